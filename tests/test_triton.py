"""triton_kernels.py against model.py in float64: on a GPU where there is one, else in Triton's interpreter on the CPU.

Where triton is missing the tests are skipped; where the environment variable CI is set, they fail. The interpreter runs
the kernels' arithmetic, not the machine code, which is compiled for two GPUs below, and run by none.
"""
import os
import types
import warnings

import pytest
import torch

import kernels
import model as m
import train
from model import GPT, GPTConfig
from support import checkpoint

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


def inputs(B, H, T, D, scale, dtype=torch.float32, seed=0):
    """q, k, v as views of one qkv that lies in a sea of nan, and a scale or None: leaves, and what to call with."""
    torch.manual_seed(seed)
    sea = torch.full((B, T + 3, 3 * H * D + 16), float('nan'))
    sea[:, 1:T + 1, 16:] = 1.5 * torch.randn(B, T, 3 * H * D)
    sea = sea.to(DEVICE, dtype).requires_grad_()
    q, k, v = (t.unflatten(2, (H, D)).transpose(1, 2) for t in sea[:, 1:T + 1, 16:].split(H * D, dim=2))
    scale = None if scale is None else torch.tensor(scale, device=DEVICE, requires_grad=True)
    return (q, k, v), scale


def check(got, want, tolerance, what):
    error, size = (got - want).double().norm().item(), want.norm().item()
    assert error <= tolerance * max(size, 0.1), f'{what} is off by {error:.2g} of {size:.2g}'


def compare(shape, tau, scale, dtype=torch.float32, tolerance=2e-5):
    """y, M and all gradients of the kernel against those of the plain code in float64."""
    qkv, scale = inputs(*shape, scale, dtype)
    leaves = [*qkv] if scale is None else [*qkv, scale]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    y, M = tk.selective_attention(*qkv, tau=tau, scale=scale)
    expected, expected_M = m.selective_attention(*exact[:3], tau=tau, block=16,
                                                 scale=exact[3] if scale is not None else None)
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
    M = tk.selective_attention(q, k, v, tau=2000.0)[1]
    F = torch.cat([torch.zeros(3), 1000.0 + torch.arange(T - 3) / 64])
    torch.testing.assert_close(M[0].cpu(), torch.arange(T) - F / 2000.0, atol=2e-6, rtol=1e-6)


def test_gradients_of_one_output_alone():
    """Of M alone, and of y while M is not used."""
    for output in (0, 1):
        qkv, _ = inputs(1, 2, 40, 16, None)
        exact = [x.detach().double().requires_grad_() for x in qkv]
        got = torch.autograd.grad(tk.selective_attention(*qkv, tau=1.0)[output].sum(), qkv)
        want = torch.autograd.grad(m.selective_attention(*exact, tau=1.0)[output].sum(), exact, materialize_grads=True)
        for g, w in zip(got, want):
            check(g, w, 2e-5, f'a gradient of output {output}')


def test_operators():
    """What torch.compile is told of the two operators is true: shapes, strides, gradients, no hidden writes."""
    qkv, scale = inputs(1, 2, 34, 16, 0.5)
    for more in (scale, 1.0), (None, None):                     # test_model compiles both
        torch.library.opcheck(tk.attention, (*qkv, *more), test_utils=('test_schema', 'test_autograd_registration',
                                                                       'test_faketensor'))
    args = *(x.detach() for x in qkv), scale.detach(), 1.0
    y, M, lse, C = tk.attention(*args)
    torch.library.opcheck(tk.attention_backward, (*args, y, lse, C, torch.randn_like(y), torch.randn_like(M)),
                          test_utils=('test_schema', 'test_faketensor'))


# ----------------------------------------------------------------------------------------------------------------------
# The model, and who chooses


def gpt(kernel, **config):
    torch.manual_seed(0)
    made = GPT(GPTConfig(**{**dict(block_size=40, vocab_size=17, n_layer=1, n_head=2, n_embd=32, selective=True,
                                   vote_scale=True, ssa='qv', kernel=kernel), **config})).to(DEVICE)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.3 * torch.randn(p.shape).to(DEVICE))
    return made


