# What the small configs share: about four minutes on two CPU cores.
# The sources of Python's standard library, in bytes; or --dataset=c4 after prepare_c4.py.
dataset = 'stdlib'
n_layer = 4
n_head = 4
n_embd = 128
block_size = 256
rope = True
qk_norm = True  # as 2410.02703's models; on this data every kind of attention is better with it

batch_size = 16
gradient_accumulation_steps = 1
max_iters = 1200
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
beta2 = 0.99  # few tokens a step, so look further back

eval_interval = 200
eval_iters = 20
log_interval = 20
