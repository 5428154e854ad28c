# Standard attention at GPT-2's smallest shape.
from config.base_124m import *

out_dir = 'out/standard_124m'
