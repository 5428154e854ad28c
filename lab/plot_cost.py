"""Time of attention against context length, from what lab.bench measured on trained runs.

    python -m lab.bench --out_dir=out/sel_1024,out/sel_2048 --to=out/selective.json
    python -m lab.bench --out_dir=out/mem_1024,out/mem_2048 --to=out/memory_loss.json
    python -m lab.plot_cost --selective=out/selective.json --memory_loss=out/memory_loss.json --to=results/cost.png
    python -m lab.plot_cost ... --qk_norm=out/qk_norm.json      a third line, of runs with memory loss and qk_norm
"""
from dataclasses import dataclass

from lab import plot
from support import files, settings
from support.settings import UserError


@dataclass
class PlotCostConfig:
    selective: str = 'out/selective.json'       # lab.bench's table of runs without memory loss
    memory_loss: str = 'out/memory_loss.json'   # lab.bench's table of runs with it
    qk_norm: str = ''                           # of runs with it and with qk_norm; '': left out
    to: str = 'out/cost.png'                    # the picture


def points(path, case):
    """T and milliseconds of attention for each sequence."""
    row = {'part': str, 'case': str, 'T': (int, str), 'value': float, 'batch?': int}
    table = files.read_json(path, {'rows': [row]}, 'run lab.bench again')
    rows = [row for row in table['rows'] if (row['part'], row['case']) == ('attention', case) and row['T'] != 'growth']
    if not rows:
        raise UserError(f'{path} has no times of attention on trained runs: run lab.bench --what=attention --out_dir=RUNS')
    return [row['T'] for row in rows], [row['value'] / row.get('batch', 1) for row in rows]


def main():
    cfg = settings.parse(PlotCostConfig)
    files.check_output(cfg.to, '.png', 'IHDR')      # the first part of a PNG
    lines = [('standard (SDPA)', points(cfg.memory_loss, 'standard'), 'o-k'),
             ('selective', points(cfg.selective, 'selective'), 's-C0'),
             ('selective, memory loss', points(cfg.memory_loss, 'selective'), '^-C3')]
    if cfg.qk_norm:
        lines.append(('selective, memory loss, qk_norm', points(cfg.qk_norm, 'selective'), 'v--C2'))
    plt = plot.import_pyplot()
    figure, axes = plt.subplots(figsize=(5, 3.6), layout='constrained')
    for label, (x, y), style in lines:
        axes.plot(x, y, style, label=label)
        axes.annotate(f'{y[-1]:.0f}', (x[-1], y[-1]), textcoords='offset points', xytext=(6, -3))
    axes.set_xscale('log', base=2)
    x = lines[0][1][0]
    axes.set_xticks(x, [f'{T:,}' for T in x])
    axes.set_ylim(bottom=0)
    axes.set_xlim(right=1.25 * x[-1])
    axes.set_xlabel('context length T, tokens')
    axes.set_ylabel('ms for each sequence')
    axes.set_title('Attention of 4 layers, forward + backward, trained weights', fontsize='medium')
    axes.legend()
    plot.save_figure(figure, cfg.to)


if __name__ == '__main__':
    settings.run(main)
