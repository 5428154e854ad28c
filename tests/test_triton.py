"""kernels/gpu.py against model.py in float64: on a GPU where there is one, else in Triton's interpreter on the CPU.

Where triton is missing the tests are skipped; where the environment variable CI is set, they fail. The interpreter runs
the kernels' arithmetic, not the machine code: test_compiled.py compiles that for two GPUs, and none runs it.
"""
import os
import types

import pytest
import torch
from torch import library

import kernels
import model as m
from model import GPT, GPTConfig

try:
    from kernels import gpu as tk
except ImportError:
    if os.environ.get('CI'):
        raise
    pytest.skip('triton is not installed', allow_module_level=True)

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


@pytest.fixture
def tiles(monkeypatch):
    """tiles(G, forward, columns, tile): set the sizes, (R, N) each; None: leave those that a GPU runs."""
    def tiles(G=None, forward=None, columns_N=None, tile=None):
        if G:
            sizes = {tk.votes_kernel: (G, columns_N), tk.forward_kernel: forward, tk.columns_kernel: (G, columns_N),
                     tk.tile_kernel: tile}
            monkeypatch.setattr(tk, 'G', G)
            monkeypatch.setattr(tk, 'tiles', lambda *_: {kernel: dict(R=R, N=N) for kernel, (R, N) in sizes.items()})
    return tiles


def inputs(B, H, T, D, scale, dtype=torch.float32, seed=0, strength=None):
    """q, k, v as views of one qkv that lies in a sea of nan, and a scale or None: leaves, and what to call with.

    strength: what each row votes on the columns, numbers (T,) or one; None: what random logits give.
    """
    torch.manual_seed(seed)
    sea = torch.full((B, T + 3, 3 * H * D + 16), float('nan'))
    sea[:, 1:T + 1, 16:] = 1.5 * torch.randn(B, T, 3 * H * D)
    if strength is not None:
        sea[:, 1:T + 1, 16:16 + D] *= 0.3
        sea[:, 1:T + 1, 16], sea[:, 1:T + 1, 16 + H * D] = D**0.5, strength
    sea = sea.to(DEVICE, dtype).requires_grad_()
    q, k, v = (t.unflatten(2, (H, D)).transpose(1, 2) for t in sea[:, 1:T + 1, 16:].split(H * D, dim=2))
    scale = None if scale is None else torch.tensor(scale, device=DEVICE, requires_grad=True)
    return (q, k, v), scale


def vote(scale=None):
    """The method of a layer with this vote_scale."""
    layer = types.SimpleNamespace(vote_scale=scale)
    return types.MethodType(m.CausalSelfAttention.vote, layer)


def check(got, want, tolerance, what):
    error, size = (got - want).double().norm().item(), want.norm().item()
    assert error <= tolerance * max(size, 0.1), f'{what} is off by {error:.2g} of {size:.2g}'


def compare(shape, tau, scale, dtype=torch.float32, tolerance=2e-5, strength=None):
    """y, M and all gradients of the kernel against those of the plain code in float64."""
    qkv, scale = inputs(*shape, scale, dtype, strength=strength)
    leaves = [*qkv] if scale is None else [*qkv, scale]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    y, M = tk.selective_attention(*qkv, vote(scale), memory_tau=tau)
    expected, expected_M = m.selective_attention(*exact[:3], vote(*exact[3:]), memory_tau=tau)
    assert y.dtype == dtype and y.transpose(1, 2).is_contiguous()
    weight, weight_M = torch.randn_like(expected), torch.randn(shape[0], shape[2], device=DEVICE)
    loss, expected_loss = (y * weight).sum(), (expected * weight).sum()
    check(y, expected, tolerance, 'y')
    if tau is None:
        assert M is None
    else:
        check(M, expected_M, tolerance, 'M')
        loss, expected_loss = loss + (M * weight_M).sum(), expected_loss + (expected_M * weight_M).sum()
    got, want = torch.autograd.grad(loss, leaves), torch.autograd.grad(expected_loss, exact)
    for name, g, w in zip(('dq', 'dk', 'dv', 'dscale'), got, want):
        check(g, w, tolerance, name)


SQUARE = dict(G=16, forward=(16, 16), columns_N=16, tile=(16, 16))
FLAT = dict(G=16, forward=(32, 16), columns_N=32, tile=(16, 32))
TALL = dict(G=16, forward=(16, 32), columns_N=16, tile=(32, 16))


@pytest.mark.parametrize('B, H, T, D, tau, scale, size', [
    (1, 1, 1, 16, None, None, {}), (2, 2, 2, 16, 1.0, 0.5, {}), (3, 2, 17, 32, 0.7, -0.2, {}),
    (1, 3, 64, 64, None, 1.3, {}), (2, 1, 100, 16, 1.0, None, {}), (1, 2, 129, 32, 1.0, 0.5, {}),
    (1, 2, 70, 128, 1.0, 0.4, {}), (1, 2, 196, 16, None, None, {}), (1, 4, 33, 16, 1.0, 0.0, {}),
    (2, 1, 50, 16, None, None, SQUARE), (1, 2, 33, 16, 1.0, 0.3, SQUARE), (1, 1, 64, 32, 0.7, 0.6, FLAT),
    (1, 2, 75, 16, 1.0, None, FLAT), (1, 1, 64, 16, 1.0, -0.4, TALL), (1, 2, 61, 16, None, 0.8, TALL)])
