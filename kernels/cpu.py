"""Selective attention on a CPU: what is masked is not paid for. model.py is complete without it.

It computes what `model.selective_attention` computes, forward and backward, but skips what no later
row can see. While no vote is negative, F only grows. A row is never masked from itself, from the
token before it or from token 0, so these bound the denominator of its softmax from below:

    l[h,i]   = log( sum of exp L[h,i,j] over j in {0, i-1, i} )
    P[h,i,j] ≤ exp( |q[h,i]| |k[h,j]| / √D − F[i,j] − l[h,i] )          by Cauchy and Schwarz

Let Q[h] be the largest |q[h,i]|/√D and m[h] the smallest l[h,i] of the rows i from b on. From there
column j is dead if

    Q[h] |k[h,j]| − m[h] − F[b,j] < log(ε/T)        for every head h, ε being half the rounding of 1

so that all dead columns together have less of a row than rounding takes. With memory_tau,
F[b,j] > memory_tau must hold, too: then M is exact and its gradient there is zero.

Blocks of rows walk down the sequence. Keys and values that a block looks at lie side by side, at
first … b: the live ones, then the block's own. After a block, if an eighth of them is dead, the
live ones are packed against b. The backward walks up again and undoes each packing there.

    before   0 1 2 3 4 5 6 7 | 8 9 …        first = 0, b = 8; 1, 2, 4 and 6 are dead
    after            0 3 5 7 | 8 9 …        first = 4

Every sequence of a batch has its own list of columns. All are as long as the longest, the others
filled up with dead columns.
"""

import math

import torch
import torch.nn.functional as fn

import model

DEVICES = ('cpu',)
DTYPES = (torch.float32, torch.float64)
HEAD_SIZES = range(1, 2**16)
BLOCK = 64  # rows of a block
TOGETHER = 2**19  # so many logits of a block are computed together: short sequences side by side
TINY = 1e-30  # a smaller P is 0: far below rounding, and products of denormal numbers are slow


def selective_attention(q, k, v, rule, dropout=0.0, memory_tau=None):
    """As `model.selective_attention`: q, k, v (B, H, T, D) -> y (B, H, T, D), M (B, T) or None.

    rule: the layer. F is the running sum of rule.vote, logits of head 0 (B, R, N) -> votes, each a
    function of its own logit and of column 0, token 0. Its derivative, and that of the layer's
    parameters that it reads, come from autograd. If a vote is negative, nothing is skipped.
    Dropout, and other types than float32 and float64, are left to model.py.
    """
    if dropout or q.dtype not in DTYPES:
        return model.selective_attention(q, k, v, rule, dropout, memory_tau)
    N = min(512, q.size(2))  # long sequences soon have few columns left
    together = max(1, TOGETHER // (q.size(1) * BLOCK * N))  # sequences of a part
    parameters = [p for p in rule.parameters() if p.requires_grad]
    found = []
    parts = list(zip(q.split(together), k.split(together), v.split(together)))
    for part in reversed(parts):  # so autograd begins with the first
        found.append(_SelectiveAttention.apply(*part, rule, memory_tau, *parameters))
    ys, Ms = zip(*reversed(found))
    if memory_tau is None:
        return torch.cat(ys), None
    return torch.cat(ys), torch.cat(Ms)


# pairs of a row and a column: those computed, and those up to each block's last row
live = [0, 0]


def live_share():
    """The share of pairs (row, column) that was computed since the last call.

    Columns that provably no later row can see are dropped; without that it would be 1. None if
    nothing ran.
    """
    computed, total = live
    live[:] = 0, 0
    if total:
        return computed / total


class _SelectiveAttention(torch.autograd.Function):
    """A part of the batch; parameters: those that the votes may depend on."""

    @staticmethod
    def forward(ctx, q, k, v, rule, tau, *parameters):
        ctx.save_for_backward(q, k, v, *parameters)
        ctx.rule = rule
        ctx.tau = tau
        y, M, ctx.blocks = _forward(q, k, v, rule, tau, not _can_be_negative(rule, q, k))
        return y, M

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dM):
        q, k, v, *parameters = ctx.saved_tensors
        B, H, T, D = q.shape
        q_heads, kv = _heads(q, k, v)
        dy_heads = dy.contiguous().flatten(0, 1)
        packed = torch.empty_like(kv)
        dq = torch.empty_like(q_heads)
        dkv = kv.new_zeros(len(kv), D, T)  # packed, and transposed: products with P are faster so
        # G[j] = sum of dF[i,j] over the rows i of later blocks: the recurrence of F, run backwards
        G = q.new_zeros(B, T)
        dparameters = {}
        for a, b, columns, F, keep in reversed(ctx.blocks):
            rows = slice(a, b)
            listed = slice(b - columns.size(1), b)
            if b == T or keep is not None:
                packed[:, listed] = _take(kv, columns)
            dkv_live = dkv[:, :, listed]  # (2*B*H, D, N)
            if keep is not None:
                after = dkv_live[:, :, -keep.size(1) :].clone()
                places = _for_heads(keep, len(kv))[:, None].expand(after.shape)
                dkv_live.zero_().scatter_(2, places, after)
            k_live, v_live = packed[:, listed].chunk(2)  # (B*H, N, D)
            dk_live, dv_live = dkv_live.chunk(2)  # (B*H, D, N)
            q_rows = q_heads[:, rows]
            dy_rows = dy_heads[:, rows]
            P, F_rows, votes, L0 = _probabilities(q_rows, k_live, F, ctx.rule, grad=True)
            dP = torch.bmm(dy_rows, v_live.mT)  # (B*H, R, N)
            dL = torch._softmax_backward_data(dP, P, -1, P.dtype, grad_input=dP)  # in its place
            dL_heads = dL.unflatten(0, (B, H))
            dF = -dL_heads.sum(dim=1)  # (B, R, N)
            if ctx.tau is not None:
                dF -= (F_rows[:, :-1] <= ctx.tau) * (dM[:, rows, None] / ctx.tau)
            # dS[k,j] = sum of dF[i,j] over i > k; before the first row, the sum of all
            sums = _sums(dF).flip(1, 2)
            dS = torch.baddbmm(G.gather(1, columns)[:, None], sums, dF)  # (B, R+1, N)
            G.scatter_(1, columns, dS[:, 0])
            if votes.requires_grad:
                inputs = [L0, *parameters]
                dS = _that_count(dS[:, 1:])
                # the graph is retained, as that of a factor that is no leaf serves all blocks
                dL0, *grads = torch.autograd.grad(
                    votes, inputs, dS, retain_graph=True, allow_unused=True
                )
                if dL0 is not None:
                    dL_heads[:, 0] += dL0
                for p, grad in zip(parameters, grads):
                    if grad is not None:
                        dparameters[p] = dparameters.get(p, 0) + grad
            dq[:, rows] = torch.bmm(dL, k_live)
            dk_live += torch.bmm(q_rows.mT, dL)
            dv_live += torch.bmm(dy_rows.mT, P)
        dq *= D**-0.5
        dk, dv = dkv.mT.unflatten(0, (2, B, H))
        return dq.view(q.shape), dk, dv, None, None, *map(dparameters.get, parameters)


