"""What the claims of lab/reproduce.py are made of: runs, what is measured, tables and pictures.

A claim compares models. Each of them is an `Arm`, which has a run of train.py for each seed.
"""

import concurrent.futures
import hashlib
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass

from support import settings  # before torch, see support/__init__.py

import numpy as np
import torch
import torch.nn.functional as fn

import data
import kernels
import model as m
import prune
import train
from lab import ablate, plot
from support import checkpoint as ckpt, files
from support.settings import UserError

NEAR = 64  # tokens: what lies farther back is recall
KINDS = 'new', 'near', 'recall'
LEGEND = f"""Losses in nats per token, on the same validation windows for all rows. Kinds of
targets: *new* did not occur in the window before; *recall* did, but not among the newest {NEAR}
tokens; *near* are the others. In brackets: the share of a kind, or a 95% interval over windows
(paired bootstrap), which does not cover how runs differ by their seeds."""


@dataclass
class Run:
    """A run of train.py, or of lab.ablate with a rule."""

    folder: str
    rule: str = ''  # '': train.py itself

    @property
    def evaluations(self):
        """The figures of each evaluation as a dictionary, [] if there was none yet."""
        if not os.path.isfile(os.path.join(self.folder, 'log.jsonl')):
            return []
        return [line for line in ckpt.read_log(self.folder) if 'val_loss' in line]


@dataclass
class Arm:
    """A model of a claim."""

    name: str
    flags: str  # of train.py; the first word may be a rule of lab.ablate
    runs: list  # a Run for each seed
    losses: object = None  # the Losses of all runs, see `kinds_table`

    def last(self, name):
        """The figure at the end of each run, [] where it is not logged."""
        found = []
        for run in self.runs:
            end = run.evaluations[-1]
            if name in end:
                found.append(end[name])
        return found

    def first(self, reached):
        """The step of each run's first evaluation for which reached(figures) holds, or None."""
        found = []
        for run in self.runs:
            steps = [line['iter'] for line in run.evaluations if reached(line)]
            found.append(min(steps, default=None))
        return found


# ---- Running -------------------------------------------------------------------------------------


class Runner:
    """Trains the models of a claim, or finds that they were trained, for this claim or another."""

    def __init__(self, cfg, title):
        self.cfg = cfg
        self.title = title
        self.commands = []  # of the runs, for the end of the section
        self.about = ''  # the text that they learned from

    def windows(self, count):
        """How many windows to measure on: count, or few in a quick version."""
        if self.cfg.quick:
            return 32
        return count

    def train(self, models, steps, flags, seeds=None):
        """{name: its Arm}. models: {name: its flags as text}.

        steps: of each run, unless --steps says otherwise. flags: a config file and the flags of all
        runs. seeds: of which to train; None: of all.
        """
        if self.cfg.quick:
            steps //= 8
        steps = self.cfg.steps or steps
        flags = [*flags, f'--max_iters={steps}', f'--warmup_iters={steps // 10}']
        line = f'    python train.py {" ".join(flags)} FLAGS --seed=SEED'
        if line not in self.commands:
            self.commands.append(line)
        arms = {name: Arm(name, own, []) for name, own in models.items()}
        jobs = []
        for seed in seeds or range(1, self.cfg.seeds + 1):
            for arm in arms.values():
                own = arm.flags.split()
                rule = ''
                if own and not own[0].startswith('--'):
                    rule = own.pop(0)
                args = [*flags, *own, f'--seed={seed}']
                run = Run(self.folder_of(rule, args), rule)
                arm.runs.append(run)
                jobs.append((run, args, steps))
        self.each(self.one, jobs)
        return arms

    def folder_of(self, rule, args):
        """The folder of a run. Another config file of the same name has another one."""
        settled = [rule, args, settings.run_config(args[0], train.TrainConfig)]
        digest = hashlib.sha256(repr(settled).encode()).hexdigest()
        words = ' '.join([rule or 'train', *reversed(args)])  # what tells them apart comes first
        name = re.sub(r'[^\w.=]+', '-', words)[:200]
        return os.path.join(self.cfg.out_dir, f'{name}-{digest[:12]}')

    def one(self, run, args, steps):
        """Train a run to its end, on from where it has come."""
        done = run.evaluations
        if done and done[-1]['iter'] >= steps:
            return
        script = ['train.py']
        if run.rule:
            script = ['-m', 'lab.ablate', run.rule]
        args = [*script, *args, f'--out_dir={run.folder}', f'--device={self.cfg.device}']
        if os.path.isfile(os.path.join(run.folder, 'ckpt.pt')):
            args.append('--init_from=resume')
        command(args)

    def each(self, function, jobs):
        """Call function(*job) for each job, several at a time.

        After an error or Ctrl-C no other one starts.
        """
        with concurrent.futures.ThreadPoolExecutor(self.cfg.workers) as pool:
            futures = [pool.submit(function, *job) for job in jobs]
            try:
                for n, future in enumerate(futures, start=1):
                    future.result()
                    print(f'{self.title}: {n} of {len(jobs)}', file=sys.stderr)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # what runs saves and stops
                raise

    def curves(self, arms, name='val_loss', y='validation loss, nats per token'):
        """Draw a figure of the arms against steps, mean and pale each seed; returns a link to it.

        Without the first evaluation, which would leave no room for differences. The picture is
        results/<title>.png beside the page.
        """
        means = {}
        pale = {}
        for arm in arms.values():
            curves = []
            for run in arm.runs:
                curves += plot.curve(run.folder, run.evaluations[1:], 'iter', name)
            means[arm.name] = curves[0], np.mean(curves[1::2], axis=0)
            pale[arm.name] = curves
        link = f'results/{re.sub("[ /]", "_", self.title)}.png'
        figure = plot.draw(means, pale, self.title, 'step', y)
        plot.save_figure(figure, os.path.join(os.path.dirname(self.cfg.to), link))
        return f'![{self.title}]({link})'


