"""Find how little memory each layer needs: the budgets of context pruning, 2410.02703 section 5.

    python prune.py --out_dir=out/selective_small --baseline=out/standard_small
    python prune.py --out_dir=out/selective_small --tolerance=0.01
    python prune.py --out_dir=out/selective_small --target_loss=1.5

The first prunes down to the loss of another model, the second to 0.01 nats over the model's own
loss, the third to a given loss. Every layer starts with a budget of block_size tokens. Each step
takes a few tokens from the layer where that costs the least validation loss, until every further
step would raise the loss above the target. Each row printed is one point of the curve of memory
against loss; <out_dir>/budgets.json has them all, and sample.py generates within its budgets. A
search that was stopped continues where it was if you run it again.

--search=plain is the paper's way: a fixed number of tokens at a time, every layer tried at every
step. The default, --search=quick, differs from it in three things. A bite is a fraction of what a
layer has, at first half of it; when the cheapest bite costs too much, all are halved, down to one
token. A bite of more than one token may spend at most a quarter of what is left up to the target.
And only the layer whose last trial was the cheapest per token is tried again: if it still is the
cheapest, it is taken without trying the others. Both ways reuse the activations below the tried
layer.
"""

import json
import math
import operator
import os
import time
from dataclasses import dataclass

from support import settings  # before torch, see support/__init__.py

import torch
import torch.nn.functional as fn

import data
import kernels
from model import POLICIES, LayerCache
from support import checkpoint as ckpt, devices, files, pretrained
from support.settings import UserError, option

ABOVE = 'is already above the target'  # of a loss without pruning
# an earlier search with the same values of these found the same losses
SAME = ('checkpoint', 'code', 'policy', 'dataset', 'data', 'block_size', 'search')
SEARCH = ('search', 'bite', 'windows', 'seed', 'batch_size', 'dtype')


@dataclass
class PruneConfig(pretrained.PretrainedConfig):
    # what to prune
    out_dir: str = option('out/selective_small', 'folder of ckpt.pt and of the budgets')
    init_from: str = option(
        'resume', "'resume': <out_dir>/ckpt.pt; or 'gpt2', 'gpt2-medium', … or a folder"
    )
    dataset: str = option(
        '', "data set whose validation loss counts; '': the one it was trained on"
    )
    windows: int = option(32, 'validation sequences that the search measures on', low=1)
    seed: int = option(0, 'which windows these are')
    # how far: give one of the three
    baseline: str = option('', 'folder of a model whose loss on the same windows is the target')
    target_loss: float = option(0.0, 'the target, in nats')
    tolerance: float = option(0.0, "the target is the model's own loss and this much")
    # how
    policy: str = option('selective', 'what is dropped at the budget', choices=POLICIES)
    search: str = option('quick', "plain is the paper's search", choices=('quick', 'plain'))
    bite: int = option(8, 'tokens taken at a time in the plain search', low=1)
    to: str = option('', "file in out_dir; '': budgets.json, for controls budgets_<policy>.json")
    device: str = option('auto', "'cuda', 'mps', 'cpu'; 'auto': the best one there is")
    dtype: str = option(
        'auto', 'bfloat16 where a GPU has it', choices=('auto', 'float32', 'bfloat16', 'float16')
    )
    batch_size: int = option(16, 'sequences that are computed at a time', low=1)


# ---- The loss under budgets ----------------------------------------------------------------------