def _forward(q, k, v, rule, tau, skip):
    """y (B, H, T, D), M (B, T) if tau is given, and the blocks for the backward.

    A block is a, b: its rows; columns (B, N): those it looks at; F (B, N): of these, as it enters;
    and keep (B, n): which of them were packed after the block, None where that was not worth it.
    """
    B, _, T, _ = q.shape
    q_heads, kv = _heads(q, k, v)  # kv is to be packed
    y = torch.empty_like(q_heads)
    M = q.new_empty(B, T)
    F = q.new_zeros(B, T)
    columns = torch.empty(B, 0, dtype=torch.long)
    log_eps = math.log(torch.finfo(q.dtype).eps / 2 / T)
    limits = None
    blocks = []
    for a in range(0, T, BLOCK):
        b = min(a + BLOCK, T)
        i = torch.arange(a, b)
        columns = torch.cat([columns, i.expand(B, -1)], dim=1)  # (B, N)
        first = b - columns.size(1)
        k_live, v_live = kv[:, first:b].chunk(2)  # (B*H, N, D)
        F_in = F.gather(1, columns)
        P, F_rows, votes, _ = _probabilities(q_heads[:, a:b], k_live, F_in, rule)
        if skip and votes.amin() < 0:
            return _forward(q, k, v, rule, tau, skip=False)
        y[:, a:b] = torch.bmm(P, v_live)
        if tau is not None:
            masked = F_rows[:, :-1].clamp(max=tau).sum(dim=2)  # (B, R)
            M[:, a:b] = i - first - masked / tau  # each of the `first` that are gone counts as 1
        F_out = F_rows[:, -1]
        F.scatter_(1, columns, F_out)
        live[0] += votes.numel()
        live[1] += B * len(i) * b
        keep = None
        if skip and b < T and F_out.amax() > -log_eps:  # before that, nothing dies by votes
            limits = limits or bounds(q_heads.view(q.shape), k)
            keep = _live_columns(b, columns, F_out, limits, log_eps, tau)
        blocks.append((a, b, columns, F_in, keep))
        if keep is not None:
            columns = columns.gather(1, keep)
            kv[:, b - columns.size(1) : b] = _take(kv, first + keep)
    return y.view(q.shape), M, blocks


