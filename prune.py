"""Find how little memory each layer needs: the budgets of context pruning, 2410.02703 section 5.

    python prune.py --out_dir=out/selective_small --baseline=out/standard_small
    python prune.py --out_dir=out/selective_small --tolerance=0.01

The first prunes down to the loss of another model, the second to 0.01 nats over the model's own
loss. Every layer starts with a budget of block_size tokens. Each step takes a few tokens from the
layer where that costs the least validation loss, until every further step would raise the loss
above the target. Each row printed is one point of the curve of memory against loss;
<out_dir>/budgets.json has them all, and sample.py generates within its budgets.

--bite=8 is the paper's way: a fixed number of tokens at a time, every layer tried at every step.
The default, the quick search, differs from it in three things. A bite is a fraction of what a
layer has, at first half of it; when the cheapest bite costs too much, all are halved, down to one
token. A bite of more than one token may spend at most a quarter of what is left up to the target.
And only the layer whose last trial was the cheapest per token is tried again: if it still is the
cheapest, it is taken without trying the others.
"""

import json
import math
from dataclasses import dataclass
from functools import partial

from support import settings  # before torch, see support/__init__.py

import torch
import torch.nn.functional as fn

import data
import kernels
from model import POLICIES, KVCache
from support import checkpoint as ckpt, devices, files, pretrained
from support.settings import UserError, option

ABOVE = 'is already above the target'  # of a loss without pruning


@dataclass
class PruneConfig:
    # what to prune
    out_dir: str = option('out/selective_small', 'folder of ckpt.pt and of the budgets')
    init_from: str = option('resume', "'resume': <out_dir>/ckpt.pt; or a folder or hub model")
    dataset: str = option(
        '', "data set whose validation loss counts; '': the one it was trained on"
    )
    windows: int = option(
        32, 'validation sequences to measure on, or a few more, to fill batches', low=1
    )
    seed: int = option(0, 'seed of the choice of sequences')
    # how far
    baseline: str = option('', "folder of a model whose loss is the target; '': this model's own")
    tolerance: float = option(0.0, 'nats by which the loss may exceed the target')
    # how
    policy: str = option('selective', f'eviction policy: {", ".join(POLICIES)}')
    bite: int = option(0, 'tokens taken at a time, as in the paper; 0: the quick search')
    to: str = option('', "file in out_dir; '': budgets.json, for controls budgets_<policy>.json")
    device: str = option('auto', "'cuda', 'mps', 'cpu'; 'auto': the best one there is")
    dtype: str = option('auto', "'auto': bfloat16 where a GPU has it", choices=devices.DTYPES)
    batch_size: int = option(16, 'sequences that are computed at a time', low=1)


# ---- The loss under budgets ----------------------------------------------------------------------


def losses(model, batches, budgets=None, policy='selective', dtype=None):
    """The mean loss of each window in nats per token, (windows,).

    batches: a list of x and y, int64 (2, B, T). The rest: see `token_losses`.
    """
    found = []
    for x, y in batches:
        nats = token_losses(model, x, y, budgets, policy, dtype)
        found.append(nats.sum(dim=1) / (y >= 0).sum(dim=1))
    return torch.cat(found).cpu()


def token_losses(model, x, y, budgets=None, policy='selective', dtype=None):
    """The loss of each target in nats, (B, T), within budgets; 0 where a target is -1.

    x, y: int64 (B, T). The rest is for KVCache; budgets None: the whole context.
    """
    cache = None
    if budgets:
        cache = KVCache(model, len(x), budgets, policy, dtype)
        for l, budget in enumerate(cache.budgets):
            if budget >= x.size(1):  # nothing is dropped, and a kernel is faster
                cache.layers[l] = None
    logits, _ = model(x, y, cache=cache)
    return fn.cross_entropy(logits.float().transpose(1, 2), y, ignore_index=-1, reduction='none')


# ---- The search ----------------------------------------------------------------------------------


@dataclass
class Trial:
    """What it costs to take a bite from one layer."""

    layer: int
    bite: int  # tokens taken
    step: int  # how many bites had been taken before
    loss: float = math.inf
    rise: float = math.inf  # of the loss, for each token taken


def search(measure, budgets, target, plain_bite=0):
    """Take bites from budgets. Yields the budgets and the loss, before the first and after each.

    measure: the losses of windows under budgets. plain_bite: tokens of a bite in the paper's
    search; 0: the quick search. See the top of this file for both. Raises UserError where the loss
    is above the target from the start.
    """
    loss = measure(budgets).mean().item()
    if loss > target:
        raise UserError(f'the loss without pruning, {loss:.4f}, {ABOVE}, {target:.4f}')
    yield budgets, loss
    size = plain_bite  # tokens of a bite; 0: a part of what the layer has
    part = 0.5
    tried = {}  # layer -> its last trial
    step = 0
    while True:
        for l, budget in enumerate(budgets):
            if l in tried:
                continue
            bite = size or int(part * budget)
            tried[l] = Trial(l, bite, step)
            if 0 < bite < budget - 1:  # else it has too few
                tried[l].loss = measure(fewer(budgets, l, bite)).mean().item()
                tried[l].rise = (tried[l].loss - loss) / bite
        best = min(tried.values(), key=lambda trial: trial.rise)
        left = target - loss
        if best.bite > 1 and not plain_bite:
            left /= 4
        if best.step < step and best.rise < math.inf:
            del tried[best.layer]  # other layers have lost tokens since: try it again
        elif best.loss - loss <= left:
            budgets = fewer(budgets, best.layer, best.bite)
            loss = best.loss
            yield budgets, loss
            step += 1
            del tried[best.layer]
            if plain_bite:
                tried.clear()
        elif not size:  # the others cost more for a token: they wait until a bite of this one fits
            part /= 2
            if part * max(budgets) < 2:
                size = 1
            tried.clear()
        elif best.rise < math.inf:
            best.loss = best.rise = math.inf  # what another layer gives may still fit
        else:
            return


