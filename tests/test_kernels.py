"""What you read is what runs: model.py is edited, in a copy, and what trains, samples and is pruned follows the edit.

A kernel may run only with the numbers of the edited model.py; where it cannot, it steps aside and says so.
"""
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as fn

import kernels
import model as m
from kernels.linear import Linear

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHAPE = dict(block_size=192, vocab_size=17, n_layer=2, n_head=2, n_embd=32, selective=True, rope=True)


COMPARE = f'''
import json, torch
import kernels, model as m
def loss_and_gradient(kernel):
    torch.manual_seed(0)
    gpt = m.GPT(m.GPTConfig(**{SHAPE}))
    for p in gpt.parameters():
        p.data += 0.2 * torch.randn_like(p)                     # strong votes
    line = kernels.install(gpt, kernel)
    idx = torch.randint(17, (2, 192))
    _, loss, memory = gpt(idx, idx, memory_tau=1.0)
    (loss + memory).backward()
    return line, loss.item(), gpt.transformer.h[0].attn.c_attn.weight.grad.norm().item(), gpt, idx
line, loss, grad, gpt, idx = loss_and_gradient('auto')
_, plain_loss, plain_grad, _, _ = loss_and_gradient('none')
# generation in a bounded cache, step by step, against the same rules in one block
steps, parallel = (m.KVCache(gpt, 2, [20, 40]) for _ in range(2))
with torch.no_grad():
    expected, _ = gpt(idx[:, :90], idx[:, :90], cache=parallel)
    got = torch.cat([gpt(idx[:, [t]], cache=steps)[0] for t in range(90)], dim=1)
print(json.dumps(dict(line=line, loss=loss, grad=grad, plain_loss=plain_loss, plain_grad=plain_grad,
                      pruned=got.mean().item(), cache_error=(got - expected).abs().max().item())))
'''
EDITS = {  # what is edited: file, old, new, and whether the CPU kernel can still give the numbers
    'nothing': ('model.py', 'S = L0.relu()', 'S = L0.relu()', True),
    'votes without ReLU': ('model.py', 'S = L0.relu()', 'S = L0', True),
    'capped votes': ('model.py', 'S = L0.relu()', 'S = L0.clamp(0, 0.2)', True),
    'another head selects': ('model.py', 'vote(L[:, 0].to(F.dtype))', 'vote(L[:, -1].to(F.dtype))', False),
    'a row masks at once': ('model.py', 'P = (L - F[:, None, :-1])', 'P = (L - F[:, None, 1:])', False),
    'votes that compare columns': ('model.py', 'S = L0.relu()', 'S = L0.relu() / (1 + L0.relu().sum(-1, True))', False),
    'a broken kernel': ('kernels/cpu.py', None, 'return y * 1.001, M', False),
    'a kernel with a wrong gradient': ('kernels/cpu.py', None, 'return y + 0.01 * (v - v.detach()), M', False),
    'a kernel that fails': ('kernels/cpu.py', None, 'raise RuntimeError("no such instruction")', False),
}


@pytest.fixture(scope='module')
def published():
    """What model.py says unedited."""
    result = subprocess.run([sys.executable, '-c', COMPARE], cwd=ROOT, capture_output=True, text=True, check=True,
                            env={**os.environ, 'OMP_NUM_THREADS': '1'})
    return json.loads(result.stdout)


@pytest.mark.parametrize('what', EDITS)
def test_an_edit_counts(tree, what, published):
    file, old, new, kernel_follows = EDITS[what]
    if old is None:
        with open(tree.path / file, 'a') as f:
            f.write('\n\nright = selective_attention\n\n\ndef selective_attention(q, k, v, vote, dropout=0.0, '
                    f'memory_tau=None):\n    y, M = right(q, k, v, vote, dropout, memory_tau)\n    {new}\n')
    else:
        tree(file, old, new)
    found = json.loads(tree.run('-c', COMPARE))
    assert found['loss'] == pytest.approx(found['plain_loss'], rel=1e-5)
    assert found['grad'] == pytest.approx(found['plain_grad'], rel=1e-3)
    if what != 'votes that compare columns':                    # which is no vote: it would look into the future
        assert found['cache_error'] < 1e-3
    if kernel_follows:
        assert 'kernels/cpu.py, which gives the numbers' in found['line']
    else:
        assert "model.py's plain code, not kernels/cpu.py: " in found['line']
        why = 'RuntimeError: no such instruction' if 'fails' in what else 'other numbers than this model.py'
        assert why in found['line']
    if file == 'model.py' and what != 'nothing':                # what trains and what is pruned did change
        assert abs(found['loss'] - published['loss']) > 1e-4
        assert abs(found['pruned'] - published['pruned']) > 1e-6


