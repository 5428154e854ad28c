# Selective attention with the memory loss, for pruning harder.
from config.base_small import *

out_dir = 'out/selective_small_mem'
selective = True
memory_loss = 0.1
