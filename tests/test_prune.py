"""prune.py: the search, what it writes, and what it refuses."""

import json
import math
import random

import pytest
import torch

import prune
import sample
from model import GPT, GPTConfig, KVCache
from support import checkpoint as ckpt, devices

SMALL = ['--windows=6', '--batch_size=4', '--device=cpu']
TOLERANCE = '--tolerance=0.05'


@pytest.fixture(scope='module')
def runs(tmp_path_factory, lines):
    """Folders of two models with large weights: selective, and a worse one, standard."""
    root = tmp_path_factory.mktemp('runs')
    for name, scale in ('selective', 10), ('standard', 30):
        torch.manual_seed(1)
        config = GPTConfig(
            block_size=32,
            vocab_size=257,
            n_layer=3,
            n_head=2,
            n_embd=16,
            selective=name == 'selective',
        )
        gpt = GPT(config)
        with torch.no_grad():
            for p in gpt.parameters():
                if p.dim() == 2:
                    p.mul_(scale)
        checkpoint = {
            'model': gpt.state_dict(),
            'model_args': vars(config),
            'dataset': str(lines),
            'tokenizer': 'bytes',
        }
        (root / name).mkdir()
        ckpt.save(root / name, checkpoint)
    return root


@pytest.fixture
def run(runs, run):
    """run(*args): prune.py, or another script, on a model of `runs`."""
    run_script = run

    def run(*args, script=prune, name='selective'):
        return run_script(script, f'--out_dir={runs / name}', *args)

    yield run
    for path in runs.glob('*/budgets*.json'):
        path.unlink()


def found(runs, file='selective/budgets.json'):
    return json.loads((runs / file).read_text())


@pytest.fixture
def loss(runs, lines):
    """loss(budgets, first): of the selective model with a cache of these budgets.

    It is measured on 6 windows, from the batch of number first on.
    """
    gpt, _ = ckpt.load_model(runs / 'selective')
    dataset = prune.data.load_dataset(str(lines))

    @torch.no_grad()
    def loss(budgets, first=0, dtype='float32'):
        total = 0
        for n, size in enumerate((4, 2)):
            x, y = dataset.batch('val', first + n, size, 32, 0)
            cache = KVCache(gpt, size, budgets, dtype=getattr(torch, dtype))
            with devices.autocast('cpu', dtype):
                total += gpt(x, y, cache=cache)[1].item() * size
        return total / 6

    return loss


@pytest.mark.parametrize('search, bite', [('quick', 1), ('plain', 4)])
def test_budgets_keep_the_loss(search, bite, loss, runs, run):
    """The losses are those with KV caches of these budgets, and no layer can give a bite more."""
    assert 'less memory' in run(*SMALL, TOLERANCE, f'--search={search}', '--bite=4')
    result = found(runs)
    budgets = result['budgets']
    assert result['target_loss'] == result['unpruned_loss'] + 0.05
    assert budgets == result['curve'][-1]['budgets'] and sum(budgets) < 96
    for p in result['curve']:
        assert abs(loss(p['budgets']) - p['val_loss']) < 1e-4
        assert p['memory'] == sum(p['budgets']) and p['val_loss'] <= result['target_loss']
    for l in range(3):
        fewer = list(budgets)
        fewer[l] -= bite
        assert fewer[l] < 2 or loss(fewer) > result['target_loss'] - 1e-4

    # only a point counts that keeps the loss on windows which the search has not seen, too
    held_out = result['held_out']
    target = loss([32] * 3, 2) + 0.05
    mean, low, high = held_out['difference']
    assert abs(held_out['target'] - target) < 1e-4
    assert abs(held_out['pruned'] - loss(budgets, 2)) < 1e-4
    assert abs(mean - (held_out['pruned'] - target)) < 1e-4 and low <= mean <= high
    fit = [p['budgets'] for p in result['curve'] if loss(p['budgets'], 2) <= target]
    assert held_out['holds']['budgets'] == fit[-1]


