"""Selective attention on a GPU: flash attention that makes F as it goes, over live columns.

It computes what `model.selective_attention` computes, as Triton kernels over tiles of R rows
(queries) by N columns (keys). model.py is complete without it. F[i,j] = sum of S[k,j] over k < i
needs, inside a tile, only what the rows above it have summed up:

    C[n,j] = sum of S[k,j] over k < n*G             F at every G-th row: T^2/G numbers for all heads
    F[i,j] = C[n,j] + sum of S[k,j] over n*G <= k < i               in a tile that begins at n*G

so no T x T tensor is built, in the forward or in the backward. There are four kernels, each a grid
of independent programs:

    votes_kernel        the column sums of S in tiles of G rows; their running sum is C
    forward_kernel      flash attention over L - F; F takes one more product a tile, q0 k0^T
    columns_kernel      dk and dv of a column block, and the column sums of dF in tiles of G rows
    tile_kernel         one tile, all heads: dq, and what its votes add to the gradients of head 0

C and the bound of kernels/cpu.py tell until which block of G rows a column is alive. Row blocks
walk over lists of the columns that are alive at their first row, and their own; column blocks take
columns that die at about the same time, and end there. So tiles have columns j in any order, and
every tile masks j > i.

The gradient of F runs the recurrence backwards, dS[k,j] = sum of dF[i,j] over i > k: what comes
from below a tile is dC[n,j] = sum of dF[i,j] over i >= n*G. The sums in dq, in dC and from votes in
dk are atomics in float32, added in an order that varies: two runs may differ in their last bits, as
they may with torch's own flash attention.

Units: S, F and C are kept as sums of q0.k0 without the factor D^-0.5, and exponentials to base 2.
The votes are relu(L0), times the layer's vote_scale if it has one, and F is their running sum:
other rules need kernels/cpu.py or model.py. Products of float32 are TF32's, as Triton has them by
default. TRITON_INTERPRET=1, set before the start, runs all of this on a CPU, slowly: that is how
the tests check the numbers.
"""

import math

import torch
import torch.nn.functional as fn
import triton
import triton.language as tl
from torch import Tensor, library

HEAD_SIZES = (16, 32, 64, 128)
DEVICES = ('cuda',)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
if triton.knobs.runtime.interpret:  # on a CPU
    DEVICES = ('cuda', 'cpu')
    DTYPES = (torch.float32, torch.float16)  # it gets bfloat16's products wrong
LOG2E = tl.constexpr(1.4426950408889634)
ROWS = 32  # from one boundary to the next; R is a multiple of it
LONGEST = 128  # R or N of any tile
G = tl.constexpr(ROWS)


# --------------------------------------------------------------------------------------------------
# Pieces of the kernels. T is a multiple of every R and N. A tile is (R, N) with rows i (R, 1) and
# columns j (1, N), or lies on its side: (N, R)


@triton.jit
def program():
    """n, m or h, and b of this program."""
    return tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)


@triton.jit
def block(n, R):
    return n * R + tl.arange(0, R)


