# SSA, arXiv 2411.12892: temperatures on queries and values.
from config.base_small import *

out_dir = 'out/ssa_small'
ssa = 'qv'
