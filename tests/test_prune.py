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
        shape = dict(block_size=32, vocab_size=257, n_layer=3, n_head=2, n_embd=16)
        config = GPTConfig(selective=name == 'selective', **shape)
        weights = GPT(config).state_dict()
        for p in weights.values():
            if p.dim() == 2:
                p.mul_(scale)
        checkpoint = {'model': weights, 'model_args': vars(config)}
        (root / name).mkdir()
        ckpt.save(root / name, {**checkpoint, 'dataset': str(lines), 'tokenizer': 'bytes'})
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

    It is measured on 8 windows, from the batch of number first on.
    """
    gpt, _ = ckpt.load_model(runs / 'selective')
    dataset = prune.data.load_dataset(str(lines))

    @torch.no_grad()
    def loss(budgets, first=0, dtype='float32'):
        total = 0
        for n in 0, 1:
            x, y = dataset.batch('val', first + n, 4, 32, 0)
            cache = KVCache(gpt, 4, budgets, dtype=getattr(torch, dtype))
            with devices.autocast('cpu', dtype):
                total += gpt(x, y, cache=cache)[1].item()
        return total / 2

    return loss


def test_budgets_keep_the_loss(loss, runs, run):
    """The losses are those with KV caches of these budgets, also on other windows."""
    assert 'less memory' in run(*SMALL, TOLERANCE)
    result = found(runs)
    curve = [p['budgets'] for p in result['curve']]
    losses = [p['val_loss'] for p in result['curve']]
    assert [loss(budgets) for budgets in curve] == pytest.approx(losses, abs=1e-4)
    assert max(losses) <= result['target_loss'] == pytest.approx(losses[0] + 0.05)
    assert result['budgets'] == curve[-1] and sum(curve[-1]) < 96
    mean, low, high = result['held_out']['difference']
    expected = loss(curve[-1], 2) - loss(curve[0], 2) - 0.05
    assert low <= mean <= high and mean == pytest.approx(expected, abs=1e-4)


def test_the_dtype_of_generation(loss, runs, run):
    """Losses are measured as sample.py generates: under autocast, with keys of its dtype."""
    run(*SMALL, TOLERANCE, '--dtype=bfloat16')
    for p in found(runs)['curve'][::3]:
        measured = loss(p['budgets'], dtype='bfloat16')
        assert abs(measured - p['val_loss']) < 1e-5 < abs(loss(p['budgets']) - measured)


def known(*costs):
    """Losses under budgets that are known: each layer costs cost(what it has)."""

    def measure(budgets):
        loss = sum(cost(budget) for cost, budget in zip(costs, budgets))
        return torch.tensor([loss], dtype=torch.float64)

    return measure


def memory(measure, full, spend, plain_bite=0):
    """What a search keeps of the budgets `full` that may raise the loss by `spend`."""

    def bites(bite):
        """The losses after each bite that could be taken."""
        for l in range(len(full)):
            if budgets[l] >= bite + 2:
                yield measure(prune.fewer(budgets, l, bite)).item()

    best = measure(full).item()
    target = best + spend
    for budgets, loss in prune.search(measure, full, target, plain_bite):
        assert loss == measure(budgets).item() <= target
        if plain_bite:  # greedy
            assert loss == best
            best = min(bites(plain_bite), default=0)
    assert min(bites(plain_bite or 1), default=math.inf) > target
    return sum(budgets)


@pytest.mark.parametrize('T', [1, 2, 3, 16, 64, 256])
@pytest.mark.parametrize('seed', range(10))
def test_the_quick_search_keeps_as_little_as_the_plain_one(T, seed):
    """Layers need from one token to all: here bites of one token are the best."""

    def cost(reach):
        return lambda budget: math.exp(-budget / reach)

    rng = random.Random(seed)
    measure = known(*[cost(1 + 60 * rng.random() ** 3) for _ in range(4)])
    spend = 0.1 + 0.3 * rng.random()
    plain = memory(measure, [T] * 4, spend, plain_bite=1)
    assert memory(measure, [T] * 4, spend) <= 1.05 * plain


def test_every_layer_is_tried_at_the_end():
    """The second layer's token is cheap once the first has lost one, and none more fits there."""
    losses = {(4, 4): 0.0, (3, 4): 0.1, (4, 3): 1.0, (2, 4): 0.6, (3, 3): 0.2}

    def measure(budgets):
        return torch.tensor([losses.get(tuple(budgets), 9.0)])

    assert memory(measure, [4, 4], 0.3) == 6


def test_only_what_holds_on_other_windows_counts():
    measure = known(lambda budget: 1 / budget)
    curve = [{'budgets': [K]} for K in (8, 4, 2)]
    found = prune.unseen(measure, curve, torch.tensor([0.3]))
    assert found['holds'] == {'budgets': [4], 'val_loss': 0.25}
    assert prune.unseen(measure, curve, torch.tensor([0.1]))['holds'] is None


def test_plain_bites(runs, run):
    run(*SMALL, TOLERANCE, '--bite=7')
    memory = [sum(p['budgets']) for p in found(runs)['curve']]
    assert memory == list(range(96, memory[-1] - 1, -7)) and len(memory) > 3


def test_policies_and_baseline(runs, run):
    run(*SMALL, '--policy=oldest', TOLERANCE)
    assert found(runs, 'selective/budgets_oldest.json')['policy'] == 'oldest'
    assert not (runs / 'selective/budgets.json').exists()
    assert 'less memory' in run(*SMALL, '--policy=random', TOLERANCE, name='standard')
    assert 'no F to prune by' in run(*SMALL, TOLERANCE, name='standard')
    standard = found(runs, 'standard/budgets_random.json')
    assert 'less memory' in run(*SMALL, f'--baseline={runs / "standard"}')
    pruned = found(runs)
    assert pruned['target_loss'] == pytest.approx(standard['curve'][0]['val_loss'])
    worse = ['--policy=oldest', f'--baseline={runs / "selective"}']
    assert prune.ABOVE in run(*SMALL, *worse, name='standard')


@pytest.mark.parametrize('change', [{'tokenizer': 'gpt2'}, {'config': {'bos': True}}])
def test_the_baseline_must_be_comparable(change, runs, run, tmp_path):
    ckpt.save(tmp_path, {**ckpt.load(runs / 'standard'), **change})
    assert 'has another block_size, tokenizer or bos' in run(*SMALL, f'--baseline={tmp_path}')


def test_sampling_inside_the_budgets(runs, run):
    run(*SMALL, TOLERANCE)
    result = found(runs)
    args = ['--max_new_tokens=5', '--device=cpu']
    assert f'for budgets {result["budgets"]}' in run(*args, script=sample)
    assert 'for budgets' not in run(*args, '--budgets=none', script=sample)
    result['checkpoint'] = '0' * 16
    (runs / 'selective/budgets.json').write_text(json.dumps(result))
    assert 'made for another checkpoint' in run(*args, script=sample)


@pytest.mark.parametrize(
    'args, words',
    [
        ('--tolerance=0.1 --bite=-1', 'bite'),
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
    error = 1.96 * values.std().item() / 200**0.5
    low, high = prune.bootstrap(values - values.mean())
    assert low == pytest.approx(-error, rel=0.1) and high == pytest.approx(error, rel=0.1)
