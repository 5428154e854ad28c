"""Runs of train.py with several seeds, and what they logged as tables and pictures: what lab/reproduce.py is made of."""
import concurrent.futures
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

import checkpoint as ckpt
from lab import plot
from settings import UserError


@dataclass
class Run:
    """What a finished run has logged. steps, and at each of them the figures of an evaluation."""
    folder: str
    steps: list
    val_loss: list
    accuracy: list
    memory: list
    seconds: float

    def first(self, reached):
        """The first step at which reached(validation loss, accuracy), or None."""
        accuracy = self.accuracy or self.val_loss
        return next((s for s, *figures in zip(self.steps, self.val_loss, accuracy) if reached(*figures)), None)


def read_run(folder, max_iters):
    """The Run in a folder; None where it has not come to its end."""
    log = ckpt.read_log(folder) if os.path.isfile(os.path.join(folder, 'log.jsonl')) else []
    evaluations = [line for line in log if 'val_loss' in line]
    if not evaluations or evaluations[-1]['iter'] < max_iters:
        return None
    return Run(folder, *([e[name] for e in evaluations if name in e] for name in ('iter', 'val_loss', 'accuracy', 'memory')),
               seconds=max((line['seconds'] for line in log if 'seconds' in line), default=0.0))


class Runner:
    """Trains the models of a claim, or finds that they were trained already, for this claim or another."""

    def __init__(self, cfg, claim):
        self.cfg, self.claim, self.started, self.commands = cfg, claim, time.time(), []
        self.seeds = 1 if cfg.quick else cfg.seeds
        self.folder = os.path.join(cfg.out_dir, 'quick') if cfg.quick else cfg.out_dir

    def train(self, models, config, steps, extra=()):
        """models: {name: its flags, as text}; a flag that is a word is a rule of lab.ablate. {name: [Run of each seed]}.

        extra: flags of all of them.
        """
        steps, jobs = max(20, steps // 8) if self.cfg.quick else steps, []
        self.commands.append(f"python train.py {' '.join([config, *extra])} --max_iters={steps} FLAGS --seed=SEED")
        for seed in range(1, self.seeds + 1):
            for name, flags in models.items():
                words = [flag for flag in flags.split() if not flag.startswith('--')]
                args = [config, *extra, *(flag for flag in flags.split() if flag.startswith('--')), f'--max_iters={steps}',
                        f'--seed={seed}']
                folder = os.path.join(self.folder, re.sub(r'[^\w=.]+', '-', ' '.join([*words, *args])))
                jobs.append((name, folder, [*(['-m', 'lab.ablate', *words] if words else ['train.py']), *args]))
        runs = {}
        with concurrent.futures.ThreadPoolExecutor(self.cfg.workers) as pool:
            futures = {pool.submit(self.one, folder, args, steps): folder for _, folder, args in jobs}
            for n, future in enumerate(concurrent.futures.as_completed(futures), start=1):
                folder = futures[future]
                try:
                    runs[folder] = future.result()
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
                print(f'{self.claim}: {n} of {len(jobs)} runs, {(time.time() - self.started) / 60:.1f} minutes | '
                      f'{folder} | validation loss {runs[folder].val_loss[-1]:.4f}', file=sys.stderr, flush=True)
        return {name: [runs[folder] for n, folder, _ in jobs if n == name] for name in models}

    def one(self, folder, args, steps):
        run = read_run(folder, steps)
        if run is None:
            resume = ['--init_from=resume'] if os.path.isfile(os.path.join(folder, 'ckpt.pt')) else []
            command([*args, *resume, f'--out_dir={folder}', '--device=cpu'])
            run = read_run(folder, steps)
        return run


def command(args):
    """Run python with these arguments on one thread, in the project's folder; UserError with its last line if it fails."""
    result = subprocess.run([sys.executable, *args], env={**os.environ, 'OMP_NUM_THREADS': '1'},
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        last = (result.stdout.strip().splitlines() or ['no output'])[-1]
        raise UserError(f'python {shlex.join(args)}: {last}')


# ----------------------------------------------------------------------------------------------------------------------
# Sections


def spread(values, form='{:.4f}'):
    """Mean and sample standard deviation, as text."""
    values = [v for v in values if v is not None]
    if not values:
        return 'never'
    text = form.format(statistics.mean(values))
    return text if len(values) == 1 else f'{text} ± {form.format(statistics.stdev(values))}'


def table(header, rows):
    lines = [' | '.join(map(str, row)) for row in (header, ['---'] * len(header), *rows)]
    return '\n'.join(f'| {line} |' for line in lines)


def minutes(runs):
    return f'{statistics.mean(run.seconds for run in runs) / 60:.1f}'


def curves(runner, groups, figure='val_loss', ylabel='validation loss, nats per token'):
    """results/<claim>.png: a panel for each group {title: {name: [Run]}}, mean of the seeds with all of them behind."""
    plt = plot.import_pyplot()
    picture, axes = plt.subplots(1, len(groups), figsize=(5.5 * len(groups), 4), layout='constrained', squeeze=False)
    for ax, (title, models) in zip(axes[0], groups.items()):
        for n, (name, runs) in enumerate(models.items()):
            colour, line, marker = plot.STYLES[n % len(plot.STYLES)]
            columns = [getattr(run, figure) for run in runs]
            for column in columns:
                ax.plot(runs[0].steps, column, color=colour, alpha=0.25, linewidth=1)
            ax.plot(runs[0].steps, [statistics.mean(values) for values in zip(*columns)], color=colour, linestyle=line,
                    marker=marker, markersize=3, label=name)
        ax.set(xlabel='step', ylabel=ylabel, title=title)
        ax.legend(fontsize=8)
        ax.grid(alpha=0.3)
    folder = runner.folder if runner.cfg.quick else os.path.join(os.path.dirname(runner.cfg.to), 'results')
    plot.save_figure(picture, os.path.join(folder, f'{runner.claim}.png'))
    return f'![{runner.claim}](results/{runner.claim}.png)'