def test_the_dtype_of_generation(loss, runs, run):
    """Losses are measured as sample.py generates: under autocast, with keys of its dtype."""
    run(*SMALL, TOLERANCE, '--dtype=bfloat16')
    for p in found(runs)['curve'][::3]:
        measured = loss(p['budgets'], dtype='bfloat16')
        assert abs(measured - p['val_loss']) < 1e-5 < abs(loss(p['budgets']) - measured)
    assert 'continuing' not in run(*SMALL, TOLERANCE)


class Known:
    """Trials whose losses are known: each layer loses cost(what it has left)."""

    def __init__(self, costs, T):
        self.costs = costs
        self.budgets = [T] * len(costs)

    def loss(self, budgets, first=0):
        return sum(cost(budget) for cost, budget in zip(self.costs, budgets))

    def memory(self, spend, plain_bite=0):
        """What a search keeps that may raise the loss by `spend`."""
        loss = self.loss(self.budgets)
        target = loss + spend
        for trial in prune.search(self, target, loss, plain_bite):
            self.budgets[trial.layer] -= trial.bite
            assert trial.loss == self.loss(self.budgets) <= target
        for l in range(len(self.budgets)):
            fewer = list(self.budgets)
            fewer[l] -= plain_bite or 1
            assert fewer[l] < 2 or self.loss(fewer) > target
        return sum(self.budgets)


@pytest.mark.parametrize('T', [1, 2, 3, 16, 64, 256])
def test_the_quick_search_keeps_as_little_as_the_plain_one(T):
    """Layers need from one token to all: here bites of one token are the best."""

    def cost(reach):
        return lambda budget: math.exp(-budget / reach)

    for n in range(10):
        rng = random.Random(n)
        costs = [cost(1 + 60 * rng.random() ** 3) for _ in range(4)]
        spend = 0.1 + 0.3 * rng.random()
        assert Known(costs, T).memory(spend) <= 1.05 * Known(costs, T).memory(spend, plain_bite=1)


def test_every_layer_is_tried_at_the_end():
    """The second layer's token is cheap once the first has lost one, and none more fits there."""
    losses = {(4, 4): 0, (3, 4): 0.1, (4, 3): 1, (2, 4): 0.6, (3, 3): 0.2}
    trials = Known([], 4)
    trials.budgets = [4, 4]
    trials.loss = lambda budgets, first=0: losses.get(tuple(budgets), 9)
    trials.memory(spend=0.3)
    assert trials.budgets == [3, 3]


def test_plain_search_is_greedy(runs, run):
    run(*SMALL, TOLERANCE, '--search=plain', '--bite=8')
    result = found(runs)
    losses = {tuple(budgets): loss for *budgets, loss in result['trials']}
    for before, after in zip(result['curve'], result['curve'][1:]):
        choices = []
        for l in range(3):
            budgets = list(before['budgets'])
            budgets[l] -= 8
            if budgets[l] >= 2:
                choices.append(losses[tuple(budgets)])
        assert after['val_loss'] == min(choices)


def test_a_stopped_search_continues(runs, run, monkeypatch):
    run(*SMALL, TOLERANCE)
    whole = found(runs)
    (runs / 'selective/budgets.json').unlink()
    computed = []
    layer = prune.Trials.layer
    monkeypatch.setattr(prune.Trials, 'layer', lambda *args: computed.append(1) or layer(*args))
    write = prune.write

    def stop(path, result):
        write(path, result)
        if len(result['curve']) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prune, 'write', stop)
        with pytest.raises(KeyboardInterrupt):
            run(*SMALL, TOLERANCE)
    assert len(found(runs)['curve']) == 5
    computed.clear()
    assert 'continuing with' in run(*SMALL, TOLERANCE)
    assert found(runs) == whole
    second = len(computed)
    computed.clear()
    run(*SMALL, TOLERANCE)
    assert found(runs) == whole and len(computed) < second  # what is done costs next to nothing