class Trials:
    """The loss of a model under budgets, on a fixed set of windows. It remembers every loss."""

    def __init__(self, model, batches, policy='selective', dtype=torch.float32):
        """batches: a list of (x, y), int64 (B, T). dtype: of the keys and values that are kept."""
        self.model = model
        self.batches = batches
        self.policy = policy
        self.dtype = dtype
        x, _ = batches[0]
        self.pos = torch.arange(x.size(1), device=x.device)
        self.budgets = [x.size(1)] * model.config.n_layer
        self.known = {}  # budgets -> loss
        # inputs[l][n]: what layer l reads of batch n under self.budgets, as far as it was needed
        self.inputs = [[model.embed(x, self.pos) for x, _ in batches]]

    def loss(self, budgets, first=0):
        """Mean loss in nats per token; first: see `windows`."""
        key = tuple(budgets)
        if key not in self.known:
            self.known[key] = self.windows(budgets, first).mean().item()
        return self.known[key]

    def windows(self, budgets, first=0):
        """The mean loss of each window, (windows,).

        first: a layer below which the budgets are self.budgets; what it reads is kept.
        """
        for l in range(len(self.inputs) - 1, first):
            outputs = [self.layer(l, x, self.budgets[l]) for x in self.inputs[l]]
            self.inputs.append(outputs)
        losses = []
        for x, (_, y) in zip(self.inputs[first], self.batches):
            for l in range(first, len(budgets)):
                x = self.layer(l, x, budgets[l])
            logits = self.model.lm_head(self.model.transformer.ln_f(x)).float()
            loss = fn.cross_entropy(logits.transpose(1, 2), y, ignore_index=-1, reduction='none')
            losses.append(loss.sum(dim=1) / (y >= 0).sum(dim=1))
        return torch.cat(losses)

    def take(self, l, bite):
        """Give layer l a smaller budget; what the layers above it read is then out of date."""
        self.budgets[l] -= bite
        del self.inputs[l + 1 :]

    def layer(self, l, x, budget):
        """Layer l on x (B, T, C), with the parallel form of context pruning."""
        cache = None
        if budget < len(self.pos):
            c = self.model.config
            cache = LayerCache(
                len(x), c.n_head, budget, c.head_size, self.policy, x.device, self.dtype
            )
        y, _ = self.model.transformer.h[l](x, self.pos, cache)
        return y


# ---- The search ----------------------------------------------------------------------------------


@dataclass
class Trial:
    """What it costs to take a bite from one layer."""

    layer: int
    bite: int  # tokens taken
    loss: float
    rise: float  # of the loss, for each token taken
    step: int  # how many bites had been taken before


def search(trials, target, loss, plain_bite=0):
    """Yield each Trial that is taken; the caller passes it on to trials.take.

    loss: without pruning. plain_bite: tokens of a bite in the paper's search; 0: the quick search.
    See the top of this file for both.
    """
    budgets = trials.budgets
    size = plain_bite  # tokens of a bite; 0: a part of what the layer has
    part = 0.5
    tried = {}  # layer -> its last trial
    step = 0
    while True:
        for l, budget in enumerate(budgets):
            if l not in tried:
                bite = size or min(int(part * budget), budget - 2)
                tried[l] = attempt(trials, l, bite, loss, step)
        best = min(tried.values(), key=operator.attrgetter('rise'))
        left = target - loss
        if best.bite > 1 and not plain_bite:
            left /= 4
        if best.step < step and best.rise < math.inf:
            del tried[best.layer]  # other layers have lost tokens since: try it again
        elif best.loss - loss <= left:
            yield best
            loss = best.loss
            step += 1
            if plain_bite:
                tried.clear()
            else:
                del tried[best.layer]
        elif not size:  # the others cost more for a token: they wait until a bite of this one fits
            part /= 2
            if part * max(budgets) < 2:
                size = 1
            tried.clear()
        elif best.rise < math.inf:
            best.loss = best.rise = math.inf  # what another layer gives may still fit
        else:
            return


def attempt(trials, l, bite, loss, step):
    """The Trial of a bite from layer l, where the loss has been `loss`; inf: it has too few."""
    budgets = list(trials.budgets)
    budgets[l] -= bite
    if bite < 1 or budgets[l] < 2:
        return Trial(l, bite, math.inf, math.inf, step)
    new = trials.loss(budgets, l)
    return Trial(l, bite, new, (new - loss) / bite, step)


# ---- How sure the result is ----------------------------------------------------------------------


