"""Curves of several runs: loss against steps, and memory against loss.

    python -m lab.plot out/*
    python -m lab.plot out/standard_small out/selective_small --to=out/figures

Reads each run's log.jsonl (train.py) and, where there is one, budgets.json (prune.py). Writes loss.png and memory.png.
"""
import json
import os
import sys
from dataclasses import dataclass, field

import settings
from lab.visualize import import_pyplot, save_figure
from settings import UserError


@dataclass
class PlotConfig:
    runs: list = field(default_factory=list)    # folders of runs; given without --runs=
    to: str = 'out'                             # folder of the pictures


# Okabe and Ito's colours, for the colour-blind; line styles and markers tell the runs apart in black and white
STYLES = [('#0072b2', '-', 'o'), ('#d55e00', '--', 's'), ('#009e73', '-.', '^'), ('#cc79a7', ':', 'D'),
          ('#56b4e9', '-', 'v'), ('#e69f00', '--', 'P'), ('#000000', '-.', 'X')]


def read_log(path):
    """(steps, training loss), (steps, validation loss) of a log.jsonl; a last line that is half written is left out."""
    train, val = ([], []), ([], [])
    with open(path, encoding='utf-8') as f:
        for line in f:
            try:
                figures = json.loads(line)
            except ValueError:
                continue
            for name, (steps, losses) in ('loss', train), ('val_loss', val):
                if name in figures:
                    steps.append(figures['iter'])
                    losses.append(figures[name])
    return train, val


def read_curve(path):
    """budgets.json of prune.py, its curve sorted by memory; None where there is no such file."""
    if not os.path.isfile(path):
        return None
    with open(path, encoding='utf-8') as f:
        result = json.load(f)
    result['curve'].sort(key=lambda point: point['memory'])
    return result


def plot_loss(plt, logs):
    """logs: {name: read_log(...)}. The figure."""
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
    """curves: {name: read_curve(...)}. The figure."""
    figure, ax = plt.subplots(figsize=(7, 4.5), layout='constrained')
    for n, (name, result) in enumerate(curves.items()):
        colour, line, marker = STYLES[n % len(STYLES)]
        ax.plot([point['saving'] for point in result['curve']], [point['val_loss'] for point in result['curve']],
                color=colour, linestyle=line, marker=marker, markersize=4, label=name.replace('$', r'\$'))
        if result.get('baseline_loss') is not None:
            ax.axhline(result['baseline_loss'], color=colour, linewidth=1, linestyle=':')
    ax.set_xscale('log', base=2)
    ax.xaxis.set_major_formatter('{x:g}x')
    ax.set(xlabel='memory saved: full context / sum of the budgets', ylabel='validation loss, nats per token',
           title='what pruning costs (dotted: standard attention, nothing pruned)')
    ax.legend()
    ax.grid(alpha=0.3)
    return figure


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
            logs[name] = read_log(os.path.join(run, 'log.jsonl'))
            curve = read_curve(os.path.join(run, 'budgets.json'))
        except (OSError, ValueError, KeyError, TypeError) as e:
            print(f'{run} is left out: {e}', file=sys.stderr)
            continue
        if curve:
            curves[name] = curve
    if not any(steps for log in logs.values() for steps, _ in log):
        raise UserError('none of these folders has a log.jsonl of train.py with a loss in it')
    plt = import_pyplot()
    save_figure(plot_loss(plt, logs), os.path.join(cfg.to, 'loss.png'))
    if curves:
        save_figure(plot_memory(plt, curves), os.path.join(cfg.to, 'memory.png'))


if __name__ == '__main__':
    settings.run(main)
