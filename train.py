"""Train a GPT with standard, selective or SSA attention, on one device or on several.

    python train.py config/selective_small.py
    python train.py config/selective_small.py --batch_size=32 --out_dir=out/x
    python train.py config/selective_small.py --init_from=resume
    python train.py config/selective_small.py --eval_only
    python train.py config/finetune_gpt2.py --ssa=qv
    torchrun --standalone --nproc_per_node=8 train.py config/selective_124m.py

Settings come from config files and --key=value pairs, in order; the last one wins. Ctrl-C
finishes the step and saves. Randomness depends only on the seed and the step. So on a CPU, with
the same number of threads, a resumed run computes exactly what an uninterrupted one does; on a GPU
the order of some sums varies, which may change the last bits.
"""

import collections
import dataclasses
import json
import math
import os
import sys
import time
from dataclasses import dataclass

from support import settings  # before torch, see support/__init__.py

import torch
from torch.nn.parallel import DistributedDataParallel

import data
import kernels
import prepare_text
from model import GPT, GPTConfig, is_gpt2
from support import checkpoint as ckpt
from support import devices, files, pretrained
from support.settings import UserError, option


@dataclass
class TrainConfig(GPTConfig):
    # run
    out_dir: str = option('out/run', 'folder of ckpt.pt and log.jsonl')
    init_from: str = option('scratch', "'scratch', 'resume', a folder, or a model on the hub")
    resume_changed: bool = option(False, 'resume even if settings have changed')
    eval_only: bool = option(False, 'evaluate ckpt.pt or init_from, print it, and write nothing')
    freeze: str = option('', "'base': train only what GPT-2 does not have", choices=('', 'base'))
    seed: int = option(1337, 'seed of weights, batches and dropout')
    max_iters: int = option(600000, 'steps in all', low=1)
    eval_interval: int = option(2000, 'steps between evaluations, which save', low=1)
    eval_iters: int = option(200, 'batches per evaluation, at least one per process', low=1)
    log_interval: int = option(10, 'steps between lines of progress', low=1)
    # data
    dataset: str = option('stdlib', "data/<name>; 'stdlib' is prepared where it is missing")
    vocab_size: int = option(0, 'rows of the embedding; at least the tokens of the data set')
    bos: bool = option(True, '<|endoftext|> in front of every window, never masked')
    batch_size: int = option(12, 'sequences of a micro-step', low=1)
    gradient_accumulation_steps: int = option(
        40, 'micro-steps of a step, over all processes together', low=1
    )
    # optimizer
    learning_rate: float = option(6e-4, 'maximum learning rate, after warmup', low=1e-12)
    min_lr: float = option(6e-5, 'learning rate at the end of the decay')
    warmup_iters: int = option(2000, 'steps of linear warmup')
    lr_decay_iters: int = option(0, 'step that ends the cosine; 0: max_iters')
    ssa_lr: float = option(1.0, "learning-rate factor of SSA's temperatures, voters and vote_scale")
    weight_decay: float = option(0.1, 'weight decay of matrices and embeddings')
    beta1: float = option(0.9, "AdamW's decay rate of the mean gradient", high=0.999999)
    beta2: float = option(0.95, "AdamW's decay rate of the mean square", high=0.999999)
    grad_clip: float = option(1.0, 'maximum norm of the gradient; 0: no clipping')
    # memory loss, 2410.02703 section 6
    memory_loss: float = option(0.0, 'weight of the memory loss, 0.1 in the paper, 1 for a voter')
    memory_tau: float = option(1.0, 'F at which a token counts as masked', low=1e-3)
    # machine
    kernel: str = option('auto', "'none': model.py's own code", choices=tuple(kernels.KERNELS))
    device: str = option('auto', "'cuda', 'cuda:1', 'mps', 'cpu'; 'auto': the best one there is")
    dtype: str = option('auto', "'auto': bfloat16 where a GPU has it", choices=devices.DTYPES)
    compile: bool = option(True, 'torch.compile, where it helps: on CUDA')