RUNNING = set()  # processes of `command`


def stop(*_):
    """What SIGTERM does: pass it on to the runs, which save, and end as Ctrl-C does."""
    for process in list(RUNNING):
        process.terminate()
    raise KeyboardInterrupt


def command(args):
    """Run python; UserError with the last line that it printed if it fails."""
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True}
    process = subprocess.Popen([sys.executable, *args], **pipes)
    RUNNING.add(process)
    output, _ = process.communicate()
    RUNNING.remove(process)
    if process.returncode:
        last = output.strip().rpartition('\n')[2]
        raise UserError(f'python {shlex.join(args)}: {last or "no output"}')


# ---- Measuring -----------------------------------------------------------------------------------


def load(run, rule=''):
    """The model of a run and its checkpoint, under a rule of lab.ablate or that of its training."""
    rule = rule or run.rule
    if rule:
        with ablate.changed(rule):
            return ckpt.load_model(run.folder)
    model, checkpoint = ckpt.load_model(run.folder)
    kernels.install(model)
    return model, checkpoint


@dataclass
class Losses:
    """The loss of each target of some windows, and its kind."""

    nats: torch.Tensor  # (seeds, windows, T)
    kinds: torch.Tensor  # (windows, T), places in KINDS

    def of(self, kind):
        """(windows, T): 1 where a target is of this kind, 0 elsewhere; None: all kinds."""
        if kind is None:
            return torch.ones(self.kinds.shape)
        return (self.kinds == KINDS.index(kind)).float()

    def means(self, kind=None):
        """The mean loss of each seed."""
        counted = self.of(kind)
        return ((self.nats * counted).sum(dim=(1, 2)) / counted.sum()).tolist()

    def against(self, base, kind=None):
        """The difference to other Losses on the same windows, and its 95% interval, as text.

        Seeds are averaged first: each window counts once in an interval over windows.
        """
        counted = self.of(kind)
        difference = (self.nats - base.nats).mean(dim=0)
        difference = (difference * counted).sum(dim=1)
        counts = counted.sum(dim=1)  # a mean over targets: windows have unequal numbers of a kind
        low, high = prune.bootstrap(difference, counts)
        return f'{difference.sum() / counts.sum():+.4f} [{low:+.4f}, {high:+.4f}]'


def kinds_of(x, y, near=NEAR):
    """The kind of each target, as a place in KINDS. x, y (B, T) -> (B, T).

    new: the target did not occur in its window before; recall: it did, but not among the newest
    `near` tokens, so that only a longer memory can know it; near: all the others.
    """
    j = torch.arange(x.size(1))
    before = (x[:, None] == y[..., None]) & (j <= j[:, None])  # (B, T, T)
    newest = (before * (j + 1)).amax(dim=2)  # where the target was last, from 1; 0: nowhere
    kinds = torch.where(j + 1 - newest < near, 1, 2)
    return kinds.masked_fill(newest == 0, 0)


