"""Curves of several runs: loss against steps, and memory against loss.

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

# Okabe and Ito's colours, for the colour-blind; lines and markers tell the runs apart in black and
# white
COLOURS = '#0072b2 #d55e00 #009e73 #cc79a7 #56b4e9 #e69f00 #000000 #999999'.split()
LINES = '-o --s -.^ :D -v --P -.X :*'.split()


@dataclass
class PlotConfig:
    runs: list = option([], 'folders of runs; given without --runs=')
    to: str = option('out', 'folder of the pictures')


def draw(path, curves, title, x, y, pale=(), scale='linear'):
    """Write a picture of the curves, {label: (xs, ys)}, as PNG, whole or not at all.

    pale: {label: (xs, ys)}, drawn thin in the colour of the curve. scale: of the x-axis.
    """
    figure, ax = import_pyplot().subplots(figsize=(7, 4.5), layout='constrained')
    for n, (label, curve) in enumerate(curves.items()):
        colour = COLOURS[n % 8]
        if label in pale:
            ax.plot(*pale[label], color=colour, alpha=0.3, linewidth=1)
        ax.plot(*curve, LINES[n % 8], color=colour, label=label)
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
    train = {}
    val = {}
    pruned = {}
    for run in cfg.runs:
        if not os.path.isfile(f'{run}/log.jsonl'):
            print(f'{run} is left out, it has no log.jsonl', file=sys.stderr)
            continue
        train[run] = curve(run, 'loss')
        val[run] = curve(run, 'val_loss')
        for path in sorted(pathlib.Path(run).glob('budgets*.json')):
            points = files.read_json(path, 'run prune.py again', curve=list)['curve']
            savings = [point['saving'] for point in points]
            pruned[f'{run}, {path.stem}'] = savings, [point['val_loss'] for point in points]
    if not val:
        raise UserError('which runs? python -m lab.plot out/*')
    y = 'validation loss, nats per token'
    draw(f'{cfg.to}/loss.png', val, 'pale: training loss', 'step', y, train)
    if pruned:
        x = 'memory saved: full context / sum of the budgets'
        draw(f'{cfg.to}/memory.png', pruned, 'what pruning costs', x, y, scale='log')


if __name__ == '__main__':
    settings.run(main)
