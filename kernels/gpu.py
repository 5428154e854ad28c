"""Selective attention on a GPU: flash attention that makes F as it goes, over live columns. model.py needs none of it.

What `model.selective_attention` computes, as Triton kernels over tiles of R rows (queries) by N columns (keys).
F[i,j] = sum of S[k,j] over k < i needs, inside a tile, only what the rows above it have summed up:

    C[n,j] = sum of S[k,j] over k < n*G             F at every G-th row: T^2/G numbers for all heads together
    F[i,j] = C[n,j] + sum of S[k,j] over n*G <= k < i               for a tile that begins at row n*G

so no T x T tensor is built, in the forward or in the backward. Four kernels, each a grid of independent programs:

    votes_kernel        the column sums of S in tiles of G rows; their running sum is C
    forward_kernel      flash attention over L - F; to make F, one product more a tile, q0 k0^T of head 0
    columns_kernel      dk and dv of a column block, and the column sums of dF in tiles of G rows
    tile_kernel         one tile, all heads: dq, and what the votes in it add to the gradients of head 0

From C and the bound of kernels/cpu.py follows until which block of G rows a column is alive. Row blocks walk over lists
of the columns that are alive at their first row, and their own; column blocks take columns that die at about the same
time, and end there. So tiles have columns j in any order, and every tile masks j > i.

The gradient of F runs the recurrence backwards, dS[k,j] = sum of dF[i,j] over i > k: what comes from below a tile is
dC[n,j] = sum of dF[i,j] over i >= n*G. The sums in dq, in dC and from votes in dk are atomics in float32, added in an
order that varies: two runs may differ in their last bits, as they may with torch's own flash attention.

Units: S, F and C are kept as sums of q0.k0 without the factor D^-0.5, and exponentials to base 2.
The votes are relu(L0), times the layer's vote_scale if it has one: other votes need kernels/cpu.py or model.py.
TRITON_INTERPRET=1, set before the start, runs all of this on a CPU, slowly: that is how the tests check the numbers.
"""
import math

import torch
import triton
import triton.language as tl
from torch import library

import model
from kernels.cpu import bounds

HEAD_SIZES = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = triton.knobs.runtime.interpret        # on a CPU; without bfloat16, whose products it gets wrong
LOG2E = tl.constexpr(1.4426950408889634)


# ----------------------------------------------------------------------------------------------------------------------
# Pieces of the kernels


@triton.jit
def load(x, strides, b, h, i, T, D: tl.constexpr, first=0):
    """The rows i of head h of x (B, H, T, D), as (len(i), D); zeros for rows before `first` and from T on."""
    i = i[:, None]
    offsets = b * strides[0] + h * strides[1] + i.to(tl.int64) * strides[2]
    return tl.load(x + offsets + tl.arange(0, D)[None, :], mask=(i >= first) & (i < T), other=0.0)


@triton.jit
def at(x, b, h, i, H, T, D: tl.constexpr):
    """Pointers to the rows i of head h of x, one that `like` made."""
    return x + ((b * T + i[:, None]) * H + h) * D + tl.arange(0, D)[None, :]


@triton.jit
def rows_above(S):
    """For each row of S (R, N), the sum of the rows above it."""
    return tl.cumsum(S, 0) - S


@triton.jit
def columns_before(S):
    """rows_above of a tile that lies on its side (N, R)."""
    return tl.cumsum(S, 1) - S


# ----------------------------------------------------------------------------------------------------------------------
# The kernels. A program has its row block n with rows i, its column block m with columns j, or both


@triton.jit
def votes_kernel(q, k, q_strides, k_strides, C, T, D: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
                 PRECISION: tl.constexpr):
    """C[n+1,j] = sum of S[i,j] over the rows i of block n; one program for each tile."""
    n, m, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if m * N >= (n + 1) * R:
        return                                                  # all future
    i, j = n * R + tl.arange(0, R), m * N + tl.arange(0, N)
    q0 = load(q, q_strides, b, 0, i, T, D)
    k0 = load(k, k_strides, b, 0, j, T, D, first=1)             # a key of zeros: token 0 gets no votes
    S = tl.maximum(tl.dot(q0, tl.trans(k0), input_precision=PRECISION), 0.0)                    # (R, N)
    S = tl.where(j[None, :] < i[:, None], S, 0.0)
    tl.store(C + (b * (tl.num_programs(0) + 1) + n + 1) * T + j, tl.sum(S, 0), mask=j < T)


