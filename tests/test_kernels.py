"""What is installed into a model, and that a kernel with other numbers than model.py is not."""

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as fn

import kernels
import model as m
from kernels import cpu
from kernels import linear

CPU = torch.device('cpu')


def make(**config):
    torch.manual_seed(0)
    shape = dict(block_size=192, vocab_size=17, n_layer=2, n_head=2, n_embd=32, rope=True)
    return m.GPT(m.GPTConfig(**{**shape, 'selective': True, **config})).eval()


GIVES = 'kernels/cpu.py, which gives the numbers of model.py'
DIFFERS = 'not kernels/cpu.py: on an example it gives other numbers'


def at_once(F, S):
    """Votes act on their own row, too."""
    return F[:, None] + fn.pad(S, (0, 0, 0, 1)).cumsum(1)


@pytest.mark.parametrize(
    'name, rule, words',
    [
        ('vote', lambda layer, L0: fn.softplus(layer.c_proj.weight[0, 0] * L0), GIVES),
        ('vote', lambda layer, L0: L0.softmax(-1), DIFFERS),
        ('accumulate', lambda layer, F, S: at_once(F, S), DIFFERS),
    ],
)
def test_a_kernel_follows_the_rule_or_steps_aside(monkeypatch, name, rule, words):
    """The gradients are those of the edited rule in any case."""
    monkeypatch.setattr(m.CausalSelfAttention, name, rule)
    idx = torch.randint(17, (2, 192), generator=torch.Generator().manual_seed(1))
    found = []
    for kernel in 'none', 'auto':
        gpt = make()
        for p in gpt.parameters():
            p.data += 0.2 * torch.randn_like(p)  # strong votes
        line = kernels.install(gpt, kernel)
        _, loss, memory = gpt(idx, idx, memory_tau=1.0)
        grads = torch.autograd.grad(loss + memory, list(gpt.parameters()))
        found.append([loss, memory, *grads])
    assert words in line
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def fails(y, M, v):
    raise RuntimeError('no such\ninstruction')


@pytest.mark.parametrize(
    'edit, why',
    [
        (lambda y, M, v: (y * 1.001, M), 'other numbers than this model.py (y)'),
        (lambda y, M, v: (y * float('nan'), M), 'other numbers than this model.py (y)'),
        (lambda y, M, v: (y, v[:, 0, :, :1]), 'ValueError: M has the shape (2, 200, 1)'),
        (lambda y, M, v: (y + 0.01 * (v - v.detach()), M), 'the gradient of'),
        (fails, 'it fails here (RuntimeError: no such instruction)'),
    ],
)
def test_a_broken_kernel(monkeypatch, edit, why):
    def broken(q, k, v, rule, dropout=0.0, memory_tau=None):
        y, M = m.selective_attention(q, k, v, rule, dropout, memory_tau)
        return edit(y, M, v)

    gpt = make()
    monkeypatch.setattr(cpu, 'selective_attention', broken)
    monkeypatch.setattr(m, 'selective_attention_listing', broken)
    line = kernels.install(gpt)
    assert "model.py's plain code, not kernels/cpu.py: " in line
    assert why in line and '\n' not in line
    for kernel in 'cpu', 'listing':
        with pytest.raises(ValueError, match='cannot run'):
            kernels.install(gpt, kernel)


def test_what_is_installed():
    functions = {
        'listing': m.selective_attention_listing,
        'auto': cpu.selective_attention,
        'cpu': cpu.selective_attention,
        'none': m.selective_attention,
    }
    gpt = make()
    for kernel, function in functions.items():
        kernels.install(gpt, kernel)
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
        ('gpu', torch.float32, 'channels|does not run|be imported'),
    ],
)
def test_what_cannot_be_installed(kernel, dtype, word):
    with pytest.raises(ValueError, match=word):
        kernels.install(make(n_embd=20), kernel, dtype)


def test_vote_scale_is_checked_away_from_zero():
    """At its start, 0, a factor hides what strong votes do, and a kernel that caps them passes."""
    gpt = make(vote_scale=True)
    layer = gpt.transformer.h[0].attn
    caps = with_rule(vote=lambda L0: L0.relu().clamp(max=0.1))
    assert 'which gives the numbers' in kernels.install(gpt)
    assert layer.vote_scale == 0
    assert 'other numbers' in kernels.check(caps, layer, CPU, torch.float32)


