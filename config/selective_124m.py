# Selective attention, arXiv 2410.02703.
from config.base_124m import *

out_dir = 'out/selective_124m'
selective = True
