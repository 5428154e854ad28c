"""The parts of the claims of lab/reproduce.py: runs, measurements, tables and pictures.

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

import data
import prune
import train
from lab import ablate, plot
from support import checkpoint as ckpt, files
from support.settings import UserError

NEAR = 64  # tokens: what lies farther back is recall
LEGEND = f"""Losses in nats per token, on the same validation windows for all rows. *Recall* tokens
are targets that occurred in the window before, but not among the newest {NEAR} tokens. In brackets:
their share, or a 95% interval over windows (paired bootstrap), which does not cover how runs differ
by their seeds."""


class Arm:
    """A model of a claim, with a run for each seed."""

    def __init__(self, flags):
        """flags: of train.py, as text; the first word may be a rule of lab.ablate."""
        self.flags = flags
        rule, dashes, options = flags.partition('--')
        self.rule = rule.strip()
        self.options = f'{dashes}{options}'.split()
        self.folders = []  # of the runs
        self.losses = None  # the Losses of all runs, see `losses_table`

    def curve(self, figure):
        """The steps of the evaluations that log a figure, and its values (seeds, steps)."""
        values = []
        for folder in self.folders:
            steps, found = plot.curve(folder, figure)
            values.append(found)
        return np.array(steps), np.array(values)

    def last(self, figure):
        """The figure at the end of each run, (seeds,), or (0,) where it is not logged."""
        _, values = self.curve(figure)
        return values[:, -1:].ravel()


# ---- Running -------------------------------------------------------------------------------------


class Runner:
    """Trains the models of a claim, or finds that they were trained, for this claim or another."""

    def __init__(self, cfg, title):
        self.cfg = cfg
        self.title = title

    def train(self, models, steps, flags, seeds=None):
        """{name: its Arm}. models: {name: its flags as text}.

        steps: of each run, unless --steps says otherwise. flags: a config file and the flags of all
        runs. seeds: of which to train; None: of all.
        """
        if self.cfg.quick:
            steps //= 8
        steps = self.cfg.steps or steps
        flags = [*flags, f'--max_iters={steps}', f'--warmup_iters={steps // 10}']
        arms = {}
        commands = []
        for name, own in models.items():
            arm = Arm(own)
            arms[name] = arm
            script = ['train.py']
            if arm.rule:
                script = ['-m', 'lab.ablate', arm.rule]
            for seed in seeds or range(1, self.cfg.seeds + 1):
                args = [*flags, *arm.options, f'--seed={seed}']
                folder = self.folder_of(arm.rule, args)
                arm.folders.append(folder)
                args += [f'--out_dir={folder}', f'--device={self.cfg.device}']
                if os.path.isfile(f'{folder}/ckpt.pt'):
                    if ckpt.read_log(folder, 'val_loss')[-1]['iter'] >= steps:
                        continue
                    args.append('--init_from=resume')
                commands.append([*script, *args])
        self.run(commands)
        return arms

    def folder_of(self, rule, args):
        """The folder of a run, whose log.jsonl has the settings.

        Another config file of the same name has another one.
        """
        settled = repr([rule, args, settings.run_config(args[0], train.TrainConfig)])
        digest = hashlib.sha256(settled.encode()).hexdigest()
        return f'{self.cfg.out_dir}/{rule or "train"}-{digest[:16]}'

    def run(self, commands):
        """Run python with each of these lists of arguments, several at a time.

        After an error or Ctrl-C no other one starts; what runs saves and stops.
        """
        with concurrent.futures.ThreadPoolExecutor(self.cfg.workers) as pool:
            list(pool.map(command, commands))

    def curves(self, arms, figure='val_loss', y='validation loss, nats per token'):
        """Draw a figure of the arms against steps, the mean over seeds; returns a link to it.

        Without the first evaluation, which would leave no room for differences.
        """
        means = {}
        for name, arm in arms.items():
            steps, values = arm.curve(figure)
            means[name] = steps[1:], values.mean(axis=0)[1:]
        plot.draw(f'{self.cfg.out_dir}/{self.title}.png', means, self.title, 'step', y)
        return f'![{self.title}]({self.title}.png)'


def command(args):
    """Run python; UserError with the last line that it printed if it fails.

    A search of prune.py that has nothing to find does not count as a failure.
    """
    shown = f'python {shlex.join(args)}'
    print(shown, file=sys.stderr)
    process = subprocess.run([sys.executable, *args], capture_output=True, text=True)
    if process.returncode and prune.ABOVE not in process.stderr:
        last = process.stderr.strip().split('\n')[-1]
        raise UserError(f'{shown}: {last}')


# ---- Measuring -----------------------------------------------------------------------------------


def load(folder, rule=''):
    """The model of a run, under its rule, and its checkpoint."""
    if rule:
        with ablate.changed(rule):
            return ckpt.load_model(folder)
    return ckpt.load_model(folder)


@dataclass
class Losses:
    """The loss of each target of some windows. Means are over all, or over recall tokens alone."""

    nats: torch.Tensor  # (seeds, windows, T)
    recall: torch.Tensor  # (windows, T), whether a target is a recall token

    def means(self, all_targets=True):
        """The mean loss of each seed."""
        counted = self.recall | all_targets
        return ((self.nats * counted).sum(dim=(1, 2)) / counted.sum()).tolist()

    def against(self, base, all_targets=True):
        """The difference to other Losses on the same windows, and its 95% interval, as text.

        Seeds are averaged first: each window counts once in an interval over windows.
        """
        counted = self.recall | all_targets
        difference = ((self.nats - base.nats).mean(dim=0) * counted).sum(dim=1)
        counts = counted.sum(dim=1)  # a mean over targets: windows have unequal numbers of a kind
        low, high = prune.bootstrap(difference, counts)
        return f'{difference.sum() / counts.sum():+.4f} [{low:+.4f}, {high:+.4f}]'

    def shown(self):
        """The losses of all targets and of recall tokens as text."""
        return f'{spread(self.means(), "{:.3f}")} / {spread(self.means(False), "{:.3f}")}'


def joined(found):
    """The Losses of several seeds, from those of each."""
    return Losses(torch.cat([losses.nats for losses in found]), found[0].recall)


def is_recall(x, y, near=NEAR):
    """Whether targets are recall tokens. x, y (B, T) -> (B, T).

    Such a target occurred in its window before, but not among the newest `near` tokens, so that
    only a longer memory can know it.
    """
    before = (x[:, None] == y[..., None]).tril()  # (B, T, T)
    newest = before.triu(1 - near)
    return before.any(dim=2) & ~newest.any(dim=2)


def token_losses(folder, rule, windows, budgets=None, policy='selective'):
    """The Losses of a run on so many validation windows or a few more, which prune.py does not see.

    budgets, policy: of a KVCache; None: the whole context.
    """
    model, checkpoint = load(folder, rule)
    text = data.load_dataset(checkpoint['dataset'], tokenizer=checkpoint['tokenizer'])
    bos = ckpt.starts_with_bos(checkpoint)
    return losses_on(model, text, model.config.block_size, windows, bos, budgets, policy)


@torch.no_grad()
def losses_on(model, text, T, windows, bos, budgets=None, policy='selective'):
    """The Losses of a model on windows of T tokens of a Dataset; see `token_losses`."""
    size = max(1, 4096 // T)
    nats = []
    recall = []
    for n in range(math.ceil(windows / size)):
        x, y = text.batch('val', n, size, T, 1, bos)
        nats.append(prune.token_losses(model, x, y, budgets, policy))
        recall.append(is_recall(x, y))
    return Losses(torch.cat(nats)[None], torch.cat(recall))


@torch.no_grad()
def records_right(folder, questions):
    """The fraction of 512 validation records of a Dataset whose answers a run has all right."""
    model, _ = load(folder)
    x, y = questions.batch('val', 0, 512, model.config.block_size)
    is_right = (model(x, y)[0].argmax(dim=-1) == y) | (y < 0)
    return is_right.all(dim=1).float().mean().item()


# ---- Searches of prune.py ------------------------------------------------------------------------


def search(r, folders, baselines, windows):
    """Have prune.py look for budgets by F and by age, where it has not yet.

    baselines: folders of the models whose losses are the targets. A model whose loss is above the
    target without pruning is left without a file.
    """
    commands = []
    for folder, baseline in zip(folders, baselines):
        for policy in 'selective', 'oldest':
            if not holds(folder, policy):
                args = ['prune.py', f'--out_dir={folder}', f'--to=budgets_{policy}.json']
                args += [f'--baseline={baseline}', f'--policy={policy}', f'--windows={windows}']
                commands.append([*args, f'--device={r.cfg.device}'])
    r.run(commands)


def holds(folder, policy):
    """The point with the least memory that keeps the loss on unseen windows, too, or None."""
    path = f'{folder}/budgets_{policy}.json'
    if os.path.isfile(path):
        return files.read_json(path, 'run prune.py again', held_out=dict)['held_out'].get('holds')


# ---- Tables --------------------------------------------------------------------------------------


def spread(values, form='{:.4f}'):
    """Mean and sample standard deviation as text."""
    if not len(values):
        return ''
    text = form.format(np.mean(values))
    if len(values) > 1:
        text += f' ± {form.format(np.std(values, ddof=1))}'
    return text


def markdown(rows):
    """A table. rows: dictionaries of text; the longest has all headers."""
    header = max(rows, key=len)
    lines = [f'| {" | ".join(header)} |', '| --- ' * len(header) + '|']
    for row in rows:
        cells = [row.get(name, '') for name in header]
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def losses_table(arms):
    """The table of losses, with differences to the arm 'standard'. Fills arm.losses."""
    for arm in arms.values():
        found = [token_losses(folder, arm.rule, 256) for folder in arm.folders]
        arm.losses = joined(found)
    base = arms['standard'].losses
    share = base.recall.float().mean()
    rows = []
    for name, arm in arms.items():
        row = {
            'model': name,
            'FLAGS': arm.flags,
            'validation loss': spread(arm.losses.means()),
            'against standard': arm.losses.against(base),
            f'recall ({share:.0%})': spread(arm.losses.means(False)),
            'recall against standard': arm.losses.against(base, False),
            'requirement': spread(arm.last('memory'), '{:.1%}'),
        }
        rows.append(row)
    return markdown(rows)


def steps_table(arms):
    """The table of models with temperatures, and when they have the loss of the first, without."""
    base = next(iter(arms))
    goal = arms[base].last('val_loss').mean()
    rows = []
    for name, arm in arms.items():
        steps, losses = arm.curve('val_loss')
        mean = losses.mean(axis=0)
        row = {
            'model': name,
            'FLAGS': arm.flags,
            'validation loss': spread(losses[:, -1]),
            f'against {base}': f'{mean[-1] - goal:+.4f}',
            'first step with its loss': str(min(steps[mean <= goal], default='never')),
        }
        rows.append(row)
    return markdown(rows)
