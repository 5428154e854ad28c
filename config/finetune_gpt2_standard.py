# Standard attention trained on: what the others are compared with.
from config.base_finetune_gpt2 import *

out_dir = 'out/finetune_gpt2_standard'
