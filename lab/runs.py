"""What the claims of lab/reproduce.py are made of: runs, what is measured, tables and pictures.

A claim compares models. Each of them is an `Arm`, which has a run of train.py for each seed.
"""

import concurrent.futures
import hashlib
import math
import os
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
        """The figures of each evaluation as a dictionary."""
        return ckpt.read_log(self.folder, 'val_loss')


@dataclass
class Arm:
    """A model of a claim."""

    flags: str  # of train.py; the first word may be a rule of lab.ablate
    runs: list  # a Run for each seed
    losses: object = None  # the Losses of all runs, see `kinds_table`

    def last(self, name):
        """The figure at the end of each run, [] where it is not logged."""
        ends = [run.evaluations[-1] for run in self.runs]
        return [end[name] for end in ends if name in end]

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
            return min(count, 32)
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
        self.commands.append(f'    python train.py {" ".join(flags)} FLAGS --seed=SEED')
        arms = {name: Arm(own, []) for name, own in models.items()}
        jobs = []
        for seed in seeds or range(1, self.cfg.seeds + 1):
            for arm in arms.values():
                rule, dashes, own = arm.flags.partition('--')
                rule = rule.strip()
                args = [*flags, *f'{dashes}{own}'.split(), f'--seed={seed}']
                run = Run(self.folder_of(rule, args), rule)
                arm.runs.append(run)
                jobs.append((run, args, steps))
        self.each(self.one, jobs)
        return arms

    def folder_of(self, rule, args):
        """The folder of a run, whose log.jsonl has the settings.

        Another config file of the same name has another one.
        """
        settled = repr([rule, args, settings.run_config(args[0], train.TrainConfig)])
        digest = hashlib.sha256(settled.encode()).hexdigest()
        return f'{self.cfg.out_dir}/{rule or "train"}-{digest[:16]}'

    def one(self, run, args, steps):
        """Train a run to its end, on from where it has come."""
        script = ['train.py']
        if run.rule:
            script = ['-m', 'lab.ablate', run.rule]
        args = [*script, *args, f'--out_dir={run.folder}', f'--device={self.cfg.device}']
        if os.path.isfile(f'{run.folder}/ckpt.pt'):
            if run.evaluations[-1]['iter'] >= steps:
                return
            args.append('--init_from=resume')
        command(args)

    def each(self, function, jobs):
        """Call function(*job) for each job, several at a time.

        After an error or Ctrl-C no other one starts; what runs saves and stops.
        """
        with concurrent.futures.ThreadPoolExecutor(self.cfg.workers) as pool:
            done = pool.map(function, *zip(*jobs))
            for n, _ in enumerate(done, start=1):
                print(f'{self.title}: {n} of {len(jobs)}', file=sys.stderr)

    def curves(self, arms, figure='val_loss', y='validation loss, nats per token'):
        """Draw a figure of the arms against steps, mean and pale each seed; returns a link to it.

        Without the first evaluation, which would leave no room for differences. The picture is
        <title>.png beside the table.
        """
        means = {}
        pale = {}
        for name, arm in arms.items():
            curves = []
            for run in arm.runs:
                curves += plot.curve(run.folder, run.evaluations[1:], 'iter', figure)
            means[name] = curves[0], np.mean(curves[1::2], axis=0)
            pale[name] = curves
        path = f'{self.cfg.to}/{self.title}.png'
        plot.draw(path, means, self.title, 'step', y, pale)
        return f'![{self.title}]({self.title}.png)'


RUNNING = set()  # processes of `command`


def stop(*_):
    """What SIGTERM does: pass it on to the runs, which save, and end as Ctrl-C does."""
    for process in list(RUNNING):
        process.terminate()
    raise KeyboardInterrupt


