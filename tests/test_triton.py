"""kernels/gpu.py against model.py in float64: on a GPU, or else in Triton's interpreter.

Where triton is missing the tests are skipped; where the environment variable CI is set, they fail.
The interpreter runs the kernels' arithmetic, not the machine code: test_compiled.py compiles that
for two GPUs.
"""

import math
import os

import pytest
import torch
from torch import library

import kernels
import model as m

try:
    from kernels import gpu
except ImportError:
    if os.environ.get('CI'):
        raise
    pytest.skip('triton is not installed', allow_module_level=True)

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
# other sizes than on a GPU: (G, and (R, N) of forward_kernel, columns_kernel, tile_kernel)
SQUARE = 16, (16, 16), (16, 16), (16, 16)
FLAT = 16, (32, 16), (16, 32), (16, 32)
TALL = 16, (16, 32), (16, 16), (32, 16)


class Rule(torch.nn.Module):
    """A layer's votes, times a factor if there is one."""

    vote = m.CausalSelfAttention.vote
    accumulate = m.CausalSelfAttention.accumulate

    def __init__(self, scale=None, dtype=torch.float32):
        super().__init__()
        self.vote_scale = None
        if scale is not None:
            self.vote_scale = torch.nn.Parameter(torch.tensor(scale, dtype=dtype, device=DEVICE))


@pytest.fixture
def tiles(monkeypatch):
    """tiles(size): run one of the sizes above; None: those of a GPU."""

    def tiles(size):
        if size is None:
            return
        names = gpu.forward_kernel, gpu.columns_kernel, gpu.tile_kernel
        sizes = {name: dict(R=R, N=N) for name, (R, N) in zip(names, size[1:])}
        sizes[gpu.votes_kernel] = sizes[gpu.columns_kernel]
        monkeypatch.setattr(gpu, 'G', size[0])
        monkeypatch.setattr(gpu, 'tiles', lambda D, dtype: sizes)

    return tiles


def example(B, H, T, D, dtype=torch.float32, strength=None):
    """q, k, v as views of one qkv that lies in a sea of nan.

    strength: what each row votes on the columns, (T,); None: what random logits give.
    """
    torch.manual_seed(0)
    sea = torch.full((B, T + 3, 3, H, D), float('nan'))
    qkv = sea[:, 1 : T + 1]
    qkv[:] = 1.5 * torch.randn(qkv.shape)
    if strength is not None:
        qkv[:, :, 0, 0] *= 0.3
        qkv[:, :, 0, 0, 0] = D**0.5
        qkv[:, :, 1, 0, 0] = strength
    sea = sea.to(DEVICE, dtype).requires_grad_()
    return [x.transpose(1, 2) for x in sea[:, 1 : T + 1].unbind(dim=2)]


def deadly(T):
    """Votes that kill most columns; every seventh is left alone."""
    return 20.0 * (torch.arange(T) % 7 > 0)


def check(got, want, tolerance, what):
    error = (got - want).double().norm()
    size = want.norm()
    assert error <= tolerance * max(size, 0.1), f'{what} is off by {error:.2g} of {size:.2g}'


def results(attention, qkv, rule, tau, only='yM'):
    """y, M where there is one, and all gradients of a loss that weighs each number of `only`."""
    g = torch.Generator().manual_seed(1)
    y, M = attention(*qkv, rule, memory_tau=tau)
    found = {'y': y}
    assert (M is None) == (tau is None)
    if tau is not None:
        found['M'] = M
    loss = 0.0
    for name, x in found.items():
        if name in only:
            loss = loss + (x * torch.randn(x.shape, generator=g).to(DEVICE)).sum()
    inputs = [*qkv, *rule.parameters()]
    grads = torch.autograd.grad(loss, inputs, materialize_grads=True)
    return found | dict(zip(['dq', 'dk', 'dv', 'dscale'], grads))


