# SSA, arXiv 2411.12892.
from config.base_124m import *

out_dir = 'out/ssa_124m'
ssa = 'qv'
