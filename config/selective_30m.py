# Selective attention, arXiv 2410.02703, in an hour on one GPU of 24 GB: see config/base_30m.py. Untried.
from config.base_30m import *

out_dir = 'out/selective_30m'
selective = True
