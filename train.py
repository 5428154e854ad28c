"""Train a GPT with standard, selective or SSA attention, on one device or on several.

    python train.py config/selective_small.py
    python train.py config/selective_small.py --batch_size=32 --out_dir=out/x
    python train.py config/selective_small.py --init_from=resume
    python train.py config/selective_small.py --eval_only
    python train.py config/finetune_gpt2_ssa.py
    python -m support.launch --nproc_per_node=8 train.py config/selective_124m.py       torchrun, with readable errors

Settings come from config files and --key=value pairs, in their order; the last one wins. Ctrl-C finishes the step
and saves. A resumed run computes exactly what an uninterrupted one does: all that is random depends on the seed and
the step alone.
"""
import contextlib
import dataclasses
import math
import os
import sys
import time
from dataclasses import dataclass

import support      # before torch, see there
import torch
from torch.nn.parallel import DistributedDataParallel

import data
import kernels
import prepare_text
from model import GPT, GPTConfig, check_config
from support import checkpoint as ckpt, devices, files, pretrained, settings
from support.settings import UserError

MODEL = [f.name for f in dataclasses.fields(GPTConfig)]


@dataclass
class TrainConfig(GPTConfig, pretrained.PretrainedConfig):
    # run
    out_dir: str = 'out/run'            # folder of ckpt.pt and log.jsonl
    init_from: str = 'scratch'          # 'scratch', 'resume' (<out_dir>/ckpt.pt), 'gpt2', 'gpt2-xl', … or a folder
    resume_changed: bool = False        # resume even where settings or data make it another run
    eval_only: bool = False             # evaluate <out_dir>/ckpt.pt or init_from, print it, and write nothing
    freeze: str = ''                    # 'base': train only what GPT-2 does not have, as SSA ['', 'base']
    seed: int = 1337                    # of the weights, the batches and dropout [0 to 2**31]
    max_iters: int = 600000             # steps in all [1 to 1e9]
    eval_interval: int = 2000           # steps between evaluations; each also saves a checkpoint [1 to 1e9]
    eval_iters: int = 200               # validation batches of an evaluation, the same ones every time [1 to 1e6]
    log_interval: int = 10              # steps between lines of progress [1 to 1e9]
    # data
    dataset: str = 'stdlib'             # data/<name>; 'stdlib', Python's standard library, is prepared where missing
    vocab_size: int = 0                 # 0: that of the data set [0 to 2**20]
    bos: bool = True                    # <|endoftext|> in front of every window, as token 0, which is never masked
    batch_size: int = 12                # sequences of a micro-step [1 to 2**20]
    gradient_accumulation_steps: int = 40   # micro-steps of a step, over all processes together [1 to 2**20]
    # optimizer
    learning_rate: float = 6e-4         # its maximum, after warmup [above 0 to 1000]
    min_lr: float = 6e-5                # at the end of the decay [0 to 1000]
    warmup_iters: int = 2000            # steps of linear warmup [0 to 1e9]
    lr_decay_iters: int = 0             # step at which the cosine ends; 0: max_iters [0 to 1e9]
    ssa_lr: float = 1.0                 # SSA's temperatures learn at this multiple of the learning rate [0 to 1e6]
    weight_decay: float = 0.1           # of matrices and embeddings [0 to 1000]
    beta1: float = 0.9                  # AdamW's memory of the gradient [0 to below 1]
    beta2: float = 0.95                 # AdamW's memory of its square [0 to below 1]
    grad_clip: float = 1.0              # largest norm of the gradient; 0: no clipping [0 to 1e6]
    # memory loss, 2410.02703 section 6
    memory_loss: float = 0.0            # its weight, epsilon; the paper's is 0.1; 0: off [0 to 1000]
    memory_tau: float = 1.0             # the F at which a token counts as wholly masked [1e-3 to 1e6]
    # machine
    kernel: str = 'auto'                # 'none': model.py's own code ['auto', 'none', 'listing', 'cpu', 'gpu']
    device: str = 'auto'                # 'cuda', 'cuda:1', 'mps', 'cpu'; 'auto': the best one there is
    dtype: str = 'auto'                 # 'auto': bfloat16 where a GPU has it ['auto', 'float32', 'bfloat16', 'float16']
    compile: bool = True                # torch.compile, where it helps: on CUDA


def check(cfg, world):
    """Raises UserError for settings that no run can have, before any work is done."""
    try:
        check_config(dataclasses.replace(cfg, vocab_size=cfg.vocab_size or 1))     # 0: known with the data
    except ValueError as e:
        raise UserError(str(e)) from None
    if cfg.init_from not in ('scratch', 'resume'):
        pretrained.check(cfg.init_from)
    for wrong, why in [
            (cfg.gradient_accumulation_steps % world, f'gradient_accumulation_steps {cfg.gradient_accumulation_steps} '
             f'cannot be shared out among {world} processes'),
            (cfg.memory_loss and not cfg.selective, 'memory_loss needs selective=True: only that masks tokens')]:
        if wrong:
            raise UserError(why)