def bootstrap(values, counts=None, samples=10_000):
    """95% interval of the mean of values, one for each window.

    Windows are drawn again with replacement. counts: how many tokens each value is the sum of; the
    mean is then over tokens. Differences of two models on the same windows give the paired
    bootstrap.
    """
    values = values.double().cpu()
    counts = torch.ones_like(values) if counts is None else counts.double().cpu()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(values), (samples, len(values)), generator=generator)
    means = values[drawn].sum(dim=1) / counts[drawn].sum(dim=1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def unseen(trials, curve, target):
    """The curve on windows that the search has not seen, those of trials.

    target (windows,): the loss to keep on each. Returns a dictionary: 'target'; 'unpruned' and
    'pruned', the losses at the ends of the curve; 'difference', of the end to the target, with its
    95% interval; 'holds', the point of the curve with the least memory whose loss on these windows
    is at most the target, or None. Only this point counts as memory saved.
    """
    end = trials.windows(curve[-1]['budgets'])
    difference = end - target
    found = {
        'target': target.mean().item(),
        'unpruned': trials.loss(curve[0]['budgets']),
        'pruned': end.mean().item(),
        'difference': [difference.mean().item(), *bootstrap(difference)],
        'holds': None,
    }
    for p in reversed(curve):
        loss = trials.loss(p['budgets'])
        if loss <= found['target']:
            found['holds'] = {**p, 'val_loss': loss}
            break
    return found


# ---- The command ---------------------------------------------------------------------------------


@torch.no_grad()
def main():
    cfg = settings.parse(PruneConfig)
    path = output_path(cfg)
    cfg.device = devices.pick_device(cfg.device)
    cfg.dtype = devices.pick_dtype(cfg.dtype, cfg.device)
    dtype = getattr(torch, cfg.dtype)
    model, checkpoint = pretrained.load_model(cfg.init_from, cfg.out_dir, cfg, cfg.device)
    if cfg.policy == 'selective' and not model.config.selective:
        raise UserError(f'{cfg.out_dir} has no F to prune by: use --policy=oldest or random')
    reference = model
    if cfg.baseline:
        reference = load_baseline(cfg, model, checkpoint)
    dataset = data.load_dataset(cfg.dataset or checkpoint['dataset'] or '')
    if dataset.tokenizer_name != checkpoint['tokenizer']:
        raise UserError(
            f'{cfg.out_dir} was trained on {checkpoint["tokenizer"]}, '
            f'data set {dataset.name} has {dataset.tokenizer_name}'
        )
    kernels.install(model, dtype=dtype)  # for layers that keep everything
    size = dataset.window(model.config.block_size) - 1  # records may be shorter
    searched, held_out = windows_of(dataset, cfg, size, ckpt.starts_with_bos(checkpoint))

    with devices.autocast(cfg.device, cfg.dtype):  # as sample.py generates
        trials = Trials(model, searched, cfg.policy, dtype)
        unpruned = trials.loss(trials.budgets)
        base = Trials(reference, searched)
        target = cfg.target_loss or base.loss(base.budgets) + cfg.tolerance
        if unpruned > target:
            raise UserError(f'the loss without pruning, {unpruned:.4f}, {ABOVE}, {target:.4f}')
        result = {
            'policy': cfg.policy,
            'block_size': size,
            'target_loss': target,
            'unpruned_loss': unpruned,
            'baseline_loss': target if cfg.baseline else None,
            'dataset': dataset.name,
            'data': dataset.fingerprint(),
            'checkpoint': ckpt.fingerprint(model),
            'code': ckpt.code_fingerprint(),
            'held_out': {},
            'search': {name: getattr(cfg, name) for name in SEARCH},
            'curve': [],
        }
        run_search(cfg, trials, result, path)
        base = Trials(reference, held_out)
        to_keep = base.windows(base.budgets) + cfg.tolerance
        if cfg.target_loss:
            to_keep = torch.full_like(to_keep, target)
        held_out = Trials(model, held_out, cfg.policy, dtype)
        result['held_out'] = unseen(held_out, result['curve'], to_keep)
    write(path, result)
    report(result, path)


def output_path(cfg):
    """The file to write; UserError for settings that do not go together."""
    given = [value for value in (cfg.baseline, cfg.target_loss, cfg.tolerance) if value]
    if len(given) != 1:
        raise UserError('say how far to prune: one of --baseline, --target_loss and --tolerance')
    if cfg.init_from != 'resume' and cfg.out_dir == PruneConfig.out_dir:
        raise UserError(f'--init_from={cfg.init_from} needs an --out_dir for its budgets')
    name = 'budgets.json' if cfg.policy == 'selective' else f'budgets_{cfg.policy}.json'
    path = os.path.join(cfg.out_dir, cfg.to or name)
    files.check_output(path, '.json', '"budgets"')
    return path


def load_baseline(cfg, model, checkpoint):
    """The model of --baseline; UserError where its loss is not comparable."""
    other, its_checkpoint = ckpt.load_model(cfg.baseline, cfg.device)
    if traits(other, its_checkpoint) != traits(model, checkpoint):
        raise UserError(f'{cfg.baseline} has another block_size, tokenizer or bos than the model')
    return other


def traits(model, checkpoint):
    """What must be the same in two models whose losses are compared."""
    bos = ckpt.starts_with_bos(checkpoint)
    return model.config.block_size, checkpoint['tokenizer'], bos


def windows_of(dataset, cfg, size, bos):
    """Two lists of batches of random validation windows; in a small text they may overlap."""
    batches = []
    count = math.ceil(cfg.windows / cfg.batch_size)
    for n in range(2 * count):
        B = min(cfg.batch_size, cfg.windows - n % count * cfg.batch_size)
        x, y = dataset.batch('val', n, B, size, cfg.seed, bos)
        batches.append((x.to(cfg.device), y.to(cfg.device)))
    return batches[:count], batches[count:]


def run_search(cfg, trials, result, path):
    """Search, print the curve, and write it after each step into result and the file."""
    target = result['target_loss']
    unpruned = result['unpruned_loss']
    print(f'{cfg.out_dir}: policy {cfg.policy}, loss {unpruned:.4f}, target {target:.4f}')
    # The search is deterministic. To continue one, repeat its steps with the losses that it found.
    known = known_trials(path, result)
    if known:
        print(f'continuing with the {len(known)} trials in {path}')
        trials.known.update(known)
    started = time.time()
    add_point(trials, result, unpruned, started)
    plain_bite = cfg.bite if cfg.search == 'plain' else 0
    for trial in search(trials, target, unpruned, plain_bite):
        trials.take(trial.layer, trial.bite)
        add_point(trials, result, trial.loss, started)
        write(path, result)


def known_trials(path, result):
    """{budgets: loss} of an earlier search of the same thing, stopped or done; {} without one."""
    try:
        earlier = files.read_json(path, '', trials=[[float]])
    except UserError:
        return {}
    for name in SAME:
        if earlier.get(name) != result[name]:
            return {}
    return {tuple(budgets): loss for *budgets, loss in earlier['trials']}


def add_point(trials, result, loss, started):
    """Put the present budgets and their loss into result, and print them."""
    memory = sum(trials.budgets)
    full = len(trials.budgets) * result['block_size']
    point = {
        'budgets': list(trials.budgets),
        'memory': memory,
        'fraction': memory / full,
        'saving': full / memory,
        'val_loss': loss,
    }
    result['budgets'] = point['budgets']
    result['curve'].append(point)
    result['trials'] = [[*budgets, loss] for budgets, loss in trials.known.items()]
    step = len(result['curve']) - 1
    budgets = ' '.join(f'{budget:4}' for budget in trials.budgets)
    spent = time.time() - started
    print(
        f'step {step:3} | budgets {budgets} | {full / memory:6.1f}x less memory '
        f'| loss {loss:.4f} | {spent:.0f}s',
        flush=True,
    )


def report(result, path):
    """Print what held-out windows say of the budgets."""
    found = result['held_out']
    mean, low, high = found['difference']
    print(
        f'on windows that the search has not seen the loss is {mean:+.4f} from the target '
        f'(95% over windows: {low:+.4f} to {high:+.4f})'
    )
    if found['holds']:
        print(f'what keeps the loss there, too: {found["holds"]["saving"]:.1f}x less memory')
    else:
        print('no point of the curve keeps the loss there')
    print(f'sample.py --budgets={path} generates within the budgets')


def write(path, result):
    files.write_file(path, json.dumps(result))


if __name__ == '__main__':
    settings.run(main)
