"""Find how little memory each layer needs: the per-layer budgets of context pruning, 2410.02703 section 5.

    python prune.py --out_dir=out/selective_small --baseline=out/standard_small     down to the loss of that model
    python prune.py --out_dir=out/selective_small --tolerance=0.01                  to 0.01 nats over its own loss
    python prune.py --out_dir=out/selective_small --target_loss=1.5

Every layer starts with a budget of block_size tokens. Each step takes a few tokens from the layer where that costs the
least validation loss, until every further step would raise the loss above the target. Each row printed is one point of
the curve of memory against loss; the file written, <out_dir>/budgets.json, has them all, and sample.py generates inside
it. Run a search that was stopped again, and it continues where it was.

--search=plain is the paper's way: a fixed number of tokens at a time, every layer tried at every step. The default,
--search=quick, differs from it in three things. A bite is a fraction of what a layer has, at first half of it; when the
cheapest costs too much, all are halved, down to one token. A bite of more than one token may spend at most a quarter of
what is left up to the target. And only the layer whose last trial was the cheapest per token is tried again: if it
still is the cheapest, it is taken without trying the others. Both ways reuse the activations below the tried layer.
"""
import json
import math
import os
import time
from dataclasses import dataclass

import support      # before torch, see there
import torch
import torch.nn.functional as fn

import data
import kernels
from model import LayerCache, check_budgets
from support import checkpoint as ckpt, devices, files, pretrained, settings
from support.settings import UserError

# what a search needs of an earlier one
EARLIER = {'checkpoint': str, 'code': str, 'policy': str, 'dataset': str, 'data': str, 'block_size': int,
           'search': dict, 'trials': [[float]]}
ABOVE = 'is already above the target'         # of a loss without pruning


@dataclass
class PruneConfig(pretrained.PretrainedConfig):
    # what to prune
    out_dir: str = 'out/selective_small'    # folder of ckpt.pt; budgets.json is written there
    init_from: str = 'resume'               # 'resume': <out_dir>/ckpt.pt; or 'gpt2', 'gpt2-medium', … or a folder
    dataset: str = ''                       # data set whose validation loss counts; '': the one it was trained on
    windows: int = 32                       # validation sequences that the search measures on [1 to 100_000]
    seed: int = 0                           # which windows these are [0 to 2**31]
    # how far: give one of the three
    baseline: str = ''                      # folder of a model whose loss on the same windows is the target
    target_loss: float = 0.0                # the target, in nats [0 to 1000]
    tolerance: float = 0.0                  # the target is the model's own unpruned loss and this much [0 to 1000]
    # how
    policy: str = 'selective'               # what is dropped at the budget ['selective', 'oldest', 'random']
    search: str = 'quick'                   # plain is the paper's search ['quick', 'plain']
    bite: int = 8                           # tokens taken at a time in the plain search [1 to 2**20]
    to: str = ''                            # file in out_dir; '': budgets.json, budgets_<policy>.json for controls
    device: str = 'auto'                    # 'cuda', 'mps', 'cpu'; 'auto': the best one there is
    batch_size: int = 16                    # sequences that are computed at a time [1 to 100_000]


