# For real text in word pieces: twice the channels.
from config.claims import *

n_embd = 128
max_iters = 1500
warmup_iters = 150
eval_interval = 250
