# What the fine-tuning runs share: GPT-2 (124M) on C4, one GPU. Prepare the data first:
#   python prepare_c4.py --tokens=100e6
init_from = 'gpt2'
dataset = 'c4'
block_size = 1024

batch_size = 8
gradient_accumulation_steps = 16  # 131,072 tokens a step
max_iters = 600
learning_rate = 3e-5  # a twentieth of pre-training's, as the weights are trained
min_lr = 3e-6
warmup_iters = 50

eval_interval = 100
eval_iters = 100
