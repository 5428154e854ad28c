"""prune.py: the search, what it writes, and what it refuses."""
import itertools
import json
import math
import random

import pytest
import torch

import prune
import sample
from model import GPT, GPTConfig, KVCache
from support import checkpoint as ckpt

SHAPE = dict(block_size=32, vocab_size=257, n_layer=3, n_head=2, n_embd=16)


@pytest.fixture(scope='module')
def runs(tmp_path_factory, lines):
    """Folders with checkpoints of two models with large weights, selective and standard."""
    root = tmp_path_factory.mktemp('runs')
    for name, selective, scale in (('selective', True, 10), ('standard', False, 30)):   # the second is a worse model
        torch.manual_seed(1)
        config = GPTConfig(**SHAPE, selective=selective)
        gpt = GPT(config)
        with torch.no_grad():
            for p in gpt.parameters():
                p.mul_(scale if p.dim() == 2 else 1)
        (root / name).mkdir()
        ckpt.save(root / name, {'model': gpt.state_dict(), 'model_args': vars(config), 'dataset': str(lines),
                                'tokenizer': 'bytes'})
    return root


@pytest.fixture
def run(runs, run):
    run_script = run

    def run(*args, script=prune, name='selective'):
        return run_script(script, f'--out_dir={runs / name}', *args)
    yield run
    for path in runs.glob('*/budgets*.json'):
        path.unlink()


def found(runs, file='selective/budgets.json'):
    return json.loads((runs / file).read_text())


SMALL = ['--windows=6', '--batch_size=4', '--device=cpu']


@pytest.mark.parametrize('search', ['quick', 'plain'])
def test_budgets_keep_the_loss(search, lines, runs, run):
    """The loss written is the one that a KV cache of these budgets has, and no layer can give one bite more."""
    out = run(*SMALL, '--tolerance=0.05', f'--search={search}', '--bite=4')
    assert 'less memory' in out
    result = found(runs)
    assert result['target_loss'] == result['unpruned_loss'] + 0.05
    assert result['budgets'] == result['curve'][-1]['budgets'] and sum(result['budgets']) < 96
    gpt, _ = ckpt.load_model(runs / 'selective')
    dataset = prune.data.load_dataset(str(lines))
    batches = [dataset.batch('val', n, size, 32, 0) for n, size in enumerate((4, 2))]

    def loss(budgets):
        with torch.no_grad():
            return sum(gpt(x, y, cache=KVCache(gpt, len(x), budgets))[1].item() * len(x) for x, y in batches) / 6
    for p in result['curve']:
        assert abs(loss(p['budgets']) - p['val_loss']) < 1e-4
        assert p['memory'] == sum(p['budgets']) and p['val_loss'] <= result['target_loss']
    bite = 4 if search == 'plain' else 1
    for l, K in enumerate(result['budgets']):
        if K - bite >= 2:
            fewer = [K - bite if l == m else other for m, other in enumerate(result['budgets'])]
            assert loss(fewer) > result['target_loss'] - 1e-4


def test_the_quick_search_ends_where_no_layer_can_give_a_token():
    """On losses that are known, of layers that need different numbers of tokens."""
    class Trials:
        def __init__(self, needs, T):
            self.needs, self.budgets = needs, [T] * len(needs)

        def loss(self, l=None, K=None):
            return sum(need * (1 - (K if i == l else kept) / 64)**(2 + 8 * need)
                       for i, (need, kept) in enumerate(zip(self.needs, self.budgets)))

    for n, T in itertools.product(range(20), (2, 16, 64)):
        rng = random.Random(n)
        trials = Trials([rng.random()**3 for _ in range(4)], T)
        target = trials.loss() + rng.random() * (sum(trials.needs) - trials.loss()) / 2
        for l, K, loss, left in prune.quick_search(trials, target, trials.loss()):
            trials.budgets[l] = K
            assert loss == trials.loss() <= target and left > 0
        assert all(K == 2 or trials.loss(l, K - 1) > target for l, K in enumerate(trials.budgets)), (n, T)


