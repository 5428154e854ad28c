"""The first minutes on a GPU: whether the kernels are right there, and what all of this costs.

    python -m lab.gpu                 at most eight minutes on an H100; writes results/gpu.md
    python -m lab.gpu --small         tries all of it with small shapes, on a CPU in some minutes

    parity      kernels/gpu.py beside model.py, in float32 (on a GPU that is TF32) and bfloat16
    random      attention alone on random weights, forward, and with backward, beside torch's
    standard    30M parameters learn Python's standard library for a minute
    selective   the same with selective attention
    trained     as random, with what that model learned
    step        a training step of GPT-2's smallest shape, standard, selective and SSA
    decode      one token of that shape from a KV cache, with and without budgets

Each part is a command with a time limit. What it prints is kept in --out_dir. The table says which
one failed, and the next one follows. The same command again does the parts that are missing. Delete
PART.txt to measure one anew.
"""

import os
import subprocess
import sys
from dataclasses import dataclass

from support import files, settings  # before torch

import torch

from support.settings import UserError, option

TITLE = '# What lab/gpu.py measured'
# of each part the limit in seconds, and the arguments of Python
PARTS = {
    'parity': (75, '{bench} --what=parity --shapes=small,{shape} --lengths=64'),
    'random': (50, '{bench} --what=attention --shapes={shape} --lengths={lengths}'),
    'standard': (75, 'train.py {train} --selective=False'),
    'selective': (75, 'train.py {train} --selective=True'),
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
    to: str = option('results/gpu.md', 'the table')
    out_dir: str = option('out/gpu', 'folder of what was printed, and of the trained models')
    dataset: str = option('stdlib', 'what the parts standard and selective learn')
    small: bool = option(False, 'small shapes and few steps; no GPU is needed')


def measure(cfg, part, words):
    """Run a part. Returns the name of the file with what it printed."""
    limit, command = PARTS[part]
    path = f'{cfg.out_dir}/{part}'
    arguments = command.format(out_dir=cfg.out_dir, **words).split()
    if arguments[0] == 'train.py':
        arguments += [f'--dataset={cfg.dataset}', f'--out_dir={path}']
        if os.path.exists(f'{path}/ckpt.pt'):
            arguments.append('--init_from=resume')
    else:
        arguments.append(f'--to={path}.json')
    print(f'python {" ".join(arguments)}', flush=True)
    command = [sys.executable, *arguments]
    with open(f'{path}.failed', 'w') as f:
        try:
            seconds = limit * words['patience']
            subprocess.run(command, stdout=f, stderr=f, timeout=seconds, check=True)
        except subprocess.SubprocessError as e:
            f.write(f'FAILED: {e}\n')
            print(f'{part} failed: {e}')
            return f.name
    os.rename(f.name, f'{path}.txt')
    return f'{path}.txt'


def main():
    cfg = settings.parse(GPUConfig)
    words = FULL
    if cfg.small:
        words = SMALL
        cfg.out_dir = f'{cfg.out_dir}/small'
        cfg.to = f'{cfg.out_dir}/gpu.md'
        os.environ.setdefault('TRITON_INTERPRET', '1')
    elif not torch.cuda.is_available():
        raise UserError('torch sees no GPU here; --small tries all of this on a CPU')
    files.check_output(cfg.to, '.md', TITLE)
    os.makedirs(cfg.out_dir, exist_ok=True)
    table = [TITLE]
    for part in PARTS:
        path = f'{cfg.out_dir}/{part}.txt'
        if not os.path.exists(path):
            path = measure(cfg, part, words)
        with open(path) as f:
            table.append(f'## {part}\n\n```\n{f.read()}```')
        files.write_file(cfg.to, '\n\n'.join([*table, '']))
    print(cfg.to)


if __name__ == '__main__':
    settings.run(main)
