# What the 30M configs share: the smallest shape of 2410.02703, 8 layers and 8 heads of 64, for one
# GPU of 24 GB. Prepare the data first:
#   python prepare_c4.py --tokens=600e6 --tokenizer=gpt2:8000 --name=c4_8000
#   python train.py config/base_30m.py --out_dir=out/standard_30m
#   python train.py config/base_30m.py --selective --out_dir=out/selective_30m
#   python -m lab.reproduce headline --config=config/base_30m.py --dataset=c4_8000 \
#       --contexts=512,1024,2048 --steps=4000 --device=cuda --workers=1 --seeds=1
# No GPU has run it. 29M parameters and 0.5 billion tokens should take about an hour. The recipe is
# that of config/base_124m.py, which says what differs from the paper's.
from config.base_124m import *

dataset = 'c4_8000'
vocab_size = 0  # that of the data set
n_layer = 8
n_head = 8
n_embd = 512
block_size = 512

batch_size = 64
gradient_accumulation_steps = 4  # 64 * 4 * 512 = 131,072 tokens a step, as the paper's
max_iters = 4000  # 0.5 billion tokens; theirs are 69 billion
warmup_iters = 400

eval_interval = 500
eval_iters = 50
