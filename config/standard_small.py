# Standard attention: what the others are compared with.
from config.small import *

out_dir = 'out/standard_small'