def compare(qkv, tau, scale, tolerance=2e-5, only='yM'):
    """The numbers of the kernels against those of the plain code in float64."""
    exact = [x.detach().double().requires_grad_() for x in qkv]
    wanted = results(m.selective_attention, exact, Rule(scale, torch.float64), tau, only)
    found = results(gpu.selective_attention, qkv, Rule(scale), tau, only)
    assert found['y'].dtype == qkv[0].dtype
    for name, want in wanted.items():
        check(found[name], want, tolerance, name)


@pytest.mark.parametrize(
    'shape, tau, scale, size',
    [
        ((1, 1, 1, 16), None, None, None),
        ((2, 2, 2, 16), 1.0, 0.5, None),
        ((3, 2, 17, 32), 0.7, -0.2, None),
        ((1, 3, 64, 64), None, 1.3, None),
        ((1, 2, 70, 128), 1.0, 0.4, None),
        ((1, 4, 33, 16), 1.0, 0.0, None),
        ((2, 1, 50, 16), None, None, SQUARE),
        ((1, 1, 40, 32), 0.7, 0.6, FLAT),
        ((1, 1, 40, 16), 1.0, -0.4, TALL),
        ((1, 2, 61, 16), None, 0.8, TALL),
        pytest.param((1, 2, 129, 32), 1.0, 0.5, None, marks=pytest.mark.slow),
        pytest.param((1, 2, 196, 16), None, None, None, marks=pytest.mark.slow),
    ],
)
def test_outputs_and_gradients(shape, tau, scale, size, tiles):
    tiles(size)
    compare(example(*shape), tau, scale)


@pytest.mark.parametrize(
    'size, tau, scale',
    [
        (None, 1.0, None),
        (SQUARE, None, 0.5),
        (FLAT, 1.0, 0.5),
        (TALL, None, None),
        (SQUARE, 150.0, None),
        (TALL, 1.0, -0.02),
        pytest.param(FLAT, 150.0, 0.5, marks=pytest.mark.slow),
        pytest.param(SQUARE, 1.0, -0.02, marks=pytest.mark.slow),
    ],
)
def test_votes_that_kill_most_columns(size, tau, scale, tiles):
    tiles(size)
    T = 135 if size is None else 50
    qkv = example(1, 2, T, 16, strength=deadly(T))
    compare(qkv, tau, scale, tolerance=5e-4 if scale == -0.02 else 2e-5)
    factor = torch.tensor(1.0 if scale is None else scale, device=DEVICE)
    *_, alive = gpu.attention(*(x.contiguous() for x in qkv), factor, tau)
    _, counts = gpu.live_columns(alive, gpu.tiles(16, torch.float32)[gpu.forward_kernel]['R'])
    if scale == -0.02:
        assert counts[0, -1] == T
    elif tau != 150:
        assert counts[0, -1] < 0.6 * T


@pytest.mark.parametrize('above, blocks_alive', [(-0.1, 4), (0.1, 1)])
def test_a_column_is_kept_until_its_probability_is_less_than_rounding(above, blocks_alive):
    T = 4 * gpu.G
    threshold = -math.log(2**-24 / T) - math.log(3)  # three logits of 0 bound the sum from below
    q, k, v = torch.zeros(3, 1, 1, T, 16, device=DEVICE)
    k[0, 0, 1, 0] = 4.0
    q[0, 0, 2, 0] = threshold + above  # which is what row 2 votes on column 1
    *_, alive = gpu.attention(q, k, v, torch.ones((), device=DEVICE), None)
    assert alive[0, 1] == blocks_alive


def test_a_column_that_negative_votes_bring_back():
    """Rows see token 0 alone, until column 1 has an F of less than -180."""
    q, k, v = torch.zeros(3, 1, 1, 100, 16, device=DEVICE)
    v[:] = torch.randn(v.shape)
    q[..., 0] = 20.0
    k[..., 0] = -40.0
    k[:, :, 0, 0] = 40.0  # a logit of 200
    k[:, :, 1, 0] = 4.0  # and one of 20
    qkv = [x.requires_grad_() for x in (q, k, v)]
    compare(qkv, None, -0.15, tolerance=5e-4)