def with_rule(**parts):
    """model.py's function with these functions in place of the layer's."""

    def attention(q, k, v, layer, dropout=0.0, memory_tau=None):
        rule = copy.copy(layer)
        vars(rule).update(parts)
        return m.selective_attention(q, k, v, rule, dropout, memory_tau)

    return attention


def one_head_sees_all(q, k, v, *args, **options):
    y, M = m.selective_attention(q, k, v, *args, **options)
    standard = fn.scaled_dot_product_attention(q, k, v, is_causal=True)
    return torch.cat([y[:, :-1], standard[:, -1:]], dim=1), M


def wrong_scale(q, *args, **options):
    return m.selective_attention(1.02 * q, *args, **options)


def a_little_wrong(*args, **options):
    """In every number, too little for the largest one to show it."""
    y, M = m.selective_attention(*args, **options)
    return 1.03 * y, M


def one_wrong_number(*args, **options):
    """Too little for the norm to show it."""
    y, M = m.selective_attention(*args, **options)
    y[0, 0, -1, 0] += y.detach().max() / 6
    return y, M


def votes_on_token_0(monkeypatch):
    def attention(*args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(m, 'votes', lambda rule, L0, i, j: torch.where(j < i, rule.vote(L0), 0.0))
            return m.selective_attention(*args, **options)

    return attention


def in_bfloat16(edit):
    """A function that is right in float32, in which more shows."""

    def attention(q, *args, **options):
        if q.dtype == torch.bfloat16:
            return edit(q, *args, **options)
        return m.selective_attention(q, *args, **options)

    return attention


LARGE = [pytest.param(heads, 64, marks=pytest.mark.slow) for heads in (8, 12)]


@pytest.mark.parametrize('heads, size', [(4, 32), *LARGE])
def test_rounding_to_bfloat16_passes_and_an_edit_does_not(heads, size, monkeypatch):
    layer = make(n_head=heads, n_embd=heads * size, n_layer=1).transformer.h[0].attn
    edits = {
        'votes act at once': with_rule(accumulate=at_once),
        'no gradient of F': with_rule(accumulate=lambda F, S: layer.accumulate(F, S).detach()),
        'one head without F': one_head_sees_all,
        'token 0 is masked': votes_on_token_0(monkeypatch),
        'a scale of 1.02': wrong_scale,
        'a norm': a_little_wrong,
        'a number': one_wrong_number,
    }
    for seed in range(10):
        assert not kernels.check(m.selective_attention, layer, CPU, torch.bfloat16, seed)
    for name, edit in edits.items():
        for seed in range(2):
            found = kernels.check(in_bfloat16(edit), layer, CPU, torch.bfloat16, seed)
            assert 'other numbers' in found, name


def test_rounding_to_tf32_passes():
    """As a GPU multiplies float32; it may cut the last 13 bits off."""

    def tf32(q, k, v, *args, **options):
        cut = [(x.detach().view(torch.int32) & -(2**13)).view(torch.float32) for x in (q, k, v)]
        q, k, v = (x + (c - x.detach()) for x, c in zip((q, k, v), cut))
        return m.selective_attention(q, k, v, *args, **options)

    layer = make(n_head=4, n_embd=128).transformer.h[0].attn
    assert not kernels.check(tf32, layer, CPU, torch.float32)


def test_the_reference_is_not_rounded_by_autocast():
    layer = make().transformer.h[0].attn
    qkv = torch.randn(3, 1, 2, 30, 16)
    y, _ = m.selective_attention(*qkv, layer)
    with torch.autocast('cpu', torch.bfloat16):
        found, _ = kernels.exact(*qkv, layer)
    torch.testing.assert_close(found, y)


@pytest.mark.parametrize('shape', [(1, 1, 24), (1, 3, 24), (0, 24)])
@pytest.mark.parametrize('n_out, bias', [(128, True), (192, False), (17, True)])
def test_linear(shape, n_out, bias):
    """The fast forward is that of nn.Linear, whether there is one row or more."""
    layer = nn.Linear(24, n_out, bias)
    x = torch.randn(shape, requires_grad=True)
    found = []
    for forward in linear.forward, nn.Linear.forward:
        y = forward(layer, x)
        found.append([y, *torch.autograd.grad(y.sum(), [x, *layer.parameters()])])
    torch.testing.assert_close(*found)


def test_fast_rows():
    gpt = make(bias=True)
    idx = torch.arange(7)[None]
    expected = gpt.generate(idx, 20, temperature=0)
    kernels.fast_rows(gpt)
    assert gpt.lm_head.forward.func is linear.forward
    assert torch.equal(gpt.generate(idx, 20, temperature=0), expected)