def loss_and_gradients(model, forward=None):
    idx = torch.randint(17, (2, 40), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    _, loss, memory = (forward or model.forward)(idx, idx, memory_tau=1.0)
    return loss, memory, *torch.autograd.grad(loss + memory, list(model.parameters()))


@pytest.fixture
def broken(monkeypatch):
    """A kernel whose gradients are off by a tenth; and nobody remembers what was found out before."""
    right = tk.selective_attention
    wrong = lambda q, k, v, tau, scale: (lambda y, M: (y + 0.1 * (y - y.detach()), M))(*right(q, k, v, tau, scale))
    monkeypatch.setattr(tk, 'selective_attention', wrong)
    kernels._try_triton.cache_clear()
    yield
    kernels._try_triton.cache_clear()


@pytest.mark.parametrize('compiled', [False, True])
def test_model(compiled):
    expected = loss_and_gradients(gpt('rows'))
    model = gpt('triton')
    forward = torch.compile(model.forward, backend='aot_eager', fullgraph=True) if compiled else None
    kernels._try_triton.cache_clear()                           # the first call, while tracing, finds out
    for got, want in zip(loss_and_gradients(model, forward), expected):
        check(got, want, 1e-4, 'one of the loss and its gradients')


def on_gpu(dtype=torch.float32, D=16, device=DEVICE):
    """As much of a GPU's queries as kernels.pick looks at."""
    return types.SimpleNamespace(is_cuda=True, device=torch.device(device), dtype=dtype, size=lambda dim: D)


def test_pick(monkeypatch):
    q = on_gpu()
    assert kernels.pick(q, 0.0) is None and kernels.pick(q, 0.0, 'triton') is kernels._triton      # slow, but exact
    monkeypatch.setattr(torch, 'get_float32_matmul_precision', lambda: 'high')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert kernels.pick(q, 0.0) is kernels._triton
        assert kernels.pick(q, 0.1) is None and kernels.pick(q, 0.0, 'rows') is None
        assert kernels.pick(torch.zeros(1, 1, 1, 16), 0.0) is kernels.selective_attention
    with pytest.warns(UserWarning, match='plain code.*48 channels'):
        assert kernels.pick(on_gpu(D=48), 0.0) is None
    for wrong, dropout, word in [(on_gpu(D=48), 0.0, '48 channels'), (on_gpu(torch.float64), 0.0, 'float64'),
                                 (q, 0.1, 'dropout')]:
        with pytest.raises(ValueError, match=f"kernel='triton'.*{word}"):
            kernels.pick(wrong, dropout, 'triton')
    if tk.INTERPRETED:
        with pytest.raises(ValueError, match='bfloat16 in the interpreter'):
            kernels.pick(on_gpu(torch.bfloat16), 0.0, 'triton')
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tk, 'INTERPRETED', False)
            kernels._try_triton.cache_clear()
            with pytest.raises(ValueError, match='this is cpu'):
                kernels.pick(torch.zeros(1, 1, 1, 16), 0.0, 'triton')
        kernels._try_triton.cache_clear()


@pytest.mark.parametrize('compiled', [False, True])
def test_a_kernel_that_errs_is_not_used(compiled, broken, monkeypatch):
    """'auto' on a GPU finds out, also when torch.compile asks first, says so in one line, and the plain code computes."""
    with pytest.raises(ValueError, match="its numbers are not those of model.py"):
        kernels.pick(on_gpu(), 0.0, 'triton')
    kernels._try_triton.cache_clear()
    monkeypatch.setattr(torch, 'get_float32_matmul_precision', lambda: 'high')
    expected, model = loss_and_gradients(gpt('rows')), gpt('auto')
    why_not = kernels._why_not_triton
    monkeypatch.setattr(kernels, 'pick', lambda q, dropout, kernel:     # as pick does where q.is_cuda
                        None if why_not(q.device, q.dtype, q.size(3), 'auto') else kernels._triton)
    forward = torch.compile(model.forward, backend='aot_eager', fullgraph=True) if compiled else None
    with pytest.warns(UserWarning, match='plain code') as said:
        results = loss_and_gradients(model, forward)
    assert all('\n' not in str(w.message) for w in said)
    for got, want in zip(results, expected):
        check(got, want, 1e-5, 'one of the loss and its gradients')


def test_a_kernel_that_fails_is_not_used(broken, monkeypatch):
    monkeypatch.setattr(tk, 'selective_attention', lambda *args, **more: 1 / 0)
    with pytest.warns(UserWarning, match='it fails on this device .ZeroDivisionError'):
        assert kernels.pick(on_gpu(torch.float16), 0.0) is None


def test_training(run, dataset, tmp_path):
    """kernel='triton' in train.py: in one line where it cannot be; and a checkpoint is not bound to it."""
    args = [dataset, f'--out_dir={tmp_path}', '--n_layer=1', '--n_head=2', '--n_embd=32', '--block_size=32', '--batch_size=2',
            '--gradient_accumulation_steps=1', '--max_iters=2', '--eval_iters=1', '--selective=True', '--kernel=triton',
            f'--device={DEVICE}', '--compile=False']
    assert 'it has no dropout' in run(train, *args, '--dropout=0.1')
    assert 'step 2/2' in run(train, *args)
    assert checkpoint.load_model(tmp_path)[0].config.kernel == 'auto'