@triton.jit
def forward_kernel(q, k, v, q_strides, k_strides, v_strides, C, scale, lists, counts, y, lse, M, tau, H, T,
                   D: tl.constexpr, R: tl.constexpr, N: tl.constexpr, G: tl.constexpr, PRECISION: tl.constexpr,
                   MEMORY: tl.constexpr):
    """y of a row block, and the logarithm of its softmax's denominator; M where MEMORY is set."""
    n = tl.num_programs(0) - 1 - tl.program_id(0)               # the longest rows first
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    i = n * R + tl.arange(0, R)
    q0, qh = load(q, q_strides, b, 0, i, T, D), load(q, q_strides, b, h, i, T, D)
    C += (b * (tl.cdiv(T, G) + 1) + n * (R // G)) * T
    lists += (b * tl.num_programs(0) + n) * T
    count = tl.load(counts + b * tl.num_programs(0) + n)
    factor, unit = tl.load(scale), LOG2E * D**-0.5
    top = tl.full([R], float('-inf'), tl.float32)               # the largest logit so far, and what depends on it
    total = tl.zeros([R], tl.float32)
    acc = tl.zeros([R, D], tl.float32)
    masked = tl.zeros([R], tl.float32) + tau * (tl.minimum(n * R + R, T) - count)   # sum over j of min(F, tau)
    for a in range(0, count, N):
        slots = a + tl.arange(0, N)
        j = tl.load(lists + slots, mask=slots < count, other=T)
        k0 = load(k, k_strides, b, 0, j, T, D, first=1)
        S = tl.maximum(tl.dot(q0, tl.trans(k0), input_precision=PRECISION), 0.0)                # (R, N)
        S = tl.where(j[None, :] < i[:, None], S, 0.0)
        F = factor * (tl.load(C + j, mask=j < T, other=0.0)[None, :] + rows_above(S))
        if MEMORY:
            masked += tl.sum(tl.minimum(F * D**-0.5, tau), 1)
        F = tl.where(j[None, :] <= i[:, None], F, float('inf'))                                 # nobody sees the future
        kh, vh = load(k, k_strides, b, h, j, T, D), load(v, v_strides, b, h, j, T, D)
        L = tl.dot(qh, tl.trans(kh), input_precision=PRECISION) - F
        new_top = tl.maximum(tl.maximum(top, tl.max(L, 1) * unit), -1e30)                       # -inf - -inf is nan
        P = tl.exp2(L * unit - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(P, 1)
        acc = tl.dot(P.to(vh.dtype), vh, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    tl.store(at(y, b, h, i, H, T, D), (acc / total[:, None]).to(y.dtype.element_ty), mask=i[:, None] < T)
    tl.store(lse + (b * H + h) * T + i, top + tl.log2(total), mask=i < T)
    if MEMORY:
        tl.store(M + b * T + i, i - masked / tau, mask=(i < T) & (h == 0))


@triton.jit
def columns_kernel(q, k, v, dy, q_strides, k_strides, v_strides, dy_strides, C, scale, lse, delta, dM, tau,
                   order, ends, dC, dk, dv, H, T, D: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
                   PRECISION: tl.constexpr, MEMORY: tl.constexpr):
    """dk and dv of a column block; to dC[n] it adds the column sums of dF. Tiles lie on their sides, (N, R)."""
    m, b, h = tl.program_id(0), (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    slots = m * N + tl.arange(0, N)
    j = tl.load(order + b * T + slots, mask=slots < T, other=T)
    first, end = tl.min(j, 0) // R, tl.max(tl.load(ends + b * T + j, mask=j < T, other=0), 0)
    k0 = load(k, k_strides, b, 0, j, T, D, first=1)
    kh, vh = load(k, k_strides, b, h, j, T, D), load(v, v_strides, b, h, j, T, D)
    blocks = tl.cdiv(T, R)
    factor, unit = tl.load(scale), LOG2E * D**-0.5
    dkh, dvh = tl.zeros([N, D], tl.float32), tl.zeros([N, D], tl.float32)
    for n in range(first, end):
        i = n * R + tl.arange(0, R)
        row = (b * H + h) * T + i
        q0, qh = load(q, q_strides, b, 0, i, T, D), load(q, q_strides, b, h, i, T, D)
        S = tl.maximum(tl.dot(k0, tl.trans(q0), input_precision=PRECISION), 0.0)                # (N, R)
        S = tl.where(j[:, None] < i[None, :], S, 0.0)
        F = tl.load(C + (b * (blocks + 1) + n) * T + j, mask=j < T, other=0.0)[:, None] + columns_before(S)
        F = tl.where(j[:, None] <= i[None, :], factor * F, float('inf'))
        L = tl.dot(kh, tl.trans(qh), input_precision=PRECISION) - F
        P = tl.exp2(L * unit - tl.load(lse + row, mask=i < T, other=float('inf'))[None, :])
        dyh = load(dy, dy_strides, b, h, i, T, D)
        dvh = tl.dot(P.to(dyh.dtype), dyh, dvh, input_precision=PRECISION)
        dP = tl.dot(vh, tl.trans(dyh), input_precision=PRECISION)
        dL = P * (dP - tl.load(delta + row, mask=i < T, other=0.0)[None, :])
        dkh = tl.dot(dL.to(qh.dtype), qh, dkh, input_precision=PRECISION)
        if MEMORY:                                              # dM belongs to no head: head 0 adds it
            dM_rows = tl.load(dM + b * T + i, mask=(i < T) & (h == 0), other=0.0)[None, :]
            dL += tl.where(F * D**-0.5 <= tau, dM_rows / tau, 0.0)
        tl.atomic_add(dC + (b * (blocks + 1) + n) * T + j, -tl.sum(dL, 1), mask=j < T, sem='relaxed')
    tl.store(at(dk, b, h, j, H, T, D), (dkh * D**-0.5).to(dk.dtype.element_ty), mask=j[:, None] < T)
    tl.store(at(dv, b, h, j, H, T, D), dvh.to(dv.dtype.element_ty), mask=j[:, None] < T)


@triton.jit
def tile_kernel(q, k, v, dy, q_strides, k_strides, v_strides, dy_strides, C, scale, lse, delta, dM, tau,
                lists, counts, dC, dq, dk0, dscale, H, T, D: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
                G: tl.constexpr, PRECISION: tl.constexpr, MEMORY: tl.constexpr):
    """The share of a tile (R, N) in dq, and by its votes in dk0 and dscale."""
    n, m, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    count = tl.load(counts + b * tl.num_programs(0) + n)
    if m * N >= count:
        return
    i, slots = n * R + tl.arange(0, R), m * N + tl.arange(0, N)
    j = tl.load(lists + (b * tl.num_programs(0) + n) * T + slots, mask=slots < count, other=T)
    factor, unit = tl.load(scale), LOG2E * D**-0.5
    q0, k0 = load(q, q_strides, b, 0, i, T, D), load(k, k_strides, b, 0, j, T, D, first=1)
    S = tl.maximum(tl.dot(q0, tl.trans(k0), input_precision=PRECISION), 0.0)                    # (R, N)
    S = tl.where(j[None, :] < i[:, None], S, 0.0)
    blocks, block = tl.cdiv(T, G), n * (R // G)                 # of G rows: all, and before this tile
    F = tl.load(C + (b * (blocks + 1) + block) * T + j, mask=j < T, other=0.0)[None, :] + rows_above(S)
    F = tl.where(j[None, :] <= i[:, None], factor * F, float('inf'))
    dF = tl.zeros([R, N], tl.float32)
    for h in range(H):
        row = (b * H + h) * T + i
        qh, kh = load(q, q_strides, b, h, i, T, D), load(k, k_strides, b, h, j, T, D)
        L = tl.dot(qh, tl.trans(kh), input_precision=PRECISION) - F
        P = tl.exp2(L * unit - tl.load(lse + row, mask=i < T, other=float('inf'))[:, None])
        vh, dyh = load(v, v_strides, b, h, j, T, D), load(dy, dy_strides, b, h, i, T, D)
        dP = tl.dot(dyh, tl.trans(vh), input_precision=PRECISION)
        dL = P * (dP - tl.load(delta + row, mask=i < T, other=0.0)[:, None])
        dF -= dL
        dqh = tl.dot((dL * D**-0.5).to(kh.dtype), kh, input_precision=PRECISION)
        tl.atomic_add(at(dq, b, h, i, H, T, D), dqh, mask=i[:, None] < T, sem='relaxed')
    if MEMORY:
        dM_rows = tl.load(dM + b * T + i, mask=i < T, other=0.0)[:, None]
        dF -= tl.where(F * D**-0.5 <= tau, dM_rows / tau, 0.0)
    block = tl.minimum(block + R // G, blocks)
    from_below = tl.load(dC + (b * (blocks + 1) + block) * T + j, mask=j < T, other=0.0)[None, :]
    dS = from_below + tl.sum(dF, 0)[None, :] - tl.cumsum(dF, 0)
    tl.atomic_add(dscale, tl.sum(dS * S) * D**-0.5, sem='relaxed')
    dL0 = tl.where(S > 0, dS * (factor * D**-0.5), 0.0).to(q0.dtype)
    dq0, dk0_tile = tl.dot(dL0, k0, input_precision=PRECISION), tl.dot(tl.trans(dL0), q0, input_precision=PRECISION)
    tl.atomic_add(at(dq, b, 0, i, H, T, D), dq0, mask=i[:, None] < T, sem='relaxed')
    tl.atomic_add(at(dk0, b, 0, j, 1, T, D), dk0_tile, mask=j[:, None] < T, sem='relaxed')


# ----------------------------------------------------------------------------------------------------------------------
# What torch sees: two operators, opaque to torch.compile

G = 32      # rows from one boundary to the next; R is a multiple of it


def tiles(D, dtype):
    """R and N of each kernel, and how it runs: sizes whose loops stay in registers on sm_80 and sm_90."""
    run = dict(num_warps=4, num_stages=2 if dtype != torch.float32 else 1)
    width = D * dtype.itemsize                                  # bytes of a row of q
    N = 64 if width <= 256 else 32
    return {votes_kernel: dict(R=G, N=64, **run),
            forward_kernel: dict(R=128 if width <= 128 else 64, N=32, **run),
            columns_kernel: dict(R=G, N=N, **run),
            tile_kernel: dict(R=64 if width <= 128 else 32, N=N, **run)}


def launch(kernel, grid, q, *args, **settings):
    """Run a kernel on q's device; grid(R, N): how many programs."""
    tile = tiles(q.size(3), q.dtype)[kernel]
    # float32 goes through tensor cores where torch's own products may, else it is slow; bfloat16 and float16 always do
    precision = 'ieee' if torch.get_float32_matmul_precision() == 'highest' else 'tf32'
    with torch.cuda.device_of(q):
        kernel[grid(tile['R'], tile['N'])](q, *args, D=q.size(3), PRECISION=precision, **tile, **settings)


def selective_attention(q, k, v, vote, dropout=0.0, memory_tau=None):
    """As `model.selective_attention`: q, k, v (B, H, T, D) -> y (B, H, T, D), M (B, T) or None.

    vote: a layer's method; of its rule these kernels know relu and vote_scale. Dropout is left to model.py.
    """
    if dropout:
        return model.selective_attention(q, k, v, vote, dropout, memory_tau)
    y, M, *_ = attention(q, k, v, getattr(vote.__self__, 'vote_scale', None), memory_tau)
    return y, M if memory_tau is not None else None


def blocks_alive(q, k, C, scale, tau):
    """How many blocks of G rows, from the first on, see each column: it is dead from the next one on. int32 (B, T)."""
    D, T, blocks = q.size(3), q.size(2), C.size(1) - 1
    k_norm, Q, m = bounds(q.float() * D**-0.5, k.float())                       # (B, H, T)
    F = C[:, :-1] * (scale * D**-0.5)                                           # (B, blocks, T)
    reach = torch.full_like(F, -math.inf)
    for h in range(q.size(1)):
        torch.maximum(reach, Q[:, h, ::G, None] * k_norm[:, h, None] - m[:, h, ::G, None], out=reach)
    dead = (reach - F < math.log(2**-24 / T)) & (scale >= 0)                    # of negative votes F may fall again
    if tau is not None:
        dead &= F > tau
    return blocks - dead.sum(dim=1, dtype=torch.int32)


def live_columns(alive, R):
    """Lists for row blocks of R rows: columns that are alive or their own (B, blocks, T), and how many (B, blocks)."""
    T = alive.size(1)
    n = torch.arange(0, T, R, device=alive.device)[:, None]                     # the first row of each block
    live = (alive[:, None] > n // G) & (torch.arange(T, device=alive.device) < n + R)
    return (~live).byte().argsort(dim=2, stable=True).int(), live.sum(dim=2, dtype=torch.int32)


def like(x, dtype=None):
    """An empty (B, H, T, D) that lies in memory as (B, T, H, D): the heads side by side, as the model wants them."""
    B, H, T, D = x.shape
    return x.new_empty(B, T, H, D, dtype=dtype).transpose(1, 2)


def with_strides(*tensors):
    """The tensors, their last dimension in one piece, and then the other strides of each."""
    tensors = [x if x.stride(3) == 1 else x.contiguous() for x in tensors]
    return *tensors, *(x.stride()[:3] for x in tensors)


def scalar(scale, q):
    return torch.ones((), device=q.device) if scale is None else scale.float()


@library.custom_op('selective::attention', mutates_args=())
def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: torch.Tensor | None, tau: float | None
              ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, M (empty without tau), and for the backward lse (B, H, T), C (B, blocks + 1, T) and alive (B, T)."""
    B, H, T, D = q.shape
    y, M, lse, C, _ = attention_fake(q, k, v, scale, tau)
    q, k, v, *strides = with_strides(q, k, v)
    launch(votes_kernel, lambda R, N: (triton.cdiv(T, R), triton.cdiv(T, N), B), q, k, *strides[:2], C.zero_(), T)
    C.cumsum_(1)
    alive = blocks_alive(q, k, C, scalar(scale, q), tau)
    lists = live_columns(alive, tiles(D, q.dtype)[forward_kernel]['R'])
    launch(forward_kernel, lambda R, N: (triton.cdiv(T, R), B * H), q, k, v, *strides, C, scalar(scale, q), *lists,
           y, lse, M, tau or 1.0, H, T, G=G, MEMORY=tau is not None)
    return y, M, lse, C, alive


@attention.register_fake
def attention_fake(q, k, v, scale, tau):
    (B, H, T, D), f = q.shape, dict(dtype=torch.float32)
    return (like(q), q.new_empty(B, T if tau is not None else 0, **f), q.new_empty(B, H, T, **f),
            q.new_empty(B, (T + G - 1) // G + 1, T, **f), q.new_empty(B, T, dtype=torch.int32))


@library.custom_op('selective::attention_backward', mutates_args=())
def attention_backward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: torch.Tensor | None,
                       tau: float | None, y: torch.Tensor, lse: torch.Tensor, C: torch.Tensor, alive: torch.Tensor,
                       dy: torch.Tensor, dM: torch.Tensor | None
                       ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv and the scalar dscale."""
    B, H, T, D = q.shape
    _, dk, dv, dscale = attention_backward_fake(q, k, v, scale, tau, y, lse, C, alive, dy, dM)
    delta = (y.float() * dy).sum(-1).contiguous()               # (B, H, T) what the softmax's backward subtracts
    memory = tau is not None and dM is not None
    q, k, v, dy, *strides = with_strides(q, k, v, dy)
    args = (q, k, v, dy, *strides, C, scalar(scale, q), lse, delta, dM.contiguous() if memory else lse, tau or 1.0)
    dC = torch.zeros_like(C)
    order = alive.argsort(dim=1, stable=True).int()
    launch(columns_kernel, lambda R, N: (triton.cdiv(T, N), B * H), *args, order, alive, dC, dk, dv, H, T,
           MEMORY=memory)
    dC = dC.flip(1).cumsum(1).flip(1)
    dq, dk0 = like(q, torch.float32).zero_(), torch.zeros(B, T, D, device=q.device)
    lists = live_columns(alive, tiles(D, q.dtype)[tile_kernel]['R'])
    launch(tile_kernel, lambda R, N: (triton.cdiv(T, R), triton.cdiv(T, N), B), *args, *lists, dC, dq, dk0,
           dscale.zero_(), H, T, G=G, MEMORY=memory)
    dk[:, 0] += dk0
    return dq.to(q.dtype), dk, dv, dscale


@attention_backward.register_fake
def attention_backward_fake(q, k, v, scale, tau, y, lse, C, alive, dy, dM):
    return like(q), like(k), like(v), lse.new_empty(())


def setup_context(ctx, inputs, output):
    q, k, v, scale, ctx.tau = inputs
    y, _, *rest = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, scale, y, *rest)


def backward(ctx, dy, dM, *_):
    q, k, v, scale, y, *rest = ctx.saved_tensors
    dy = torch.zeros_like(y) if dy is None else dy
    dq, dk, dv, dscale = attention_backward(q, k, v, scale, ctx.tau, y, *rest, dy, dM)
    return dq, dk, dv, dscale.to(scale.dtype) if scale is not None else None, None


attention.register_autograd(backward, setup_context=setup_context)
