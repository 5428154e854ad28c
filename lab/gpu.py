"""The first minutes on a GPU: whether the kernels are right there, and what all of this costs.

    python -m lab.gpu                 at most eight minutes on an H100; writes results/gpu.md
    python -m lab.gpu --small         tries all of it with small shapes, on a CPU in about a minute
    python -m lab.gpu --what=parity   one part, measured anew; then the first command, for the table

    parity      kernels/gpu.py beside model.py: how far y, M and gradients are off, as parts of
                their norms, in float32 (on a GPU that is TF32), bfloat16 and float16
    random      attention alone on random weights, forward, and with backward, beside torch's flash
    training    30M parameters learn Python's standard library for a minute, standard and selective
    trained     as random, with what this selective model learned, or the one in --trained
    step        a training step of GPT-2's smallest shape, standard, selective and SSA
    decode      one token of that shape from a KV cache, with and without budgets

Every part is a process of its own with a time limit. The table says which one failed and why, and
the next one follows. What is measured is kept in --out_dir as soon as it is known: the same command
again does the parts that are missing. Delete the folder to begin anew.
"""

import os
import subprocess
import sys
from dataclasses import dataclass

from support import checkpoint as ckpt, files, settings  # before torch

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from lab import bench, measure
from support.settings import UserError, option

TITLE = '# What lab/gpu.py measured'
DONE = 'all measured'
HEADER = (
    '| part | shape | T | batch | case | value | unit | ratio |\n|---|---|---|---|---|---|---|---|'
)
ROW = '| {part} | {shape} | {T:,} | {batch} | {case} | {value:,.3f} | {unit} | {ratio:.2f} |'
LIMITS = {'parity': 75, 'random': 50, 'training': 150, 'trained': 45, 'step': 120, 'decode': 40}
# Of measure.SHAPES one; contexts; tokens of a batch; how many times a median is taken of; settings
# of train.py; what the limits, in seconds, are multiplied with.
FULL = {
    'shape': '124m',
    'lengths': [1024, 4096, 16384],
    'tokens': 32768,
    'rounds': 5,
    'train': 'config/base_30m.py --block_size=1024 --batch_size=32 --gradient_accumulation_steps=1 '
    '--max_iters=600 --warmup_iters=60 --learning_rate=2e-3 --eval_interval=100 --eval_iters=10',
    'patience': 1,
}
SMALL = {
    'shape': 'small',
    'lengths': [64, 128],
    'tokens': 128,
    'rounds': 1,
    'train': 'config/base_small.py --n_layer=2 --n_embd=32 --n_head=2 --block_size=64 '
    '--batch_size=2 --max_iters=4 --eval_interval=4 --eval_iters=1 --log_interval=2',
    'patience': 10,
}


@dataclass
class GPUConfig:
    to: str = option('', "the table; '': results/gpu.md, with --small table.md in its folder")
    out_dir: str = option('out/gpu', 'folder of what was measured, and of the trained models')
    what: str = option(','.join(LIMITS), 'parts, with commas')
    trained: str = option('', "folder of a trained selective run; '': that of the part training")
    dataset: str = option('stdlib', 'what the part training learns')
    small: bool = option(False, 'small shapes, few steps, and a folder in out_dir')


# ---- The parts: they call keep(subject, groups), a group is (name, unit, {case: value}) ----------


def parity(cfg, keep):
    device = torch.device(cfg.device)
    for shape in dict.fromkeys(('small', cfg.shape)):
        subject = measure.Subject(cfg, shape, 200)
        layer = subject.layers[0]
        for name in 'gpu', 'cpu':
            for dtype in torch.float32, torch.bfloat16, torch.float16:
                attention, why_not = kernels.load(name, device, dtype, layer.config)
                if why_not:
                    print(f'{kernels.KERNELS[name]}, {dtype}: {why_not}')
                    continue
                args = layer, device, dtype, 1.0
                found = kernels.results(attention, *args)
                wrong = kernels.errors(found, kernels.results(kernels.exact, *args))
                values = {f'allowed in {dtype}': 1e6 * kernels.tolerance(device, dtype)}
                for number, (norm, _) in wrong.items():
                    values[number] = 1e6 * norm
                keep(subject, [(f'{name}.py', 'ppm', values)])


def random(cfg, keep):
    attention(cfg, keep, cfg.shape)


def trained(cfg, keep):
    attention(cfg, keep, cfg.trained or f'{cfg.out_dir}/selective')