def fewer(budgets, l, bite):
    """The budgets after a bite from layer l."""
    return [*budgets[:l], budgets[l] - bite, *budgets[l + 1 :]]


# ---- How sure the result is ----------------------------------------------------------------------


def bootstrap(values, counts=None):
    """95% interval of the mean of values, one for each window.

    Windows are drawn again with replacement. counts: how many tokens each value is the sum of; the
    mean is then over tokens. Differences of two models on the same windows give the paired
    bootstrap.
    """
    if counts is None:
        counts = torch.ones_like(values)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(values), (10_000, len(values)), generator=generator)
    means = values.double()[drawn].sum(dim=1) / counts.double()[drawn].sum(dim=1)
    return means.quantile(means.new_tensor([0.025, 0.975])).tolist()


def unseen(measure, curve, target):
    """The curve on held-out windows.

    measure: their losses under budgets; target: the loss to keep on each, (windows,). Returns
    a dictionary: 'difference', of the end of the curve to the target, with its 95% interval;
    'holds', the point of the curve with the least memory whose loss on these windows is at most the
    target, or None. Only this point counts as memory saved.
    """
    difference = measure(curve[-1]['budgets']) - target
    holds = None
    for p in reversed(curve):
        loss = measure(p['budgets']).mean()
        if loss <= target.mean():
            holds = {**p, 'val_loss': loss.item()}
            break
    return {'difference': [difference.mean().item(), *bootstrap(difference)], 'holds': holds}


# ---- The command ---------------------------------------------------------------------------------


@torch.no_grad()
def main():
    cfg = settings.parse(PruneConfig)
    path = output_path(cfg)
    cfg.device = devices.pick_device(cfg.device)
    cfg.dtype = devices.pick_dtype(cfg.dtype, cfg.device)
    dtype = getattr(torch, cfg.dtype)

    # the model, the one whose loss is to be kept, and the text
    model, checkpoint = pretrained.load_model(cfg.init_from, cfg.out_dir, cfg.device)
    every = str(model.config.block_size)  # a budget of any model: it is the policy that may not fit
    ckpt.read_budgets(every, cfg.out_dir, model, cfg.policy)
    reference = model
    if cfg.baseline:
        reference, other = ckpt.load_model(cfg.baseline, cfg.device)
        if traits(reference, other) != traits(model, checkpoint):
            raise UserError(f'{cfg.baseline} has another block_size, tokenizer or bos')
    name = cfg.dataset or checkpoint['dataset'] or ''
    dataset = data.load_dataset(name, tokenizer=checkpoint['tokenizer'])
    kernels.install(model, dtype=dtype)  # for layers that keep everything
    batches = windows_of(dataset, cfg, model, checkpoint)
    searched = batches[: len(batches) // 2]
    held_out = batches[len(batches) // 2 :]

    with devices.autocast(cfg.device, cfg.dtype):  # as sample.py generates
        # the search
        target = losses(reference, searched).mean().item() + cfg.tolerance
        result = {
            **vars(cfg),
            'target_loss': target,
            'checkpoint': ckpt.fingerprint(model),
            'curve': [],
            'held_out': {},
        }

        measure = partial(losses, model, searched, policy=cfg.policy, dtype=dtype)
        full = [searched[0].size(2)] * model.config.n_layer
        for budgets, loss in search(measure, full, target, cfg.bite):
            saving = sum(full) / sum(budgets)
            print(f'{budgets}: {saving:.1f}x less memory, loss {loss:.4f}', flush=True)
            result['budgets'] = budgets
            result['curve'].append({'budgets': budgets, 'saving': saving, 'val_loss': loss})
            files.write_file(path, json.dumps(result))

        # does it hold on other windows?
        measure = partial(losses, model, held_out, policy=cfg.policy, dtype=dtype)
        found = unseen(measure, result['curve'], losses(reference, held_out) + cfg.tolerance)
    result['held_out'] = found
    files.write_file(path, json.dumps(result))
    mean, low, high = found['difference']
    print(f'on other windows: {mean:+.4f} [{low:+.4f}, {high:+.4f}] from the target')
    if found['holds']:
        print(f'with {found["holds"]["saving"]:.1f}x less memory the loss is kept there, too')


def output_path(cfg):
    """The file to write. UserError where it may not be written."""
    if cfg.init_from != 'resume' and cfg.out_dir == PruneConfig.out_dir:
        raise UserError(f'--init_from={cfg.init_from} needs an --out_dir for its budgets')
    name = 'budgets.json' if cfg.policy == 'selective' else f'budgets_{cfg.policy}.json'
    path = f'{cfg.out_dir}/{cfg.to or name}'
    files.check_output(path, '.json', '"budgets"')
    return path


def traits(model, checkpoint):
    """What must be the same in two models whose losses are compared."""
    return model.config.block_size, checkpoint['tokenizer'], ckpt.starts_with_bos(checkpoint)


def windows_of(dataset, cfg, model, checkpoint):
    """Batches of random validation windows, half of them for the search.

    In a small text windows may overlap.
    """
    size = dataset.window(model.config.block_size) - 1  # records may be shorter
    B = min(cfg.batch_size, cfg.windows)
    batches = []
    for n in range(2 * math.ceil(cfg.windows / B)):
        batch = dataset.batch('val', n, B, size, cfg.seed, ckpt.starts_with_bos(checkpoint))
        batches.append(torch.stack(batch).to(cfg.device))
    return batches


if __name__ == '__main__':
    settings.run(main)