class Trials:
    """The loss of a model under budgets, on a fixed set of windows. Remembers every loss that it has computed."""

    def __init__(self, model, batches, policy):
        """batches: a list of (x, y), int64 (B, T)."""
        self.model, self.batches, self.policy = model, batches, policy
        self.targets = [y for _, y in batches]
        T = self.targets[0].size(1)
        self.pos = torch.arange(T, device=self.targets[0].device)
        self.budgets = [T] * model.config.n_layer
        # inputs[l][n]: what layer l reads from batch n under self.budgets; those of layers up to `ready` are up to date
        self.inputs = [[model.embed(x, self.pos) for x, _ in batches]] + [None] * len(self.budgets)
        self.ready = 0
        self.known = {}         # budgets -> loss

    def loss(self, l=0, K=None):
        """Mean loss in nats per token with a budget of K in layer l (None: its own) and the others as they are."""
        K = self.budgets[l] if K is None else K
        budgets = (*self.budgets[:l], K, *self.budgets[l + 1:])
        if budgets in self.known:
            return self.known[budgets]
        for below in range(self.ready, l):
            self.inputs[below + 1] = [self._layer(below, x, self.budgets[below]) for x in self.inputs[below]]
        self.ready = max(self.ready, l)
        self.known[budgets] = self._windows(l, budgets).mean().item()
        return self.known[budgets]

    def windows(self, budgets):
        """The mean loss of each window (windows,) with these budgets."""
        return Trials(self.model, self.batches, self.policy)._windows(0, budgets)

    def _windows(self, l, budgets):
        # from what layer l reads, which is ready
        losses = []
        for x, y in zip(self.inputs[l], self.targets):
            for layer in range(l, len(budgets)):
                x = self._layer(layer, x, budgets[layer])
            logits = self.model.lm_head(self.model.transformer.ln_f(x))
            loss = fn.cross_entropy(logits.transpose(1, 2), y, ignore_index=-1, reduction='none')        # (B, T)
            losses.append(loss.sum(dim=1) / (y >= 0).sum(dim=1))
        return torch.cat(losses)

    def set(self, l, K):
        """Give layer l the budget K; what the layers above it read must then be computed again."""
        self.budgets[l] = K
        self.ready = min(self.ready, l)

    def _layer(self, l, x, K):
        """Layer l on x (B, T, C) with a budget of K: the parallel form of context pruning."""
        c, cache = self.model.config, None
        if K < len(self.pos):
            cache = LayerCache(len(x), c.n_head, K, c.n_embd // c.n_head, self.policy, x.device, x.dtype)
        return self.model.transformer.h[l](x, self.pos, cache)[0]


def quick_search(trials, target, loss):
    """Yield (layer, its new budget, loss, an estimate of the trials left); the caller then sets it in trials.

    See the top of this file for how it is chosen.
    """
    budgets, part, single = trials.budgets, 0.5, False
    least = min(2, max(budgets))
    while not single:
        single = part * max(budgets) < 2    # the last round: one token, from any layer
        last = {}       # layer -> (loss per token in its last trial of this round, loss, budget, the step of the trial)
        step, open_layers = 0, set(range(len(budgets)))
        while True:
            def bite(l):
                return min(1 if single else math.floor(budgets[l] * part), budgets[l] - least)
            open_layers = {l for l in open_layers if bite(l) >= 1}
            if not open_layers:
                break
            l = min(open_layers, key=lambda l: last[l][0] if l in last else -math.inf)
            if l not in last or last[l][3] < step:
                K = budgets[l] - bite(l)
                tried = trials.loss(l, K)
                last[l] = ((tried - loss) / bite(l), tried, K, step)
                continue    # the cheapest is sought again: it may be another layer now
            _, tried, K, _ = last.pop(l)
            if tried - loss <= (target - loss) / (1 if bite(l) == 1 else 4):
                loss, step = tried, step + 1
                left = 1 if single else 1 + math.log2(part * max(budgets))      # rounds
                yield l, K, loss, 2 * len(budgets) * left       # two trials a layer in each round
            elif single:
                open_layers.remove(l)       # what another layer gives may still fit
            else:
                break       # the others cost more for a token: they wait until this one's bite fits
        part /= 2


def plain_search(trials, target, bite):
    """The paper's greedy search, `bite` tokens at a time from the layer where that costs the least loss.

    Yields what `quick_search` yields; of the trials left it knows only how many they are at most.
    """
    least = min(2, max(trials.budgets))
    while True:
        tried = {l: trials.loss(l, K - bite) for l, K in enumerate(trials.budgets) if K - bite >= least}
        l = min(tried, key=tried.get, default=None)
        if l is None or tried[l] > target:
            return
        yield l, trials.budgets[l] - bite, tried[l], len(trials.budgets) * sum(K // bite for K in trials.budgets)


def point(budgets, block_size, loss):
    """One point of the curve."""
    memory, full = sum(budgets), len(budgets) * block_size
    return {'budgets': list(budgets), 'memory': memory, 'fraction': memory / full, 'saving': full / memory,
            'val_loss': loss}


def show(number, p, note=''):
    print(f"{number:4} | {' '.join(f'{K:4}' for K in p['budgets'])} | {p['fraction']:7.2%} | {p['saving']:6.1f}x | "
          f"{p['val_loss']:.4f} | {note}", flush=True)


def windows_of(dataset, cfg, block_size, bos, held_out=False):
    """Batches of random validation windows; held_out: as many others (in a small text they may overlap)."""
    count = -(-cfg.windows // cfg.batch_size)
    sizes = [min(cfg.batch_size, cfg.windows - n * cfg.batch_size) for n in range(count)]
    batches = [dataset.batch('val', n + held_out * count, size, block_size, cfg.seed, bos)
               for n, size in enumerate(sizes)]
    return [(x.to(cfg.device), y.to(cfg.device)) for x, y in batches]


def bootstrap(values, counts=None, samples=10_000):
    """95% interval of the mean of values, one for each window, when windows are drawn again with replacement.

    counts: how many tokens each value is the sum of; the mean is then over tokens. Differences of two models on the
    same windows give the paired bootstrap.
    """
    values = values.double().cpu()
    counts = torch.ones_like(values) if counts is None else counts.double().cpu()
    drawn = torch.randint(len(values), (samples, len(values)), generator=torch.Generator().manual_seed(0))
    means = values[drawn].sum(dim=1) / counts[drawn].sum(dim=1)
    return tuple(means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist())


def unseen(trials, curve, target):
    """The curve on windows that the search has not seen, those of trials. target: the loss to keep on each window.

    Returns a dictionary: 'target'; 'unpruned', 'pruned', the losses at the ends of the curve; 'difference', of the end
    to the target, with its 95% interval; 'holds', the point of the curve with the least memory whose loss on these
    windows is at most the target, or None. Only this point counts as memory saved.
    """
    unpruned = trials.windows(curve[0]['budgets']).mean().item()
    found = {'target': target.mean().item(), 'unpruned': unpruned, 'holds': None}
    for p in reversed(curve):
        losses = trials.windows(p['budgets'])
        if p is curve[-1]:
            difference = losses - target
            found.update(pruned=losses.mean().item(), difference=[difference.mean().item(), *bootstrap(difference)])
        if losses.mean() <= target.mean():
            found['holds'] = {**p, 'val_loss': losses.mean().item()}
            break
    return found


@torch.no_grad()
def main():
    cfg = settings.parse(PruneConfig)
    if sum(map(bool, (cfg.baseline, cfg.target_loss, cfg.tolerance))) != 1:
        raise UserError('say how far to prune: one of --baseline, --target_loss and --tolerance, above 0')
    if cfg.init_from != 'resume' and cfg.out_dir == PruneConfig.out_dir:
        raise UserError(f'--init_from={cfg.init_from} needs an --out_dir: the folder for its budgets')
    name = cfg.to or ('budgets.json' if cfg.policy == 'selective' else f'budgets_{cfg.policy}.json')
    if os.path.basename(name) != name:
        raise UserError(f'--to={name}: it names a file in {cfg.out_dir}, without a folder')
    path = os.path.join(cfg.out_dir, name)
    files.check_output(path, '.json', '"budgets"')
    cfg.device = devices.pick_device(cfg.device)
    model, checkpoint = pretrained.load_model(cfg.init_from, cfg.out_dir, cfg, cfg.device)
    size = model.config.block_size
    try:
        check_budgets(model.config, size, cfg.policy)
    except ValueError as e:
        raise UserError(f'{cfg.out_dir}: {e}') from None
    dataset = data.load_dataset(cfg.dataset or checkpoint['dataset'] or '')
    if dataset.tokenizer_name != checkpoint['tokenizer']:
        raise UserError(f"{cfg.out_dir} was trained on {checkpoint['tokenizer']}, data set {dataset.name} has "
                        f'{dataset.tokenizer_name}')
    size = dataset.window(size) - 1                         # records may be shorter
    kernels.install(model)                                  # for layers that keep everything
    search_set, held_out = (windows_of(dataset, cfg, size, ckpt.starts_with_bos(checkpoint), held_out)
                            for held_out in (False, True))
    trials, trials_held_out = Trials(model, search_set, cfg.policy), Trials(model, held_out, cfg.policy)
    unpruned, baseline, target = trials.loss(), None, cfg.target_loss
    if cfg.baseline:
        other, other_checkpoint = ckpt.load_model(cfg.baseline, cfg.device)
        traits = [(m.config.block_size, c['tokenizer'], ckpt.starts_with_bos(c))
                  for m, c in ((model, checkpoint), (other, other_checkpoint))]
        if traits[0] != traits[1]:
            raise UserError(f'{cfg.baseline} has another block_size, tokenizer or bos: the losses cannot be compared')
        target = baseline = Trials(other, search_set, cfg.policy).loss()
        held_out_target = Trials(other, held_out, cfg.policy).windows([size] * other.config.n_layer)
    elif cfg.tolerance:
        target = unpruned + cfg.tolerance
        held_out_target = trials_held_out.windows(trials.budgets) + cfg.tolerance
    else:
        held_out_target = torch.full((cfg.windows,), target, device=cfg.device)
    if unpruned > target:
        raise UserError(f'the loss without pruning, {unpruned:.4f}, {ABOVE}, {target:.4f}')

    result = {'budgets': list(trials.budgets), 'policy': cfg.policy, 'block_size': size, 'target_loss': target,
              'unpruned_loss': unpruned, 'baseline_loss': baseline, 'dataset': dataset.name, 'data': dataset.fingerprint(),
              'checkpoint': ckpt.fingerprint(model), 'code': ckpt.code_fingerprint(), 'held_out': {},
              'search': {name: getattr(cfg, name) for name in ('search', 'bite', 'windows', 'seed', 'batch_size')},
              'curve': [point(trials.budgets, size, unpruned)], 'trials': []}
    # The search is deterministic: to continue one, repeat its steps with the losses that it found.
    trials.known.update(known_trials(path, result))
    print(f'{cfg.out_dir}: pruning {len(trials.budgets)} layers of {size} tokens, policy {cfg.policy}; loss '
          f'{unpruned:.4f} without pruning, target {target:.4f}'
          + (f'; continuing with the {len(trials.known) - 1} trials in {path}' if len(trials.known) > 1 else ''))
    print(f"step | {'budgets':{5 * len(trials.budgets) - 1}} | memory  |  saving | loss   | time")
    show(0, result['curve'][0])
    started, tried_before = time.time(), len(trials.known)
    steps = plain_search(trials, target, cfg.bite) if cfg.search == 'plain' else \
        quick_search(trials, target, unpruned)
    about = 'at most' if cfg.search == 'plain' else 'about'
    for number, (l, K, loss, trials_left) in enumerate(steps, start=1):
        trials.set(l, K)
        result['budgets'] = list(trials.budgets)
        result['curve'].append(point(trials.budgets, size, loss))
        result['trials'] = [[*budgets, loss] for budgets, loss in trials.known.items()]
        write(path, result)
        spent = time.time() - started
        left = spent / max(1, len(trials.known) - tried_before) * trials_left
        show(number, result['curve'][-1], f'{spent:.0f}s, {about} {left:.0f}s left')
    result['held_out'] = found = unseen(trials_held_out, result['curve'], held_out_target)
    write(path, result)
    last = result['curve'][-1]
    print(f"{last['memory']:,} tokens of {len(trials.budgets) * size:,}: {last['saving']:.1f}x less memory at loss "
          f"{last['val_loss']:.4f} (target {target:.4f}; {unpruned:.4f} without pruning); "
          f'{len(trials.known) - tried_before} trials in {time.time() - started:.0f}s')
    mean, low, high = found['difference']
    print(f"on windows that the search has not seen: {found['pruned']:.4f} against {found['target']:.4f}, {mean:+.4f} "
          f'(95% over windows: {low:+.4f} to {high:+.4f}); '
          + ('no point of the curve keeps the loss there' if not found['holds'] else
             f"what keeps the loss there, too: {found['holds']['saving']:.1f}x less memory"))
    own = '' if name == 'budgets.json' else f' --budgets={path}'
    print(path + (f': sample.py --out_dir={cfg.out_dir}{own} generates within it' if cfg.policy == 'selective' else ''))


def known_trials(path, result):
    """{budgets: loss} of an earlier search of the same thing, stopped or done; {} if there was none."""
    try:
        before = files.read_json(path, EARLIER, '')
    except UserError:
        return {}
    same = all(before[key] == result[key] for key in EARLIER if key != 'trials')
    return {tuple(map(int, row[:-1])): row[-1] for row in before['trials'] if len(row) > 1} if same else {}


def write(path, result):
    files.write_file(path, json.dumps(result))


if __name__ == '__main__':
    settings.run(main)
