"""kernels/gpu.py against the listing of model.py: on a GPU, or else in Triton's interpreter.

Where triton is missing the tests are skipped; where the environment variable CI is set, they fail.
The interpreter runs the kernels' arithmetic, not the machine code: test_compiled.py compiles that
for two GPUs.
"""

import math
import os

import pytest
import torch
from torch import library

import attention
import kernels
import model as m

try:
    from kernels import gpu
except ImportError:
    if os.environ.get('CI'):
        raise
    pytest.skip('triton is not installed', allow_module_level=True)

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


def rule(scale):
    """A layer that votes as model.py has it; scale: its vote_scale, None: it has none."""
    parameters = {}
    if scale is not None:
        parameters['vote_scale'] = scale
    return attention.Rule(**parameters).to(DEVICE, torch.float32)


def example(B, H, T, D, dtype=torch.float32, strength=None):
    """q, k, v as views of one tensor.

    strength: what each row votes on the columns, (T,); None: what random logits give.
    """
    torch.manual_seed(0)
    qkv = 1.5 * torch.randn(B, T, 3, H, D)
    if strength is not None:
        qkv[:, :, 0, 0] *= 0.3
        qkv[:, :, 0, 0, 0] = D**0.5
        qkv[:, :, 1, 0, 0] = strength
    return qkv.to(DEVICE, dtype).transpose(1, 3).unbind(dim=2)


def compare(qkv, tau, scale, tolerance=5e-5):
    # 0.1: of a single token dq and dk are 0, and rounding makes 3e-7 of it
    attention.compare(gpu.selective_attention, qkv, rule(scale), tau, tolerance, 0.1)


@pytest.mark.parametrize(
    'shape, tau, scale',
    [
        ((1, 1, 1, 16), None, None),
        ((2, 2, 2, 16), 1.0, 0.5),
        ((3, 2, 17, 32), 0.7, -0.2),
        ((1, 3, 33, 16), 1.0, 0.0),
    ],
)
def test_outputs_and_gradients(shape, tau, scale):
    compare(example(*shape), tau, scale)


@pytest.mark.parametrize('D, tau, scale', [(16, 150.0, None), (64, None, 0.5), (128, 1.0, 0.5)])
def test_votes_that_kill_most_columns(D, tau, scale):
    """Tiles have other sizes for each D. Every seventh column is left alone."""
    T = 256
    qkv = example(1, 2, T, D, strength=20.0 * (torch.arange(T) % 7 > 0))
    compare(qkv, tau, scale)
    factor = torch.tensor(scale or 1.0, device=DEVICE)
    *_, alive = gpu.attention(*(x.contiguous() for x in qkv), factor, tau)
    assert (alive == alive.max()).sum() < 0.6 * T


@pytest.mark.parametrize('above, blocks_alive', [(-0.1, 4), (0.1, 1)])
def test_a_column_is_kept_until_its_probability_is_less_than_rounding(above, blocks_alive):
    T = 4 * gpu.ROWS
    threshold = -math.log(2**-24 / T) - math.log(3)  # three logits of 0 bound the sum from below
    q, k, v = torch.zeros(3, 1, 1, T, 16, device=DEVICE)
    k[0, 0, 1, 0] = 4.0
    q[0, 0, 2, 0] = threshold + above  # which is what row 2 votes on column 1
    *_, alive = gpu.attention(q, k, v, torch.ones((), device=DEVICE), None)
    assert alive[0, 1] == blocks_alive


def test_a_column_that_negative_votes_bring_back():
    """Rows see token 0 alone, until column 1 has an F of less than -180."""
    q, k, v = torch.zeros(3, 1, 1, 140, 16, device=DEVICE)
    v.normal_()
    q[..., 0] = 20.0
    k[..., 0] = -40.0
    k[..., 0, 0] = 40.0  # a logit of 200
    k[..., 1, 0] = 4.0  # and one of 20
    compare([q, k, v], None, -0.15, tolerance=5e-4)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float16, 0.003), (torch.bfloat16, 0.02)])
def test_half_precision(dtype, tolerance):
    if dtype not in gpu.DTYPES:
        pytest.skip("Triton's interpreter cannot multiply bfloat16")
    compare(example(1, 2, 40, 16, dtype), 1.0, 0.5, tolerance)


def test_F_is_a_float32_sum():
    """Votes that float16 would lose in their sum: 100 of 1/64 after one of 1000."""
    q, k, v = torch.zeros(3, 1, 1, 102, 16, device=DEVICE, dtype=torch.float16)
    k[..., 1, 0] = 4.0  # all vote on token 1
    q[..., 2:, 0] = 1 / 64
    q[..., 2, 0] = 1000.0
    _, M = gpu.selective_attention(q, k, v, rule(None), memory_tau=2000.0)
    assert 2000.0 * (101 - M[0, 101].item()) == pytest.approx(1000 + 98 / 64, abs=0.1)


def test_autocast_does_not_round_the_bound():
    q, k, _ = example(1, 2, 100, 16)
    with torch.autocast(DEVICE, torch.bfloat16):
        rounded = gpu.bounds(q, k)
    torch.testing.assert_close(rounded, gpu.bounds(q, k), rtol=0, atol=0)


def test_operators():
    """What torch.compile is told of the operators is true: shapes, gradients, no hidden writes."""
    qkv = [x.contiguous().requires_grad_() for x in example(1, 1, 128, 16)]
    tests = ['test_schema', 'test_faketensor']
    args = *qkv, rule(0.5).vote_scale, 1.0
    library.opcheck(gpu.attention, args, test_utils=[*tests, 'test_autograd_registration'])
    args = [x.detach() for x in args[:4]]
    made = gpu.attention(*args, 1.0)
    saved = [*args, *made, torch.randn_like(made[0]), torch.randn_like(made[1])]
    library.opcheck(gpu.attention_backward, (saved, 1.0), test_utils=tests)


@pytest.mark.slow
def test_a_compiled_model():
    torch.manual_seed(0)
    gpt = m.GPT(m.GPTConfig(40, 17, 1, 1, 16, selective=True, vote_scale=True)).to(DEVICE)
    for p in gpt.parameters():
        p.data += 0.3 * torch.randn(p.shape).to(DEVICE)
    idx = torch.randint(17, (2, 40)).to(DEVICE)
    found = []
    for kernel in 'none', 'gpu':
        kernels.install(gpt, kernel)
        gpt.compile(backend='aot_eager', fullgraph=True)
        _, loss, memory = gpt(idx, idx, memory_tau=1.0)
        grads = torch.autograd.grad(loss + memory, list(gpt.parameters()))
        found.append([loss, memory, *grads])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