@torch.no_grad()
def token_losses(run, windows, budgets=None, policy='selective', rule=''):
    """The Losses of a run on so many validation windows or a few more, which prune.py does not see.

    budgets, policy: of a KVCache; None: the whole context. rule: see `load`.
    """
    model, checkpoint = load(run, rule)
    text = data.load_dataset(checkpoint['dataset'])
    bos = ckpt.starts_with_bos(checkpoint)
    T = model.config.block_size
    size = max(1, 4096 // T)
    nats = []
    kinds = []
    for n in range(0, windows, size):
        x, y = text.batch('val', n // size, size, T, seed=1, bos=bos)
        cache = None
        if budgets:
            cache = m.KVCache(model, size, budgets, policy)
        logits, _ = model(x, y, cache=cache)
        nats.append(fn.cross_entropy(logits.transpose(1, 2), y, reduction='none'))
        kinds.append(kinds_of(x, y))
    return Losses(torch.cat(nats)[None], torch.cat(kinds))


@torch.no_grad()
def records_right(run, folder, batches=8):
    """The fraction of validation records of a data set whose answers are all right."""
    model, _ = load(run)
    questions = data.Dataset(folder)
    right = []
    for n in range(batches):
        x, y = questions.batch('val', n, 64, model.config.block_size)
        answers = model(x, y)[0].argmax(dim=-1)
        right += ((answers == y) | (y < 0)).all(dim=1).tolist()
    return np.mean(right)


def position_part(arm):
    """The factors of log n in SSA at the end of training, σ(α), of all heads, layers and runs."""
    factors = []
    for run in arm.runs:
        for name, p in ckpt.load(run.folder)['model'].items():
            if name.endswith('.alpha'):
                factors += torch.sigmoid(p).tolist()
    return factors


# ---- Searches of prune.py ------------------------------------------------------------------------


def search(runner, jobs, windows):
    """Have prune.py look for budgets where it has not yet.

    jobs: [(Run, policy, flag that says how far)]. A model whose loss is above the target without
    pruning is left without a file.
    """

    def one(run, policy, far):
        if holds(run, policy):
            return
        args = [f'--out_dir={run.folder}', f'--to=budgets_{policy}.json', far]
        args += [f'--policy={policy}', f'--windows={windows}', f'--device={runner.cfg.device}']
        try:
            command(['prune.py', *args])
        except UserError as e:
            if prune.ABOVE not in str(e):
                raise

    runner.each(one, jobs)


def holds(run, policy):
    """The point with the least memory that keeps the loss on unseen windows, too, or None."""
    path = os.path.join(run.folder, f'budgets_{policy}.json')
    if not os.path.isfile(path):
        return None
    found = files.read_json(path, 'run prune.py again', held_out=dict)
    return found['held_out'].get('holds')


# ---- Tables --------------------------------------------------------------------------------------


def spread(values, form='{:.4f}'):
    """Mean and sample standard deviation as text.

    None is a seed that never got there, and is counted.
    """
    if not values:
        return ''
    there = [value for value in values if value is not None]
    if not there:
        return 'never'
    text = form.format(np.mean(there))
    if len(there) > 1:
        text += f' ± {form.format(np.std(there, ddof=1))}'
    if len(there) < len(values):
        text += f' ({len(there)} of {len(values)} seeds)'
    return text


def markdown(header, rows):
    """A table. rows: dictionaries of text; what is not in one of them stays empty."""
    lines = [f'| {" | ".join(header)} |', '| --- ' * len(header) + '|']
    for row in rows:
        cells = [row.get(name, '') for name in header]
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def table(first, arms, cells):
    """Markdown: a row for each arm, with its flags and what cells(arm) is, {header: text}."""
    rows = []
    for arm in arms.values():
        flags = arm.flags and f'`{arm.flags}`'
        rows.append({first: arm.name, 'FLAGS': flags, **cells(arm)})
    return markdown(list(rows[0]), rows)


def kinds_table(runner, first, arms):
    """The table of losses by kind of target, with differences to 'standard'. Fills arm.losses."""
    for arm in arms.values():
        found = [token_losses(run, runner.windows(256)) for run in arm.runs]
        arm.losses = Losses(torch.cat([losses.nats for losses in found]), found[0].kinds)
    base = arms['standard'].losses

    def cells(arm):
        row = {'validation loss': spread(arm.losses.means())}
        row['against standard'] = arm.losses.against(base)
        for kind in KINDS:
            row[f'{kind} ({base.of(kind).mean():.0%})'] = spread(arm.losses.means(kind))
        row['recall against standard'] = arm.losses.against(base, 'recall')
        row['requirement'] = spread(arm.last('memory'), '{:.1%}')
        return row

    return table(first, arms, cells)
