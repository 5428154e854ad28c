"""Tests of kernels/cpu.py: T x T matrices in float64 are the oracle, and most tests have columns that die."""
import math

import pytest
import torch

import model as m
from kernels import cpu

torch.set_num_threads(1)
relu = torch.relu


@pytest.fixture(autouse=True)
def blocks_of_8(monkeypatch):
    monkeypatch.setattr(cpu, 'BLOCK', 8)
    cpu.live.share()


def oracle(q, k, v, vote, memory_tau=None):
    """The paper's equations with T x T matrices."""
    i = torch.arange(q.size(2))
    i, j = i[:, None], i[None, :]
    L = torch.einsum('bhid,bhjd->bhij', q, k) / math.sqrt(q.size(3))
    S = torch.where((0 < j) & (j < i), vote(L[:, 0]), 0.0)
    F = S.cumsum(dim=1) - S
    y = (L - F[:, None]).masked_fill(j > i, -math.inf).softmax(dim=-1) @ v
    return y, i[:, 0] - (F.clamp(max=memory_tau) / memory_tau).sum(dim=-1) if memory_tau is not None else None


def example(B, H, T, D, strength, seed=0, dtype=torch.float64):
    """q, k, v whose head 0 votes: strength (B or 1, T) or a number is what a row gives each column, more or less.

    Heads 1 … have logits of a few units. v grows with the column, so that no column can hide behind another.
    """
    g = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, B, H, T, D, dtype=torch.float64, generator=g)
    q[:, 0], k[:, 0] = 0.3 * q[:, 0], 0.3 * k[:, 0]
    q[:, 0, :, 0], k[:, 0, :, 0] = math.sqrt(D), torch.as_tensor(strength, dtype=torch.float64).expand(B, T)
    v *= torch.logspace(0, 2, T, dtype=torch.float64)[:, None]
    return [x.to(dtype).requires_grad_() for x in (q, k, v)]


def outputs(attention, qkv, vote=relu, memory_tau=None, parameters=()):
    """y, M and every gradient of a loss that weighs each number of y and M differently."""
    y, M = attention(*qkv, vote, memory_tau=memory_tau)
    g = torch.Generator().manual_seed(1)
    loss = (y * torch.randn(y.shape, dtype=torch.float64, generator=g).to(y.dtype)).sum()
    if memory_tau is not None:
        loss = loss + (M * torch.rand(M.shape, dtype=torch.float64, generator=g).to(y.dtype)).sum()
    names = ['dq', 'dk', 'dv'] + [f'd{n}' for n in range(len(parameters))]
    gradients = torch.autograd.grad(loss, (*qkv, *parameters))
    return {'y': y, 'M': M, **dict(zip(names, gradients))}


def check(qkv, vote=relu, memory_tau=None, parameters=(), tolerance=1e-12):
    """The kernel's numbers are the oracle's; returns the share of the columns that it computed."""
    cpu.live.share()
    got = outputs(cpu.selective_attention, qkv, vote, memory_tau, parameters)
    share = cpu.live.share()
    for name, want in outputs(oracle, qkv, vote, memory_tau, parameters).items():
        if want is None:
            assert got[name] is None
            continue
        error = (got[name] - want).abs().max() / want.abs().max().clamp(min=1e-9)
        assert error < tolerance, f'{name} is wrong by {error:.1e}'
    return share


def computed(columns, T, dead):
    """The share that blocks of 8 compute where dead(a) columns are gone from row a on."""
    blocks = [(a, min(a + 8, T)) for a in range(0, T, 8)]
    return sum((b - a) * (b - dead(a)) for a, b in blocks) / sum((b - a) * b for a, b in blocks)


@pytest.mark.parametrize('T', [1, 2, 8, 9, 16, 67])
@pytest.mark.parametrize('strength', [0, 0.1, 1, 10, 1000])
@pytest.mark.parametrize('memory_tau', [None, 1.0, 300.0])
def test_from_no_votes_to_very_strong_ones(T, strength, memory_tau):
    share = check(example(2, 3, T, 4, strength), memory_tau=memory_tau)
    if T == 67 and memory_tau != 300:
        assert share == 1 if strength == 0 else share < {0.1: 1.01, 1: 1.01, 10: 0.5, 1000: 0.3}[strength]


def test_nothing_that_dies_is_computed_and_nothing_else_is_left_out():
    # row 5 masks columns 1 … 4, row 61 masks 1 … 60: they die in the first block and in the last but one
    qkv = example(1, 2, 72, 4, 0)
    with torch.no_grad():
        qkv[0][:, 0], qkv[1][:, 0] = 0., 0.
        qkv[0][0, 0, [5, 61], 0], qkv[1][0, 0, :, 0] = torch.tensor([200., 100.], dtype=torch.float64), 1.
    share = check(qkv, memory_tau=1.0)
    # packed where an eighth of the list has died: 4 of 8 at row 8, 57 of 60 at row 64
    assert share == computed(72, 72, lambda a: 0 if a < 8 else 4 if a < 64 else 60)


