# What the 124M configs share: GPT-2's smallest shape on C4, for GPUs. Prepare the data first:
#   python prepare_c4.py --tokens=11e9
# The contexts of 2410.02703 are --block_size=512, 1024 and 2048; keep batch_size * block_size the same.
dataset = 'c4'
vocab_size = 50304          # 50257, rounded up to a multiple of 64
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
rope = True

batch_size = 16
gradient_accumulation_steps = 32    # 16 * 32 * 1024 = 524,288 tokens a step
max_iters = 20000                   # 10.5 billion tokens
learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 700

eval_interval = 1000
eval_iters = 200
log_interval = 10