def test_the_quick_search_keeps_as_little_as_the_plain_one():
    """On losses that are known, of layers that need from one token to all: bites of one token are the best here."""
    class Trials:
        def __init__(self, reach, T):
            self.reach, self.budgets = reach, [T] * len(reach)

        def loss(self, l=None, K=None):
            return sum(math.exp(-(K if i == l else kept) / reach)
                       for i, (reach, kept) in enumerate(zip(self.reach, self.budgets)))

    for n, T in itertools.product(range(10), (64, 256)):
        memory = []
        for search in (prune.quick_search, lambda *args: prune.plain_search(*args[:2], bite=1)):
            rng = random.Random(n)
            trials = Trials([1 + 60 * rng.random()**3 for _ in range(4)], T)
            for l, K, *_ in search(trials, trials.loss() + 0.1 + 0.3 * rng.random(), trials.loss()):
                trials.budgets[l] = K
            memory.append(sum(trials.budgets))
        assert memory[0] <= 1.05 * memory[1], (n, T)


def test_plain_search_is_greedy(runs, run):
    run(*SMALL, '--tolerance=0.05', '--search=plain', '--bite=8')
    result = found(runs)
    trials = {tuple(row[:-1]): row[-1] for row in result['trials']}
    for before, after in zip(result['curve'], result['curve'][1:]):
        b = before['budgets']
        choices = [trials[tuple(K - 8 if l == m else K for m, K in enumerate(b))] for l in range(3) if b[l] - 8 >= 2]
        assert after['val_loss'] == min(choices)


def test_a_stopped_search_continues(runs, run, monkeypatch):
    run(*SMALL, '--tolerance=0.05')
    whole = found(runs)
    count = []
    layer = prune.Trials._layer
    monkeypatch.setattr(prune.Trials, '_layer', lambda *args: count.append(1) or layer(*args))
    (runs / 'selective/budgets.json').unlink()
    write = prune.write

    def stop(path, result):
        write(path, result)
        if len(result['curve']) == 5:
            raise KeyboardInterrupt
    monkeypatch.setattr(prune, 'write', stop)
    with pytest.raises(KeyboardInterrupt):
        run(*SMALL, '--tolerance=0.05')
    monkeypatch.setattr(prune, 'write', write)
    assert len(found(runs)['curve']) == 5
    first = len(count)
    assert 'continuing with' in run(*SMALL, '--tolerance=0.05')
    second = len(count) - first
    assert found(runs) == whole
    count.clear()
    run(*SMALL, '--tolerance=0.05')
    assert found(runs) == whole and len(count) < second     # a search that is done costs next to nothing
    for place, name in (prune.ckpt, 'code_fingerprint'), (prune.data.Dataset, 'fingerprint'):
        with monkeypatch.context() as edited:                   # losses of an edited model.py, or of other text, differ
            edited.setattr(place, name, lambda *_: 'another')
            assert 'continuing with' not in run(*SMALL, '--tolerance=0.05')
        run(*SMALL, '--tolerance=0.05')


def test_policies_and_baseline(runs, run):
    out = run(*SMALL, '--policy=oldest', '--tolerance=0.05')
    assert 'policy oldest' in out and found(runs, 'selective/budgets_oldest.json')['policy'] == 'oldest'
    assert not (runs / 'selective/budgets.json').exists()
    assert 'less memory' in run(*SMALL, '--policy=random', '--tolerance=0.05', name='standard')
    assert 'no F to prune by' in run(*SMALL, '--tolerance=0.05', name='standard')
    run(*SMALL, '--policy=oldest', '--tolerance=0.0001', name='standard')
    loss = found(runs, 'standard/budgets_oldest.json')['unpruned_loss']
    assert 'less memory' in run(*SMALL, f'--baseline={runs / "standard"}')
    assert found(runs)['baseline_loss'] == found(runs)['target_loss'] == loss
    assert found(runs)['held_out'].keys() == {'target', 'unpruned', 'pruned', 'difference', 'holds'}


