# What the 124M configs share: GPT-2's smallest shape on C4, for GPUs. Prepare the data first:
#   python prepare_c4.py --tokens=11e9
#   python train.py config/base_124m.py --out_dir=out/standard_124m
#   python train.py config/base_124m.py --ssa=qv --out_dir=out/ssa_124m
# The contexts of 2410.02703 are --block_size=512, 1024 and 2048; keep batch_size * block_size the
# same.
#
# Of that paper's recipe, as public re-implementations report it, this has the normalised queries
# and keys, AdamW's betas, the learning rate, its warmup and cosine, and <|endoftext|> in front of
# every window. What differs: rotary positions are our choice; LayerNorm and GELU, not RMSNorm and
# SwiGLU; GPT-2's 50,257 tokens, not 8,000 (--tokenizer=gpt2:8000 is near it); 524,288 tokens a step
# for 20,000 steps, not 131,072 for 524,288. Nobody has run it yet. If the loss diverges,
# --learning_rate=6e-4 --beta2=0.95 is GPT-2's way.
dataset = 'c4'
vocab_size = 50304  # 50257, rounded up to a multiple of 64
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
rope = True
qk_norm = True

batch_size = 16
gradient_accumulation_steps = 32  # 16 * 32 * 1024 = 524,288 tokens a step
max_iters = 20000  # 10.5 billion tokens
learning_rate = 5e-3
min_lr = 0.0
warmup_iters = 1000
beta2 = 0.999

eval_interval = 1000
eval_iters = 200
log_interval = 10
