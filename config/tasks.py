# A small model for the synthetic tasks of lab/tasks.py. --dataset names another of them; block_size
# is enough for each.
from config.claims import *

dataset = 'variable_assignment'
block_size = 160
batch_size = 64
max_iters = 1500
learning_rate = 2e-3
min_lr = 2e-4
eval_iters = 10
log_interval = 100
