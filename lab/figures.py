"""What is measured after training: losses by kind of target, records answered, entropy of attention, memory kept."""
import contextlib
import os
import statistics
from dataclasses import dataclass

import torch
import torch.nn.functional as fn

import data
import kernels
import model as m
import prune
from lab import ablate
from lab.runs import command, spread, table
from support import checkpoint as ckpt, files
from support.settings import UserError

# ---- Losses by kind of target

NEAR = 64       # tokens: what lies farther back is recall
KINDS = 'new', 'near', 'recall'


def kinds(x, y, near=NEAR):
    """The kind of each target, as a place in KINDS. x, y (B, T) -> (B, T).

    new: the target did not occur in its window before; recall: it did, but not among the newest `near` tokens, which is
    what only a memory longer than that can know; near: all the others.
    """
    B, T = x.shape
    j = torch.arange(T)
    newest = torch.stack([((x[b] == y[b, :, None]) & (j <= j[:, None])).mul(j + 1).amax(dim=1) for b in range(B)])
    return torch.where(newest == 0, 0, torch.where(j + 1 - newest < near, 1, 2))


def rule_of(folder):
    """The rule of lab.ablate that a run was trained with, None for train.py: the Runner puts it first in the name."""
    rule = os.path.basename(folder).split('-')[0]
    with contextlib.suppress(UserError):
        ablate.parse(rule)
        return rule


@dataclass
class Losses:
    """The loss of each target of some windows, and its kind."""
    nats: torch.Tensor      # (windows, T)
    kinds: torch.Tensor     # (windows, T), places in KINDS

    def of(self, kind):
        """(windows, T): 1 where a target is of this kind, 0 elsewhere; None stands for all kinds."""
        return torch.ones_like(self.nats) if kind is None else (self.kinds == KINDS.index(kind)).float()

    def mean(self, kind=None):
        return ((self.nats * self.of(kind)).sum() / self.of(kind).sum()).item()

    def against(self, base, kind=None):
        """The difference to other Losses on the same windows and its 95% interval over windows, as text."""
        difference, counted = ((self.nats - base.nats) * self.of(kind)).sum(dim=1), self.of(kind).sum(dim=1)
        low, high = prune.bootstrap(difference, counted)    # a mean over targets: windows have unequal numbers of a kind
        return f'{difference.sum() / counted.sum():+.4f} [{low:+.4f}, {high:+.4f}]'


def mean_over_seeds(several):
    """The Losses of several seeds on the same windows, as one: each window counts once in an interval over windows."""
    return Losses(torch.stack([one.nats for one in several]).mean(dim=0), several[0].kinds)


