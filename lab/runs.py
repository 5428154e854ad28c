"""Runs of train.py with several seeds, and what they logged as tables and pictures, for lab/reproduce.py."""
import concurrent.futures
import dataclasses
import hashlib
import os
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

import train
from lab import plot
from support import checkpoint as ckpt
from support import settings
from support.settings import UserError

# settings of a run that do not change what it learns, or that train.py fills in
FREE = ('out_dir', 'init_from', 'device', 'dtype', 'kernel', 'vocab_size', 'bos')


@dataclass
class Run:
    """What a finished run has logged: steps, and at each of them the figures of an evaluation."""
    folder: str
    steps: list
    val_loss: list
    accuracy: list
    memory: list
    seconds: float

    def crossing(self, figure, goal):
        """The step at which the loss falls to the goal, or another figure rises to it, between evaluations; or None."""
        points = list(zip(self.steps, getattr(self, figure)))
        for (s, a), (t, b) in zip(points, points[1:]):
            if a > goal >= b if figure == 'val_loss' else a < goal <= b:
                return s + (t - s) * (a - goal) / (a - b)


def read_run(folder, max_iters):
    """The Run in a folder; None where it has not come to its end."""
    log = ckpt.read_log(folder) if os.path.isfile(os.path.join(folder, 'log.jsonl')) else []
    evaluations = [line for line in log if 'val_loss' in line]
    if not evaluations or evaluations[-1]['iter'] < max_iters:
        return None
    clock = [line['seconds'] for line in log if 'seconds' in line] + [0.0]      # a resumed run starts it again
    figures = 'iter', 'val_loss', 'accuracy', 'memory'
    return Run(folder, *([e[name] for e in evaluations if name in e] for name in figures),
               seconds=sum(before for before, after in zip(clock, clock[1:]) if after < before))