def check(cfg, world):
    """Raise UserError for settings that no run can have, before any work is done."""
    if cfg.gradient_accumulation_steps % world:
        raise UserError(f'gradient_accumulation_steps: {world} processes cannot share them evenly')
    if cfg.memory_loss and not cfg.selective:
        raise UserError('memory_loss needs selective=True, which masks tokens')
    if cfg.voter and not (cfg.memory_loss or cfg.eval_only):
        raise UserError('voter learns by the memory loss alone: add --memory_loss=1')


def schedule(cfg, iter_num):
    """The learning rate as a fraction of its maximum: linear warmup, then a cosine to min_lr."""
    if iter_num < cfg.warmup_iters:
        return (iter_num + 1) / (cfg.warmup_iters + 1)
    end = cfg.lr_decay_iters or cfg.max_iters
    least = cfg.min_lr / cfg.learning_rate
    if iter_num >= end:
        return least
    ratio = (iter_num - cfg.warmup_iters) / (end - cfg.warmup_iters)
    return least + 0.5 * (1 + math.cos(math.pi * ratio)) * (1 - least)


# ---- What a run begins with ----------------------------------------------------------------------


def find_start(cfg, processes):
    """The checkpoint that the run starts from, or the default values of a run from scratch.

    Sets what the checkpoint determines: the whole model if resumed, else its shape.
    """
    resumed = cfg.init_from == 'resume'
    if os.path.isfile(f'{cfg.out_dir}/ckpt.pt') and not resumed and not cfg.eval_only:
        raise UserError(
            f'{cfg.out_dir} has a checkpoint: resume it with --init_from=resume, delete the '
            'folder, or give another --out_dir'
        )
    if cfg.init_from == 'scratch':
        return dict(ckpt.ABSENT)
    if resumed:
        start = ckpt.load(cfg.out_dir)
        fixed = {**start['model_args'], 'bos': ckpt.starts_with_bos(start)}
    else:
        start = processes.after_master(pretrained.load, cfg.init_from)  # the master downloads it
        fixed = {name: start['model_args'][name] for name in pretrained.SHAPE}
    if cfg.eval_only and cfg.dataset == TrainConfig.dataset and start['dataset']:
        fixed['dataset'] = start['dataset']
    for name, value in fixed.items():
        if getattr(cfg, name) != value:
            processes.say(f'as the checkpoint has it: {name}={value}')
            setattr(cfg, name, value)
    if resumed and not cfg.eval_only:
        ckpt.check_resume(start, cfg)
    return start


def open_data(cfg, processes, start):
    """The data set of the run, which must have the tokenizer of its checkpoint."""
    processes.after_master(prepare_text.provide, cfg.dataset)
    dataset = data.load_dataset(cfg.dataset, tokenizer=start.get('tokenizer'))
    cfg.vocab_size = max(cfg.vocab_size, dataset.vocab_size)
    if dataset.record_len:
        cfg.bos = False
    for split in 'train', 'val':  # long enough?
        dataset.batch(split, 0, 1, cfg.block_size, bos=cfg.bos)
    return dataset


def make_model(cfg, start, say):
    """The model of the run on its device, with the kernel that the settings ask for."""
    torch.manual_seed(cfg.seed)
    args = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(GPTConfig)}
    try:
        if cfg.init_from == 'scratch':
            model = GPT(GPTConfig(**args))
        else:
            model = ckpt.build(start, add_new=cfg.init_from != 'resume', **args)
        model.to(cfg.device)
        say(kernels.install(model, cfg.kernel, getattr(torch, cfg.dtype)))
    except ValueError as e:
        raise UserError(str(e)) from None
    if cfg.freeze:
        for name, p in model.named_parameters():
            p.requires_grad_(not is_gpt2(name))
        if not any(p.requires_grad for p in model.parameters()):
            raise UserError("freeze='base' trains nothing: set ssa, voter or vote_scale")
    return model


# ---- Batches and evaluation ----------------------------------------------------------------------


def forward(cfg, model, dataset, split, index, seed, with_memory):
    """The targets (B, T) of batch number index, then what the model returns for it.

    with_memory: whether that includes the memory requirement.
    """
    batch = torch.stack(dataset.batch(split, index, cfg.batch_size, cfg.block_size, seed, cfg.bos))
    if 'cuda' in cfg.device:  # pinned memory lets the copy run beside the computation
        batch = batch.pin_memory()
    x, y = batch.to(cfg.device, non_blocking=True)
    tau = cfg.memory_tau if with_memory else None
    with devices.autocast(cfg.device, cfg.dtype):
        return y, *model(x, y, memory_tau=tau)


