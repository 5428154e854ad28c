"""lab/ablate.py: each rule against loops over rows and columns, and in training."""

import math

import pytest

import torch

import model as m
import train
from lab import ablate
from support import checkpoint as ckpt

TINY = ['--n_layer=1', '--n_head=4', '--n_embd=16', '--block_size=12', '--batch_size=4']
TINY += ['--eval_interval=4', '--eval_iters=1', '--gradient_accumulation_steps=1', '--device=cpu']


def votes_of(rule, L, i):
    """S of row i from the logits L (i + 1,) of the head that selects."""
    S = L.clamp(min=0)
    if rule == 'no_relu':
        S = L.clone()
    elif rule == 'fox':  # -log of the gate, which is a sigmoid of token 0's logit
        S = -torch.sigmoid(L[0] + 4).log().expand(i + 1).clone()
    if rule != 'first_too':
        S[0] = 0
    if rule != 'self_too':
        S[i] = 0
    return S


def naive(rule, q, k, v):
    """The rules of ablate.py in loops. All are the recurrence F <- F + S."""
    B, H, T, D = q.shape
    name, K = ablate.parse(rule)
    y = torch.zeros_like(q)
    for b in range(B):
        for h in range(H):
            voter = {'groups': h - h % 2, 'last_head': H - 1}.get(rule, 0)
            slope = 2 ** (-8 * (h + 1) / H) if 'alibi' in name else 0
            F = torch.zeros(T, dtype=q.dtype)
            for i in range(T):
                L = q[b, :, i, None] @ k[b, :, : i + 1].transpose(1, 2) / D**0.5
                S = torch.zeros(T, dtype=q.dtype)
                if name not in ('window=K', 'alibi', 'alibi=K'):
                    S[: i + 1] = votes_of(rule, L[voter, 0], i)
                S[: i + 1] += slope  # one more step away from the next row
                if K and i - K + 2 > 0:
                    S[i - K + 2] = float('inf')  # of K tokens, the one that token i + 1 drives out
                before = F
                F = F + S
                if rule == 'at_once':
                    before = F
                y[b, h, i] = (L[h, 0] - before[: i + 1]).softmax(dim=0) @ v[b, h, : i + 1]
    return y


def qkv(H):
    g = torch.Generator().manual_seed(0)
    return torch.randn(3, 2, H, 9, 4, dtype=torch.float64, generator=g).unbind()


def layer_of(rule, H, **options):
    config = m.GPTConfig(n_layer=1, n_head=H, n_embd=4 * H, vocab_size=9, **options)
    with ablate.changed(rule):
        return m.GPT(config).transformer.h[0].attn


VALUES = [name for name in ablate.VOTES if name[-2:] != '=K']
VALUES += ['alibi=4', 'alibi=9', 'window=2', 'window=4', 'window=9', 'window=30']


