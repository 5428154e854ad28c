# A small model for the synthetic tasks of lab/tasks.py. --dataset names another of them; block_size
# is enough for each.
dataset = 'variable_assignment'
n_layer = 2
n_head = 4
n_embd = 64
block_size = 160
rope = True

batch_size = 64
gradient_accumulation_steps = 1
max_iters = 1500
learning_rate = 2e-3
min_lr = 2e-4
warmup_iters = 100
beta2 = 0.99

eval_interval = 100
eval_iters = 10
log_interval = 100