def schedule(cfg, iter_num):
    """The learning rate as a fraction of its maximum: linear warmup, then a cosine down to min_lr."""
    if iter_num < cfg.warmup_iters:
        return (iter_num + 1) / (cfg.warmup_iters + 1)
    end, least = cfg.lr_decay_iters or cfg.max_iters, cfg.min_lr / cfg.learning_rate
    if iter_num >= end:
        return least
    ratio = (iter_num - cfg.warmup_iters) / (end - cfg.warmup_iters)
    return least + 0.5 * (1 + math.cos(math.pi * ratio)) * (1 - least)


def find_start(cfg, processes):
    """The checkpoint that the run begins with, of out_dir or of a pretrained model; None: it begins from scratch."""
    if cfg.init_from == 'resume':
        return ckpt.load(cfg.out_dir)
    if os.path.isfile(os.path.join(cfg.out_dir, 'ckpt.pt')) and not cfg.eval_only:
        raise UserError(f'{cfg.out_dir} has a checkpoint: resume it with --init_from=resume, delete the folder, or '
                        'give another --out_dir')
    if cfg.init_from != 'scratch':
        return processes.after_master(pretrained.load, cfg.init_from, cfg)      # the master downloads it


def take_settings(cfg, start):
    """Set what the checkpoint decides: for eval_only all of the model and the data, else what cannot change in a run.

    Yields a line about the settings given that it overrules, and lines about what else differs in a resumed run.
    """
    args = ckpt.model_args(start)
    if cfg.eval_only:
        fixed = {**args, 'bos': ckpt.starts_with_bos(start)}
        if start['dataset'] and cfg.dataset == TrainConfig.dataset:
            fixed['dataset'] = start['dataset']
    elif cfg.init_from == 'resume':
        fixed = {name: args[name] for name in pretrained.SHAPE if start['pretrained'] or name == 'vocab_size'}
        fixed['bos'] = ckpt.starts_with_bos(start)
    else:
        fixed = {name: args[name] for name in pretrained.SHAPE}
    overruled = [name for name, value in fixed.items() if getattr(cfg, name) not in (value, getattr(TrainConfig, name))]
    if overruled:
        yield 'as the checkpoint has it: ' + ', '.join(f'{name}={fixed[name]}' for name in overruled)
    for name, value in fixed.items():
        setattr(cfg, name, value)
    if cfg.init_from == 'resume' and not cfg.eval_only:
        if told := ckpt.check_resume(start, cfg):
            yield told
        if 'bos' not in start['config']:
            yield 'bos=False: this run began without <|endoftext|> in front of windows'


def open_data(cfg, processes, start):
    """The data set of the run; start: its checkpoint, or None. Prepares 'stdlib' where missing, off the network."""
    def opened():
        if cfg.dataset == 'stdlib' and not os.path.exists('data/stdlib/meta.json'):
            prepare_text.prepare(prepare_text.TextConfig())
        return data.load_dataset(cfg.dataset)
    dataset = processes.after_master(opened)
    cfg.vocab_size = cfg.vocab_size or dataset.vocab_size
    cfg.bos = cfg.bos and not dataset.record_len
    if start:
        ckpt.check_data(start, dataset, cfg)
    if cfg.vocab_size < dataset.vocab_size:
        raise UserError(f'vocab_size {cfg.vocab_size} is less than the {dataset.vocab_size} of data set {cfg.dataset}')
    for split in 'train', 'val':            # long enough?
        dataset.batch(split, 0, 1, cfg.block_size, bos=cfg.bos)
    return dataset


def make_model(cfg, start):
    """The model of the run on its device, with the kernel that the settings ask for, and a line about the latter."""
    args = {name: getattr(cfg, name) for name in MODEL}
    if not cfg.eval_only:
        devices.check_memory(cfg, cfg.batch_size * cfg.block_size, cfg.device)
    torch.manual_seed(cfg.seed)
    model = ckpt.build(start, **args) if start else GPT(GPTConfig(**args))
    model.to(cfg.device)
    try:
        return model, kernels.install(model, cfg.kernel, getattr(torch, cfg.dtype))
    except ValueError as e:
        raise UserError(str(e)) from None


def get_batch(cfg, dataset, split, index):
    """Batch number index on the device; those of validation are the same in every run."""
    x, y = dataset.batch(split, index, cfg.batch_size, cfg.block_size, cfg.seed if split == 'train' else 0, cfg.bos)
    if 'cuda' in cfg.device:                # pinned memory lets the copy run beside the computation
        x, y = x.pin_memory(), y.pin_memory()
    return x.to(cfg.device, non_blocking=True), y.to(cfg.device, non_blocking=True)


