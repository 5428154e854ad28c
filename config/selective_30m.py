# Selective attention, arXiv 2410.02703, on one GPU of 24 GB: see config/base_30m.py. No GPU has run
# it.
from config.base_30m import *

out_dir = 'out/selective_30m'
selective = True
