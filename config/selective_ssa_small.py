# Both: SSA scales, selection reads the scaled logits of head 0.
from config.base_small import *

out_dir = 'out/selective_ssa_small'
selective = True
ssa = 'qv'