@torch.no_grad()
def evaluate(cfg, model, dataset, processes):
    """Figures on the validation set, by name; all processes take part.

    val_loss is the plain cross-entropy. memory is the share of the context that selection needs,
    or the foresight_loss of voters. accuracy, where the data set asks questions, is the fraction of
    the answers that are the likeliest token. live is the share of attention that kernels/cpu.py
    computed, where it ran.
    """
    model.eval()
    kernels.live_share()  # from here on
    sums = collections.Counter()
    batches = range(processes.rank, max(cfg.eval_iters, processes.world), processes.world)
    for n in batches:
        # the seed is 0, so that batches are the same in every run
        y, logits, loss, *memory = forward(cfg, model, dataset, 'val', n, 0, cfg.selective)
        sums['val_loss'] += loss.item()
        if cfg.selective:
            sums['memory'] += memory[0].item()
        if dataset.record_len:
            right = (logits.argmax(dim=-1) == y)[y >= 0]
            sums['accuracy'] += right.float().mean().item()
    if live := kernels.live_share():
        sums['live'] = live * len(batches)
    model.train()
    *means, count = processes.mean(*sums.values(), len(batches))
    return {name: mean / count for name, mean in zip(sums, means)}


def shown(figures):
    """Figures for a line of progress."""
    return ''.join(f' | {name} {value:.5g}' for name, value in figures.items())


# ---- Training ------------------------------------------------------------------------------------


def main():
    cfg = settings.parse(TrainConfig)
    if cfg.eval_only and cfg.init_from == 'scratch':
        cfg.init_from = 'resume'
    processes = devices.Processes()
    if processes.master and not cfg.eval_only:
        with files.locked(cfg.out_dir):  # one run at a time
            train(cfg, processes)
    else:
        train(cfg, processes)


def train(cfg, processes):
    """Set up a run, then train, or only evaluate."""
    say = processes.say
    cfg.device = processes.start(devices.pick_device(cfg.device))
    cfg.dtype = devices.pick_dtype(cfg.dtype, cfg.device)
    if 'cuda' in cfg.device:
        torch.set_float32_matmul_precision('high')  # TF32

    # the checkpoint that the run begins with, if any, its data, its model and its optimizers
    start = find_start(cfg, processes)
    check(cfg, processes.world)
    dataset = open_data(cfg, processes, start)
    model = make_model(cfg, start, say)
    say(
        f'{model.num_params() / 1e6:.2f}M parameters on {cfg.device} in {cfg.dtype}; '
        f'data {cfg.dataset} ({data.label(dataset.tokenizer_name)})'
    )
    if cfg.eval_only:
        say(f'step {start["iter_num"]}{shown(evaluate(cfg, model, dataset, processes))}')
        processes.stop()
        return
    device_type = torch.device(cfg.device).type
    optimizers = model.configure_optimizers(
        cfg.weight_decay, cfg.learning_rate, (cfg.beta1, cfg.beta2), device_type, cfg.ssa_lr
    )
    scaler = torch.amp.GradScaler(device_type, enabled=cfg.dtype == 'float16')
    if cfg.init_from == 'resume':
        ckpt.load_optimizers(optimizers, scaler, model, start)
    progress = {name: start[name] for name in ckpt.ABSENT}
    del start  # frees its memory

    done = loop(cfg, processes, dataset, model, optimizers, scaler, progress)
    processes.stop()  # the others wait for the master, which may still be saving
    if not done:
        say('stopped, nothing is lost; to continue, add --init_from=resume to the command')
        sys.exit(130)
    say(f'done; read what it learned: python sample.py --out_dir={cfg.out_dir}')


