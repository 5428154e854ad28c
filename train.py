"""Train a GPT with standard, selective or SSA attention, on one device or on several.

    python train.py config/selective_small.py
    python train.py config/selective_small.py --batch_size=32 --out_dir=out/x
    python train.py config/selective_small.py --init_from=resume
    python train.py config/finetune_gpt2_ssa.py
    torchrun --standalone --nproc_per_node=8 train.py config/selective_124m.py

Settings come from config files and --key=value pairs, in their order; the last one wins. Ctrl-C finishes the step
and saves; a resumed run goes on exactly, as whatever is random depends on the seed and the step alone.
"""
import dataclasses
import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from support import checkpoint as ckpt
import data
import kernels
from support import pretrained
from support import settings
from model import GPT, GPTConfig, check_config
from support.settings import UserError


@dataclass
class TrainConfig(GPTConfig, pretrained.Settings):
    # run
    out_dir: str = 'out/run'            # folder of ckpt.pt and log.jsonl
    init_from: str = 'scratch'          # 'scratch', 'resume' (<out_dir>/ckpt.pt), 'gpt2', 'gpt2-xl', … or a folder
    freeze: str = ''                    # 'base': train only what SSA and vote_scale add to the model; '': everything
    seed: int = 1337                    # of the weights, the batches and dropout
    max_iters: int = 600000             # steps in all
    eval_interval: int = 2000           # steps between evaluations; each also saves a checkpoint
    eval_iters: int = 200               # validation batches of an evaluation, the same ones every time
    log_interval: int = 10              # steps between lines of progress
    # data
    dataset: str = 'auto'               # data/<name>; 'auto': C4, or Python's standard library where C4 is out of reach
    vocab_size: int = 0                 # 0: that of the data set
    batch_size: int = 12                # sequences of a micro-step
    gradient_accumulation_steps: int = 40   # micro-steps of a step, over all processes together
    # optimizer
    learning_rate: float = 6e-4         # its maximum, after warmup
    min_lr: float = 6e-5                # at the end of the decay
    warmup_iters: int = 2000            # steps of linear warmup
    lr_decay_iters: int = 0             # step at which the cosine ends; 0: max_iters
    weight_decay: float = 0.1           # of matrices and embeddings
    beta1: float = 0.9                  # AdamW's memory of the gradient
    beta2: float = 0.95                 # AdamW's memory of its square
    grad_clip: float = 1.0              # largest norm of the gradient; 0: no clipping
    # memory loss, 2410.02703 section 6
    memory_loss: float = 0.0            # its weight, epsilon; the paper's is 0.1; 0: off
    memory_tau: float = 1.0             # the F at which a token counts as wholly masked
    # machine
    device: str = 'auto'                # 'cuda', 'cuda:1', 'mps', 'cpu'; 'auto': the best one there is
    dtype: str = 'auto'                 # 'float32', 'bfloat16', 'float16'; 'auto': bfloat16 where a GPU has it
    compile: bool = True                # torch.compile, where it helps: on CUDA


def check(cfg, world):
    """Raises UserError for settings that no run can have, before any work is done."""
    try:
        check_config(dataclasses.replace(cfg, vocab_size=cfg.vocab_size or 1))     # 0: known with the data
    except ValueError as e:
        raise UserError(str(e)) from None
    for name in ('max_iters', 'eval_interval', 'eval_iters', 'log_interval', 'batch_size',
                 'gradient_accumulation_steps'):
        if getattr(cfg, name) < 1:
            raise UserError(f'{name} is {getattr(cfg, name)}; it must be at least 1')
    if cfg.init_from not in ('scratch', 'resume'):
        pretrained.check(cfg.init_from)
    if cfg.freeze not in ('', 'base'):
        raise UserError(f"freeze {cfg.freeze!r}: it is 'base' or ''")
    if cfg.freeze and not (cfg.ssa or cfg.vote_scale):
        raise UserError("freeze='base' leaves nothing to train: set ssa or vote_scale")
    if cfg.gradient_accumulation_steps % world:
        raise UserError(f'gradient_accumulation_steps {cfg.gradient_accumulation_steps} cannot be shared out '
                        f'among {world} processes')
    if cfg.memory_loss and not cfg.selective:
        raise UserError('memory_loss needs selective=True: standard attention has nothing to forget with')
    if cfg.memory_tau <= 0:
        raise UserError(f'memory_tau is {cfg.memory_tau}; it must be above 0')


