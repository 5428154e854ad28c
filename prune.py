"""Find how little memory each layer needs: the budgets of context pruning, 2410.02703 section 5.

    python prune.py --out_dir=out/selective_small --baseline=out/standard_small
    python prune.py --out_dir=out/selective_small --tolerance=0.01

The first prunes down to the loss of another model, the second to 0.01 nats over the model's own
loss. Every layer starts with a budget of block_size tokens. Each step
takes a few tokens from the layer where that costs the least validation loss, until every further
step would raise the loss above the target. Each row printed is one point of the curve of memory
against loss; <out_dir>/budgets.json has them all, and sample.py generates within its budgets.

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
from dataclasses import dataclass

from support import settings  # before torch, see support/__init__.py

import torch
import torch.nn.functional as fn

import data
import kernels
from model import POLICIES
from support import checkpoint as ckpt, devices, files, pretrained
from support.settings import UserError, option

ABOVE = 'is already above the target'  # of a loss without pruning


@dataclass
class PruneConfig:
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
    # how far
    baseline: str = option('', "folder of a model whose loss is the target; '': this model's own")
    tolerance: float = option(0.0, 'nats by which the loss may exceed the target')
    # how
    policy: str = option('selective', f'what is dropped at the budget: {", ".join(POLICIES)}')
    search: str = option('quick', "plain is the paper's search", choices=('quick', 'plain'))
    bite: int = option(8, 'tokens taken at a time in the plain search', low=1)
    to: str = option('', "file in out_dir; '': budgets.json, for controls budgets_<policy>.json")
    device: str = option('auto', "'cuda', 'mps', 'cpu'; 'auto': the best one there is")
    dtype: str = option('auto', "'auto': bfloat16 where a GPU has it", choices=devices.DTYPES)
    batch_size: int = option(16, 'sequences that are computed at a time', low=1)


# ---- The loss under budgets ----------------------------------------------------------------------


class Trials:
    """The loss of a model under budgets, on a fixed set of windows."""

    def __init__(self, model, batches, policy='selective', dtype=torch.float32):
        """batches: a list of x and y, int64 (2, B, T). dtype: of keys and values that are kept."""
        self.model = model
        self.batches = batches
        self.policy = policy
        self.dtype = dtype
        x, _ = batches[0]
        self.pos = torch.arange(x.size(1), device=x.device)
        self.turn = model.rotation(self.pos)
        self.budgets = [x.size(1)] * model.config.n_layer
        # inputs[n][l]: what layer l reads of batch n under self.budgets, as far as it was needed
        self.inputs = [[model.embed(x, self.pos)] for x, _ in batches]

    def loss(self, budgets, first=0):
        """Mean loss in nats per token; first: see `windows`."""
        return self.windows(budgets, first).mean().item()

    def windows(self, budgets, first=0):
        """The mean loss of each window, (windows,).

        first: a layer below which the budgets are self.budgets; what it reads is kept.
        """
        losses = []
        for inputs, (_, y) in zip(self.inputs, self.batches):
            for l in range(len(inputs) - 1, first):
                inputs.append(self.layer(l, inputs[l], self.budgets[l]))
            x = inputs[first]
            for l in range(first, len(budgets)):
                x = self.layer(l, x, budgets[l])
            logits = self.model.lm_head(self.model.transformer.ln_f(x)).float()
            loss = fn.cross_entropy(logits.transpose(1, 2), y, ignore_index=-1, reduction='none')
            losses.append(loss.sum(dim=1) / (y >= 0).sum(dim=1))
        return torch.cat(losses).cpu()

    def take(self, l, bite):
        """Give layer l a smaller budget; what the layers above it read is then out of date."""
        self.budgets[l] -= bite
        for inputs in self.inputs:
            del inputs[l + 1 :]

    def layer(self, l, x, budget):
        """Layer l on x (B, T, C), with the parallel form of context pruning."""
        cache = None
        if budget < len(self.pos):
            layer = self.model.transformer.h[l].attn
            cache = layer.make_cache(len(x), budget, self.policy, self.dtype)
        y, _ = self.model.transformer.h[l](x, self.pos, self.turn, cache)
        return y


# ---- The search ----------------------------------------------------------------------------------


@dataclass
class Trial:
    """What it costs to take a bite from one layer."""

    layer: int
    bite: int  # tokens taken
    step: int  # how many bites had been taken before
    loss: float = math.inf
    rise: float = math.inf  # of the loss, for each token taken


def search(trials, target, plain_bite=0):
    """Take bites from trials.budgets. Yields the loss without pruning, then that after each bite.

    plain_bite: tokens of a bite in the paper's search; 0: the quick search. See the top of this
    file for both. Raises UserError where the loss is above the target from the start.
    """
    budgets = trials.budgets
    loss = trials.loss(budgets)
    if loss > target:
        raise UserError(f'the loss without pruning, {loss:.4f}, {ABOVE}, {target:.4f}')
    yield loss
    size = plain_bite  # tokens of a bite; 0: a part of what the layer has
    part = 0.5
    tried = {}  # layer -> its last trial
    step = 0
    while True:
        for l, budget in enumerate(budgets):
            if l in tried:
                continue
            bite = size or min(int(part * budget), budget - 2)
            tried[l] = Trial(l, bite, step)
            if 0 < bite < budget - 1:  # else it has too few
                fewer = list(budgets)
                fewer[l] -= bite
                tried[l].loss = trials.loss(fewer, l)
                tried[l].rise = (tried[l].loss - loss) / bite
        best = min(tried.values(), key=lambda trial: trial.rise)
        left = target - loss
        if best.bite > 1 and not plain_bite:
            left /= 4
        if best.step < step and best.rise < math.inf:
            del tried[best.layer]  # other layers have lost tokens since: try it again
        elif best.loss - loss <= left:
            trials.take(best.layer, best.bite)
            loss = best.loss
            yield loss
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
    return means.quantile(0.025).item(), means.quantile(0.975).item()


def unseen(trials, curve, target):
    """The curve on windows that the search has not seen, those of trials.

    target (windows,): the loss to keep on each. Returns a dictionary: 'target'; 'unpruned' and
    'pruned', the losses at the ends of the curve; 'difference', of the end to the target, with its
    95% interval; 'holds', the point of the curve with the least memory whose loss on these windows
    is at most the target, or None. Only this point counts as memory saved.
    """
    end = trials.windows(curve[-1]['budgets'])
    difference = end - target
    goal = target.mean().item()
    holds = None
    for p in reversed(curve):
        loss = trials.loss(p['budgets'])
        if loss <= goal:
            holds = {**p, 'val_loss': loss}
            break
    return {
        'target': goal,
        'unpruned': trials.loss(curve[0]['budgets']),
        'pruned': end.mean().item(),
        'difference': [difference.mean().item(), *bootstrap(difference)],
        'holds': holds,
    }


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
    dataset = data.load_dataset(cfg.dataset or checkpoint['dataset'] or '')
    if dataset.tokenizer_name != checkpoint['tokenizer']:
        raise UserError(f'{dataset.path} has another tokenizer than {cfg.out_dir}')
    kernels.install(model, dtype=dtype)  # for layers that keep everything
    searched, held_out = windows_of(dataset, cfg, model, checkpoint)

    with devices.autocast(cfg.device, cfg.dtype):  # as sample.py generates
        # the search
        target = to_keep(reference, searched, cfg).mean().item()
        trials = Trials(model, searched, cfg.policy, dtype)
        result = {
            **vars(cfg),
            'target_loss': target,
            'checkpoint': ckpt.fingerprint(model),
            'budgets': trials.budgets,
            'curve': [],
            'held_out': {},
        }
        full = sum(trials.budgets)
        plain_bite = cfg.bite if cfg.search == 'plain' else 0
        for loss in search(trials, target, plain_bite):
            budgets = list(trials.budgets)
            saving = full / sum(budgets)
            print(f'{budgets}: {saving:.1f}x less memory, loss {loss:.4f}', flush=True)
            result['curve'].append({'budgets': budgets, 'saving': saving, 'val_loss': loss})
            files.write_file(path, json.dumps(result))

        # does it hold on other windows?
        trials = Trials(model, held_out, cfg.policy, dtype)
        found = unseen(trials, result['curve'], to_keep(reference, held_out, cfg))
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
    """Two lists of batches of random validation windows; in a small text they may overlap."""
    size = dataset.window(model.config.block_size) - 1  # records may be shorter
    bos = ckpt.starts_with_bos(checkpoint)
    lists = [], []
    n = 0
    for batches in lists:
        for start in range(0, cfg.windows, cfg.batch_size):
            B = min(cfg.batch_size, cfg.windows - start)
            batch = torch.stack(dataset.batch('val', n, B, size, cfg.seed, bos))
            batches.append(batch.to(cfg.device))
            n += 1
    return lists


def to_keep(reference, batches, cfg):
    """The loss to keep on each window, (windows,)."""
    trials = Trials(reference, batches)
    return trials.windows(trials.budgets) + cfg.tolerance


if __name__ == '__main__':
    settings.run(main)
