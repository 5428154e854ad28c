# Standard attention: what the others are compared with.
from config.base_small import *

out_dir = 'out/standard_small'