@pytest.mark.parametrize('rule', VALUES)
@pytest.mark.parametrize('H', [1, 3, 4])
def test_rules(rule, H):
    q, k, v = qkv(H)
    layer = layer_of(rule, H, selective=True)
    y, M = layer.attention(q, k, v, layer, memory_tau=1.0)
    same, none = layer.attention(q, k, v, layer)
    assert none is None and M.shape == (2, 9)
    torch.testing.assert_close(same, y)
    torch.testing.assert_close(y, naive(rule, q, k, v), atol=1e-6, rtol=1e-6)
    published = layer_of('as_published', H, selective=True)
    expected, needed = m.selective_attention(q, k, v, published, memory_tau=1.0)
    changes = rule != 'as_published' and not (rule in ('last_head', 'groups') and H == 1)
    assert torch.allclose(y, expected) == (not changes)
    if not changes:
        torch.testing.assert_close(M, needed, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize('K', [2, 4, 9, 20])
def test_window_is_a_budget_by_age(K):
    """window=K sees what a cache of K tokens keeps under oldest-first eviction."""
    q, k, v = qkv(3)
    layer = layer_of(f'window={K}', 3, selective=True)
    cache = m.LayerCache(2, 3, K, 4, 'oldest', 'cpu', torch.float64)
    y, M = layer.attention(q, k, v, layer, memory_tau=1.0)
    torch.testing.assert_close(y, cache.attend(q, k, v, torch.arange(9), None))
    assert M[0].tolist() == [min(i, K - 1) for i in range(9)]


@pytest.mark.parametrize('rule', ['no_relu', 'groups', 'window=3', 'ssmax', 'double_heads'])
def test_what_is_changed_is_put_back(rule):
    before = dict(vars(m))
    with pytest.raises(ZeroDivisionError), ablate.changed(rule):
        changed = [name for name in before if getattr(m, name) is not before[name]]
        assert changed == ['Temperature' if rule == 'ssmax' else 'CausalSelfAttention']
        raise ZeroDivisionError
    assert vars(m) == before


def test_temperatures_of_other_papers():
    config = m.GPTConfig(n_head=2, n_embd=8)
    pos = torch.arange(3)
    theirs = ablate.PositionOnly(config, True)(None, None, pos)
    assert theirs.tolist() == [
        [pytest.approx(1 + 0.0113 * math.log(n), abs=1e-4)] for n in (1, 2, 3)
    ]
    scaled = ablate.ScalableSoftmax(config, True)(None, None, pos)
    assert scaled.tolist() == [[pytest.approx(0.43 * math.log(n + 1))] * 2 for n in (1, 2, 3)]


def trained(run, tmp_path, dataset, script, *args):
    """The last validation loss of a short run, and the parameters of its attention."""
    out_dir = tmp_path / '-'.join(args)
    args = [*args, *TINY, dataset, '--max_iters=8', '--warmup_iters=1', '--learning_rate=0.05']
    run(script, *args, f'--out_dir={out_dir}')
    checkpoint = ckpt.load(out_dir)
    layer = 'transformer.h.0.attn.'
    weights = {}
    for name, p in checkpoint['model'].items():
        weights[name.removeprefix(layer)] = p
    return checkpoint['val_loss'], weights


def test_trained_by_rules_of_votes(run, dataset, tmp_path):
    losses = {}
    for rule in 'as_published', 'no_relu', 'at_once', 'groups', 'window=3':
        args = run, tmp_path, dataset, ablate, rule, '--selective', '--rope'
        losses[rule], _ = trained(*args)
    published, _ = trained(run, tmp_path, dataset, train, '--selective', '--rope')
    assert losses.pop('as_published') == pytest.approx(published, abs=1e-5)
    for loss in losses.values():
        assert loss != pytest.approx(published, abs=1e-5)
    # the checkpoint says what the rule has to fit
    evaluate = [f'--out_dir={tmp_path}/no_relu---selective---rope', '--eval_only']
    assert 'step 8' in run(ablate, 'no_relu', *evaluate)
    assert 'does not fit' in run(ablate, 'ssmax', *evaluate, '--ssa=q')


@pytest.mark.parametrize(
    'rule, flag, name, shape, start',
    [
        ('double_heads', '--qk_norm', 'c_attn.weight', (96, 16), 0),
        ('position_on_values', '--ssa=v', 'ssa.v.alpha', (4,), -4),
        ('position_only', '--ssa=q', 'ssa.q.beta', (1,), 1.5),
        ('ssmax', '--ssa=q', 'ssa.q.s', (4,), 0.43),
    ],
)
def test_trained_with_a_parameter(run, dataset, tmp_path, rule, flag, name, shape, start):
    _, weights = trained(run, tmp_path, dataset, ablate, rule, flag)
    assert weights[name].shape == shape and (weights[name] != start).any()


def test_trained_without_position(run, dataset, tmp_path):
    _, weights = trained(run, tmp_path, dataset, ablate, 'no_position', '--ssa=qv')
    assert 'ssa.q.w.weight' in weights and 'ssa.q.alpha' not in weights


@pytest.mark.parametrize(
    'args, words',
    [
        ([], 'the rule comes first'),
        (['nothing'], 'the rule comes first'),
        (['window', '--selective'], 'the rule comes first'),
        (['groups=3', '--selective'], 'the rule comes first'),
        (['window=1', '--selective'], 'window=1: 1 is not in the range'),
        (['window=K', '--selective'], "window=K: 'K' is not a whole number"),
        (['no_relu'], 'does not fit'),
        (['window=4'], 'does not fit'),
        (['double_heads', '--selective'], 'does not fit'),
        (['no_position', '--ssa=v'], 'does not fit'),
        (['position_on_values', '--ssa=q'], 'does not fit'),
        (['ssmax', '--ssa=qv'], 'does not fit'),
        (['fox', '--selective', '--vote_scale'], 'no vote_scale'),
        (['no_relu', '--selective', '--eval_only', '--out_dir=nowhere'], 'ckpt.pt does not exist'),
    ],
)
def test_refusals(run, args, words):
    assert words in run(ablate, *args)


def test_help(run):
    out = run(ablate, '--help')
    assert all(rule in out for rule in ablate.RULES)
