"""What the claims of lab/reproduce.py are made of: runs, what is measured, tables and pictures.

A claim compares models. Each of them is an `Arm`, which has a run of train.py for each seed.
"""

import concurrent.futures
import hashlib
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
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
    """What a finished run has logged."""

    folder: str
    rule: str  # of lab.ablate; '': train.py itself
    evaluations: list  # dictionaries of the figures at each evaluation
    seconds: float

    def crossing(self, name, goal):
        """The step at which the loss falls to the goal, or another figure rises to it; or None.

        Between two evaluations it is interpolated.
        """
        for before, after in zip(self.evaluations, self.evaluations[1:]):
            a = before[name]
            b = after[name]
            reached = a < goal <= b
            if name == 'val_loss':
                reached = a > goal >= b
            if reached:
                steps = after['iter'] - before['iter']
                return before['iter'] + steps * (a - goal) / (a - b)
        return None


@dataclass
class Arm:
    """A model of a claim."""

    name: str
    flags: str  # of train.py; a word among them is a rule of lab.ablate
    runs: list  # a Run for each seed
    losses: object = None  # the Losses of all runs, see `kinds_table`

    def last(self, name):
        """The figure at the end of each run, [] where it is not logged."""
        found = []
        for run in self.runs:
            if name in run.evaluations[-1]:
                found.append(run.evaluations[-1][name])
        return found

    def crossings(self, name, goal):
        """The step of each run, see `Run.crossing`."""
        return [run.crossing(name, goal) for run in self.runs]


# ---- Running -------------------------------------------------------------------------------------


class Runner:
    """Trains the models of a claim, or finds that they were trained, for this claim or another."""

    def __init__(self, cfg, claim, title):
        self.cfg = cfg
        self.claim = claim
        self.title = title
        self.started = time.time()
        self.commands = []  # of the runs, for the end of the section
        self.about = ''  # the text that they learned from

    def windows(self, count):
        """How many windows to measure on: count, or few in a quick version."""
        if self.cfg.quick:
            return 32
        return count

    def train(self, models, steps, quick, flags, seeds=None):
        """{name: its Arm}. models: {name: its flags as text}.

        steps: of each run, quick: of a quick one, unless --steps says otherwise. flags: a config
        file and the flags of all runs. seeds: of which to train; None: of all.
        """
        if self.cfg.quick:
            steps = quick
        steps = self.cfg.steps or steps
        flags = [*flags, f'--max_iters={steps}', f'--warmup_iters={steps // 10}']
        line = f'    python train.py {" ".join(flags)} FLAGS --seed=SEED'
        if line not in self.commands:
            self.commands.append(line)
        arms = {name: Arm(name, own, []) for name, own in models.items()}
        jobs = {}
        places = []
        for seed in seeds or range(1, self.cfg.seeds + 1):
            for arm in arms.values():
                own = arm.flags.split()
                rule = ''
                if own and not own[0].startswith('--'):
                    rule = own.pop(0)
                args = [*flags, *own, f'--seed={seed}']
                folder = self.folder_of(rule, args)
                jobs[folder] = rule, args, steps
                places.append((arm, folder))
        found = self.each(self.one, jobs)
        for arm, folder in places:
            arm.runs.append(found[folder])
        return arms

    def folder_of(self, rule, args):
        """The folder of a run. Another config file of the same name has another one."""
        settled = [rule, args, settings.run_config(args[0], train.TrainConfig)]
        digest = hashlib.sha256(repr(settled).encode()).hexdigest()
        words = [rule or 'train', *reversed(args)]  # what tells them apart comes first
        name = re.sub(r'[^\w.=]+', '-', ' '.join(words))
        return os.path.join(self.cfg.out_dir, f'{name[:200]}-{digest[:12]}')

    def one(self, folder, rule, args, steps):
        """The Run of one command, which continues what there is of it."""
        found = read_run(folder, rule, steps)
        if found:
            return found
        script = ['train.py']
        if rule:
            script = ['-m', 'lab.ablate', rule]
        place = [f'--out_dir={folder}', f'--device={self.cfg.device}']
        if os.path.isfile(os.path.join(folder, 'ckpt.pt')):
            place.append('--init_from=resume')
        command([*script, *args, *place])
        return read_run(folder, rule, steps)

    def each(self, function, jobs):
        """{path: function(path, *arguments)}, several at a time. jobs: {path: arguments}.

        After an error or Ctrl-C no other one starts.
        """
        found = {}
        with concurrent.futures.ThreadPoolExecutor(self.cfg.workers) as pool:
            path_of = {}
            for path, arguments in jobs.items():
                path_of[pool.submit(function, path, *arguments)] = path
            try:
                for future in concurrent.futures.as_completed(path_of):
                    path = path_of[future]
                    found[path] = future.result()
                    minutes = (time.time() - self.started) / 60
                    progress = f'{self.claim}: {len(found)} of {len(jobs)}, {minutes:.1f} minutes'
                    print(f'{progress} | {path}', file=sys.stderr, flush=True)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # what runs saves and stops
                raise
        return found

    def picture(self, figure):
        """Write results/<title>.png beside the page, and return the link to it."""
        name = self.title.replace(' ', '_').replace('/', '_')
        link = f'results/{name}.png'
        plot.save_figure(figure, os.path.join(os.path.dirname(self.cfg.to), link))
        return f'![{self.title}]({link})'

    def curves(self, arms, name='val_loss', y='validation loss, nats per token'):
        """The picture of a figure of the arms against steps: the mean, and pale each seed.

        From an eighth of the steps on: what comes before would leave no room for differences.
        """
        means = {}
        pale = {}
        for arm in arms.values():
            curves = []
            for run in arm.runs:
                start = run.evaluations[-1]['iter'] / 8
                shown = [line for line in run.evaluations if line['iter'] >= start]
                curves += plot.curve(run.folder, shown, 'iter', name)
            means[arm.name] = curves[0], np.mean(curves[1::2], axis=0)
            pale[arm.name] = curves
        plt = plot.import_pyplot()
        return self.picture(plot.draw(plt, means, pale, self.title, 'step', y))