@pytest.mark.parametrize('D', [16, 64])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float16, 0.003), (torch.bfloat16, 0.02)])
def test_half_precision(dtype, tolerance, D):
    if dtype not in gpu.DTYPES:
        pytest.skip("Triton's interpreter cannot multiply bfloat16")
    compare(example(2, 2, 50, D, dtype), 1.0, 0.5, tolerance)


def test_F_is_a_float32_sum():
    """Votes that float16 would lose in their sum: 300 of 1/64 after one of 1000."""
    T = 302
    q = torch.zeros(1, 2, T, 16, device=DEVICE, dtype=torch.float16)
    k = torch.zeros_like(q)
    v = torch.randn_like(q)
    k[0, 0, 1, 0] = 4.0  # all vote on token 1
    q[0, 0, 2:, 0] = 1 / 64
    q[0, 0, 2, 0] = 1000.0
    _, M = gpu.selective_attention(q, k, v, Rule(), memory_tau=2000.0)
    F = torch.zeros(T)
    F[3:] = 1000.0 + torch.arange(T - 3) / 64
    torch.testing.assert_close(M[0].cpu(), torch.arange(T) - F / 2000.0, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize('output', ['y', 'M'])
def test_gradients_of_one_output_alone(output):
    compare(example(1, 2, 40, 16), 1.0, None, only=output)


def test_autocast_does_not_round_the_bound():
    qkv = [x.contiguous() for x in example(1, 2, 100, 16, strength=deadly(100))]
    args = *qkv, torch.ones((), device=DEVICE), None
    with torch.autocast(DEVICE, torch.bfloat16):
        rounded = gpu.attention(*args)
        limits = gpu.bounds(*qkv[:2])
    torch.testing.assert_close(rounded, gpu.attention(*args), rtol=0, atol=0)
    torch.testing.assert_close(limits, gpu.bounds(*qkv[:2]), rtol=0, atol=0)


def test_operators():
    """What torch.compile is told of the operators is true: shapes, gradients, no hidden writes."""
    qkv = [x.contiguous() for x in example(1, 2, 34, 16)]
    tests = ['test_schema', 'test_faketensor']
    for tau in None, 1.0:
        args = *qkv, Rule(0.5).vote_scale, tau
        library.opcheck(gpu.attention, args, test_utils=[*tests, 'test_autograd_registration'])
        args = [x.detach() for x in args[:4]]
        y, M, *saved = gpu.attention(*args, tau)
        saved = [*args, y, *saved, torch.randn_like(y), torch.randn_like(M)]
        library.opcheck(gpu.attention_backward, (saved, tau), test_utils=tests)


@pytest.mark.parametrize('compiled', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_model(compiled):
    torch.manual_seed(0)
    shape = dict(block_size=40, vocab_size=17, n_layer=1, n_head=2, n_embd=32, rope=True)
    config = m.GPTConfig(**shape, selective=True, vote_scale=True, ssa='qv')
    gpt = m.GPT(config).to(DEVICE)
    for p in gpt.parameters():
        p.data += 0.3 * torch.randn(p.shape).to(DEVICE)
    idx = torch.randint(17, (2, 40)).to(DEVICE)
    found = []
    for kernel in 'gpu', 'none':
        line = kernels.install(gpt, kernel)
        assert kernel == 'none' or 'kernels/gpu.py (Triton), which gives the numbers' in line
        forward = gpt.forward
        if compiled and kernel == 'gpu':
            forward = torch.compile(forward, backend='aot_eager', fullgraph=True)
        _, loss, memory = forward(idx, idx, memory_tau=1.0)
        grads = torch.autograd.grad(loss + memory, list(gpt.parameters()))
        found.append([loss, memory, *grads])
    for got, want in zip(*found):
        check(got, want, 1e-4, 'one of the loss and its gradients')