def test_outputs_and_gradients(B, H, T, D, tau, scale, size, tiles):
    tiles(**size)
    compare((B, H, T, D), tau, scale)


@pytest.mark.parametrize('size', [{}, SQUARE, FLAT, TALL])
@pytest.mark.parametrize('tau', [None, 1.0, 150.0])
@pytest.mark.parametrize('scale', [None, 0.5, -0.02])
def test_votes_that_kill_most_columns(size, tau, scale, tiles):
    tiles(**size)
    T, strength = 100, 20.0 * (torch.arange(100) % 7 > 0)       # every seventh column is left alone
    compare((2, 2, T, 16), tau, scale, strength=strength, tolerance=2e-5 if scale != -0.02 else 5e-4)
    (q, k, v), _ = inputs(2, 2, T, 16, scale, strength=strength)
    *_, alive = tk.attention(q, k, v, None if scale is None else torch.tensor(scale, device=DEVICE), tau)
    R = tk.tiles(16, q.dtype)[tk.forward_kernel]['R']
    _, counts = tk.live_columns(alive, R)
    whole = torch.arange(R, T + R, R).clamp(max=T)
    if scale == -0.02 or R > 64:                                # nothing dies; all in one block
        assert (counts.cpu() == whole).all()
    elif tau != 150:
        assert (counts[:, -1] < 0.6 * T).all() and (alive[:, ::7].amin(dim=1) == alive.amax()).all()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('D', [16, 64])
def test_half_precision(dtype, D):
    if tk.INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cannot multiply bfloat16")
    compare((2, 2, 100, D), 1.0, 0.5, dtype, tolerance=0.003 if dtype == torch.float16 else 0.02)


def test_F_is_a_float32_sum():
    """Votes that float16 would lose in their sum: 300 of 1/64 after one of 1000."""
    T = 302
    q = torch.zeros(1, 2, T, 16, device=DEVICE, dtype=torch.float16)
    k, v = torch.zeros_like(q), torch.randn_like(q)
    k[0, 0, 1, 0], q[0, 0, 2:, 0], q[0, 0, 2, 0] = 4.0, 1 / 64, 1000.0     # all vote on token 1
    M = tk.selective_attention(q, k, v, vote(), memory_tau=2000.0)[1]
    F = torch.cat([torch.zeros(3), 1000.0 + torch.arange(T - 3) / 64])
    torch.testing.assert_close(M[0].cpu(), torch.arange(T) - F / 2000.0, atol=2e-6, rtol=1e-6)


def test_gradients_of_one_output_alone():
    """Of M alone, and of y while M is not used."""
    for output in (0, 1):
        qkv, _ = inputs(1, 2, 40, 16, None)
        exact = [x.detach().double().requires_grad_() for x in qkv]
        got = torch.autograd.grad(tk.selective_attention(*qkv, vote(), memory_tau=1.0)[output].sum(), qkv)
        expected = m.selective_attention(*exact, vote(), memory_tau=1.0)[output]
        want = torch.autograd.grad(expected.sum(), exact, materialize_grads=True)
        for g, w in zip(got, want):
            check(g, w, 2e-5, f'a gradient of output {output}')


def test_operators():
    """What torch.compile is told of the two operators is true: shapes, strides, gradients, no hidden writes."""
    qkv, scale = inputs(1, 2, 34, 16, 0.5)
    for more in (scale, 1.0), (None, None):                     # test_model below compiles both
        library.opcheck(tk.attention, (*qkv, *more), test_utils=('test_schema', 'test_autograd_registration',
                                                                 'test_faketensor'))
    args = *(x.detach() for x in qkv), scale.detach(), 1.0
    y, M, *saved = tk.attention(*args)
    library.opcheck(tk.attention_backward, (*args, y, *saved, torch.randn_like(y), torch.randn_like(M)),
                    test_utils=('test_schema', 'test_faketensor'))


def test_dropout_is_left_to_model():
    qkv, _ = inputs(1, 2, 20, 16, None)
    torch.manual_seed(0)
    got = tk.selective_attention(*qkv, vote(), 0.5)
    torch.manual_seed(0)
    torch.testing.assert_close(got, m.selective_attention(*qkv, vote(), 0.5))


@pytest.mark.parametrize('compiled', [False, True])
def test_model(compiled):
    def loss_and_gradients(kernel, compiled=False):
        torch.manual_seed(0)
        gpt = GPT(GPTConfig(block_size=40, vocab_size=17, n_layer=1, n_head=2, n_embd=32, selective=True,
                            vote_scale=True, ssa='qv', rope=True)).to(DEVICE)
        with torch.no_grad():
            for p in gpt.parameters():
                p.add_(0.3 * torch.randn(p.shape).to(DEVICE))
        line = kernels.install(gpt, kernel)
        assert kernel == 'none' or 'kernels/gpu.py (Triton), which gives the numbers' in line
        forward = torch.compile(gpt.forward, backend='aot_eager', fullgraph=True) if compiled else gpt.forward
        idx = torch.randint(17, (2, 40), generator=torch.Generator().manual_seed(1)).to(DEVICE)
        _, loss, memory = forward(idx, idx, memory_tau=1.0)
        return loss, memory, *torch.autograd.grad(loss + memory, list(gpt.parameters()))
    for got, want in zip(loss_and_gradients('gpu', compiled), loss_and_gradients('none')):
        check(got, want, 1e-4, 'one of the loss and its gradients')