def test_only_the_same_search_is_continued(runs, run):
    """Losses of an edited model.py, of other text or of other windows are of no use."""
    run(*SMALL, TOLERANCE)
    path = runs / 'selective/budgets.json'
    result = found(runs)
    assert len(prune.known_trials(path, result)) > 5
    for name in 'code', 'data', 'checkpoint', 'search', 'policy':
        assert prune.known_trials(path, {**result, name: 'another'}) == {}
    path.write_text(json.dumps({**result, 'trials': [[32, 'x']]}))
    assert prune.known_trials(path, result) == {}


def test_policies_and_baseline(runs, run):
    out = run(*SMALL, '--policy=oldest', TOLERANCE)
    assert 'policy oldest' in out
    assert found(runs, 'selective/budgets_oldest.json')['policy'] == 'oldest'
    assert not (runs / 'selective/budgets.json').exists()
    assert 'less memory' in run(*SMALL, '--policy=random', TOLERANCE, name='standard')
    assert 'no F to prune by' in run(*SMALL, TOLERANCE, name='standard')
    run(*SMALL, '--policy=oldest', '--tolerance=0.0001', name='standard')
    loss = found(runs, 'standard/budgets_oldest.json')['unpruned_loss']
    assert 'less memory' in run(*SMALL, f'--baseline={runs / "standard"}')
    assert found(runs)['baseline_loss'] == found(runs)['target_loss'] == loss


def test_the_baseline_must_be_comparable(runs, run, tmp_path):
    for change in {'tokenizer': 'gpt2'}, {'config': {'bos': True}}:
        checkpoint = ckpt.load(runs / 'standard')
        ckpt.save(tmp_path, {**checkpoint, **change})
        assert 'has another block_size, tokenizer or bos' in run(*SMALL, f'--baseline={tmp_path}')


def test_sampling_inside_the_budgets(runs, run):
    run(*SMALL, TOLERANCE)
    budgets = found(runs)['budgets']
    args = ['--max_new_tokens=5', '--device=cpu']
    out = run(*args, script=sample)
    assert f'for budgets {budgets}' in out and f'{96 / sum(budgets):.1f}x less' in out
    assert 'for budgets' not in run(*args, '--budgets=none', script=sample)
    other = json.dumps({**found(runs), 'checkpoint': '0' * 16})
    (runs / 'selective/budgets.json').write_text(other)
    assert 'made for another checkpoint' in run(*args, script=sample)


@pytest.mark.parametrize(
    'args, words',
    [
        ('', 'how far'),
        ('--tolerance=0.1 --target_loss=2', 'how far'),
        ('--target_loss=0.1', prune.ABOVE),
        ('--tolerance=0.1 --search=fast', 'search'),
        ('--tolerance=0.1 --policy=newest', 'newest'),
        ('--tolerance=0.1 --dtype=int8', 'dtype'),
        ('--tolerance=0.1 --dataset=nowhere', 'nowhere'),
        ('--tolerance=0.1 --to=budgets.txt', 'ends in .json'),
        ('--baseline=nowhere', 'nowhere'),
    ],
)
def test_refusals(args, words, runs, run):
    assert words in run(*SMALL, *args.split())
    assert not (runs / 'selective/budgets.json').exists()


def test_bootstrap():
    values = torch.randn(200, generator=torch.Generator().manual_seed(0)) + 3
    low, high = prune.bootstrap(values)
    error = values.std() / 200**0.5
    assert abs(low - (values.mean() - 1.96 * error)) < 0.2 * error
    assert abs(high - (values.mean() + 1.96 * error)) < 0.2 * error
    assert prune.bootstrap(torch.full((5,), 2.0)) == (2.0, 2.0)
    counts = torch.tensor([2.0, 8.0])
    assert prune.bootstrap(torch.tensor([1.0, 4.0]), counts) == (0.5, 0.5)