@torch.no_grad()
def evaluate(cfg, model, dataset, processes):
    """Figures on the validation set: val_loss, the plain cross-entropy; memory, the share of the context that selection
    needs; accuracy, where the data set asks questions: the fraction of the answers that are the likeliest token; live,
    with kernels/cpu.py: the share of attention that it computed, as the rest is provably masked."""
    model.eval()
    kernels.live_share()                    # from here on
    names = ['val_loss'] + ['memory'] * cfg.selective + ['accuracy'] * bool(dataset.record_len) + ['live']
    totals, batches = [0.0] * (len(names) - 1), range(processes.rank, cfg.eval_iters, processes.world)
    for n in batches:
        with devices.autocast(cfg.device, cfg.dtype):
            x, y = get_batch(cfg, dataset, 'val', n)
            logits, *figures = model(x, y, memory_tau=cfg.memory_tau if cfg.selective else None)
        if dataset.record_len:
            figures.append((logits.argmax(dim=-1) == y)[y >= 0].float().mean())
        totals = [total + figure.item() for total, figure in zip(totals, figures)]
    model.train()
    # a process without a batch has no live share, but adds up as many numbers as the others
    *totals, count = processes.mean(*totals, (kernels.live_share() or 0.0) * len(batches), len(batches))
    figures = {name: total / count for name, total in zip(names, totals)}
    return figures if figures['live'] else {name: figures[name] for name in names[:-1]}


def shown(figures):
    """Figures for a line of progress."""
    return ''.join(f' | validation loss {value:.4f}' if name == 'val_loss' else f' | {name} {value:.1%}'
                   for name, value in figures.items())


def check_finite(cfg, iter_num, what, value, saved_iter):
    if not math.isfinite(value):
        good = f'{cfg.out_dir}/ckpt.pt has step {saved_iter}' if saved_iter is not None else 'no checkpoint was saved'
        raise UserError(f'step {iter_num}: the {what} is not finite; {good}; try a lower learning rate')


def main():
    cfg = settings.parse(TrainConfig)
    if cfg.eval_only and cfg.init_from == 'scratch':
        cfg.init_from = 'resume'
    processes = devices.Processes()
    check(cfg, processes.world)
    with files.locked(cfg.out_dir) if processes.master and not cfg.eval_only else contextlib.nullcontext():
        train(cfg, processes)