@torch.no_grad()
def token_losses(run, windows, budgets=None, policy='selective', rule=None, seed=1):
    """The Losses of a run on validation windows that prune.py does not see.

    budgets, policy: of a KVCache; None: the whole context. rule: of lab.ablate; None: the one it was trained with.
    """
    rule = rule or rule_of(run.folder)
    with ablate.changed(rule) if rule else contextlib.nullcontext():
        model, checkpoint = ckpt.load_model(run.folder)
        if not rule:
            kernels.install(model)
        text, T, found = data.load_dataset(checkpoint['dataset']), model.config.block_size, []
        size = max(1, 4096 // T)
        for n in range(-(-windows // size)):
            x, y = text.batch('val', n, size, T, seed, bos=ckpt.starts_with_bos(checkpoint))
            cache = m.KVCache(model, size, budgets, policy) if budgets else None
            logits, _ = model(x, y, cache=cache)
            found.append(Losses(fn.cross_entropy(logits.transpose(1, 2), y, reduction='none'), kinds(x, y)))
    return Losses(*(torch.cat([getattr(one, name) for one in found])[:windows] for name in ('nats', 'kinds')))


def measure(runner, runs):
    """{name: [Losses of each seed]} of {name: [Run]}, on the same windows for all."""
    return {name: [token_losses(run, 32 if runner.cfg.quick else 256) for run in some] for name, some in runs.items()}


def mean_of(losses):
    """The mean loss of several seeds."""
    return statistics.mean(one.mean() for one in losses)


LEGEND = f"""Losses in nats per token, on the same validation windows for all rows. Kinds of targets: *new* did not occur in the
window before; *recall* did, but not among the newest {NEAR} tokens; *near* are the others. In brackets: the share of a kind, or a
95% interval over windows (paired bootstrap), which does not cover how runs differ by their seeds."""


def kinds_table(first, models, runs, losses, extra=None, base='standard'):
    """The table of losses by kind of target: the seeds' means, and differences to the model `base`.

    losses: of `measure`; extra: more columns, as `table` takes them.
    """
    whole = {name: mean_over_seeds(some) for name, some in losses.items()}

    def means(kind=None):
        return lambda name: spread([one.mean(kind) for one in losses[name]])

    def against(kind=None):
        return lambda name: '' if name == base else whole[name].against(whole[base], kind)
    columns = {'validation loss': means(), f'against {base}': against()}
    columns |= {f'{kind} ({whole[base].of(kind).mean():.0%})': means(kind) for kind in KINDS}
    columns |= {f'recall against {base}': against('recall')}
    columns = {header: {name: column(name) for name in models} for header, column in columns.items()}
    return table(first, models, runs, {**columns, **(extra or {})})


# ---- Records of questions and answers, entropy


@torch.no_grad()
def records_right(run, folder, batches=8):
    """The fraction of validation records of a data set whose answers are all right."""
    model, _ = ckpt.load_model(run.folder)
    questions, right = data.Dataset(folder, folder), []
    for n in range(batches):
        x, y = questions.batch('val', n, 64, model.config.block_size)
        right.append(((model(x, y)[0].argmax(dim=-1) == y) | (y < 0)).all(dim=1).float().mean().item())
    return statistics.mean(right)


def right_in(folders):
    """Columns of `table` from {header: folder of a data set}."""
    return {header: lambda runs, folder=folder: spread([records_right(run, folder) for run in runs], '{:.1%}')
            for header, folder in folders.items()}


@torch.no_grad()
def entropy(run, batches=4):
    """How spread out attention is: the entropy of a row's probabilities, as a fraction of the largest possible, mean
    over rows, heads and layers. 0: one key gets everything; 1: all the same."""
    rule = rule_of(run.folder)
    with ablate.changed(rule) if rule else contextlib.nullcontext():
        model, checkpoint = ckpt.load_model(run.folder)
    text, entropies, attention = data.load_dataset(checkpoint['dataset']), [], m.fn.scaled_dot_product_attention

    def recorded(q, k, v, **kwargs):
        T = q.size(2)
        hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
        L = (q @ k.transpose(-2, -1) * q.size(-1)**-0.5).masked_fill(hidden, float('-inf'))
        entropy = -(L.softmax(dim=-1) * L.log_softmax(dim=-1).masked_fill(hidden, 0)).sum(dim=-1)       # (B, H, T)
        entropies.append((entropy[..., 1:] / torch.arange(2, T + 1).log()).mean().item())
        return attention(q, k, v, **kwargs)
    m.fn.scaled_dot_product_attention = recorded
    try:
        for n in range(batches):
            model(text.batch('val', n, 16, model.config.block_size, bos=ckpt.starts_with_bos(checkpoint))[0])
    finally:
        m.fn.scaled_dot_product_attention = attention
    return statistics.mean(entropies)


# ---- SSA's parameters


def position_part(runs):
    """A column of `table`: the factor of log n at the end of training, smallest and largest head of all layers and
    runs: σ(α), or what the rule has in its place; '' where there is none."""
    factors = []
    for run in runs:
        for name, p in ckpt.load(run.folder)['model'].items():
            if name.endswith('.alpha'):
                factors += torch.sigmoid(p).tolist()
            elif name.endswith('.ssa.q.beta'):
                factors += torch.exp(-torch.exp(p)).tolist()
            elif name.endswith('.ssa.q.s'):
                factors += p.tolist()
    return f'{min(factors):.4f} to {max(factors):.4f}' if factors else ''


def new_parameters(run):
    """The share that the temperatures have of a run's parameters."""
    sizes = {name: p.numel() for name, p in ckpt.load(run.folder)['model'].items() if name != 'lm_head.weight'}
    return sum(size for name, size in sizes.items() if '.ssa.' in name) / sum(sizes.values())


# ---- Searches of prune.py


def search(runner, jobs, windows):
    """Have prune.py look for budgets where it has not yet. jobs: [(run, policy, flags that say how far, file)].

    A model whose loss is above the target without pruning is left without a file.
    """
    def one(run, policy, flags, file):
        if not held_out(run, file):
            try:
                command(['prune.py', f'--out_dir={run.folder}', *flags, f'--policy={policy}', f'--windows={windows}',
                         f'--device={runner.cfg.device}', f'--to={file}'])
            except UserError as e:
                if prune.ABOVE not in str(e):
                    raise
    runner.each(one, jobs)


def held_out(run, file):
    """What a search found on unseen windows, see `prune.unseen`; {} where it has yet to be done."""
    path = os.path.join(run.folder, file)
    return files.read_json(path, {'held_out': dict}, 'run prune.py again')['held_out'] if os.path.isfile(path) else {}


def holds(run, file):
    """The point with the least memory that keeps the loss on unseen windows, too, or None."""
    return held_out(run, file).get('holds')


def saving(file):
    """A column of `table`: how many times less memory the budgets take that hold on unseen windows."""
    return lambda runs: spread([(holds(run, file) or {}).get('saving') for run in runs], '{:.1f}x')


def equal_memory(r, T, runs, kept, flags):
    """Text: what each model keeps of T tokens for standard attention's loss, and what others do with as many tokens.

    r: a Runner; runs: {name: [Run of each seed]}, 'standard' among them. Adds the tokens kept a layer to kept, {name:
    {context: [tokens]}}. flags: of the controls, which are trained for the model of each seed that keeps the least.
    """
    windows, count = (32, 32) if r.cfg.quick else (max(32, 16384 // T), max(64, 32768 // T))   # search, table
    file, policies = 'budgets_{}_baseline.json', ('selective', 'oldest')
    models, rows = [name for name in runs if name != 'standard'], []
    search(r, [(run, policy, [f'--baseline={base.folder}'], file.format(policy)) for name in models
               for run, base in zip(runs[name], runs['standard']) for policy in policies], windows)

    def row(name, *losses, budgets='', saved=('', '')):
        rows.append([f'{name}, seed {seed}' if r.seeds > 1 else name, budgets, *saved,
                     *(f"{one.mean():.3f} / {one.mean('recall'):.3f}" for one in losses), *[''] * (7 - len(losses))])

    for seed, base in enumerate(runs['standard'], start=1):
        found = {name: [holds(runs[name][seed - 1], file.format(policy)) for policy in policies] for name in models}
        least = min((statistics.mean(by_F['budgets']) for by_F, _ in found.values() if by_F), default=None)
        if least is not None:
            K = max(2, round(least))
            controls = r.train({'window': f'window={K} --selective', 'ALiBi': 'alibi --selective'},
                               r.cfg.config, 1000, flags, quick=100, seeds=[seed])
        row('standard', token_losses(base, count))
        for name, (by_F, by_age) in found.items():
            for label, point in (name, by_F), (f'{name}, newest', by_age):
                if point:
                    kept.setdefault(label, {}).setdefault(T, []).append(statistics.mean(point['budgets']))
            run = runs[name][seed - 1]
            saved, losses = [f"{point['saving']:.1f}x" if point else 'none' for point in (by_F, by_age)], []
            if by_F:
                budgets = by_F['budgets']
                losses = [token_losses(run, count, budgets, policy) for policy in (*policies, 'random')]
                losses.append(token_losses(base, count, budgets, 'oldest'))
                if statistics.mean(budgets) == least:
                    losses.append(token_losses(controls['window'][0], count))
                    losses.append(token_losses(controls['ALiBi'][0], count, rule=f'alibi={K}'))
            row(name, token_losses(run, count), *losses, saved=saved,
                budgets=' '.join(map(str, budgets)) if by_F else 'above the loss of standard')
        if least is not None:
            row('ALiBi', token_losses(controls['ALiBi'][0], count))
    header = ['model', 'kept by F', 'saving by F', 'saving by age', 'all of its context', 'by F', 'newest', 'random',
              'standard, newest', 'trained on as many', 'ALiBi, newest']
    return ('Tokens kept, by layer, for the loss of standard attention, confirmed on unseen windows; and the loss of all / of '
            'recall tokens, with all of its context and with as many tokens:\n\n'
            + '\n'.join(f"| {' | '.join(row)} |" for row in [header, ['---'] * len(header), *rows]))