@triton.jit
def boundary(C, b, n, T):
    """Pointer to C[n] of sequence b, which is (T,)."""
    return C + (b * (T // G + 1) + n) * T


@triton.jit
def at(x, rows, D):
    """Pointers to rows of q, k, v or what is like them, as (len(rows), D).

    Row i of head h of sequence b has the number (b * H + h) * T + i.
    """
    return x + rows[:, None] * D + tl.arange(0, D)[None, :]


@triton.jit
def load(x, rows, D):
    return tl.load(at(x, rows, D))


@triton.jit
def add(pointers, numbers):
    tl.atomic_add(pointers, numbers, sem='relaxed')


@triton.jit
def S_of(x, y, i, j):
    """The votes in a tile. x, y: q0, k0, or for a tile on its side k0, q0."""
    S = tl.maximum(tl.dot(x, tl.trans(y)), 0.0)
    return tl.where((0 < j) & (j < i), S, 0.0)


@triton.jit
def S_and_F_of(x, y, C, factor, i, j, axis):
    """S and F of a tile, F infinite in the future. C: at its first row; axis: along the rows."""
    S = S_of(x, y, i, j)
    above = tl.cumsum(S, axis) - S
    return S, tl.where(j <= i, factor * (tl.load(C + j) + above), float('inf'))


@triton.jit
def dF_of_M(F, dM, tau, D):
    """What the gradient of M takes from that of F: M counts min(F, tau) / tau.

    dM: pointers to those of its rows.
    """
    return tl.where(F * D**-0.5 <= tau, tl.load(dM) / tau, 0.0)


@triton.jit
def softmax_backward(x, y, dx, dy, F, lse, delta, D):
    """P and dL of a tile. x, y, dx, dy: q, k, dy, v of a head; for one on its side k, q, v, dy.

    lse, delta: pointers to those of its rows.
    """
    L = tl.dot(x, tl.trans(y)) - F
    P = tl.exp2(L * (LOG2E * D**-0.5) - tl.load(lse))
    dP = tl.dot(dx, tl.trans(dy))
    return P, P * (dP - tl.load(delta))


# --------------------------------------------------------------------------------------------------
# The kernels. A program has its row block n with rows i, its column block m with columns j, or
# both. `voter` and `head` are the numbers of the first rows of head 0 and of its own head.


@triton.jit
def votes_kernel(q, k, C, H, T, D: tl.constexpr, R: tl.constexpr, N: tl.constexpr):
    """C[n+1,j] = sum of S[i,j] over the rows i of block n; one program for each tile."""
    n, m, b = program()
    if m * N >= (n + 1) * R:
        return  # all future
    voter = b * H * T
    i = block(n, R)
    j = block(m, N)
    q0 = load(q, voter + i, D)
    k0 = load(k, voter + j, D)
    S = S_of(q0, k0, i[:, None], j[None, :])
    tl.store(boundary(C, b, n + 1, T) + j, tl.sum(S, 0))


@triton.jit
def forward_kernel(
    q, k, v, C, scale, lists, counts, y, lse, M, tau, H, T,
    D: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """y of a row block, and log2 of its softmax's denominator; M where tau is given."""
    n, h, b = program()
    n = tl.num_programs(0) - 1 - n  # the longest rows first
    voter = b * H * T
    head = voter + h * T
    i = block(n, R)
    q0 = load(q, voter + i, D)
    qh = load(q, head + i, D)
    C = boundary(C, b, n * (R // G), T)
    place = b * tl.num_programs(0) + n
    lists += place * T
    count = tl.load(counts + place)
    factor = tl.load(scale)
    unit = LOG2E * D**-0.5
    # the largest logit so far, and what depends on it
    top = tl.full([R], float('-inf'), tl.float32)
    total = tl.zeros_like(top)
    acc = tl.zeros([R, D], tl.float32)
    masked = tl.zeros_like(top)
    for m in range(count):
        j = tl.load(lists + block(m, N))
        k0 = load(k, voter + j, D)
        _, F = S_and_F_of(q0, k0, C, factor, i[:, None], j[None, :], 0)  # (R, N)
        if tau is not None:
            masked += tl.sum(tl.minimum(F * D**-0.5, tau), 1)
        kh = load(k, head + j, D)
        vh = load(v, head + j, D)
        L = tl.dot(qh, tl.trans(kh)) - F
        new_top = tl.maximum(top, tl.max(L, 1) * unit)  # finite: each row sees the first column
        P = tl.exp2(L * unit - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(P, 1)
        acc = tl.dot(P.to(vh.dtype), vh, acc * shrink[:, None])
        top = new_top
    tl.store(at(y, head + i, D), acc / total[:, None])
    tl.store(lse + head + i, top + tl.log2(total))
    if tau is not None:
        # A row sees i + 1 columns. Those without a tile have tau, as in a tile those of the future.
        tl.store(M + b * T + i, count * N - 1 - masked / tau)  # the same from each head


@triton.jit
def columns_kernel(
    q, k, v, dy, C, scale, lse, delta, dM, tau, order, ends, dC, dk, dv, H, T,
    D: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dk and dv of a column block; to dC[n] it adds the column sums of dF.

    Its tiles lie on their sides, so that products with them add up to rows of dk and dv.
    """
    m, h, b = program()
    voter = b * H * T
    head = voter + h * T
    j = tl.load(order + b * T + block(m, N))
    first = tl.min(j, 0) // R
    end = tl.max(tl.load(ends + b * T + j), 0)
    k0 = load(k, voter + j, D)
    kh = load(k, head + j, D)
    vh = load(v, head + j, D)
    factor = tl.load(scale)
    dkh = tl.zeros([N, D], tl.float32)
    dvh = tl.zeros_like(dkh)
    for n in range(first, end):
        i = block(n, R)
        q0 = load(q, voter + i, D)
        qh = load(q, head + i, D)
        rows = i[None, :]
        _, F = S_and_F_of(k0, q0, boundary(C, b, n, T), factor, rows, j[:, None], 1)  # (N, R)
        dyh = load(dy, head + i, D)  # here it leaves registers free above
        P, dL = softmax_backward(kh, qh, vh, dyh, F, lse + head + rows, delta + head + rows, D)
        dvh = tl.dot(P.to(dyh.dtype), dyh, dvh)
        dkh = tl.dot(dL.to(qh.dtype), qh, dkh)
        if tau is not None and h == 0:  # M belongs to no head
            dL += dF_of_M(F, dM + b * T + rows, tau, D)
        add(boundary(dC, b, n, T) + j, -tl.sum(dL, 1))
    tl.store(at(dk, head + j, D), dkh * D**-0.5)
    tl.store(at(dv, head + j, D), dvh)


@triton.jit
def tile_kernel(
    q, k, v, dy, C, scale, lse, delta, dM, tau, lists, counts, dC, dq, dk0, dscale, H, T,
    D: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The share of a tile (R, N) in dq, and by its votes in dk0 and dscale."""
    n, m, b = program()
    place = b * tl.num_programs(0) + n
    if m >= tl.load(counts + place):
        return
    voter = b * H * T
    i = block(n, R)
    j = tl.load(lists + place * T + block(m, N))
    q0 = load(q, voter + i, D)
    k0 = load(k, voter + j, D)
    factor = tl.load(scale)
    rows = i[:, None]
    above = n * (R // G)
    S, F = S_and_F_of(q0, k0, boundary(C, b, above, T), factor, rows, j[None, :], 0)  # (R, N)
    dF = tl.zeros_like(F)
    for h in range(H):
        head = voter + h * T
        qh = load(q, head + i, D)
        kh = load(k, head + j, D)
        vh = load(v, head + j, D)
        dyh = load(dy, head + i, D)
        _, dL = softmax_backward(qh, kh, dyh, vh, F, lse + head + rows, delta + head + rows, D)
        dF -= dL
        dqh = tl.dot((dL * D**-0.5).to(kh.dtype), kh)
        add(at(dq, head + i, D), dqh)
    if tau is not None:
        dF -= dF_of_M(F, dM + b * T + rows, tau, D)
    from_below = tl.load(boundary(dC, b, above + R // G, T) + j)[None, :]
    dS = from_below + tl.cumsum(dF, 0, reverse=True) - dF
    add(dscale, tl.sum(dS * S) * D**-0.5)
    dL0 = tl.where(S > 0, dS * (factor * D**-0.5), 0.0).to(q0.dtype)
    add(at(dq, voter + i, D), tl.dot(dL0, k0))
    add(at(dk0, b * T + j, D), tl.dot(tl.trans(dL0), q0))


# --------------------------------------------------------------------------------------------------
# What torch sees: two operators, opaque to torch.compile, of contiguous q, k and v whose T is a
# multiple of LONGEST


def selective_attention(q, k, v, rule, dropout=0.0, memory_tau=None):
    """As `model.selective_attention`: q, k, v (B, H, T, D) -> y (B, H, T, D), M (B, T) or None.

    rule: the layer, of which these kernels read vote_scale alone. They have no dropout.
    """
    assert not dropout, 'kernels.load leaves dropout to model.py'
    scale = rule.vote_scale
    if scale is None:
        scale = torch.ones((), device=q.device)
    T = q.size(2)
    # rows of zeros at the end see tokens and mask none
    padded = [fn.pad(x, (0, 0, 0, -T % LONGEST)).contiguous() for x in (q, k, v)]
    y, M, *_ = attention(*padded, scale.float(), memory_tau)
    if memory_tau is None:
        return y[:, :, :T], None
    return y[:, :, :T], M[:, :T]


def tiles(D, dtype):
    """{kernel: (R, N)}: sizes whose loops stay in registers on sm_80 and sm_90."""
    width = D * dtype.itemsize  # bytes of a row of q
    R = 64
    N = 64
    if width > 128:
        R = 32
    if width > 256:
        N = 32
    return {
        votes_kernel: (ROWS, 64),
        forward_kernel: (2 * R, 32),
        columns_kernel: (ROWS, N),
        tile_kernel: (R, N),
    }


def launch(kernel, x, y, q, *args):
    """Run a kernel on q's device: a program for each of x, each of y and each sequence."""
    B, H, T, D = q.shape
    R, N = tiles(D, q.dtype)[kernel]
    programs = {'rows': T // R, 'columns': T // N, 'heads': H}
    stages = 4 // q.itemsize  # so that tiles fit into shared memory
    with torch.cuda.device_of(q):
        kernel[programs[x], programs[y], B](q, *args, H, T, D=D, R=R, N=N, num_stages=stages)


def blocks_alive(q, k, C, scale, tau):
    """How many blocks of G rows, from the first on, see each column, int32 (B, T).

    The column is dead from the next one on, by the bound of kernels/cpu.py.
    """
    T, D = q.shape[2:]
    F = C[:, :-1] * (scale * D**-0.5)  # (B, blocks, T)
    dead = scale >= 0  # of negative votes F may fall again
    if tau is not None:
        dead = dead & (F > tau)
    for k_norm, Q, less in bounds(q.float() * D**-0.5, k.float()).unbind(2):  # head by head
        reach = Q[:, ::ROWS, None] * k_norm[:, None] + less[:, ::ROWS, None]
        dead = dead & (reach - F < math.log(2**-24 / T))
    return (~dead).sum(dim=1, dtype=torch.int32)


def bounds(q, k):
    """|k|, and Q and -m as they hold from each row on, (3, B, H, T), from k, q/√D (B, H, T, D)."""
    keys = k, k.roll(1, dims=2), k[:, :, :1]  # the row's own, the one before, token 0's
    # not as products of matrices, which autocast and TF32 would round
    logits = torch.stack([(q * key).sum(dim=3) for key in keys])
    logits[1, :, :, :1] = -math.inf  # row 0 has none before
    logits[2, :, :, :2] = -math.inf  # of rows 0 and 1, token 0 is one of these
    rows = torch.stack([q.norm(dim=3), -logits.logsumexp(dim=0)])
    later = rows.flip(3).cummax(dim=3).values.flip(3)
    return torch.stack([k.norm(dim=3), *later])


def live_columns(alive, kernel, q):
    """For the kernel's blocks of rows, the columns in an order, and how many tiles they take.

    What is alive, or the block's own, leads the lists (B, blocks, T). The last tile is filled up
    with others, which are too weak to matter or in the future. The numbers are (B, blocks).
    """
    T, D = q.shape[2:]
    R, N = tiles(D, q.dtype)[kernel]
    n = torch.arange(0, T, R, device=alive.device)[:, None]  # the first row of each block
    past = torch.arange(T, device=alive.device) < n + R
    live = (alive[:, None] > n // ROWS) & past
    lists = (~live).byte().argsort(dim=2, stable=True)
    return lists.int(), (live.sum(dim=2, dtype=torch.int32) + N - 1) // N


@library.custom_op('selective::attention', mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, scale: Tensor, tau: float | None) -> list[Tensor]:
    """y, M (B, T), and for the backward lse (B, H, T), C (B, blocks + 1, T) and alive (B, T)."""
    y, M, lse, C, alive = attention_fake(q, k, v, scale, tau)
    launch(votes_kernel, 'rows', 'columns', q, k, C)
    C.cumsum_(1)
    alive = blocks_alive(q, k, C, scale, tau)
    lists = live_columns(alive, forward_kernel, q)
    launch(forward_kernel, 'rows', 'heads', q, k, v, C, scale, *lists, y, lse, M, tau)
    return [y, M, lse, C, alive]


@attention.register_fake
def attention_fake(q, k, v, scale, tau):
    B, H, T, _ = q.shape
    lse = q.new_zeros(B, H, T, dtype=torch.float32)
    M = lse.new_zeros(B, T)
    C = lse.new_zeros(B, T // ROWS + 1, T)
    return [torch.empty_like(q), M, lse, C, M.int()]


@library.custom_op('selective::attention_backward', mutates_args=())
def attention_backward(saved: list[Tensor], tau: float | None) -> list[Tensor]:
    """dq, dk, dv and the scalar dscale."""
    q, k, v, scale, y, _, lse, C, alive, dy, dM = saved
    dq, dk, dv, dscale = attention_backward_fake(saved, tau)
    delta = (y.float() * dy).sum(-1)  # (B, H, T) what the softmax's backward subtracts
    common = q, k, v, dy, C, scale, lse, delta, dM, tau
    dC = torch.zeros_like(C)
    order = alive.argsort(dim=1, stable=True).int()
    launch(columns_kernel, 'columns', 'heads', *common, order, alive, dC, dk, dv)
    dC = dC.flip(1).cumsum(1).flip(1)
    dq = torch.zeros_like(q, dtype=torch.float32)
    dk0 = torch.zeros_like(q[:, 0], dtype=torch.float32)
    lists = live_columns(alive, tile_kernel, q)
    launch(tile_kernel, 'rows', 'columns', *common, *lists, dC, dq, dk0, dscale)
    dk[:, 0] += dk0
    return [dq.to(q.dtype), dk, dv, dscale]


@attention_backward.register_fake
def attention_backward_fake(saved, tau):
    return [torch.zeros_like(x) for x in saved[:4]]


def setup_context(ctx, inputs, output):
    *tensors, ctx.tau = inputs
    ctx.save_for_backward(*tensors, *output)


def backward(ctx, grads):
    dy, dM, *_ = grads
    saved = [*ctx.saved_tensors, dy.contiguous(), dM.contiguous()]
    return *attention_backward(saved, ctx.tau), None


attention.register_autograd(backward, setup_context=setup_context)