class Runner:
    """Trains the models of a claim, or finds that they were trained already, for this claim or another."""

    def __init__(self, cfg, claim, title=''):
        self.cfg, self.claim, self.title, self.started = cfg, claim, title or claim, time.time()
        self.commands, self.about = [], ''
        self.seeds = 1 if cfg.quick else cfg.seeds
        self.folder = os.path.join(cfg.out_dir, 'quick') if cfg.quick else cfg.out_dir

    def train(self, models, config, steps, extra=(), quick=0, seeds=None):
        """models: {name: its flags, as text}; a word among them is a rule of lab.ablate. {name: [Run of each seed]}.

        steps: of each run, unless --steps says otherwise; quick: of a quick one, 0: a quarter. extra: flags of all.
        seeds: of which to train; None: of all that the claim has.
        """
        steps, jobs = self.cfg.steps or (quick or max(20, steps // 4) if self.cfg.quick else steps), []
        always = [*extra, f'--max_iters={steps}']
        if not any(flag.startswith('--warmup_iters') for flag in extra):
            always.append(f'--warmup_iters={steps // 10}')
        self.commands.append(f"python train.py {config} FLAGS {' '.join(always)} --seed=SEED "
                             f'--device={self.cfg.device}')
        for seed in seeds or range(1, self.seeds + 1):
            for name, flags in models.items():
                words = [flag for flag in flags.split() if not flag.startswith('--')]
                args = [config, *(flag for flag in flags.split() if flag.startswith('--')), *always, f'--seed={seed}']
                stem = '-'.join([*words, *(os.path.basename(arg.lstrip('-')) for arg in args)])
                if len(stem) > 250:         # file systems take 255 bytes
                    stem = f'{stem[:200]}-{hashlib.sha256(stem.encode()).hexdigest()[:16]}'
                jobs.append((os.path.join(self.folder, stem), words, args, steps))
        runs = self.each(self.one, jobs)
        return {name: runs[n::len(models)] for n, name in enumerate(models)}

    def each(self, function, jobs):
        """[function(*job) for job in jobs], several at a time. After an error or Ctrl-C no other one starts."""
        with concurrent.futures.ThreadPoolExecutor(self.cfg.workers) as pool:
            futures = [pool.submit(function, *job) for job in jobs]
            try:
                for n, future in enumerate(concurrent.futures.as_completed(futures), start=1):
                    future.result()
                    done = jobs[futures.index(future)][0]       # a folder or its Run
                    print(f'{self.claim}: {n} of {len(jobs)}, {(time.time() - self.started) / 60:.1f} minutes | '
                          f'{getattr(done, "folder", done)}', file=sys.stderr, flush=True)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)      # what runs saves and stops
                raise
        return [future.result() for future in futures]

    def save(self, picture):
        """Write the section's picture, results/<title>.png beside the page, and return the link to it."""
        name = self.title.replace(' ', '_').replace('/', '_') + '.png'
        link = os.path.join('results', name)                    # as RESULTS.md, which lies beside the folder, has it
        path = os.path.join(os.path.dirname(self.cfg.to), link)
        if self.cfg.quick:
            link = path = os.path.join(self.folder, name)
        plot.save_figure(picture, path)
        return f'![{self.title}]({link})'

    def one(self, folder, words, args, steps):
        """The Run of one command, which is given what there is of it already."""
        resume = []
        if os.path.isfile(os.path.join(folder, 'ckpt.pt')):
            resume, made = ['--init_from=resume'], ckpt.load(folder)['config']
            for key, value in dataclasses.asdict(settings.parse(train.TrainConfig, args)).items():
                if key not in FREE and made.get(key, value) != value:
                    raise UserError(f'{folder} was trained with {key}={made[key]!r}, not {value!r}: delete it')
        if read_run(folder, steps) is None:
            command([*(['-m', 'lab.ablate', *words] if words else ['train.py']), *args, *resume, f'--out_dir={folder}',
                     f'--device={self.cfg.device}'])
        return read_run(folder, steps)


RUNNING = set()     # processes of `command`


def stop(*_):
    """What SIGTERM does: passes it on to the runs, which save, and ends as Ctrl-C, which they get from the terminal."""
    for process in list(RUNNING):
        process.terminate()
    raise KeyboardInterrupt


def command(args):
    """Run python with these arguments, on one thread; UserError with the last line that it printed if it fails."""
    process = subprocess.Popen([sys.executable, *args], env={**os.environ, 'OMP_NUM_THREADS': '1'},
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    RUNNING.add(process)
    output, _ = process.communicate()
    RUNNING.remove(process)
    if process.returncode:
        last = (output.strip().splitlines() or ['no output'])[-1]
        raise UserError(f'python {shlex.join(args)}: {last}')


# ----------------------------------------------------------------------------------------------------------------------
# Tables and pictures


def spread(values, form='{:.4f}'):
    """Mean and sample standard deviation as text; a None is a seed that never got there, and is counted."""
    there = [v for v in values if v is not None]
    if not there:
        return 'never'
    text = form.format(statistics.mean(there))
    text += f' ± {form.format(statistics.stdev(there))}' if len(there) > 1 else ''
    return text if len(there) == len(values) else f'{text} ({len(there)} of {len(values)} seeds)'


def last(figure, form='{:.4f}'):
    """A column of `table`: the figure at the end of each run."""
    return lambda runs: spread([getattr(run, figure)[-1] for run in runs], form) if getattr(runs[0], figure) else ''


def mean_loss(runs):
    """The validation loss at the end, mean over the runs."""
    return statistics.mean(run.val_loss[-1] for run in runs)


def steps_to(figure, goal):
    """A column of `table`: the step at which a figure gets to the goal."""
    return lambda runs: spread([run.crossing(figure, goal) for run in runs], '{:.0f}')


def table(first, models, runs, columns):
    """Markdown: a row for each model, with its flags, its columns and its minutes.

    columns: {header: a function of [Run], or {name of the model: text}}.
    """
    columns = {**columns, 'minutes': lambda runs: f'{statistics.mean(run.seconds for run in runs) / 60:.1f}'}
    rows = [[first, 'FLAGS', *columns], ['---'] * (len(columns) + 2)]
    rows += [[name, flags and f'`{flags}`', *(column[name] if isinstance(column, dict) else column(runs[name])
                                               for column in columns.values())] for name, flags in models.items()]
    return '\n'.join(f"| {' | '.join(row)} |" for row in rows)


def curves(runner, title, runs, figure='val_loss', ylabel='validation loss, nats per token'):
    """The claim's picture of {name: [Run]}: mean of the seeds with all of them behind."""
    plt = plot.import_pyplot()
    picture, ax = plt.subplots(figsize=(5.5, 4), layout='constrained')
    for n, (name, some) in enumerate(runs.items()):
        colour, line, marker = plot.STYLES[n % len(plot.STYLES)]
        # a loss from an eighth of the steps on: what comes before would leave no room for the differences
        skip = sum(step < some[0].steps[-1] / 8 for step in some[0].steps) if figure == 'val_loss' else 0
        steps, columns = some[0].steps[skip:], [getattr(run, figure)[skip:] for run in some]
        for column in columns:
            ax.plot(steps, column, color=colour, alpha=0.25, linewidth=1)
        ax.plot(steps, [statistics.mean(values) for values in zip(*columns)], color=colour, linestyle=line,
                marker=marker, markersize=3, label=name)
    ax.set(xlabel='step', ylabel=ylabel, title=title)
    ax.legend(fontsize=8)
    ax.grid(alpha=0.3)
    return runner.save(picture)


def tokens_kept(runner, kept):
    """The picture: tokens kept a layer against context, the paper's beside ours. kept: {name: {context: [tokens]}}."""
    plt = plot.import_pyplot()
    picture, ax = plt.subplots(figsize=(6, 4), layout='constrained')
    for n, (name, points) in enumerate([*kept.items(), ("the paper's", {512: [32], 1024: [41], 2048: [44]})]):
        colour, line, marker = plot.STYLES[n % len(plot.STYLES)]
        ax.plot(list(points), [statistics.mean(values) for values in points.values()], color=colour, linestyle=line,
                marker=marker, label=name)
    ax.set(xlabel='context', ylabel='tokens kept a layer', xscale='log', yscale='log',
           title="at standard attention's loss")
    ax.legend(fontsize=8)
    ax.grid(alpha=0.3)
    return runner.save(picture)
