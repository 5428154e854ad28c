"""What is installed into a model, and that a kernel with other numbers than model.py is not."""

import copy
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as fn

import kernels
import model as m
from kernels import cpu
from kernels import linear


def make(**config):
    torch.manual_seed(0)
    shape = dict(block_size=192, vocab_size=17, n_layer=2, n_head=2, n_embd=32, rope=True)
    return m.GPT(m.GPTConfig(**{**shape, 'selective': True, **config})).eval()


def fails(y, M, v):
    raise RuntimeError('no such\ninstruction')


@pytest.mark.parametrize(
    'edit, why',
    [
        (lambda y, M, v: (y * 1.001, M), 'other numbers than this model.py (y)'),
        (lambda y, M, v: (y * float('nan'), M), 'other numbers than this model.py (y)'),
        (lambda y, M, v: (y[:, :1], M), 'ValueError: y has the shape (2, 1, 200, 16)'),
        (lambda y, M, v: (y + 0.01 * (v - v.detach()), M), 'the gradient of'),
        (fails, 'it fails here (RuntimeError: no such instruction)'),
    ],
)
def test_a_broken_kernel(monkeypatch, edit, why):
    def broken(q, k, v, *args):
        return edit(*m.selective_attention(q, k, v, *args), v)

    gpt = make()
    monkeypatch.setattr(cpu, 'selective_attention', broken)
    monkeypatch.setattr(m, 'selective_attention_listing', broken)
    line = kernels.install(gpt)
    assert "model.py's plain code, not kernels/cpu.py: " in line
    assert why in line and '\n' not in line
    for kernel in 'cpu', 'listing':
        with pytest.raises(ValueError, match='cannot run'):
            kernels.install(gpt, kernel)


def test_what_is_installed(monkeypatch):
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
    monkeypatch.setattr(m.CausalSelfAttention, 'vote', lambda layer, L0: L0.softmax(-1))
    for line in kernels.install(gpt), kernels.install(make(dropout=0.1)):
        assert 'not kernels/cpu.py: on an example it gives other' in line or 'dropout' in line
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


def edited(edit, q, k, v, rule, dropout, memory_tau):
    """model.py's function with an edit. It is right in float32, in which more shows."""
    if q.dtype == torch.float32:
        edit = ''
    rule = copy.copy(rule)
    usual = rule.accumulate
    if edit == 'votes act at once':
        rule.accumulate = lambda F, S: F[:, None] + fn.pad(S, (0, 0, 0, 1)).cumsum(1)
    if edit == 'no gradient of F':
        rule.accumulate = lambda F, S: usual(F, S).detach()
    if edit == 'token 0 is masked':
        rule.accumulate = lambda F, S: usual(F, torch.cat([S[:, :, 1:2], S[:, :, 1:]], 2))
    if edit == 'a scale':
        q = 1.02 * q
    y, M = m.selective_attention(q, k, v, rule, dropout, memory_tau)
    if edit == 'one head without F':
        standard = fn.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = torch.cat([y[:, :-1], standard[:, -1:]], dim=1)
    return y, M


EDITS = [
    'votes act at once',
    'no gradient of F',
    'token 0 is masked',
    'a scale',
    'one head without F',
]
LARGE = [pytest.param(heads, 64, marks=pytest.mark.slow) for heads in (8, 12)]


@pytest.mark.parametrize('heads, size', [(4, 32), *LARGE])
def test_rounding_to_bfloat16_passes_and_an_edit_does_not(heads, size):
    """vote_scale is 0, as at its start. That hides every edit of F where the check leaves it so."""
    gpt = make(n_head=heads, n_embd=heads * size, n_layer=1, vote_scale=True)
    layer = gpt.transformer.h[0].attn
    like = layer, torch.device('cpu'), torch.bfloat16
    for seed in range(10):
        assert not kernels.check(m.selective_attention, *like, seed)
    for edit in EDITS:
        for seed in range(2):
            assert 'other numbers' in kernels.check(partial(edited, edit), *like, seed), edit
    assert layer.vote_scale == 0


@pytest.mark.parametrize('shape', [(1, 1, 24), (1, 3, 24), (0, 24)])
@pytest.mark.parametrize('n_out, bias', [(128, True), (192, False), (17, True)])
def test_linear(monkeypatch, shape, n_out, bias):
    """The fast forward is that of nn.Linear, whether there is one row or more."""
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 2)
    layer = nn.Linear(24, n_out, bias)
    x = torch.randn(shape)
    torch.testing.assert_close(linear.forward(layer, x), layer(x))


def test_fast_rows():
    gpt = make(bias=True)
    idx = torch.arange(7)[None]
    expected = gpt.generate(idx, 20, temperature=0)
    kernels.fast_rows(gpt)
    assert 'forward' not in vars(gpt.lm_head)  # it is too small
    assert torch.equal(gpt.generate(idx, 20, temperature=0), expected)


def test_fast_rows_of_large_layers():
    gpt = make(vocab_size=2**14)
    kernels.fast_rows(gpt)
    assert gpt.lm_head.forward.func is linear.forward
