# Selective attention put into GPT-2. The votes are scaled by a factor that starts at 0, so that
# training opens them.
from config.base_finetune_gpt2 import *

out_dir = 'out/finetune_gpt2_selective'
selective = True
# False: at full strength at once; hurts at first, masks more (results/finetune_toy.md)
vote_scale = True