def learning_rate(cfg, iter_num):
    """Linear warmup, then a cosine down to min_lr."""
    if iter_num < cfg.warmup_iters:
        return cfg.learning_rate * (iter_num + 1) / (cfg.warmup_iters + 1)
    end = cfg.lr_decay_iters or cfg.max_iters
    if iter_num >= end:
        return cfg.min_lr
    ratio = (iter_num - cfg.warmup_iters) / (end - cfg.warmup_iters)
    return cfg.min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * (cfg.learning_rate - cfg.min_lr)


def main():
    cfg = settings.parse(TrainConfig)
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    master = rank == 0
    say = print if master else lambda *args, **kwargs: None
    check(cfg, world)
    cfg.device = ckpt.pick_device(cfg.device)
    if cfg.init_from != 'resume' and os.path.isfile(os.path.join(cfg.out_dir, 'ckpt.pt')):
        raise UserError(f'{cfg.out_dir} has a checkpoint: go on with it by --init_from=resume, delete the folder, or '
                        'give another --out_dir')
    if world > 1:
        if cfg.device == 'cuda':
            cfg.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(cfg.device)
        dist.init_process_group('nccl' if 'cuda' in cfg.device else 'gloo',
                                timeout=timedelta(hours=2))     # the first one may have much to download
    cuda = 'cuda' in cfg.device
    cfg.dtype = ckpt.pick_dtype(cfg.dtype, cfg.device)
    if cuda:
        torch.set_float32_matmul_precision('high')          # TF32

    # data, model, optimizer
    saved, base = ckpt.load(cfg.out_dir, 'cpu') if cfg.init_from == 'resume' else None, None
    if cfg.init_from not in ('scratch', 'resume'):
        if not master:
            dist.barrier()                  # until the master has downloaded it
        base = pretrained.load(cfg.init_from, cfg)
        if master and world > 1:
            dist.barrier()
    origin = (base or saved or {}).get('pretrained')
    if origin:                              # the settings for its shape have no say
        for name in pretrained.SHAPE:
            setattr(cfg, name, (base or saved)['model_args'][name])
    if cfg.dataset == 'auto':
        name = [saved['dataset'] if saved else data.auto_dataset() if master else None]
        if world > 1:
            dist.broadcast_object_list(name)
        cfg.dataset = name[0]
    dataset = data.load_dataset(cfg.dataset)
    cfg.vocab_size = cfg.vocab_size or dataset.vocab_size
    if cfg.vocab_size < dataset.vocab_size:
        raise UserError(f'vocab_size {cfg.vocab_size} is less than the {dataset.vocab_size} of data set {cfg.dataset}')
    dataset.batch('train', 0, 1, cfg.block_size), dataset.batch('val', 0, 1, cfg.block_size)   # long enough?
    torch.manual_seed(cfg.seed)
    model_args = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(GPTConfig)}
    if saved:
        for key, value in saved['model_args'].items():
            if key not in ('dropout', 'kernel') and value != model_args.get(key):
                raise UserError(f"{cfg.out_dir}/ckpt.pt has {key}={value!r}, this run {model_args.get(key)!r}: "
                                'a run is resumed with the model it had')
        if saved['config'].get('freeze', '') != cfg.freeze:
            raise UserError(f'{cfg.out_dir}/ckpt.pt was trained with another freeze than {cfg.freeze!r}')
    model = (ckpt.build(saved, dropout=cfg.dropout, kernel=cfg.kernel) if saved else
             ckpt.build(base, **model_args) if base else GPT(GPTConfig(**model_args)))
    base = None                             # its memory
    model.to(cfg.device)
    if cfg.kernel == 'triton' and cfg.selective:
        try:
            kernels.pick(torch.empty(1, 1, 1, cfg.n_embd // cfg.n_head, device=cfg.device,
                                     dtype=getattr(torch, cfg.dtype)), cfg.dropout, 'triton')
        except ValueError as e:
            raise UserError(str(e)) from None
    if cfg.freeze:
        for name, p in model.named_parameters():
            p.requires_grad_(ckpt.is_added(name))
    optimizer = model.configure_optimizers(cfg.weight_decay, cfg.learning_rate, (cfg.beta1, cfg.beta2),
                                           torch.device(cfg.device).type)
    scaler = torch.amp.GradScaler(enabled=cfg.dtype == 'float16')
    iter_num, val_loss, val_iter = 0, None, None
    if saved:
        optimizer.load_state_dict(saved['optimizer'])
        for group, decay in zip(optimizer.param_groups, (cfg.weight_decay, 0.0)):     # settings may be changed
            group.update(weight_decay=decay, betas=(cfg.beta1, cfg.beta2))
        scaler.load_state_dict(saved['scaler'])
        iter_num, val_loss, val_iter = saved['iter_num'], saved['val_loss'], saved['val_iter']
        if iter_num >= cfg.max_iters:
            raise UserError(f'{cfg.out_dir} is done: {iter_num} of {cfg.max_iters} steps; a larger --max_iters goes on')
        saved = None                        # its memory
    raw_model = model
    if cfg.compile and cuda:
        model = torch.compile(model)
    if world > 1:
        model = DistributedDataParallel(model, device_ids=[torch.cuda.current_device()] if cuda else None)

    micro_steps = cfg.gradient_accumulation_steps // world
    tokens_per_step = cfg.gradient_accumulation_steps * cfg.batch_size * (dataset.window(cfg.block_size) - 1)
    log = None
    if master:
        os.makedirs(cfg.out_dir, exist_ok=True)
        log = ckpt.Log(cfg, iter_num)
    attention = ' + '.join(['selective'] * cfg.selective + [f'SSA {cfg.ssa}'] * bool(cfg.ssa)) or 'standard'
    say(f'{cfg.out_dir}: {attention} attention, {raw_model.num_params() / 1e6:.2f}M parameters, {world} x {cfg.device} '
        f'{cfg.dtype}; data {cfg.dataset} ({dataset.tokens("train"):,} tokens of {dataset.tokenizer_name}); '
        f'{tokens_per_step:,} tokens a step', flush=True)

    def batch(split, index):
        x, y = dataset.batch(split, index, cfg.batch_size, cfg.block_size, cfg.seed if split == 'train' else 0)
        if cuda:                            # pinned memory lets the copy run beside the computation
            x, y = x.pin_memory(), y.pin_memory()
        return x.to(cfg.device, non_blocking=True), y.to(cfg.device, non_blocking=True)

    def mean(*values):
        """Means over all processes."""
        values = torch.tensor(values, dtype=torch.float64 if cfg.device != 'mps' else torch.float32, device=cfg.device)
        if world > 1:
            dist.all_reduce(values)
        return (values / world).tolist()

    @torch.no_grad()
    def evaluate():
        """On the validation set: val_loss, the plain cross-entropy; memory, what a selective model needs of it;
        accuracy, where the data set asks questions: the fraction of the answers that are the likeliest token."""
        model.eval()
        names = ['val_loss'] + ['memory'] * cfg.selective + ['accuracy'] * bool(dataset.record_len)
        totals, batches = [0.0] * len(names), range(rank, cfg.eval_iters, world)
        for n in batches:
            with ckpt.autocast(cfg.device, cfg.dtype):
                x, y = batch('val', n)
                logits, *figures = raw_model(x, y, memory_tau=cfg.memory_tau if cfg.selective else None)
            if dataset.record_len:
                figures.append((logits.argmax(dim=-1) == y)[y >= 0].float().mean())
            totals = [total + figure.item() for total, figure in zip(totals, figures)]
        model.train()
        *totals, count = mean(*totals, len(batches))
        return {name: total / count for name, total in zip(names, totals)}

    def save():
        if master:
            ckpt.save(cfg.out_dir, {
                'model': raw_model.state_dict(), 'optimizer': optimizer.state_dict(), 'scaler': scaler.state_dict(),
                'model_args': model_args, 'config': dataclasses.asdict(cfg), 'iter_num': iter_num,
                'val_loss': val_loss, 'val_iter': val_iter, 'pretrained': origin, 'dataset': cfg.dataset,
                'tokenizer': dataset.tokenizer_name})

    def not_finite(what):
        good = f'{cfg.out_dir}/ckpt.pt has step {saved_iter}' if saved_iter is not None else 'no checkpoint was saved'
        raise UserError(f'step {iter_num}: {what} is not finite; {good}; try a lower learning rate')

    signals = []                            # Ctrl-C or SIGTERM: finish the step, save, stop; a second one stops at once
    def on_signal(number, _):
        if signals:
            raise KeyboardInterrupt
        signals.append(number)
        say('\nfinishing the step …', flush=True)
    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)

    started, eval_seconds = time.time(), 0.0
    logged_at, logged_iter = started, iter_num
    saved_iter = iter_num if iter_num else None
    while True:
        if (iter_num % cfg.eval_interval == 0 or iter_num == cfg.max_iters) and val_iter != iter_num:
            paused = time.time()
            figures = evaluate()
            val_loss, val_iter = figures.pop('val_loss'), iter_num
            if not math.isfinite(val_loss):
                not_finite('the validation loss')
            say(f'step {iter_num}/{cfg.max_iters} | validation loss {val_loss:.4f}'
                + ''.join(f' | {name} {value:.1%}' for name, value in figures.items()), flush=True)
            if master:
                log.write(iter=iter_num, val_loss=val_loss, **figures)
            save()
            saved_iter = iter_num
            eval_seconds = time.time() - paused
            logged_at += eval_seconds                       # tokens/s is that of training alone
        if iter_num == cfg.max_iters:
            break

        # one step: forward and backward of all micro-steps; gradients are synchronised at the last one only
        lr = learning_rate(cfg, iter_num)
        for group in optimizer.param_groups:
            group['lr'] = lr
        torch.manual_seed((cfg.seed * 1_000_003 + iter_num) * 1009 + rank)     # of dropout
        step_loss = step_memory = 0.0
        for micro in range(micro_steps):
            x, y = batch('train', iter_num * cfg.gradient_accumulation_steps + micro * world + rank)
            if world > 1:
                model.require_backward_grad_sync = micro == micro_steps - 1
            with ckpt.autocast(cfg.device, cfg.dtype):
                if cfg.memory_loss:
                    _, loss, memory = model(x, y, memory_tau=cfg.memory_tau)
                    step_memory += memory.detach() / micro_steps
                else:
                    (_, loss), memory = model(x, y), 0.0
            step_loss += loss.detach() / micro_steps
            scaler.scale((loss + cfg.memory_loss * memory) / micro_steps).backward()
        loss, memory, stop = mean(step_loss, step_memory, float(bool(signals)))
        if not math.isfinite(loss):
            not_finite('the training loss')
        if cfg.grad_clip:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        if iter_num % cfg.log_interval == 0 and master:
            now, steps = time.time(), iter_num + 1 - logged_iter
            rate = steps * tokens_per_step / (now - logged_at)
            left = (cfg.max_iters - iter_num - 1) * (tokens_per_step / rate + eval_seconds / cfg.eval_interval)
            extra = {'memory': memory} if cfg.memory_loss else {}
            if cuda:
                extra['mfu'] = rate / world * raw_model.flops_per_token() / peak_flops()
            print(f'step {iter_num}/{cfg.max_iters} | loss {loss:.4f} | lr {lr:.2e} | {rate:,.0f} tok/s | '
                  f'{left // 60:.0f}m {left % 60:02.0f}s left'
                  + ''.join(f' | {name} {value:.1%}' for name, value in extra.items()), flush=True)
            log.write(iter=iter_num, loss=loss, lr=lr, tokens_per_s=rate, seconds=now - started, **extra)
            logged_at, logged_iter = now, iter_num + 1
        iter_num += 1
        if stop and iter_num < cfg.max_iters:
            save()
            say(f'stopped after step {iter_num - 1}, nothing is lost; to go on, give the same command with '
                '--init_from=resume')
            sys.exit(130)

    say(f'done in {(time.time() - started) / 60:.1f} minutes; read what it learned: '
        f'python sample.py --out_dir={cfg.out_dir}')
    if world > 1:
        dist.barrier()                      # the others wait for the master, which is still saving
        del model                           # its reducer has threads that use the process group
        dist.destroy_process_group()


def peak_flops():
    """Dense bfloat16 operations per second of the GPU, by NVIDIA's datasheets; an A100's where it is unknown."""
    name = torch.cuda.get_device_name()
    return 989e12 if any(chip in name for chip in ('H100', 'H200', 'GH200')) else 312e12


if __name__ == '__main__':
    settings.run(main)
