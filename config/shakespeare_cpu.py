# nanoGPT's recipe for character-level Shakespeare on a CPU. Its README gives a validation loss of
# 1.88 on the last tenth of the text; prepare_text.py keeps the last thirtieth. The text is
# data/tinyshakespeare/input.txt of github.com/karpathy/char-rnn; then:
#   python prepare_text.py input.txt --name=shakespeare --tokenizer=bytes
dataset = 'shakespeare'
n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
bos = False  # as nanoGPT, which has learned positions, too

batch_size = 12
gradient_accumulation_steps = 1
max_iters = 2000
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
beta2 = 0.99

eval_interval = 250
eval_iters = 200  # nanoGPT's run has 20, which is a noisy estimate
log_interval = 50