def read_run(folder, rule, steps):
    """The Run in a folder, None where it has not come to its end."""
    if not os.path.isfile(os.path.join(folder, 'log.jsonl')):
        return None
    log = ckpt.read_log(folder)
    evaluations = [line for line in log if 'val_loss' in line]
    if not evaluations or evaluations[-1]['iter'] < steps:
        return None
    seconds = clock = 0.0
    for line in log:
        now = line.get('seconds', clock)
        if now < clock:  # it was resumed, which starts the clock again
            seconds += clock
        clock = now
    return Run(folder, rule, evaluations, seconds + clock)


RUNNING = set()  # processes of `command`


def stop(*_):
    """What SIGTERM does: pass it on to the runs, which save, and end as Ctrl-C does."""
    for process in list(RUNNING):
        process.terminate()
    raise KeyboardInterrupt


def command(args):
    """Run python on one thread; UserError with the last line that it printed if it fails."""
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True}
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    process = subprocess.Popen([sys.executable, *args], env=env, **pipes)
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


def windows_of(model, checkpoint, count, size, seed=0):
    """Validation windows x, y (B, T) in batches of size, at least count in all."""
    text = data.load_dataset(checkpoint['dataset'])
    bos = ckpt.starts_with_bos(checkpoint)
    for n in range(0, count, size):
        yield text.batch('val', n // size, size, model.config.block_size, seed, bos)


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
        difference = self.nats.mean(dim=0) - base.nats.mean(dim=0)
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
    newest = torch.empty_like(x)  # where the target was last, counted from 1; 0: nowhere
    for b in range(len(x)):
        before = (x[b] == y[b, :, None]) & (j <= j[:, None])  # (T, T)
        newest[b] = (before * (j + 1)).amax(dim=1)
    kinds = torch.where(j + 1 - newest < near, 1, 2)
    return kinds.masked_fill(newest == 0, 0)


@torch.no_grad()
def token_losses(run, windows, budgets=None, policy='selective', rule=''):
    """The Losses of a run on validation windows that prune.py does not see.

    budgets, policy: of a KVCache; None: the whole context. rule: see `load`.
    """
    model, checkpoint = load(run, rule)
    nats = []
    kinds = []
    size = max(1, 4096 // model.config.block_size)
    for x, y in windows_of(model, checkpoint, windows, size, seed=1):
        cache = None
        if budgets:
            cache = m.KVCache(model, size, budgets, policy)
        logits, _ = model(x, y, cache=cache)
        nats.append(fn.cross_entropy(logits.transpose(1, 2), y, reduction='none'))
        kinds.append(kinds_of(x, y))
    return Losses(torch.cat(nats)[None, :windows], torch.cat(kinds)[:windows])


@torch.no_grad()
def records_right(run, folder, batches=8):
    """The fraction of validation records of a data set whose answers are all right."""
    model, _ = load(run)
    questions = data.Dataset(folder, folder)
    right = []
    for n in range(batches):
        x, y = questions.batch('val', n, 64, model.config.block_size)
        answers = model(x, y)[0].argmax(dim=-1)
        right.append(((answers == y) | (y < 0)).all(dim=1).float().mean().item())
    return statistics.mean(right)


class Recorder:
    """In the place of each LayerCache: standard attention that notes how spread out it is."""

    def __init__(self):
        self.entropies = []

    def attend(self, q, k, v, i, rule):
        L = m.logits(q, k).masked_fill(i > i[:, None], float('-inf'))
        P = L.softmax(dim=-1)  # (B, H, T, T)
        entropy = torch.special.entr(P).sum(dim=-1)[..., 1:]  # token 0 sees nothing but itself
        self.entropies.append((entropy / torch.log(i[1:] + 1.0)).mean().item())
        return P @ v


@torch.no_grad()
def entropy(run, batches=4):
    """How spread out standard attention is, from 0, one key gets everything, to 1, all the same.

    The entropy of a row's probabilities as a fraction of the largest possible, mean over rows,
    heads and layers.
    """
    model, checkpoint = load(run)
    recorder = Recorder()
    for x, _ in windows_of(model, checkpoint, 16 * batches, 16):
        cache = m.KVCache(model, len(x))
        cache.layers = [recorder] * len(cache.layers)
        model(x, cache=cache)
    return statistics.mean(recorder.entropies)


def position_part(arm):
    """The factor of log n at the end of training, σ(α) or what the rule has in its place.

    The smallest and the largest of all heads, layers and runs, as text; '' where there is none.
    """
    factors = []
    for run in arm.runs:
        for name, p in ckpt.load(run.folder)['model'].items():
            if name.endswith('.alpha'):
                factors += torch.sigmoid(p).tolist()
            elif name.endswith('.beta'):
                factors += torch.exp(-torch.exp(p)).tolist()
            elif name.endswith('.ssa.q.s'):
                factors += p.tolist()
    if not factors:
        return ''
    return f'{min(factors):.4f} to {max(factors):.4f}'


# ---- Searches of prune.py ------------------------------------------------------------------------


def search(runner, jobs, goal, windows):
    """Have prune.py look for budgets where it has not yet.

    jobs: [(Run, policy, flag that says how far)], goal: see `budgets_path`. A model whose loss is
    above the target without pruning is left without a file.
    """

    def one(path, run, policy, far):
        if held_out(path):
            return
        how = [far, f'--policy={policy}', f'--windows={windows}', f'--device={runner.cfg.device}']
        place = [f'--out_dir={run.folder}', f'--to={os.path.basename(path)}']
        try:
            command(['prune.py', *place, *how])
        except UserError as e:
            if prune.ABOVE not in str(e):
                raise

    paths = {}
    for run, policy, far in jobs:
        paths[budgets_path(run, policy, goal)] = run, policy, far
    runner.each(one, paths)


def budgets_path(run, policy, goal):
    """The file of a search. goal: 'tolerance' or 'baseline', what prune.py is told to keep."""
    return os.path.join(run.folder, f'budgets_{policy}_{goal}.json')


def held_out(path):
    """What a search found on unseen windows, see `prune.unseen`; {} where it is not done."""
    if not os.path.isfile(path):
        return {}
    return files.read_json(path, 'run prune.py again', held_out=dict)['held_out']


def holds(run, policy, goal):
    """The point with the least memory that keeps the loss on unseen windows, too, or None."""
    return held_out(budgets_path(run, policy, goal)).get('holds')


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
    text = form.format(statistics.mean(there))
    if len(there) > 1:
        text += f' ± {form.format(statistics.stdev(there))}'
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
    """Markdown: a row for each arm, with its flags, cells(arm), {header: text}, and its minutes."""
    rows = []
    for arm in arms.values():
        row = {first: arm.name, 'FLAGS': ''}
        if arm.flags:
            row['FLAGS'] = f'`{arm.flags}`'
        row.update(cells(arm))
        row['minutes'] = f'{statistics.mean(run.seconds for run in arm.runs) / 60:.1f}'
        rows.append(row)
    return markdown(list(row), rows)


def kinds_table(runner, first, arms):
    """The table of losses by kind of target, with differences to 'standard'. Fills arm.losses."""
    for arm in arms.values():
        found = [token_losses(run, runner.windows(256)) for run in arm.runs]
        arm.losses = Losses(torch.cat([losses.nats for losses in found]), found[0].kinds)
    base = arms['standard'].losses

    def cells(arm):
        row = {'validation loss': spread(arm.losses.means()), 'against standard': ''}
        for kind in KINDS:
            header = f'{kind} ({base.of(kind).mean():.0%})'
            row[header] = spread(arm.losses.means(kind))
        row['recall against standard'] = ''
        if arm.name != 'standard':
            row['against standard'] = arm.losses.against(base)
            row['recall against standard'] = arm.losses.against(base, 'recall')
        row['requirement'] = spread(arm.last('memory'), '{:.1%}')
        return row

    return table(first, arms, cells)
