"""lab/ablate.py: each rule against a loop over rows, and in training."""

import math

import pytest
import torch

import model as m
from lab import ablate
from support import checkpoint as ckpt

TINY = ['--n_layer=1', '--n_head=4', '--n_embd=16', '--block_size=12', '--batch_size=4']
TINY += ['--eval_interval=4', '--eval_iters=1', '--gradient_accumulation_steps=1', '--device=cpu']
TINY += ['--max_iters=1']


def naive(rule, q, k, v):
    """y and M of the rules, row by row. All but ALiBi are the recurrence F <- F + S."""
    B, H, T, D = q.shape
    name, _, K = rule.partition('=')
    K = int(K or 10**9)
    slopes = torch.zeros(H, 1)
    if 'alibi' in name:
        slopes = 2 ** (-8 * torch.arange(1, H + 1)[:, None] / H)
    F = q.new_zeros(B, 1, T)
    y = []
    M = []
    for i in range(T):
        L = (q[:, :, i, None] * k).sum(dim=3) / D**0.5  # (B, H, T)
        biased = L - F - slopes * (i - torch.arange(T))
        P = biased[..., : i + 1].softmax(dim=2)
        y.append((P[..., None] * v[:, :, : i + 1]).sum(dim=2))
        M.append(i - F[:, 0].clamp(max=1).sum(dim=1))
        if i - K + 2 > 0:
            F[..., i - K + 2] = math.inf  # of K tokens, the one that token i + 1 drives out
        if name in ('window', 'alibi'):
            continue
        S = L[:, :1].relu()  # (B, 1, T)
        first = 1
        end = i
        if rule == 'no_relu':
            S = L[:, :1]
        elif rule == 'fox':  # -log of the gate, which is a sigmoid of token 0's logit
            S = -torch.sigmoid(L[:, :1, :1] + 4).log().expand(B, 1, T)
        elif rule == 'last_head':
            S = L[:, -1:].relu()
        elif rule == 'first_too':
            first = 0
        elif rule == 'self_too':
            end = i + 1
        F[..., first:end] += S[..., first:end]
    return torch.stack(y, dim=2), torch.stack(M, dim=1)


@pytest.fixture
def qkv():
    g = torch.Generator().manual_seed(0)
    return torch.randn(3, 2, 3, 9, 4, dtype=torch.float64, generator=g).unbind()


def layer_of(rule):
    with ablate.changed(rule):
        return m.GPT(m.GPTConfig(n_layer=1, n_head=3, n_embd=12, selective=True)).transformer.h[0]


MASKS = ['no_relu', 'fox', 'first_too', 'self_too', 'last_head', 'votes_and_alibi', 'alibi']
MASKS += ['alibi=4', 'alibi=9', 'window=2', 'window=4', 'window=30']


@pytest.mark.parametrize('rule', MASKS)
def test_masks(rule, qkv):
    layer = layer_of(rule).attn
    found = layer.attention(*qkv, layer, memory_tau=1.0)
    torch.testing.assert_close(found, naive(rule, *qkv), atol=1e-6, rtol=1e-6, check_dtype=False)
    assert layer.attention(*qkv, layer)[1] is None


def test_what_is_changed_is_put_back():
    before = m.CausalSelfAttention
    with pytest.raises(ZeroDivisionError), ablate.changed('window=3'):
        assert m.CausalSelfAttention is not before
        raise ZeroDivisionError
    assert m.CausalSelfAttention is before


def test_temperatures_of_other_papers():
    config = m.GPTConfig(n_head=2, n_embd=8)
    pos = torch.tensor([0, 1, 9])
    theirs = ablate.PositionOnly(config, 2, True)(None, None, pos)
    assert theirs[:, 0].tolist() == pytest.approx([1, 1.0078, 1.026], abs=1e-4)
    scaled = ablate.ScalableSoftmax(config, 2, True)(None, None, pos)
    assert scaled[:, 1].tolist() == pytest.approx([0.298, 0.4724, 1.0311], abs=1e-4)


@pytest.mark.parametrize(
    'rule, flag, name, shape',
    [
        ('double_heads', '--qk_norm', 'c_attn.weight', (96, 16)),
        ('position_only', '--qk_norm', 'ssa.q.beta', (1,)),
        ('ssmax', '--qk_norm', 'ssa.q.s', (4,)),
    ],
)
def test_trained(run, dataset, tmp_path, rule, flag, name, shape):
    """A rule comes with the flag that it needs."""
    run(ablate, rule, *TINY, dataset, flag, f'--out_dir={tmp_path}')
    weights = ckpt.load(tmp_path)['model']
    assert weights[f'transformer.h.0.attn.{name}'].shape == shape
    assert 'transformer.h.0.attn.ssa.q.alpha' not in weights


def test_rules_of_votes_select(run, dataset, tmp_path):
    run(ablate, 'fox', *TINY, dataset, f'--out_dir={tmp_path}')
    assert ckpt.load(tmp_path)['model_args']['selective']


@pytest.mark.parametrize(
    'args, words',
    [
        ([], 'the rule comes first'),
        (['window', '--selective'], 'the rule comes first'),
        (['fox=3', '--selective'], 'the rule comes first'),
        (['window=1', '--selective'], 'is not in the range 2 to'),
        (['window=K', '--selective'], "window=K: 'K' is not a whole number"),
    ],
)
def test_refusals(run, args, words):
    assert words in run(ablate, *args)


def test_help(run):
    assert 'votes_and_alibi' in run(ablate, '--help')
