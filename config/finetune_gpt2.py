# Fine-tuning GPT-2 (124M) on C4, one GPU. Prepare the data first:
#   python prepare_c4.py --tokens=100e6
# Without more, standard attention trains on: what these are compared with, each with an --out_dir:
#   --ssa=qv                        SSA; the loss is almost as before, then all weights train
#   --selective --vote_scale        votes with a factor from 0, so that training opens them
#   --selective                     at full strength at once: it hurts at first, and masks more
# With --freeze=base --learning_rate=3e-3 only the new parameters train (results/finetune_toy.md).
out_dir = 'out/finetune_gpt2'
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