def loop(cfg, processes, dataset, raw_model, optimizers, scaler, progress):
    """Train until max_iters, or until a signal comes. Returns whether it came to max_iters."""
    model = raw_model
    if cfg.compile and 'cuda' in cfg.device:
        model = torch.compile(model)
    if processes.world > 1:
        model = DistributedDataParallel(model)
    iter_num = progress['iter_num']
    log = ckpt.open_log(cfg, iter_num) if processes.master else None

    def report(figures):
        for name, value in figures.items():
            if not math.isfinite(value):
                raise UserError(
                    f'step {iter_num}: {name} is not finite; what was saved before is kept; '
                    'try a lower learning rate'
                )
        processes.say(f'step {iter_num}/{cfg.max_iters}{shown(figures)}')
        if log:
            log.write(json.dumps({'iter': iter_num, **figures}) + '\n')

    signals = devices.catch_signals(processes.say)
    tokens = cfg.gradient_accumulation_steps * cfg.batch_size * (dataset.window(cfg.block_size) - 1)
    since = time.time()  # tokens/s counts from the last line of the log
    steps = 0
    stop = False
    while True:
        # once in a while: evaluate, all processes take part
        done = iter_num >= cfg.max_iters
        due = done or iter_num % cfg.eval_interval == 0
        if due:
            figures = evaluate(cfg, raw_model, dataset, processes)
            report(figures)
            progress['val_loss'] = figures['val_loss']

        # save then, and when a signal stops the run
        if processes.master and (due or stop):
            state = {
                **progress,
                'iter_num': iter_num,
                'model': raw_model.state_dict(),
                'optimizer': ckpt.optimizer_state(optimizers, raw_model),
                'scaler': scaler.state_dict(),
                'model_args': vars(raw_model.config),
                'config': vars(cfg),
                'dataset': cfg.dataset,
                'tokenizer': dataset.tokenizer_name,
            }
            ckpt.save(cfg.out_dir, state)
        if done or stop:
            return done
        if due:
            since = time.time()
            steps = 0

        # one step of training
        scale = schedule(cfg, iter_num)
        loss, memory = step(cfg, processes, dataset, model, optimizers, scaler, iter_num, scale)
        steps += 1

        # once in a while: report the loss and check all processes for signals; waits for the GPU
        stop = signals and processes.world == 1
        if iter_num % cfg.log_interval == 0:
            loss, memory, stop = processes.mean(loss, memory, bool(signals))
            seconds = (time.time() - since) / steps
            since = time.time()
            steps = 0
            figures = {
                'loss': loss,
                'lr': cfg.learning_rate * scale,
                'tokens_per_s': tokens / seconds,
                'minutes_left': (cfg.max_iters - iter_num) * seconds / 60,
            }
            if cfg.memory_loss:
                figures['memory'] = memory
            report(figures)
        iter_num += 1


def step(cfg, processes, dataset, model, optimizers, scaler, iter_num, scale):
    """One step of training, at a learning rate of scale times its maximum.

    Returns the training loss and the memory requirement of this process, as tensors, because a
    number would have to wait for the GPU.
    """
    # the learning rate of every group
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['lr'] = group.setdefault('initial_lr', group['lr']) * scale

    # forward and backward of all micro-steps; every process has batches of its own
    torch.manual_seed((cfg.seed * 1_000_003 + iter_num) * 1009 + processes.rank)  # of dropout
    micro_steps = cfg.gradient_accumulation_steps // processes.world
    mean_loss = mean_memory = 0.0
    for micro in range(micro_steps):
        index = (iter_num * micro_steps + micro) * processes.world + processes.rank
        if processes.world > 1:  # gradients are synchronised in the last one only
            model.require_backward_grad_sync = micro == micro_steps - 1
        _, _, loss, *memory = forward(
            cfg, model, dataset, 'train', index, cfg.seed, cfg.memory_loss
        )
        mean_loss += loss.detach() / micro_steps
        if cfg.memory_loss:
            mean_memory += memory[0].detach() / micro_steps
            loss = loss + cfg.memory_loss * memory[0]
        scaler.scale(loss / micro_steps).backward()

    # clip the gradient, then move the weights
    if cfg.grad_clip:
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
    for optimizer in optimizers:
        scaler.step(optimizer)
        optimizer.zero_grad()
    scaler.update()
    return mean_loss, mean_memory


if __name__ == '__main__':
    settings.run(main)
