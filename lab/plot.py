"""Curves of several runs: validation loss against steps, and against the memory saved.

    python -m lab.plot out/*
    python -m lab.plot out/standard_small out/selective_small --to=out/figures

Reads each run's log.jsonl (train.py) and its budgets*.json (prune.py), and writes loss.png and
memory.png.
"""

import os
import pathlib
import sys
from dataclasses import dataclass

from support import checkpoint as ckpt, files, settings
from support.settings import UserError, option

# lines and markers tell the runs apart without colours, too
LINES = '-o --s -.^ :D -v --P -.X :*'.split()


@dataclass
class PlotConfig:
    runs: list = option([], 'folders of runs; given without --runs=')
    to: str = option('out', 'folder of the pictures')


def draw(path, curves, title, x, y, scale='linear'):
    """Write a picture of the curves, {label: (xs, ys)}, as PNG. scale: of the x-axis."""
    figure, ax = import_pyplot().subplots(figsize=(7, 4.5), layout='constrained')
    for n, (label, curve) in enumerate(curves.items()):
        ax.plot(*curve, LINES[n % 8], label=label)
    ax.set(title=title, xlabel=x, ylabel=y, xscale=scale)
    ax.legend()
    ax.grid(alpha=0.3)
    with files.replacing(path) as f:
        figure.savefig(f, format='png', dpi=150)
    print(path, file=sys.stderr)


def import_pyplot():
    """matplotlib.pyplot without a display; UserError if it is not installed."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError('pictures need matplotlib: pip install matplotlib') from None
    plt.switch_backend('Agg')
    return plt


def curve(run, figure):
    """The steps at which a run logs a figure, and its values, as two lists."""
    lines = ckpt.read_log(run, figure)
    return [line['iter'] for line in lines], [line[figure] for line in lines]


def main():
    cfg = settings.parse(PlotConfig, positional='runs')
    val = {}
    pruned = {}
    for run in cfg.runs:
        if not os.path.isfile(f'{run}/log.jsonl'):
            print(f'{run} is left out, it has no log.jsonl', file=sys.stderr)
            continue
        val[run] = curve(run, 'val_loss')
        for path in sorted(pathlib.Path(run).glob('budgets*.json')):
            points = files.read_json(path, 'run prune.py again', curve=list)['curve']
            savings = [point['saving'] for point in points]
            pruned[f'{run}, {path.stem}'] = savings, [point['val_loss'] for point in points]
    if not val:
        raise UserError('which runs? python -m lab.plot out/*')
    y = 'validation loss, nats per token'
    draw(f'{cfg.to}/loss.png', val, 'what the runs learn', 'step', y)
    if pruned:
        x = 'memory saved: full context / sum of the budgets'
        draw(f'{cfg.to}/memory.png', pruned, 'what pruning costs', x, y, 'log')


if __name__ == '__main__':
    settings.run(main)