def command(args):
    """Run python; UserError with the last line that it printed if it fails."""
    process = subprocess.Popen(
        [sys.executable, *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    RUNNING.add(process)
    output, _ = process.communicate()
    RUNNING.remove(process)
    if process.returncode:
        last = output.strip().split('\n')[-1]
        raise UserError(f'python {shlex.join(args)}: {last}')


# ---- Measuring -----------------------------------------------------------------------------------


def load(run):
    """The model of a run, under its rule, and its checkpoint."""
    if run.rule:
        with ablate.changed(run.rule):
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
        difference = ((self.nats - base.nats).mean(dim=0) * counted).sum(dim=1)
        counts = counted.sum(dim=1)  # a mean over targets: windows have unequal numbers of a kind
        low, high = prune.bootstrap(difference, counts)
        return f'{difference.sum() / counts.sum():+.4f} [{low:+.4f}, {high:+.4f}]'

    def shown(self):
        """The losses of all targets and of recall tokens as text."""
        return f'{spread(self.means(), "{:.3f}")} / {spread(self.means("recall"), "{:.3f}")}'


def joined(found):
    """The Losses of several seeds, from those of each."""
    return Losses(torch.cat([losses.nats for losses in found]), found[0].kinds)


def kinds_of(x, y, near=NEAR):
    """The kind of each target, as a place in KINDS. x, y (B, T) -> (B, T).

    new: the target did not occur in its window before; recall: it did, but not among the newest
    `near` tokens, so that only a longer memory can know it; near: all the others.
    """
    place = torch.arange(1, x.size(1) + 1)
    before = (x[:, None] == y[..., None]) & (place <= place[:, None])  # (B, T, T)
    newest = (before * place).amax(dim=2)  # where the target was last; 0: nowhere
    kinds = torch.where(place - newest < near, 1, 2)
    return kinds.masked_fill(newest == 0, 0)


def token_losses(run, windows, budgets=None, policy='selective'):
    """The Losses of a run on so many validation windows or a few more, which prune.py does not see.

    budgets, policy: of a KVCache; None: the whole context.
    """
    model, checkpoint = load(run)
    text = data.load_dataset(checkpoint['dataset'])
    T = model.config.block_size
    bos = ckpt.starts_with_bos(checkpoint)
    return losses_on(model, text, T, windows, bos, budgets, policy)


@torch.no_grad()
def losses_on(model, text, T, windows, bos, budgets=None, policy='selective'):
    """The Losses of a model on windows of T tokens of a Dataset; see `token_losses`."""
    size = max(1, 4096 // T)
    nats = []
    kinds = []
    for n in range(math.ceil(windows / size)):
        x, y = text.batch('val', n, size, T, 1, bos)
        cache = None
        if budgets:
            cache = m.KVCache(model, size, budgets, policy)
        logits, _ = model(x, y, cache=cache)
        nats.append(fn.cross_entropy(logits.transpose(1, 2), y, reduction='none'))
        kinds.append(kinds_of(x, y))
    return Losses(torch.cat(nats)[None], torch.cat(kinds))


@torch.no_grad()
def records_right(run, folder):
    """The fraction of validation records of a data set, 512 drawn, whose answers are all right."""
    model, _ = load(run)
    questions = data.Dataset(folder)
    right = []
    for n in range(8):
        x, y = questions.batch('val', n, 64, model.config.block_size)
        is_right = (model(x, y)[0].argmax(dim=-1) == y) | (y < 0)
        right += is_right.all(dim=1).tolist()
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

    jobs: [(Run, policy, folder of the model whose loss is the target)]. A model whose loss is above
    the target without pruning is left without a file.
    """

    def one(run, policy, baseline):
        if holds(run, policy):
            return
        args = ['prune.py', f'--out_dir={run.folder}', f'--to=budgets_{policy}.json']
        args += [f'--baseline={baseline}', f'--policy={policy}', f'--windows={windows}']
        args.append(f'--device={runner.cfg.device}')
        try:
            command(args)
        except UserError as e:
            if prune.ABOVE not in str(e):
                raise

    runner.each(one, jobs)


def holds(run, policy):
    """The point with the least memory that keeps the loss on unseen windows, too, or None."""
    path = f'{run.folder}/budgets_{policy}.json'
    if not os.path.isfile(path):
        return None
    return files.read_json(path, 'run prune.py again', held_out=dict)['held_out'].get('holds')


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


def markdown(rows):
    """A table. rows: dictionaries of text; the longest has all headers."""
    header = max(rows, key=len)
    lines = [f'| {" | ".join(header)} |', '| --- ' * len(header) + '|']
    for row in rows:
        cells = [row.get(name, '') for name in header]
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def table(first, arms, cells):
    """Markdown: a row for each arm, with its flags and what cells(arm) is, {header: text}."""
    rows = []
    for name, arm in arms.items():
        flags = arm.flags and f'`{arm.flags}`'
        rows.append({first: name, 'FLAGS': flags, **cells(arm)})
    return markdown(rows)


def kinds_table(runner, first, arms):
    """The table of losses by kind of target, with differences to 'standard'. Fills arm.losses."""
    for arm in arms.values():
        arm.losses = joined([token_losses(run, runner.windows(256)) for run in arm.runs])
    base = arms['standard'].losses

    def cells(arm):
        means = {}
        for kind in KINDS:
            means[f'{kind} ({base.of(kind).mean():.0%})'] = spread(arm.losses.means(kind))
        return {
            'validation loss': spread(arm.losses.means()),
            'against standard': arm.losses.against(base),
            **means,
            'recall against standard': arm.losses.against(base, 'recall'),
            'requirement': spread(arm.last('memory'), '{:.1%}'),
        }

    return table(first, arms, cells)


def against(arms, base):
    """The table of models with temperatures beside one without, the arm `base`."""
    goal = np.mean(arms[base].last('val_loss'))

    def cells(arm):
        losses = arm.last('val_loss')
        first = arm.first(lambda line: line['val_loss'] <= goal)
        return {
            'validation loss': spread(losses),
            f'against {base}': f'{np.mean(losses) - goal:+.4f}',
            'first evaluation with its loss, step': spread(first, '{:.0f}'),
            'position part': spread(position_part(arm)),
        }

    return table('temperatures', arms, cells)
