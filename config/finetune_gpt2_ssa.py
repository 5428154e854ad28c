# SSA put into GPT-2. The fresh layers leave the loss almost as it was, then all weights train.
from config.base_finetune_gpt2 import *

out_dir = 'out/finetune_gpt2_ssa'
ssa = 'qv'
# freeze = 'base'; learning_rate = 3e-3     # train the new parameters only
