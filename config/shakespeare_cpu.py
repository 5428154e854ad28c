# nanoGPT's recipe for character-level Shakespeare on a CPU, which it publishes a validation loss of 1.88 for; about a
# minute. The data: python prepare_text.py tinyshakespeare.txt --name=shakespeare --tokenizer=bytes
dataset = 'shakespeare'
n_layer = 4
n_head = 4
n_embd = 128
block_size = 64

batch_size = 12
gradient_accumulation_steps = 1
max_iters = 2000
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
beta2 = 0.99

eval_interval = 250
eval_iters = 200            # nanoGPT's run has 20, which is a noisy estimate
log_interval = 50
