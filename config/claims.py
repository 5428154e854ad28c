# What the claims of lab/reproduce.py about text share: 4,096 tokens a step, rotary positions.
rope = True
n_layer = 2
n_head = 4
n_embd = 64
block_size = 256

batch_size = 16  # lab/reproduce.py keeps batch_size * block_size the same
gradient_accumulation_steps = 1
max_iters = 1000
learning_rate = 3e-3
min_lr = 3e-4
warmup_iters = 100
beta2 = 0.99

eval_interval = 100
eval_iters = 25
log_interval = 50