def attention(cfg, keep, source):
    for T in cfg.lengths:
        subject = measure.Subject(cfg, source, T)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            keep(subject, bench.attention_part(subject))


def training(cfg, keep):
    """train.py, twice. A run that is stopped has what it saved at its last evaluation."""
    figures = {'iter': {}, 'val_loss': {}, 'tokens_per_s': {}}
    for case in 'standard', 'selective':
        out_dir = f'{cfg.out_dir}/{case}'
        command = [sys.executable, 'train.py', *cfg.train.split(), f'--dataset={cfg.dataset}']
        command += [f'--selective={case == "selective"}', f'--out_dir={out_dir}']
        if os.path.exists(f'{out_dir}/ckpt.pt'):
            command.append('--init_from=resume')
        limited(command, 65 * cfg.patience)
        for line in ckpt.read_log(out_dir):
            for name in figures.keys() & line.keys():
                figures[name][case] = line[name]
    subject = measure.Subject(cfg, out_dir, 0)
    keep(subject, [('training', name, values) for name, values in figures.items()])


def step(cfg, keep):
    subject = measure.Subject(cfg, cfg.shape, cfg.lengths[0])
    keep(subject, bench.step_part(subject, ['standard', 'selective', 'SSA']))


def decode(cfg, keep):
    subject = measure.Subject(cfg, cfg.shape, cfg.lengths[0])
    subject.gpt.to(getattr(torch, subject.dtype))
    keep(subject, bench.decode_part(subject))


PARTS = dict(zip(LIMITS, (parity, random, training, trained, step, decode)))


# ---- The command ---------------------------------------------------------------------------------


def limited(command, seconds):
    """Run a command, which is killed after these seconds."""
    try:
        subprocess.run(command, timeout=seconds)
    except subprocess.TimeoutExpired:
        print(f'stopped after {seconds} seconds: {" ".join(command[1:])}')


def run_part(cfg, part):
    """Measure a part. Its file has the rows that are known, and last how it ended."""
    rows = []

    def write(end):
        text = '\n'.join([*rows, f'| {part} | {end} |'])
        files.write_file(f'{cfg.out_dir}/{part}.md', text)

    def keep(subject, groups):
        kernel = f'| kernel | {subject.kernel} |'
        if kernel not in rows:
            rows.append(kernel)
        for group in groups:
            if group[0].startswith('layer'):
                continue  # their sum follows
            for row in measure.group(subject, *group):
                rows.append(ROW.format(**row))
            write('FAILED: it was stopped')

    write('FAILED: its process ended')
    try:
        PARTS[part](cfg, keep)
        write(DONE)
    except Exception as e:  # whatever a GPU, its driver and its compilers may raise
        print(f'{part} failed: {kernels.why(e)}')
        write(f'FAILED: {kernels.why(e)}')


def measured(cfg, part):
    """The rows in the file of a part, as text."""
    path = f'{cfg.out_dir}/{part}.md'
    if not os.path.exists(path):
        return f'| {part} | FAILED: it did not start |'
    with open(path) as f:
        return f.read()


def main():
    cfg = settings.parse(GPUConfig)
    vars(cfg).update(FULL, device='cuda')
    if cfg.small:
        vars(cfg).update(SMALL, out_dir=f'{cfg.out_dir}/small')
        cfg.to = cfg.to or f'{cfg.out_dir}/table.md'
    cfg.to = cfg.to or 'results/gpu.md'
    parts = bench.listed('what', cfg.what, PARTS)
    files.check_output(cfg.to, '.md', TITLE)
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision('high')  # TF32
    elif cfg.small:
        cfg.device = 'cpu'
        os.environ.setdefault('TRITON_INTERPRET', '1')
    else:
        raise UserError('torch sees no GPU here; --small tries all of this on a CPU')
    if len(parts) == 1:
        return run_part(cfg, *parts)
    table = [f'{TITLE}: {measure.machine(cfg)}, torch {torch.__version__}', '', HEADER]
    for part in parts:
        if DONE not in measured(cfg, part):
            command = [sys.executable, '-m', 'lab.gpu', *sys.argv[1:], f'--what={part}']
            limited(command, LIMITS[part] * cfg.patience)
        table.append(measured(cfg, part))
    files.write_file(cfg.to, '\n'.join([*table, '']))
    print(cfg.to)


if __name__ == '__main__':
    settings.run(main)