def train(cfg, processes):
    # ---- set-up ------------------------------------------------------------------------------------------------------
    say = settings.say if processes.master else lambda *_: None
    cfg.device = processes.start(devices.pick_device(cfg.device))
    cfg.dtype, cuda = devices.pick_dtype(cfg.dtype, cfg.device), 'cuda' in cfg.device
    if cuda:
        torch.set_float32_matmul_precision('high')          # TF32

    # ---- start or resume ---------------------------------------------------------------------------------------------
    start = find_start(cfg, processes)
    for line in take_settings(cfg, start) if start else ():
        say(line)
    dataset = open_data(cfg, processes, start)
    if not dataset.meta['complete']:
        say(f'data set {cfg.dataset} is not complete: the script that prepares it has not finished')
    raw_model, kernel = make_model(cfg, start)
    if cfg.freeze:
        for name, p in raw_model.named_parameters():
            p.requires_grad_(ckpt.is_added(name))
        if not any(p.requires_grad for p in raw_model.parameters()):
            raise UserError("freeze='base' trains nothing: set ssa or vote_scale, or add parameters of yours")
    optimizer = raw_model.configure_optimizers(cfg.weight_decay, cfg.learning_rate, (cfg.beta1, cfg.beta2),
                                               torch.device(cfg.device).type, cfg.ssa_lr)
    scaler = torch.amp.GradScaler(enabled=cfg.dtype == 'float16')
    origin = start and start['pretrained']
    iter_num, val_loss, val_iter, saved_iter = 0, None, None, None
    if cfg.init_from == 'resume':
        iter_num, val_loss, val_iter = start['iter_num'], start['val_loss'], start['val_iter']
        saved_iter = iter_num
        if not cfg.eval_only:
            ckpt.load_optimizer(optimizer, scaler, raw_model, start)
    start = None                            # frees its memory

    micro_steps = cfg.gradient_accumulation_steps // processes.world
    tokens_per_step = cfg.gradient_accumulation_steps * cfg.batch_size * (dataset.window(cfg.block_size) - 1)
    attention = ' + '.join(['selective'] * cfg.selective + [f'SSA {cfg.ssa}'] * bool(cfg.ssa)) or 'standard'
    say(f'{cfg.out_dir}: {attention} attention, {raw_model.num_params() / 1e6:.2f}M parameters, {processes.world} x '
        f'{cfg.device} {cfg.dtype}; data {cfg.dataset} ({dataset.tokens("train"):,} tokens of '
        f'{dataset.tokenizer_name}); {tokens_per_step:,} tokens a step')
    say(kernel)
    if cfg.eval_only:
        say(f'step {iter_num}{shown(evaluate(cfg, raw_model, dataset, processes))}')
        processes.stop()
        return
    model = torch.compile(raw_model) if cfg.compile and cuda else raw_model
    if processes.world > 1:
        model = DistributedDataParallel(model, device_ids=[torch.cuda.current_device()] if cuda else None)
    log = ckpt.Log(cfg, iter_num) if processes.master else None

    def save():
        if processes.master:
            ckpt.save(cfg.out_dir, {
                'model': raw_model.state_dict(), 'optimizer': optimizer.state_dict(), 'scaler': scaler.state_dict(),
                'model_args': {name: getattr(cfg, name) for name in MODEL}, 'config': dataclasses.asdict(cfg),
                'iter_num': iter_num, 'val_loss': val_loss, 'val_iter': val_iter, 'pretrained': origin,
                'dataset': cfg.dataset, 'tokenizer': dataset.tokenizer_name, 'data': dataset.fingerprint()})

    # ---- loop --------------------------------------------------------------------------------------------------------
    signals = devices.catch_signals(say)
    started, eval_seconds = time.time(), 0.0
    logged_at, logged_iter = started, iter_num
    while True:
        if (iter_num % cfg.eval_interval == 0 or iter_num == cfg.max_iters) and val_iter != iter_num:
            paused = time.time()
            figures = evaluate(cfg, raw_model, dataset, processes)
            val_loss, val_iter = figures['val_loss'], iter_num
            check_finite(cfg, iter_num, 'validation loss', val_loss, saved_iter)
            say(f'step {iter_num}/{cfg.max_iters}{shown(figures)}')
            if log:
                log.write(iter=iter_num, **figures)
            save()
            saved_iter = iter_num
            eval_seconds = time.time() - paused
            logged_at += eval_seconds                       # tokens/s is that of training alone
        if iter_num == cfg.max_iters:
            break

        # one step: forward and backward of all micro-steps; gradients are synchronised at the last one only
        for group in optimizer.param_groups:
            group['lr'] = group['initial_lr'] * schedule(cfg, iter_num)
        torch.manual_seed((cfg.seed * 1_000_003 + iter_num) * 1009 + processes.rank)     # of dropout
        step_loss = step_memory = 0.0
        for micro in range(micro_steps):
            index = iter_num * cfg.gradient_accumulation_steps + micro * processes.world + processes.rank
            x, y = get_batch(cfg, dataset, 'train', index)
            if processes.world > 1:
                model.require_backward_grad_sync = micro == micro_steps - 1
            with devices.autocast(cfg.device, cfg.dtype):
                _, loss, *memory = model(x, y, memory_tau=cfg.memory_tau if cfg.memory_loss else None)
                memory = memory[0] if memory else torch.zeros(())
            step_loss += loss.detach() / micro_steps
            step_memory += memory.detach() / micro_steps
            scaler.scale((loss + cfg.memory_loss * memory) / micro_steps).backward()
        loss, memory, stop = processes.mean(step_loss, step_memory, float(bool(signals)))
        check_finite(cfg, iter_num, 'training loss', loss, saved_iter)
        if cfg.grad_clip:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        if iter_num % cfg.log_interval == 0 and processes.master:
            now, lr = time.time(), cfg.learning_rate * schedule(cfg, iter_num)
            rate = (iter_num + 1 - logged_iter) * tokens_per_step / (now - logged_at)
            left = (cfg.max_iters - iter_num - 1) * (tokens_per_step / rate + eval_seconds / cfg.eval_interval)
            figures = {'memory': memory} if cfg.memory_loss else {}
            if cuda:
                figures['mfu'] = devices.mfu(raw_model, rate / processes.world)
            say(f'step {iter_num}/{cfg.max_iters} | loss {loss:.4f} | lr {lr:.2e} | {rate:,.0f} tok/s | '
                f'{left // 60:.0f}m {left % 60:02.0f}s left{shown(figures)}')
            log.write(iter=iter_num, loss=loss, lr=lr, tokens_per_s=rate, seconds=now - started, **figures)
            logged_at, logged_iter = now, iter_num + 1
        iter_num += 1
        if stop and iter_num < cfg.max_iters:
            save()
            say(f'stopped after step {iter_num - 1}, nothing is lost; to continue, give the same command with '
                '--init_from=resume')
            sys.exit(130)

    say(f'done in {(time.time() - started) / 60:.1f} minutes; read what it learned: '
        f'python sample.py --out_dir={cfg.out_dir}')
    if processes.world > 1:
        del model                           # its reducer has threads that use the processes
    processes.stop()


if __name__ == '__main__':
    settings.run(main)
