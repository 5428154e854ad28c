# Selective attention, arXiv 2410.02703. The first config to try.
from config.base_small import *

out_dir = 'out/selective_small'
selective = True
