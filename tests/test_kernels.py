"""What is installed into a model, and that a kernel with other numbers than model.py is not."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as fn

import kernels
import model as m
from kernels import cpu
from kernels.linear import Linear

CPU = torch.device('cpu')


def make(**config):
    torch.manual_seed(0)
    shape = dict(block_size=192, vocab_size=17, n_layer=2, n_head=2, n_embd=32, rope=True)
    return m.GPT(m.GPTConfig(**{**shape, 'selective': True, **config})).eval()


def compares_columns(layer, L0):
    votes = L0.relu()
    return votes / (1 + votes.sum(dim=-1, keepdim=True))


def masks_at_once(layer, F, S):
    F = F[:, None] + S.cumsum(dim=1)
    return torch.cat([F, F[:, -1:]], dim=1)


@pytest.mark.parametrize(
    'name, rule, follows',
    [
        ('vote', lambda layer, L0: L0, True),
        ('vote', lambda layer, L0: L0.clamp(0, 0.2), True),
        ('vote', lambda layer, L0: fn.softplus(layer.c_proj.weight[0, 0] * L0), True),
        ('vote', compares_columns, False),
        ('accumulate', masks_at_once, False),
    ],
)
def test_a_kernel_follows_the_rule_or_steps_aside(monkeypatch, name, rule, follows):
    """What trains is the edited rule in any case: another loss, and model.py's gradients."""
    idx = torch.randint(17, (2, 192), generator=torch.Generator().manual_seed(1))

    def run(kernel):
        gpt = make()
        for p in gpt.parameters():
            p.data += 0.2 * torch.randn_like(p)  # strong votes
        line = kernels.install(gpt, kernel)
        _, loss, memory = gpt(idx, idx, memory_tau=1.0)
        (loss + memory).backward()
        return line, loss, [p.grad for p in gpt.parameters()]

    _, published, _ = run('auto')
    monkeypatch.setattr(m.CausalSelfAttention, name, rule)
    line, *found = run('auto')
    assert ('kernels/cpu.py, which gives the numbers' in line) == follows
    assert follows or 'not kernels/cpu.py: on an example it gives other numbers' in line
    _, *expected = run('none')
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert abs(found[0] - published) > 1e-4


def wrong_M(y, M, v):
    if M is not None:
        M = M + 1
    return y, M


def fails(y, M, v):
    raise RuntimeError('no such\ninstruction')


@pytest.mark.parametrize(
    'edit, why',
    [
        (lambda y, M, v: (y, M), ''),
        (lambda y, M, v: (y * 1.001, M), 'other numbers than this model.py (y)'),
        (lambda y, M, v: (y * float('nan'), M), 'other numbers than this model.py (y)'),
        (wrong_M, 'other numbers than this model.py (M)'),
        (lambda y, M, v: (y + 0.01 * (v - v.detach()), M), 'the gradient of'),
        (lambda y, M, v: (y[:, :1], M), 'it fails here'),
        (fails, 'it fails here (RuntimeError: no such instruction)'),
    ],
)
def test_a_broken_kernel(monkeypatch, edit, why):
    def broken(q, k, v, rule, dropout=0.0, memory_tau=None):
        y, M = m.selective_attention(q, k, v, rule, dropout, memory_tau)
        return edit(y, M, v)

    gpt = make()
    found = kernels.check(broken, gpt.transformer.h[0].attn, CPU, torch.float32)
    assert why in found and bool(why) == bool(found) and '\n' not in found
    if why:
        monkeypatch.setattr(cpu, 'selective_attention', broken)
        assert kernels.install(gpt).endswith(f'plain code, not kernels/cpu.py: {found}')
        with pytest.raises(ValueError, match='cannot run'):
            kernels.install(gpt, 'cpu')


def test_what_is_installed():
    functions = {
        'none': m.selective_attention,
        'listing': m.selective_attention_listing,
        'auto': cpu.selective_attention,
        'cpu': cpu.selective_attention,
    }
    gpt = make()
    for kernel, function in functions.items():
        line = kernels.install(gpt, kernel)
        assert line.startswith('attention: ') and '\n' not in line
        for block in gpt.transformer.h:
            assert block.attn.attention is function
    assert 'scaled_dot_product_attention' in kernels.install(make(selective=False))
    gpt = make(dropout=0.1)
    assert 'dropout' in kernels.install(gpt)
    assert gpt.transformer.h[0].attn.attention is m.selective_attention


@pytest.mark.parametrize(
    'kernel, dtype, word',
    [
        ('fast', torch.float32, 'fast'),
        ('cpu', torch.float16, 'float16'),
        ('gpu', torch.float32, 'gpu'),
    ],
)
def test_what_cannot_be_installed(kernel, dtype, word):
    with pytest.raises(ValueError, match=word):
        kernels.install(make(n_embd=20), kernel, dtype)


def test_a_listing_that_differs_is_refused(monkeypatch):
    attend = m.attend
    monkeypatch.setattr(m, 'attend', lambda q, *args, **more: attend(2 * q, *args, **more))
    with pytest.raises(ValueError, match='other numbers than this model.py'):
        kernels.install(make(), 'listing')


def test_vote_scale_is_checked_away_from_zero():
    """At its start, 0, a factor hides what the votes do, and a kernel that ignores it passes."""

    def blind(q, k, v, rule, dropout=0.0, memory_tau=None):
        return cpu.selective_attention(q, k, v, make().transformer.h[0].attn, dropout, memory_tau)

    gpt = make(vote_scale=True)
    layer = gpt.transformer.h[0].attn
    assert 'which gives the numbers' in kernels.install(gpt)
    assert layer.vote_scale == 0
    assert 'other numbers' in kernels.check(blind, layer, CPU, torch.float32)


@pytest.mark.parametrize('shape', [(1, 1, 24), (24,), (1, 3, 24), (0, 24)])
@pytest.mark.parametrize('n_out, bias', [(128, True), (192, False), (17, True)])
def test_linear(shape, n_out, bias):
    """A fast linear layer is nn.Linear, whether it has one row or more."""
    linear = nn.Linear(24, n_out, bias).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    found = []
    for layer in linear, Linear(linear):
        y = layer(x)
        found.append([y, *torch.autograd.grad(y.sin().sum(), [x, *layer.parameters()])])
    torch.testing.assert_close(*found)


def test_fast_rows():
    gpt = make(bias=True)
    idx = torch.arange(7)[None]
    expected = gpt.generate(idx, 20, temperature=0)
    weights = gpt.state_dict()
    kernels.fast_rows(gpt)
    assert not any(type(layer) is nn.Linear for layer in gpt.modules())
    assert gpt.lm_head.weight is gpt.transformer.wte.weight
    assert list(gpt.state_dict()) == list(weights)
    assert torch.equal(gpt.generate(idx, 20, temperature=0), expected)