def test_a_column_that_dies_in_the_last_block_of_a_length_that_is_no_multiple():
    qkv = example(1, 2, 67, 4, 0)
    with torch.no_grad():
        qkv[0][:, 0], qkv[1][:, 0] = 0., 0.
        qkv[0][0, 0, 65, 0], qkv[1][0, 0, :, 0] = 100., 1.
    assert check(qkv, memory_tau=1.0) == 1


@pytest.mark.parametrize('below', [-0.1, 0.1, 20.])
@pytest.mark.parametrize('head', [0, 1, 2])
def test_a_column_is_kept_until_its_probability_is_less_than_rounding(below, head):
    # Row 2 masks column 1 so that a later row of the head gives it just more than eps/T. Its huge v must be seen.
    T = 24
    threshold = -math.log(torch.finfo(torch.float64).eps / 2 / T) - math.log(3)     # three logits of 0 bound the sum
    q, k, v = torch.zeros(3, 1, 3, T, 4, dtype=torch.float64)
    q[0, 0, 2, 0] = 2 * (threshold - below + (10 if head == 0 else 0))
    k[0, 0, 1, 0] = 1                                           # row 2 votes with threshold − below
    if head == 0:
        q[0, 0, 20, 0] = 20                                     # of which row 20's logit makes good 10 in head 0 itself
    else:
        q[0, head, 20, 1], k[0, head, 1, 1] = 6, 5              # a logit of 15
        q[0, 0, 2, 0] += 30
    v[:] = 1
    v[0, :, 1] = 1e15
    qkv = [x.requires_grad_() for x in (q, k, v)]
    y = cpu.selective_attention(*qkv, relu)[0]
    if below > 0:
        torch.testing.assert_close(y, oracle(*qkv, relu)[0], rtol=1e-9, atol=0)
    else:                                                       # now it may go, and its v is too large not to be missed
        assert (y - oracle(*qkv, relu)[0]).abs().max() > 1e-5


@pytest.mark.parametrize('together', [1, 2 * 2 * 8 * 67, 2**20])
def test_sequences_of_a_batch_have_lists_of_their_own(monkeypatch, together):
    monkeypatch.setattr(cpu, 'TOGETHER', together)              # one by one, in pairs, all together
    T, often = 67, torch.tensor([0, .3, .6, .9, 1])[:, None]
    dies = torch.rand(5, T, generator=torch.Generator().manual_seed(0)) < often
    qkv = example(5, 2, T, 4, 100. * dies)
    shares = [check([x[b:b + 1].detach().requires_grad_() for x in qkv], memory_tau=1.0) for b in range(5)]
    assert sorted(shares, reverse=True) == shares and shares[0] == 1 and shares[-1] < 0.3
    share = check(qkv, memory_tau=1.0)
    if together == 1:
        assert share == pytest.approx(sum(shares) / 5)
    if together == 2**20:
        assert share == 1                                       # as long as the longest


def test_tau_above_F_keeps_columns_and_tau_below_lets_them_go():
    shares = [check(example(1, 2, 67, 4, 20.), memory_tau=tau) for tau in (1.0, 500.0, 1e6)]
    assert shares[0] < 0.4 and shares[0] < shares[1] < shares[2] == 1


@pytest.mark.parametrize('scale', [0.0, 0.5, 3.0, -0.5])
def test_parameters_of_the_vote(scale):
    class Layer:
        vote_scale = torch.nn.Parameter(torch.tensor(scale, dtype=torch.float64))
        power = torch.nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

        def vote(self, L0):
            return relu(L0)**self.power * self.vote_scale * 2
    layer = Layer()
    share = check(example(2, 2, 40, 4, 20.), layer.vote, 1.0, [layer.vote_scale, layer.power], 1e-9)
    assert share == 1 if scale <= 0 else share < 0.5
    factor = layer.vote_scale * 2                               # no leaf: its graph is used in every block
    check(example(2, 2, 40, 4, 20.), lambda L0: relu(L0) * factor, None, [layer.vote_scale], 1e-9)


