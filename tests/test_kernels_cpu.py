"""kernels/cpu.py and cpu.c against model.py's listing in float64; in most tests columns die."""

import copy
import math
import os
import subprocess
import sys

import pytest
import torch

import kernels
import model as m
from attention import Rule, compare, results
from kernels import cpu

torch.set_num_threads(1)

RELU = Rule()


def example(B, H, T, D, strength, seed=0):
    """q, k, v whose head 0 votes: strength, (B or 1, T) or a number, is what each column gets.

    v grows with the column, so that no column can hide behind another.
    """
    g = torch.Generator().manual_seed(seed)
    qkv = torch.randn(3, B, H, T, D, dtype=torch.float64, generator=g)
    qkv[:2, :, 0] *= 0.3
    qkv[0, :, 0, :, 0] = math.sqrt(D)
    qkv[1, :, 0, :, 0] = torch.as_tensor(strength)
    qkv[2] *= torch.logspace(0, 2, T, dtype=torch.float64)[:, None]
    return qkv


def votes_by_rows(votes, T=576):
    """q, k, v where the rows of a dict give these votes to all columns, and nobody else votes."""
    qkv = example(1, 2, T, 4, 0)
    qkv[:2, :, 0] = 0
    qkv[1, :, 0, :, 0] = 1
    for row, vote in votes.items():
        qkv[0, 0, 0, row, 0] = 2 * vote
    return qkv


def check(qkv, rule=RELU, memory_tau=None, tolerance=1e-12):
    """The kernel's numbers are the listing's; returns the share of the columns it computed."""
    cpu.live_share()
    compare(cpu.selective_attention, qkv, rule, memory_tau, tolerance)
    return cpu.live_share()


@pytest.mark.parametrize('T', [2, 64, 65, 128, 330])
@pytest.mark.parametrize('strength, most', [(0, 1), (0.01, 1), (1, 0.7), (1000, 0.34)])
@pytest.mark.parametrize('memory_tau', [None, 1.0, 300.0])
def test_from_no_votes_to_very_strong_ones(T, strength, most, memory_tau):
    share = check(example(2, 3, T, 4, strength), memory_tau=memory_tau)
    if T == 330 and memory_tau != 300:
        assert share <= most
    if strength == 0:
        assert share == 1


def test_nothing_that_dies_is_computed_and_nothing_else_is_left_out():
    """Row 5 masks columns 1 … 4, row 500 masks 1 … 499: in the first block and the last but one."""
    share = check(votes_by_rows({5: 120, 500: 60}), memory_tau=1.0)
    ends = range(64, 577, 64)
    dead = [0] + 7 * [4] + [499]
    assert share == 1 - sum(dead) / sum(ends)


def test_a_column_that_dies_in_the_last_block_of_a_length_that_is_no_multiple():
    assert check(votes_by_rows({520: 50}, T=530), memory_tau=1.0) == 1


@pytest.mark.parametrize('below, seen', [(-0.1, False), (0.1, True), (20.0, True)])
@pytest.mark.parametrize('head, makes_good', [(0, 10), (1, 15), (2, 15)])
def test_a_column_is_kept_until_its_probability_is_less_than_rounding(
    below, seen, head, makes_good
):
    """Row 2 masks column 1 so that row 70 gives it, in one head, just more than eps/T, or less.

    Its v is so large that it must be seen, or will be missed.
    """
    q, k, v = qkv = torch.zeros(3, 1, 3, 80, 4, dtype=torch.float64)
    threshold = -math.log(2**-53 / 80) - math.log(3)  # three logits of 0 bound the sum
    q[0, 0, 2, 0] = 2 * (threshold - below + makes_good)  # the vote of row 2
    q[0, head, 70, min(head, 1)] = 2 * makes_good  # the logit of row 70
    k[0, 0, 1, 0] = 1
    k[0, 1:, 1, 1] = 1
    v[:] = 1
    v[0, :, 1] = 1e15
    y, _ = cpu.selective_attention(*qkv, RELU)
    error = (y / m.selective_attention_listing(*qkv, RELU)[0] - 1).abs().max()
    assert (error < 1e-9) == seen


