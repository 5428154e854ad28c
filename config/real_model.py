# A language model goes on with another text: python -m lab.reproduce retrofit finetune

init_from = 'HuggingFaceTB/SmolLM2-135M'
block_size = 512
batch_size = 1
gradient_accumulation_steps = 1

learning_rate = 5e-5
min_lr = 5e-6

eval_interval = 100
eval_iters = 8
