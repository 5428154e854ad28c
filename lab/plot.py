"""Curves of several runs: loss against steps, memory against loss, and what attention costs.

    python -m lab.plot out/*
    python -m lab.plot out/standard_small out/selective_small --to=out/figures
    python -m lab.bench --out_dir=out/sel_1024,out/sel_2048 --to=out/selective.json
    python -m lab.plot --cost=out/selective.json

Reads each run's log.jsonl (train.py) and its budgets*.json (prune.py), and writes loss.png and
memory.png. cost.png shows the time of attention against context length, one line for each table
of lab.bench and one for standard attention.
"""

import io
import pathlib
import sys
from dataclasses import dataclass

import numpy as np

from support import checkpoint as ckpt, files, settings
from support.settings import UserError, option

# Okabe and Ito's colours, for the colour-blind; lines and markers tell the runs apart in black and
# white
COLOURS = '#0072b2 #d55e00 #009e73 #cc79a7 #56b4e9 #e69f00 #000000 #999999'.split()
LINES = '-o --s -.^ :D -v --P -.X :*'.split()


@dataclass
class PlotConfig:
    runs: list = option([], 'folders of runs; given without --runs=')
    cost: str = option('', 'tables of lab.bench, as FILE,FILE,…; their names are the labels')
    to: str = option('out', 'folder of the pictures')


# ---- Curves: a list of x and a list of y ---------------------------------------------------------


def curve(path, rows, x, y):
    """The entries x and y of rows, which are from a JSON file; UserError if they lack one."""
    for row in rows:
        if problem := files.misfit(row, {x: float, y: float}):
            raise UserError(f'{path} is damaged ({problem}): make it again')
    return [row[x] for row in rows], [row[y] for row in rows]


def read_times(path, case):
    """Context lengths in a table of lab.bench, and milliseconds of attention for each sequence."""
    found = files.read_json(path, 'run lab.bench again', rows=[dict])
    rows = []
    for row in found['rows']:
        if (row.get('part'), row.get('case')) == ('attention', case):
            rows.append(row)
    if not rows:
        raise UserError(f'{path} has no times of attention: run lab.bench --what=attention')
    lengths, times = curve(path, rows, 'T', 'value')
    _, batches = curve(path, rows, 'T', 'batch')
    return lengths, np.divide(times, batches)


# ---- Pictures ------------------------------------------------------------------------------------


def draw(path, curves, title, x, y, pale=(), powers_of_2=''):
    """Write a picture of the curves, {label: (xs, ys)}, as PNG, whole or not at all.

    pale: {label: (xs, ys)}, drawn thin in the colour of the curve. powers_of_2: format of the
    numbers on a logarithmic x-axis; '': it is linear.
    """
    figure, ax = import_pyplot().subplots(figsize=(7, 4.5), layout='constrained')
    for n, (label, curve) in enumerate(curves.items()):
        colour = COLOURS[n % 8]
        if label in pale:
            ax.plot(*pale[label], color=colour, alpha=0.3, linewidth=1)
        ax.plot(*curve, LINES[n % 8], color=colour, label=label.replace('$', r'\$'))
    if powers_of_2:
        ax.set_xscale('log', base=2)
        ax.xaxis.set_major_formatter(powers_of_2)
    ax.set(title=title, xlabel=x, ylabel=y)
    ax.legend()
    ax.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=150, bbox_inches='tight')
    files.write_file(path, buffer.getvalue())
    print(path, file=sys.stderr)


def import_pyplot():
    """matplotlib.pyplot without a display; UserError if it is not installed."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError('pictures need matplotlib: pip install matplotlib') from None
    plt.switch_backend('Agg')
    return plt


# ---- The command ---------------------------------------------------------------------------------


def main():
    cfg = settings.parse(PlotConfig, positional='runs')
    if bool(cfg.runs) == bool(cfg.cost):
        raise UserError('which runs? python -m lab.plot out/*; or --cost=FILE alone')
    if cfg.cost:
        plot_cost(cfg.cost.split(','), cfg.to)
    else:
        plot_runs(cfg.runs, cfg.to)


def plot_runs(runs, to):
    """Write loss.png, and memory.png if there are budgets, into the folder `to`."""
    train = {}
    val = {}
    pruned = {}
    for run in runs:
        try:
            train[run] = curve(run, ckpt.read_log(run, 'loss'), 'iter', 'loss')
            val[run] = curve(run, ckpt.read_log(run, 'val_loss'), 'iter', 'val_loss')
        except OSError as e:
            print(f'{run} is left out: {e}', file=sys.stderr)
            continue
        for path in sorted(pathlib.Path(run).glob('budgets*.json')):
            found = files.read_json(path, 'run prune.py again', curve=[dict])
            pruned[f'{run}, {path.stem}'] = curve(path, found['curve'], 'saving', 'val_loss')
    if not val:
        raise UserError('none of these folders has a log.jsonl of train.py')
    y = 'validation loss, nats per token'
    draw(f'{to}/loss.png', val, 'pale: training loss', 'step', y, train)
    if pruned:
        x = 'memory saved: full context / sum of the budgets'
        draw(f'{to}/memory.png', pruned, 'what pruning costs', x, y, powers_of_2='{x:g}x')


def plot_cost(paths, to):
    """Write cost.png, from tables of lab.bench, into the folder `to`."""
    curves = {'standard': read_times(paths[0], 'standard')}
    for path in paths:
        curves[pathlib.Path(path).stem] = read_times(path, 'selective')
    x = 'context length T, tokens'
    y = 'ms for each sequence, forward and backward'
    title = 'attention of trained weights'
    draw(f'{to}/cost.png', curves, title, x, y, powers_of_2='{x:,.0f}')


if __name__ == '__main__':
    settings.run(main)
