"""Time of attention against context length, from what lab.bench measured on trained runs.

    python -m lab.bench --out_dir=out/sel_1024,out/sel_2048 --to=out/selective.json
    python -m lab.bench --out_dir=out/mem_1024,out/mem_2048 --to=out/memory_loss.json
    python -m lab.plot_cost --selective=out/selective.json --memory_loss=out/memory_loss.json --to=results/cost.png
"""
from dataclasses import dataclass

import matplotlib
import matplotlib.pyplot as plt

from support import files, settings

matplotlib.use('Agg')


@dataclass
class PlotConfig:
    selective: str = 'out/selective.json'       # of runs without memory loss
    memory_loss: str = 'out/memory_loss.json'   # of runs with it
    to: str = 'results/cost.png'


def points(table, case, part='attention'):
    """T and milliseconds for each sequence."""
    rows = [row for row in table['rows'] if row['part'] == part and row['case'] == case and row['T'] != 'growth']
    return [row['T'] for row in rows], [row['value'] / row['batch'] for row in rows]


def main():
    cfg = settings.parse(PlotConfig)
    selective, memory_loss = (files.read_json(path, {'rows': [dict]}, 'run lab.bench again')
                              for path in (cfg.selective, cfg.memory_loss))
    figure, axes = plt.subplots(figsize=(5, 3.6), layout='constrained')
    for label, (x, y), style in [('standard (SDPA)', points(memory_loss, 'standard'), 'o-k'),
                                 ('selective', points(selective, 'selective'), 's-C0'),
                                 ('selective, memory loss', points(memory_loss, 'selective'), '^-C3')]:
        axes.plot(x, y, style, label=label)
        axes.annotate(f'{y[-1]:.0f}', (x[-1], y[-1]), textcoords='offset points', xytext=(6, -3))
    axes.set_xscale('log', base=2)
    axes.set_xticks(x, [f'{T:,}' for T in x])
    axes.set_ylim(bottom=0)
    axes.set_xlim(right=1.15 * x[-1])
    axes.set_xlabel('context length T, tokens')
    axes.set_ylabel('ms for each sequence')
    axes.set_title('Attention of 4 layers, forward + backward, trained weights', fontsize='medium')
    axes.legend()
    figure.savefig(cfg.to, dpi=150)
    print(cfg.to)


if __name__ == '__main__':
    settings.run(main)
