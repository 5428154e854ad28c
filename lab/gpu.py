"""The first minutes on a GPU: whether the kernels are right there, and what all of this costs.

    python -m lab.gpu                 at most eight minutes on an H100; writes out/gpu/gpu.md
    python -m lab.gpu --small         tries all of it with small shapes, on a CPU in some minutes

    parity      kernels/gpu.py beside model.py, in float32 (on a GPU that is TF32) and bfloat16
    random      attention alone on random weights, forward, and with backward, beside torch's
    standard    30M parameters learn Python's standard library for a minute
    selective   the same with selective attention
    trained     as random, with what that model learned
    step        a training step of GPT-2's smallest shape, standard, selective and SSA
    decode      one token of that shape from a KV cache, with and without budgets

Each part is a command with a time limit. What it prints is kept in --out_dir, and the table says
which one failed. The same command again does the parts that are missing. To do one again, delete
PART.txt and, of a training, the folder PART.
"""

import os
import subprocess
import sys
from dataclasses import dataclass

from support import files, settings  # before torch

import torch

from support.settings import UserError, option

# of each part the limit in seconds, and the arguments of Python
PARTS = {
    'parity': (75, '{bench} --what=parity --shapes=small,{shape} --lengths=64'),
    'random': (50, '{bench} --what=attention --shapes={shape} --lengths={lengths}'),
    'standard': (75, 'train.py {train} --dataset={dataset} --out_dir={path} --selective=False'),
    'selective': (75, 'train.py {train} --dataset={dataset} --out_dir={path} --selective=True'),
    'trained': (45, '{bench} --what=attention --out_dir={out_dir}/selective --lengths={lengths}'),
    'step': (120, '{bench} --what=step --shapes={shape} --lengths={T}'),
    'decode': (40, '{bench} --what=decode --shapes={shape} --lengths={T}'),
}
FULL = {
    'shape': '124m',
    'lengths': '1024,4096,16384',
    'T': 1024,
    'bench': '-m lab.bench --tokens=32768',
    'patience': 1,  # what the limits are multiplied with
    'train': 'config/base_30m.py --block_size=1024 --batch_size=32 --gradient_accumulation_steps=1 '
    '--max_iters=600 --warmup_iters=60 --learning_rate=2e-3 --eval_interval=100 --eval_iters=10',
}
SMALL = {
    'shape': 'small',
    'lengths': '64,128',
    'T': 64,
    'bench': '-m lab.bench --tokens=128 --rounds=1 --device=cpu',
    'patience': 20,
    'train': 'config/base_small.py --n_layer=2 --n_embd=32 --n_head=2 --block_size=64 '
    '--batch_size=2 --max_iters=4 --eval_interval=4 --eval_iters=1 --log_interval=2',
}


@dataclass
class GPUConfig:
    out_dir: str = option('out/gpu', 'folder of the table, of what was printed, of trained models')
    dataset: str = option('stdlib', 'what the parts standard and selective learn')
    small: bool = option(False, 'small shapes and few steps; no GPU is needed')


def measure(cfg, part, sizes):
    """Run a part and write what it prints to PART.txt. On a failure FAILED is in it."""
    limit, command = PARTS[part]
    path = f'{cfg.out_dir}/{part}'
    command = command.format(path=path, **vars(cfg), **sizes)
    print(f'python {command}', flush=True)
    command = [sys.executable, *command.split()]
    with open(f'{path}.part', 'w') as f:
        try:
            seconds = limit * sizes['patience']
            subprocess.run(command, stdout=f, stderr=f, timeout=seconds, check=True)
        except subprocess.SubprocessError as e:
            f.write(f'FAILED: {e}\n')
            print(f'{part} failed: {e}')
    os.rename(f'{path}.part', f'{path}.txt')


def main():
    cfg = settings.parse(GPUConfig)
    sizes = FULL
    if cfg.small:
        sizes = SMALL
        cfg.out_dir = f'{cfg.out_dir}/small'
        os.environ.setdefault('TRITON_INTERPRET', '1')
    elif not torch.cuda.is_available():
        raise UserError('torch sees no GPU here; --small tries all of this on a CPU')
    os.makedirs(cfg.out_dir, exist_ok=True)
    table = ['# What lab/gpu.py measured']
    for part in PARTS:
        path = f'{cfg.out_dir}/{part}.txt'
        if not os.path.exists(path):
            measure(cfg, part, sizes)
        with open(path) as f:
            table.append(f'## {part}\n\n```\n{f.read()}```\n')
        files.write_file(f'{cfg.out_dir}/gpu.md', '\n\n'.join(table))
    print(f'{cfg.out_dir}/gpu.md')


if __name__ == '__main__':
    settings.run(main)
