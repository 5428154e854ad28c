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
import os
import pathlib
import sys
from dataclasses import dataclass

import numpy as np

from support import checkpoint as ckpt, files, settings
from support.settings import UserError, option

# Okabe and Ito's colours, for the colour-blind; line styles and markers tell the runs apart in
# black and white
STYLES = [
    ('#0072b2', '-', 'o'),
    ('#d55e00', '--', 's'),
    ('#009e73', '-.', '^'),
    ('#cc79a7', ':', 'D'),
    ('#56b4e9', '-', 'v'),
    ('#e69f00', '--', 'P'),
    ('#000000', '-.', 'X'),
    ('#999999', ':', '*'),
]


@dataclass
class PlotConfig:
    runs: list = option([], 'folders of runs; given without --runs=')
    cost: str = option('', 'tables of lab.bench, as FILE,FILE,…; their names are the labels')
    to: str = option('out', 'folder of the pictures')


# ---- Curves: a list of x and a list of y ---------------------------------------------------------


def curve(path, rows, x, y):
    """The entries x and y of rows, which are from a JSON file; UserError if they lack one."""
    xs = []
    ys = []
    for row in rows:
        if problem := files.misfit(row, {x: float, y: float}):
            raise UserError(f'{path} is damaged ({problem}): make it again')
        xs.append(row[x])
        ys.append(row[y])
    return xs, ys


def read_losses(run, name):
    """Steps, and the loss of this name in a run's log.jsonl."""
    lines = [line for line in ckpt.read_log(run) if name in line]
    return curve(run, lines, 'iter', name)


def read_times(path, case):
    """Context lengths in a table of lab.bench, and milliseconds of attention for each sequence."""
    found = files.read_json(path, 'run lab.bench again', rows=[dict])
    rows = [row for row in found['rows'] if row.get('part') == 'attention']
    rows = [row for row in rows if row.get('case') == case]
    if not rows:
        raise UserError(f'{path} has no times of attention: run lab.bench --what=attention')
    lengths, times = curve(path, rows, 'T', 'value')
    _, batches = curve(path, rows, 'T', 'batch')
    return lengths, np.divide(times, batches)


# ---- Pictures ------------------------------------------------------------------------------------


def draw(plt, curves, pale, title, x, y, powers_of_2=''):
    """A figure of the curves, {label: (xs, ys)}.

    pale: {label: (xs, ys)}, drawn thin in the colour of the curve. powers_of_2: format of the
    numbers on a logarithmic x-axis; '': it is linear.
    """
    figure, ax = plt.subplots(figsize=(7, 4.5), layout='constrained')
    for n, (label, curve) in enumerate(curves.items()):
        colour, line, marker = STYLES[n % len(STYLES)]
        if label in pale:
            ax.plot(*pale[label], color=colour, alpha=0.3, linewidth=1)
        name = label.replace('$', r'\$')
        ax.plot(*curve, color=colour, linestyle=line, marker=marker, markersize=4, label=name)
    if powers_of_2:
        ax.set_xscale('log', base=2)
        ax.xaxis.set_major_formatter(powers_of_2)
    ax.set(title=title, xlabel=x, ylabel=y)
    ax.legend()
    ax.grid(alpha=0.3)
    return figure


def import_pyplot():
    """matplotlib.pyplot without a display; UserError if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError('pictures need matplotlib: pip install matplotlib') from None
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    return plt


def save_figure(figure, path):
    """Write the figure as PNG; whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=150, bbox_inches='tight')
    write(path, buffer.getvalue())


def write(path, content):
    """Write bytes, and say so."""
    files.write_file(path, content)
    print(f'{path}: {len(content) / 1e3:,.0f} kB', file=sys.stderr)


# ---- The command ---------------------------------------------------------------------------------


def main():
    cfg = settings.parse(PlotConfig, positional='runs')
    if bool(cfg.runs) == bool(cfg.cost):
        raise UserError('which runs? python -m lab.plot out/*; or --cost=FILE alone')
    plt = import_pyplot()
    if cfg.runs:
        plot_runs(plt, cfg)
    else:
        plot_cost(plt, cfg)


def plot_runs(plt, cfg):
    """Write loss.png, and memory.png if there are budgets."""
    train = {}
    val = {}
    pruned = {}
    baselines = {}
    for run in cfg.runs:
        try:
            train[run] = read_losses(run, 'loss')
            val[run] = read_losses(run, 'val_loss')
            for path in sorted(pathlib.Path(run).glob('budgets*.json')):
                types = dict(curve=[dict], baseline_loss=(float, None))
                found = files.read_json(path, 'run prune.py again', **types)
                saved, losses = curve(path, found['curve'], 'saving', 'val_loss')
                label = f'{run}, {path.stem}'
                pruned[label] = saved, losses
                if found.get('baseline_loss'):
                    baselines[label] = saved, [found['baseline_loss']] * len(saved)
        except UserError as e:
            print(f'{run} is left out: {e}', file=sys.stderr)
    if not any(steps for steps, _ in val.values()):
        raise UserError('none of these folders has a log.jsonl of train.py with a loss in it')
    title = 'validation loss (pale: training loss)'
    figure = draw(plt, val, train, title, 'step', 'loss, nats per token')
    save_figure(figure, os.path.join(cfg.to, 'loss.png'))
    if pruned:
        title = 'what pruning costs (pale: the baseline, which is not pruned)'
        x = 'memory saved: full context / sum of the budgets'
        figure = draw(plt, pruned, baselines, title, x, 'validation loss, nats per token', '{x:g}x')
        save_figure(figure, os.path.join(cfg.to, 'memory.png'))


def plot_cost(plt, cfg):
    """Write cost.png."""
    paths = cfg.cost.split(',')
    curves = {'standard': read_times(paths[0], 'standard')}
    for path in paths:
        curves[pathlib.Path(path).stem] = read_times(path, 'selective')
    title = 'attention of trained weights, forward and backward'
    x = 'context length T, tokens'
    figure = draw(plt, curves, {}, title, x, 'ms for each sequence', '{x:,.0f}')
    figure.axes[0].set_ylim(bottom=0)
    save_figure(figure, os.path.join(cfg.to, 'cost.png'))


if __name__ == '__main__':
    settings.run(main)