def test_sequences_of_a_batch_have_lists_of_their_own():
    often = torch.tensor([0, 0.3, 0.6, 0.9, 1])[:, None]
    dies = torch.rand(5, 330, generator=torch.Generator().manual_seed(0)) < often
    qkv = example(5, 2, 330, 4, 100.0 * dies)
    shares = [check(x, memory_tau=1.0) for x in qkv.split(1, dim=1)]
    assert shares[0] == 1 and shares[-1] < 0.4
    assert check(qkv, memory_tau=1.0) == pytest.approx(sum(shares) / 5)


def test_the_bound():
    """What holds from each block's first row on: the largest |q|, the smallest denominator."""
    q, k, _ = qkv = example(2, 3, 150, 4, 20.0)
    c = cpu._known(*qkv, 0.0)
    c.update(norm=torch.empty(2, 3, 150).double())
    c.update(Q=torch.empty(2, 3, 3).double(), m=torch.empty(2, 3, 3).double())
    cpu._call('bounds', c)
    logits = q @ k.mT / 2
    smallest = math.inf
    for i in reversed(range(150)):
        near = list({0, max(0, i - 1), i})
        smallest = logits[:, :, i, near].logsumexp(dim=2).clamp(max=smallest)
        if i % 64 == 0:
            torch.testing.assert_close(c['m'][:, :, i // 64], smallest)
            largest = q[:, :, i:].norm(dim=3).amax(dim=2) / 2
            torch.testing.assert_close(c['Q'][:, :, i // 64], largest)


def test_tau_above_F_keeps_columns_and_tau_below_lets_them_go():
    qkv = example(1, 2, 330, 4, 20.0)
    low, middle, high = [check(qkv, memory_tau=tau) for tau in (1.0, 2000.0, 1e6)]
    assert low < 0.4 and low < middle < high == 1


@pytest.mark.parametrize('scale', [0.0, 0.5, 3.0, -0.5])
def test_parameters_of_the_vote(scale):
    rule = Rule(lambda L0: torch.relu(L0) ** rule.power * rule.scale * 2, scale=scale, power=1.5)
    share = check(example(2, 2, 200, 4, 20.0), rule, 1.0, 1e-9)
    assert share == 1 if scale <= 0 else share < 0.6


def test_a_factor_that_is_no_leaf():
    """Its graph is used by more than one layer."""
    rule = Rule(lambda L0: torch.relu(L0) * factor, scale=0.5)
    factor = rule.scale * 2
    check(example(2, 2, 200, 4, 20.0), rule, tolerance=1e-7)


@pytest.mark.parametrize(
    'vote, dies',
    [
        (lambda L0: torch.relu(L0).clamp(max=4.0), True),
        (torch.nn.functional.softplus, True),
        (torch.square, True),
        (lambda L0: torch.relu(L0 - L0[:, :, :1]), True),  # token 0 counts
        (lambda L0: torch.full_like(L0, 9.0), True),
        (lambda L0: L0, False),
        (torch.tanh, False),
        (lambda L0: torch.relu(L0) - 0.01, False),
        (lambda L0: torch.where(L0 < -5, L0 - 3, L0.relu()), False),  # where columns are dead
    ],
)
def test_odd_votes(vote, dies):
    column = torch.arange(200)
    qkv = example(2, 2, 200, 4, 10.0 * ((column > 0) & (column < 40)))
    qkv[0, :, 0, 70:, 0] *= -1  # later rows have negative logits on dead columns, and only there
    share = check(qkv, Rule(vote), tolerance=1e-11)
    assert (share < 1) == dies


def test_a_vote_that_is_negative_for_a_single_logit():
    """No sample of logits finds it. It is noticed in row 300, after columns have been dropped."""
    qkv = example(1, 2, 330, 4, 10.0)
    seen = qkv[0, 0, 0, 300] @ qkv[1, 0, 0, 299] / 2
    rule = Rule(lambda L0: torch.relu(L0) - 500 * ((L0 - seen).abs() < 1e-9))
    assert check(qkv) < 0.5
    assert 0.6 < check(qkv, rule) < 1  # a part, and then all: the mean of two walks


def test_a_single_token_sees_itself():
    q, k, v = example(2, 3, 1, 4, 1.0)
    assert torch.equal(cpu.selective_attention(q, k, v, RELU)[0], v)


def test_a_vote_of_another_shape_is_not_read():
    with pytest.raises(ValueError, match='shape'):
        cpu.selective_attention(*example(1, 2, 80, 4, 1.0), Rule(lambda L0: L0.relu()[:, :, :9]))


@pytest.mark.parametrize('seed', range(30))
def test_random_strengths(seed):
    g = torch.Generator().manual_seed(seed)
    B, H, T, logD, often, strong = torch.randint(1, 5, (6,), generator=g).tolist()
    T = 100 * T - seed
    strength = 10 ** (4 * torch.rand(B, T, generator=g) - 2)
    strength *= torch.rand(B, T, generator=g) < often / 4
    qkv = example(B, H, T, 2**logD, strength, seed)
    qkv[:2, :, 1:] *= strong
    check(qkv, memory_tau=[None, 0.1, 1.0, 30.0][seed % 4], tolerance=1e-11)


@pytest.mark.parametrize('seed', range(3))
def test_float32_is_as_exact_as_the_plain_form(seed):
    g = torch.Generator().manual_seed(seed)
    strength = 10 ** (4 * torch.rand(2, 300, generator=g) - 2)
    qkv = example(2, 4, 300, 32, strength, seed).float()
    assert check(qkv, tolerance=3e-5) < 0.8  # model.py is wrong by up to 2.3e-5


@pytest.mark.parametrize('B, H, T, D', [(1, 2, 257, 7), (2, 1, 300, 20), (3, 4, 130, 24)])
def test_float32_on_plain_numbers(B, H, T, D):
    qkv = torch.randn(3, B, H, T, D, generator=torch.Generator().manual_seed(D))
    check(qkv, memory_tau=1.0, tolerance=2e-6)


def test_token_0_stays_column_0_though_nobody_can_see_it():
    """Every row sees itself with a logit of 200 and more."""
    qkv = example(2, 2, 200, 4, 0)
    qkv[:2] = 20 * torch.randn_like(qkv[0])
    qkv[1, :, :, 0] = 0
    qkv[0] = qkv[1]
    rule = Rule(lambda L0: torch.relu(L0 - L0[:, :, :1]))
    assert check(qkv, rule, tolerance=1e-9) < 1


def test_nan_is_not_hidden():
    qkv = example(1, 2, 200, 4, 1.0)
    qkv[1, 0, 1, 100] = math.nan
    y, _ = cpu.selective_attention(*qkv.float(), RELU)
    assert y[0, 1, 100:].isnan().all() and y[0, 1, :64].isfinite().all()


@pytest.mark.parametrize('dtype, dropout', [(torch.float32, 0.5), (torch.bfloat16, 0.0)])
def test_the_rest_is_left_to_model(dtype, dropout):
    qkv = torch.randn(3, 1, 2, 20, 4, dtype=dtype)
    torch.manual_seed(0)
    found = cpu.selective_attention(*qkv, RELU, dropout, 1.0)
    torch.manual_seed(0)
    torch.testing.assert_close(found, m.selective_attention(*qkv, RELU, dropout, 1.0))


def test_two_threads_give_the_same_bits_each_time(monkeypatch):
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 2)
    qkv = example(1, 2, 330, 4, 0.3).float()
    first = results(cpu.selective_attention, qkv, RELU, 1.0)
    for _ in range(5):
        for name, x in results(cpu.selective_attention, qkv, RELU, 1.0).items():
            assert torch.equal(x, first[name]), name


# ---- Compiling -----------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing has been compiled yet, and the cache is in tmp_path."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    cpu.library.cache_clear()
    yield tmp_path / 'selective-attention'
    cpu.library.cache_clear()


@pytest.mark.parametrize(
    'compiler, mode, words',
    [
        ('no-such-cc', 0o700, 'there is no C compiler'),
        ('false', 0o700, 'false fails'),
        ('cc', 0o777, 'others can write'),
    ],
)
def test_without_a_compiler_the_plain_code_trains(fresh, monkeypatch, compiler, mode, words):
    fresh.mkdir()
    fresh.chmod(mode)
    monkeypatch.setenv('CC', compiler)
    gpt = m.GPT(m.GPTConfig(8, 17, 1, 2, 16, selective=True))
    line = kernels.install(gpt)
    assert "model.py's plain code, not kernels/cpu.py" in line and words in line
    assert '\n' not in line
    assert gpt.transformer.h[0].attn.attention is m.selective_attention


def test_two_processes_compile_at_once_and_a_third_does_not(fresh, monkeypatch):
    """The compiler knows no OpenMP, as on a Mac."""
    script = fresh.parent / 'cc'
    script.write_text('#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1;; esac\nsleep 1\nexec cc "$@"\n')
    script.chmod(0o700)
    monkeypatch.setenv('CC', str(script))
    code = 'from kernels import cpu; import torch; cpu.library(torch.float32); print(cpu.note)'
    command = [sys.executable, '-c', code]
    root = os.path.dirname(os.path.dirname(cpu.SOURCE))
    both = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in 'ab']
    printed = ''
    for process in both:
        output, _ = process.communicate(timeout=100)
        assert process.returncode == 0
        printed += output
    assert ' s to compile' in printed  # the slower one may find what the faster one left
    assert len(list(fresh.iterdir())) == 1 and fresh.stat().st_mode & 0o777 == 0o700
    cpu.note = ''
    check(example(1, 2, 80, 4, 1.0).float(), tolerance=1e-5)
    assert cpu.note == ''


def test_heads_that_share_keys_are_refused():
    """model.py repeats them before. Without them cpu.c would read other memory."""
    q, k, v = torch.randn(3, 1, 4, 70, 8)
    layer = m.CausalSelfAttention(m.GPTConfig(n_head=4, n_embd=32, selective=True))
    for shared in (q, k[:, :2], v), (q, k, v[:, :2]):
        with pytest.raises(ValueError, match='it must be'):
            cpu.selective_attention(*shared, layer)


# ---- Generation ----------------------------------------------------------------------------------


def make(dtype=torch.float64, **flags):
    """A model and a copy of it with fast rows."""
    torch.manual_seed(0)
    shape = dict(block_size=60, vocab_size=50, n_layer=2, n_head=4, n_embd=96)
    gpt = m.GPT(m.GPTConfig(**{**shape, **flags})).to(dtype).eval()
    with torch.no_grad():
        for p in gpt.parameters():
            p += 0.1 * torch.randn_like(p)
    fast = copy.deepcopy(gpt)
    kernels.fast_rows(fast)
    return gpt, fast


def is_fast(gpt):
    return 'forward' in vars(gpt.transformer.h[1].attn)


@torch.no_grad()
def compare_rows(gpt, fast, B=2, budgets=9, policy='selective', tolerance=1e-12, dtype=None):
    """A prompt, and then row by row: the same logits, and the same tokens are held."""
    idx = torch.randint(50, (B, 40), generator=torch.Generator().manual_seed(1))
    plain = m.KVCache(gpt, B, budgets, policy, dtype)
    other = m.KVCache(fast, B, budgets, policy, dtype)
    for new in idx.split([5] + 35 * [1], dim=1):
        expected, _ = gpt(new, cache=plain)
        found, _ = fast(new, cache=other)
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()
        for a, b in zip(plain.layers, other.layers):
            assert a.n == b.n and torch.equal(a.j, b.j)
            torch.testing.assert_close(a.F, b.F, atol=10 * tolerance, rtol=1e-4)


@pytest.fixture
def no_plain_rows(monkeypatch):
    """A context in which model.py's code for a row fails."""

    def fail(*args):
        raise AssertionError('model.py computes a row')

    return lambda: monkeypatch.setattr(m.LayerCache, '_row', fail)


VARIANTS = {
    'standard': {},
    'heads of 12': dict(selective=True, n_head=8, vote_scale=True, bias=True),
    'heads of 32': dict(selective=True, n_head=3, rope=True, qk_norm=True),
    'shared keys': dict(selective=True, n_kv_head=2, rope=True, llama=True),
}


@pytest.mark.parametrize('flags', VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize('B, budgets', [(1, None), (2, 9), (3, [2, 33])])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_rows_by_cpu_c(flags, B, budgets, dtype, tolerance):
    gpt, fast = make(dtype, **flags)
    assert is_fast(fast)
    policies = ['selective']
    if not flags:
        policies = ['oldest', 'streaming:3', 'streaming:50']
    for policy in policies:
        compare_rows(gpt, fast, B, budgets, policy, tolerance)


@pytest.mark.parametrize('flags', [{}, dict(selective=True, vote_scale=True)])
@pytest.mark.parametrize('shape', [(1, 16), (4, 128), (6, 384), (9, 576, 3), (12, 768), (25, 1600)])
@pytest.mark.parametrize('like', [{}, dict(llama=True, rope=True, qk_norm=True)])
def test_models_of_any_size_have_fast_rows(flags, shape, like):
    """Rounding is not taken for an edit."""
    n_head, n_embd, n_kv_head = (*shape, 0)[:3]
    like = dict(like, n_head=n_head, n_embd=n_embd, n_kv_head=n_kv_head, **flags)
    config = m.GPTConfig(n_layer=1, n_inner=8, vocab_size=9, block_size=9, **like)
    with torch.device('meta'):
        gpt = m.GPT(config)
    assert kernels.same_rows(gpt, 1) and kernels.same_rows(gpt, -1)


def test_rows_are_not_left_to_model(no_plain_rows):
    _, fast = make(selective=True)
    idx = torch.zeros(2, 9, dtype=torch.long)
    no_plain_rows()
    fast.generate(idx, 20, budgets=8)
    with pytest.raises(AssertionError, match='computes a row'):
        fast.generate(idx, 2, budgets=8, policy='h2o')


@pytest.mark.parametrize('policy', ['oldest', 'h2o', 'knorm', 'random', 'tova'])
def test_rows_with_other_policies_are_model_py_s(policy):
    compare_rows(*make(selective=True), policy=policy)


@pytest.mark.parametrize('flags', [dict(ssa='v'), dict(ssa='q'), dict(voter=4), dict(voter=24)])
def test_rows_that_cpu_c_does_not_know(flags):
    gpt, fast = make(selective=True, **flags)
    compare_rows(gpt, fast)
    assert is_fast(fast) == ('voter' in flags)  # its caches are told apart


def test_rows_of_other_types():
    gpt, fast = make(torch.bfloat16, selective=True)
    compare_rows(gpt, fast, tolerance=0)
    gpt, fast = make(torch.float32, selective=True)
    with torch.autocast('cpu', torch.bfloat16):
        compare_rows(gpt, fast, tolerance=0, dtype=torch.bfloat16)
        compare_rows(gpt, fast, tolerance=0)


def test_rows_with_gradients_are_model_py_s():
    _, fast = make(selective=True)
    fast(torch.zeros(1, 1, dtype=torch.long), cache=m.KVCache(fast, 1))[0].sum().backward()
    assert fast.transformer.h[0].attn.c_attn.weight.grad.norm() > 0


@torch.no_grad()
def test_a_cache_of_another_class_is_asked():
    """As lab.visualize has one."""

    class Counting(m.LayerCache):
        rows = 0

        def _row(self, *args):
            self.rows += 1
            return super()._row(*args)

    gpt, fast = make(selective=True)
    cache = m.KVCache(fast, 1)
    for layer in cache.layers:
        layer.__class__ = Counting
    fast(torch.zeros(1, 1, dtype=torch.long), cache=cache)
    assert [layer.rows for layer in cache.layers] == [1, 1]


def test_any_vote_is_used(monkeypatch):
    def vote(self, L0):
        return torch.square(L0 - L0[:, :, :1])

    monkeypatch.setattr(m.CausalSelfAttention, 'vote', vote)
    gpt, fast = make(selective=True)
    assert is_fast(fast)
    compare_rows(gpt, fast, B=3)
    monkeypatch.setattr(m.CausalSelfAttention, 'vote', lambda self, L0: L0[..., :1])
    cache = m.KVCache(fast, 1)
    with torch.no_grad(), pytest.raises(ValueError, match='vote.L0. has the shape'):
        for token in range(2):
            fast(torch.tensor([[token]]), cache=cache)


def fading(self, F, S):
    return 0.9 * usual_sum(self, F, S)


def newest(self, A, F, i, j):
    return j.to(F.dtype).expand(F.shape)


def turned_back(x, turn):
    return usual_rotation(x, (turn[0], -turn[1]))


def gated(self, x, *more):
    y, M = usual_forward(self, x, *more)
    return y * x.tanh(), M


usual_sum = m.CausalSelfAttention.accumulate
usual_forward = m.CausalSelfAttention.forward
usual_rotation = m.rotate
EDITS = [
    (m.CausalSelfAttention, 'accumulate', fading),
    (m.CausalSelfAttention, 'forward', gated),
    (m.Selective, 'score', newest),
    (m, 'rotate', turned_back),
    (m, 'weighted_sum', lambda P, v: P.sqrt() @ v),
]


@pytest.mark.parametrize('place, name, edit', EDITS)
def test_after_an_edit_rows_are_model_py_s(monkeypatch, place, name, edit):
    monkeypatch.setattr(place, name, edit)
    gpt, fast = make(selective=True, rope=True)
    assert not is_fast(fast)
    compare_rows(gpt, fast)


def test_age_is_tried_too(monkeypatch):
    monkeypatch.setattr(m.Oldest, 'score', newest)
    assert not is_fast(make()[1])


def test_a_layer_of_another_class_keeps_its_code():
    class Other(m.CausalSelfAttention):
        pass

    _, fast = make(selective=True)
    fast.transformer.h[0].attn = Other(fast.config)
    kernels.fast_rows(fast)
    assert 'forward' not in vars(fast.transformer.h[0].attn)


def test_without_a_compiler_rows_are_model_py_s(fresh, monkeypatch):
    monkeypatch.setenv('CC', 'no-such-cc')
    assert not is_fast(make(selective=True)[1])


def test_fast_rows_draws_no_random_number():
    gpt, _ = make(selective=True)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    kernels.fast_rows(gpt)
    assert torch.equal(torch.rand(3), expected)


class Decay(m.CausalSelfAttention):
    """Votes fade by a learned rate, which has a limit: above it the layer is as published."""

    def __init__(self, config):
        super().__init__(config)
        self.decay = torch.nn.Parameter(torch.tensor(0.95))

    def accumulate(self, F, S):
        rows = [F]
        for row in S.unbind(dim=1):
            rows.append(self.decay.clamp(0, 1) * rows[-1] + row)
        return torch.stack(rows, dim=1)


@pytest.mark.parametrize('n_embd', [64, 128])
@pytest.mark.parametrize('rope', [True, False])
def test_a_limit_hides_no_edit(n_embd, rope, monkeypatch):
    monkeypatch.setattr(m, 'CausalSelfAttention', Decay)
    gpt = m.GPT(m.GPTConfig(16, 17, 1, 2, n_embd, rope=rope, selective=True))
    assert 'plain code, not kernels/cpu.py: on an example it gives other' in kernels.install(gpt)
    kernels.fast_rows(gpt)
    assert 'forward' not in vars(gpt.transformer.h[0].attn)