def _live_columns(b, columns, F, limits, log_eps, tau):
    """Which columns to keep from row b on: places (B, n) in the list (B, N). None: few are dead."""
    k_norm, Q, m = limits
    k_norm = k_norm.take_along_dim(columns[:, None], 2)  # (B, H, N)
    reach = Q[:, :, b, None] * k_norm - m[:, :, b, None]
    dead = reach.amax(dim=1) - F < log_eps  # (B, N)
    if tau is not None:
        dead &= F > tau
    dead[:, 0] = False  # token 0 stays column 0 of what votes see
    n = int((~dead).sum(dim=1).max())  # the longest list
    if n > 7 / 8 * columns.size(1):
        return None
    # the live ones first, in their order
    return dead.byte().argsort(dim=1, stable=True)[:, :n]


def _probabilities(q, k, F, rule, grad=False):
    """A block of rows: q (B*H, R, D) scaled, k (B*H, N, D), F (B, N) as it enters the block.

    The last R columns are the rows' own. Returns P (B*H, R, N); F (B, R+1, N) of each row and of
    the row after the block; all votes (B, R, N), and head 0's logits, with a graph if grad is set.
    """
    R = q.size(1)
    P = torch.bmm(q, k.mT)  # as yet the logits
    L = P.unflatten(0, (len(F), -1))  # (B, H, R, N), the same memory
    L0 = L[:, 0].clone().requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        votes = rule.vote(L0)
    S = _that_count(votes.detach())
    F_rows = torch.baddbmm(F[:, None], _sums(S), S)
    L -= F_rows[:, None, :-1]
    future = torch.full((R, R), -math.inf, dtype=L.dtype)
    L[..., -R:] += future.triu_(1)
    torch.softmax(P, dim=-1, out=P)
    fn.threshold_(P, TINY, 0.0)
    return P, F_rows, votes, L0


def _that_count(S):
    """A copy of S (B, R, N) with zeros where a row has no vote: on token 0, itself, the future."""
    S = S.clone()
    S[:, :, 0] = 0
    S[:, :, -S.size(1) :].tril_(-1)
    return S


def _sums(S):
    """(B, R+1, R): times S (B, R, N), for each row the sum of those above it, and last of all."""
    B, R, _ = S.shape
    return S.new_ones(R + 1, R).tril_(-1).expand(B, -1, -1)


def _heads(q, k, v):
    """q/√D (B*H, T, D); k, then v (2*B*H, T, D)."""
    q = q * q.size(3) ** -0.5
    return q.flatten(0, 1), torch.cat([k, v]).flatten(0, 1)


def _take(kv, columns):
    """kv (2*B*H, T, D), columns (B, n) -> (2*B*H, n, D)."""
    X = len(kv)
    return kv[torch.arange(X)[:, None], _for_heads(columns, X)]


def _for_heads(columns, X):
    """Columns (B, n) of each sequence -> (X, n), for keys, then values, of all its heads."""
    H = X // (2 * len(columns))
    return columns.repeat_interleave(H, dim=0).repeat(2, 1)


def bounds(q, k):
    """|k|, and Q and m as they hold from each row on, all (B, H, T), from k, q/√D (B, H, T, D)."""
    keys = k, k.roll(1, dims=2), k[:, :, :1]  # the row's own, the one before, token 0's
    # not as products of matrices, which autocast and TF32 would round
    logits = torch.stack([(q * key).sum(dim=3) for key in keys])
    logits[1, :, :, :1] = -math.inf  # row 0 has none before
    logits[2, :, :, :2] = -math.inf  # of rows 0 and 1, token 0 is one of these
    l = logits.logsumexp(dim=0)
    Q = q.norm(dim=3).flip(2).cummax(dim=2).values.flip(2)
    m = l.flip(2).cummin(dim=2).values.flip(2)
    return k.norm(dim=3), Q, m


def _can_be_negative(rule, q, k):
    """Whether a vote on a logit that these q and k can have is negative, by 1,000 examples.

    This cannot be left to the votes of the blocks, which are not computed where columns are dead.
    """
    largest = q[:, 0].norm(dim=2).max() * k[:, 0].norm(dim=2).max() * q.size(3) ** -0.5
    logits = torch.linspace(-largest, largest, 1001, dtype=q.dtype)
    votes = rule.vote(logits.repeat(len(q), 1, 1))
    return bool(votes.amin() < 0)