def test_training_follows_an_edit(tree, lines):
    """The first thing that a reader tries: no ReLU, train with the default settings, and see other losses."""
    def losses(out):
        tree.run('train.py', 'config/selective_small.py', f'--dataset={lines}', '--n_layer=1', '--n_head=2',
                 '--n_embd=32', '--block_size=64', '--max_iters=4', '--log_interval=1', '--eval_iters=1', '--device=cpu',
                 f'--out_dir={out}')
        with open(tree.path / out / 'log.jsonl') as f:
            return [line['loss'] for line in map(json.loads, f) if 'loss' in line]
    before = losses('before')
    tree('model.py', 'S = L0.relu()', 'S = L0')
    after = losses('after')
    assert len(before) == len(after) == 4 and all(a != b for a, b in zip(before, after))


def make(**config):
    torch.manual_seed(0)
    return m.GPT(m.GPTConfig(**{**SHAPE, **config})).eval()


def test_what_is_installed():
    plain = m.selective_attention
    listing = m.selective_attention_listing
    for kernel, function in ('none', plain), ('listing', listing), ('auto', None), ('cpu', None):
        gpt = make()
        line = kernels.install(gpt, kernel)
        assert '\n' not in line and line.startswith('attention: ')
        installed = {block.attn.attention for block in gpt.transformer.h}
        assert installed == {function} if function else plain not in installed
    assert 'scaled_dot_product_attention' in kernels.install(make(selective=False))
    gpt = make(dropout=0.1)
    assert 'dropout' in kernels.install(gpt) and gpt.transformer.h[0].attn.attention is plain
    for kernel, word in ('fast', 'fast'), ('gpu', 'gpu'):
        with pytest.raises(ValueError, match=word):
            kernels.install(make(n_embd=20), kernel)
    with pytest.raises(ValueError, match='float16'):
        kernels.install(make(), 'cpu', torch.float16)


def test_a_listing_that_differs_says_so(monkeypatch):
    """The listing is model.py's own and runs as it is asked to; but it says if `attend` computes something else."""
    assert 'other numbers' not in kernels.install(make(), 'listing')
    attend = m.attend
    monkeypatch.setattr(m, 'attend', lambda q, k, v, F, i, j, vote, **more: attend(
        q, k, v, F, i, j, lambda L0: L0, **more))
    assert 'it gives other numbers than this model.py' in kernels.install(make(), 'listing')


def test_vote_scale_is_checked_away_from_zero():
    """At its start, 0, a factor hides what the votes do, and a kernel that ignores it would pass."""
    from kernels import cpu
    gpt = make(vote_scale=True)
    assert 'which gives the numbers' in kernels.install(gpt)
    assert gpt.transformer.h[0].attn.vote_scale == 0
    blind = lambda q, k, v, vote, dropout=0.0, memory_tau=None: cpu.selective_attention(
        q, k, v, lambda L0: 0 * L0.relu(), dropout, memory_tau)
    assert 'other numbers' in kernels.check(blind, gpt.transformer.h[0].attn, torch.device('cpu'), torch.float32)


@pytest.mark.parametrize('shape', [(1, 1, 24), (24,), (1, 3, 24), (0, 24)])
@pytest.mark.parametrize('n_out, bias', [(128, True), (192, False), (17, True)])
def test_linear(shape, n_out, bias):
    """A fast linear layer is nn.Linear, whether it has one row or more."""
    layer, x = Linear(24, n_out, bias).double(), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    got, want = layer(x), fn.linear(x, layer.weight, layer.bias)
    for y in (got, want):
        y.grads = torch.autograd.grad(y.sin().sum(), inputs)
    torch.testing.assert_close([got, *got.grads], [want, *want.grads])


def test_fast_rows():
    gpt, idx = make(), torch.arange(7)[None]
    expected = gpt.generate(idx, 20, temperature=0)
    names = list(gpt.state_dict())
    kernels.fast_rows(gpt)
    assert {type(x) for x in gpt.modules() if isinstance(x, nn.Linear)} == {Linear} and list(gpt.state_dict()) == names
    assert torch.equal(gpt.generate(idx, 20, temperature=0), expected)