@pytest.mark.parametrize('name, vote', {
    'capped': lambda L0: relu(L0).clamp(max=4.0),
    'softplus': torch.nn.functional.softplus,
    'squared': lambda L0: L0**2,
    'token 0 counts': lambda L0: relu(L0 - L0[:, :, :1]),
    'identity': lambda L0: L0,
    'constant': lambda L0: torch.full_like(L0, 9.0),
    'now and then negative': lambda L0: L0.relu() - 0.01,
    'negative where columns are dead': lambda L0: torch.where(L0 < -5, -3.0 + L0, L0.relu()),
}.items())
def test_odd_votes(name, vote):
    qkv = example(2, 2, 67, 4, 10. * (torch.arange(67) > 0))
    with torch.no_grad():
        qkv[0][:, 0, 30:, 0] *= -1                              # later rows have negative logits on dead columns
    share = check(qkv, vote)
    assert share == 1 if name in ('identity', 'now and then negative', 'negative where columns are dead') else share < 1


def test_a_vote_that_is_negative_for_a_single_logit():
    # no sample of logits finds it: it is noticed in row 60, long after the first columns have been dropped
    qkv = example(1, 2, 67, 4, 10.)
    with torch.no_grad():
        seen = (qkv[0][0, 0, 60] * qkv[1][0, 0, 59]).sum() / 2
    vote = lambda L0: relu(L0) - 500 * ((L0 - seen).abs() < 1e-9)
    assert check(qkv) < 0.5
    assert 0.6 < check(qkv, vote) < 1                           # a part, noticed, then all: the mean of the two walks


@pytest.mark.parametrize('seed', range(40))
def test_random_strengths(seed):
    g = torch.Generator().manual_seed(1000 + seed)
    draw = lambda low, high: int(torch.randint(low, high + 1, (), generator=g))
    B, H, T, D = draw(1, 4), draw(1, 4), draw(1, 100), 2**draw(0, 4)
    strength = 10**(4 * torch.rand(B, T, generator=g) - 2) * (torch.rand(B, T, generator=g) < draw(0, 4) / 4)
    qkv = example(B, H, T, D, strength, seed)
    with torch.no_grad():
        for x in qkv[:2]:
            x[:, 1:] *= draw(1, 5)
    check(qkv, memory_tau=[None, 0.1, 1.0, 30.0][draw(0, 3)], tolerance=1e-11)


def test_float32_is_as_exact_as_the_plain_form():
    for seed in range(3):
        strength = 10**(4 * torch.rand(2, 300, generator=torch.Generator().manual_seed(seed)) - 2)
        qkv = example(2, 4, 300, 32, strength, seed, torch.float32)
        want = outputs(oracle, [x.detach().double().requires_grad_() for x in qkv])
        plain, got = outputs(m.selective_attention, qkv), outputs(cpu.selective_attention, qkv)
        assert cpu.live.share() < 0.8
        for name in ('y', 'dq', 'dk', 'dv'):
            assert got[name].dtype == torch.float32
            error, allowed = ((x[name] - want[name]).abs().max() for x in (got, plain))
            assert error < 2 * allowed + 1e-6 * want[name].abs().max(), name


def test_token_0_stays_column_0_though_nobody_can_see_it():
    qkv = example(2, 2, 67, 4, 0)
    with torch.no_grad():                                       # every row sees itself with a logit of 200 and more
        q, k, _ = qkv
        k[:] = 20 * torch.randn(k.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        k[:, :, 0] = 0
        q.copy_(k)
    assert check(qkv, lambda L0: relu(L0 - L0[:, :, :1]), tolerance=1e-9) < 1


def test_as_the_model_calls_it(monkeypatch):
    qkv = torch.randn(2, 40, 3 * 8, dtype=torch.float64, requires_grad=True)
    q, k, v = (x.view(2, 40, 2, 4).transpose(1, 2) for x in qkv.split(8, dim=2))
    y = cpu.selective_attention(q, k, v, relu)[0]
    want = oracle(q, k, v, relu)[0]
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(torch.autograd.grad(y.sin().sum(), qkv), torch.autograd.grad(want.sin().sum(), qkv))
    with torch.no_grad():
        torch.testing.assert_close(cpu.selective_attention(q, k, v, relu)[0], want)


def test_the_rest_is_left_to_model(monkeypatch):
    q, k, v = torch.randn(3, 1, 2, 20, 4)
    for args, dropout in ((q, k, v), 0.5), ((q.bfloat16(), k.bfloat16(), v.bfloat16()), 0.0):
        torch.manual_seed(0)
        y, M = cpu.selective_attention(*args, relu, dropout, 1.0)
        torch.manual_seed(0)
        torch.testing.assert_close((y, M), m.selective_attention(*args, relu, dropout, 1.0))


def test_the_floating_point_mode_stays_as_it_was():
    for flush in (True, False):
        torch.set_flush_denormal(flush)
        check(example(1, 2, 40, 4, 10.))
        assert (torch.tensor(1e-38) * 0.1 == 0) == flush
