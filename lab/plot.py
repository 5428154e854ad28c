"""Curves of several runs: loss against steps, and memory against loss.

    python -m lab.plot out/*
    python -m lab.plot out/standard_small out/selective_small --to=out/figures

Reads each run's log.jsonl (train.py) and what there is of budgets.json, budgets_oldest.json and budgets_random.json
(prune.py). Writes loss.png and memory.png.
"""
import io
import os
import pathlib
import sys
from dataclasses import dataclass, field

from support import checkpoint as ckpt, files, settings
from support.settings import UserError


@dataclass
class PlotConfig:
    runs: list = field(default_factory=list)    # folders of runs; given without --runs=
    to: str = 'out'                             # folder of the pictures


# Okabe and Ito's colours, for the colour-blind; line styles and markers tell the runs apart in black and white
STYLES = [('#0072b2', '-', 'o'), ('#d55e00', '--', 's'), ('#009e73', '-.', '^'), ('#cc79a7', ':', 'D'),
          ('#56b4e9', '-', 'v'), ('#e69f00', '--', 'P'), ('#000000', '-.', 'X'), ('#999999', ':', '*')]

CURVE = {'curve': [{'saving': float, 'val_loss': float}], 'baseline_loss?': (float, None)}      # of a budgets.json


def read_losses(run):
    """(steps, training loss), (steps, validation loss) of a run's log.jsonl."""
    log = ckpt.read_log(run)
    return tuple(([line['iter'] for line in log if name in line], [line[name] for line in log if name in line])
                 for name in ('loss', 'val_loss'))


def budget_files(run):
    """The budgets*.json of a run's folder."""
    return sorted(pathlib.Path(run).glob('budgets*.json'))


def read_budgets(path):
    """The curve of a budgets.json as (factors saved, validation losses), and the loss of the baseline, or None."""
    found = files.read_json(path, CURVE, 'run prune.py again')
    points = sorted((point['saving'], point['val_loss']) for point in found['curve'])
    return tuple(zip(*points)), found.get('baseline_loss')


def plot_loss(plt, logs):
    """logs: {name: read_losses(...)}. The figure."""
    figure, ax = plt.subplots(figsize=(7, 4.5), layout='constrained')
    for n, (name, (train, val)) in enumerate(logs.items()):
        colour, line, marker = STYLES[n % len(STYLES)]
        ax.plot(*train, color=colour, alpha=0.3, linewidth=1)
        ax.plot(*val, color=colour, linestyle=line, marker=marker, markersize=4, label=name.replace('$', r'\$'))
    ax.set(xlabel='step', ylabel='loss, nats per token', title='validation loss (pale: training loss)')
    ax.legend()
    ax.grid(alpha=0.3)
    return figure


def plot_memory(plt, curves):
    """curves: {name: read_budgets(...)}. The figure."""
    figure, ax = plt.subplots(figsize=(7, 4.5), layout='constrained')
    for n, (name, (curve, baseline)) in enumerate(curves.items()):
        colour, line, marker = STYLES[n % len(STYLES)]
        ax.plot(*curve, color=colour, linestyle=line, marker=marker, markersize=4, label=name.replace('$', r'\$'))
        if baseline is not None:
            ax.axhline(baseline, color=colour, linewidth=1, linestyle=':')
    ax.set_xscale('log', base=2)
    ax.xaxis.set_major_formatter('{x:g}x')
    ax.set(xlabel='memory saved: full context / sum of the budgets', ylabel='validation loss, nats per token',
           title='what pruning costs (dotted: the baseline, which is not pruned)')
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


def main():
    cfg = settings.parse(PlotConfig, positional='runs')
    if not cfg.runs:
        raise UserError('which runs? python -m lab.plot out/*')
    logs, curves = {}, {}
    for run in cfg.runs:
        name = os.path.basename(os.path.normpath(run))
        if name in logs:
            name = run                                      # two runs of one name in different folders
        try:
            logs[name] = read_losses(run)
        except UserError as e:
            print(f'{run} is left out: {e}', file=sys.stderr)
        for path in budget_files(run):
            try:
                curves[name + path.stem.removeprefix('budgets').replace('_', ', ')] = read_budgets(path)
            except UserError as e:
                print(f'{path} is left out: {e}', file=sys.stderr)
    if not any(steps for log in logs.values() for steps, _ in log):
        raise UserError('none of these folders has a log.jsonl of train.py with a loss in it')
    plt = import_pyplot()
    save_figure(plot_loss(plt, logs), os.path.join(cfg.to, 'loss.png'))
    if curves:
        save_figure(plot_memory(plt, curves), os.path.join(cfg.to, 'memory.png'))


if __name__ == '__main__':
    settings.run(main)