def test_sampling_inside_the_budgets(runs, run):
    run(*SMALL, '--tolerance=0.05')
    budgets = found(runs)['budgets']
    out = run('--max_new_tokens=5', '--device=cpu', script=sample)
    assert f'for budgets {budgets}' in out and f'{96 / sum(budgets):.1f}x less' in out
    assert 'for budgets' not in run('--max_new_tokens=5', '--budgets=none', '--device=cpu', script=sample)
    moved = json.dumps({**found(runs), 'checkpoint': '0' * 16})
    (runs / 'selective/budgets.json').write_text(moved)
    assert 'made for another checkpoint' in run('--device=cpu', script=sample)
    (runs / 'selective/budgets.json').write_text('{"budgets": 1')
    assert 'is damaged (it is not JSON)' in run('--device=cpu', script=sample)


@pytest.mark.parametrize('args, words', [
    ([], 'how far'), (['--tolerance=0.1', '--target_loss=2'], 'how far'), (['--target_loss=0.1'], prune.ABOVE),
    (['--tolerance=0.1', '--search=fast'], 'search'), (['--tolerance=0.1', '--policy=newest'], 'newest'),
    (['--tolerance=0.1', '--dataset=nowhere'], 'nowhere'), (['--baseline=nowhere'], 'nowhere')])
def test_refusals(args, words, runs, run):
    assert words in run(*SMALL, *args)
    assert not (runs / 'selective/budgets.json').exists()


def test_unseen_windows(lines, runs, run):
    """Only the point of the curve counts that keeps the loss on windows which the search has not seen."""
    out = run(*SMALL, '--tolerance=0.05')
    held_out, curve = found(runs)['held_out'], found(runs)['curve']
    gpt, _ = ckpt.load_model(runs / 'selective')
    dataset = prune.data.load_dataset(str(lines))
    batches = [dataset.batch('val', 2 + n, size, 32, 0) for n, size in enumerate((4, 2))]

    @torch.no_grad()
    def loss(budgets):
        return sum(gpt(x, y, cache=KVCache(gpt, len(x), budgets))[1].item() * len(x) for x, y in batches) / 6
    target = loss([32] * 3) + 0.05
    assert abs(held_out['target'] - target) < 1e-4 and abs(held_out['pruned'] - loss(found(runs)['budgets'])) < 1e-4
    assert abs(held_out['difference'][0] - (held_out['pruned'] - target)) < 1e-4
    assert held_out['difference'][1] <= held_out['difference'][0] <= held_out['difference'][2]
    fit = [p['budgets'] for p in curve if loss(p['budgets']) <= target]
    assert held_out['holds']['budgets'] == fit[-1] and abs(held_out['holds']['val_loss'] - loss(fit[-1])) < 1e-4
    assert 'windows that the search has not seen' in out
    trials = prune.Trials(gpt, batches, 'selective')
    assert prune.unseen(trials, curve, torch.zeros(6))['holds'] is None
    assert prune.unseen(trials, curve, torch.full((6,), 99.0))['holds']['budgets'] == curve[-1]['budgets']


def test_bootstrap():
    values = torch.randn(200, generator=torch.Generator().manual_seed(0)) + 3
    low, high = prune.bootstrap(values)
    error = values.std() / 200**0.5
    assert abs(low - (values.mean() - 1.96 * error)) < 0.2 * error
    assert abs(high - (values.mean() + 1.96 * error)) < 0.2 * error
    assert prune.bootstrap(torch.full((5,), 2.0)) == (2.0, 2.0)
    assert prune.bootstrap(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 8.0])) == (0.5, 0.5)
