"""Selective attention on a CPU: what is masked is not paid for. model.py is complete without this file.

Computes what `model.selective_attention` computes, forward and backward, but skips what no later row can see.
While no vote is negative, F only grows. A row is never masked from itself, from the token before it or from token 0, so
these bound the denominator of its softmax from below:

    l[h,i]   = log( sum of exp L[h,i,j] over j in {0, i-1, i} )
    P[h,i,j] ≤ exp( |q[h,i]| |k[h,j]| / √D − F[i,j] − l[h,i] )                          by Cauchy and Schwarz

Let Q[h] be the largest |q[h,i]|/√D and m[h] the smallest l[h,i] of the rows i from a on. From there column j is dead if

    Q[h] |k[h,j]| − m[h] − F[a,j] < log(ε/T)        for every head h, ε being half the rounding of 1

so that all dead columns together have less of a row than rounding takes. With memory_tau, F[a,j] > memory_tau must
hold, too: then M is exact and its gradient there is zero.

Blocks of rows walk down the sequence. The columns that block a … b looks at are the slice first … b of every array: the
live ones, packed against a, then the block's own. Nothing is moved while first = 0 and little has died; when an eighth
of the list is dead, it is packed. The backward walks up again and undoes each packing where the forward did it:

    before   0 1 2 3 4 5 6 7 | 8 9 …        first = 0, a = 8; 1, 2, 4 and 6 are dead
    after            0 3 5 7 | 8 9 …        first = 4

Every sequence of a batch has its own list. All are as long as the longest, the others filled up with dead columns.
"""
import math

import torch
import torch.nn.functional as fn

import model

BLOCK = 64              # rows of a block
TOGETHER = 2**19        # so many logits of a block are computed together: short sequences side by side
TINY = 1e-30            # a smaller P is 0: far below rounding, and products of denormal numbers are slow on a CPU


def selective_attention(q, k, v, vote, dropout=0.0, memory_tau=None):
    """As `model.selective_attention`: q, k, v (B, H, T, D) -> y (B, H, T, D), M (B, T) or None.

    vote: logits of head 0 (B, R, N) -> votes (B, R, N), elementwise but for column 0, which is token 0. Its
    derivative, and that of the parameters that it reads, come from autograd. If a vote is negative, nothing is skipped.
    Dropout, and other types than float32 and float64, are left to model.py.
    """
    if dropout or q.device.type != 'cpu' or q.dtype not in (torch.float32, torch.float64):
        return model.selective_attention(q, k, v, vote, dropout, memory_tau)
    y, M = _SelectiveAttention.apply(q, k, v, vote, memory_tau, *_parameters(vote, q))
    return y, M if memory_tau is not None else None


class Live:
    """Counts pairs of a row and a column: those computed, and those below the blocks' diagonal edge in all."""
    computed = total = 0

    def share(self):
        """The fraction that was computed since the last call, or None where nothing was."""
        share = self.computed / self.total if self.total else None
        self.computed = self.total = 0
        return share


live = Live()


def _parameters(vote, q):
    """The leaf tensors that a gradient of the votes reaches, found by trying it."""
    if not torch.is_grad_enabled():
        return []
    L0 = q.new_ones(len(q), 1, 2, requires_grad=True)
    leaves, seen, todo = {}, set(), [vote(L0).grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
            leaf = getattr(node, 'variable', L0)                # the nodes that accumulate .grad have one
            if leaf is not L0:
                leaves[id(leaf)] = leaf
    return list(leaves.values())


class _SelectiveAttention(torch.autograd.Function):

    @staticmethod
    def forward(ctx, q, k, v, vote, tau, *parameters):
        B, H, T, _ = q.shape
        y, M = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(B, T if tau is not None else 0)
        n = max(1, TOGETHER // (H * min(BLOCK, T) * min(512, T)))       # long sequences soon have few columns left
        ctx.walks = []                                          # a slice of the batch, and its blocks
        for g in [slice(b, b + n) for b in range(0, B, n)]:
            for skip in (True, False):
                blocks = _forward(q[g], k[g], v[g], vote, tau, y[g], M[g], skip)
                if blocks is not None:
                    break                                       # else a vote was negative: again, without skipping
            ctx.walks.append((g, blocks))
        ctx.save_for_backward(q, k, v, *parameters)
        ctx.vote, ctx.tau = vote, tau
        return y, M

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dM):
        q, k, v, *parameters = ctx.saved_tensors
        parts = [_backward(q[g], k[g], v[g], ctx.vote, ctx.tau, parameters, blocks, dy[g], dM[g])
                 for g, blocks in ctx.walks]
        dq, dk, dv, *dparameters = zip(*parts)
        return (*map(torch.cat, (dq, dk, dv)), None, None, *map(sum, dparameters))


def _forward(q, k, v, vote, tau, y, M, skip):
    """Writes y (B, H, T, D) and M (B, T). Returns the blocks for `_backward`, None if skip and a vote is negative."""
    B, H, T, D = q.shape
    if skip and _can_be_negative(vote, q, k):
        return None
    q = _scaled(q)                                              # (B*H, T, D)
    k, v = (x.clone(memory_format=torch.contiguous_format) for x in (k, v))     # packed in their place
    k3, v3, k_norm = k.flatten(0, 1), v.flatten(0, 1), None
    F = q.new_zeros(B, T)                                       # as it enters the block
    columns = torch.arange(T).repeat(B, 1)
    constants, buffer = _Constants(T, q.dtype), q.new_empty(B * H * min(BLOCK, T) * T)
    log_eps = math.log(torch.finfo(q.dtype).eps / 2 / T)
    blocks, first = [], 0
    for a in range(0, T, BLOCK):
        b, packing = min(a + BLOCK, T), None
        if skip and a and F[:, first:a].amax() > -log_eps:      # before that, nothing dies by votes
            if k_norm is None:
                k_norm, Q, m = bounds(q.view(B, H, T, D), k)
            dead = (Q[:, :, a, None] * k_norm[:, :, first:a] - m[:, :, a, None]).amax(dim=1) - F[:, first:a] < log_eps
            if tau is not None:
                dead &= F[:, first:a] > tau
            dead[:, 0] = False                                  # token 0 stays column 0 of what votes see
            n = int((~dead).sum(dim=1).max())                   # the longest list
            if n <= 7 / 8 * (a - first):
                keep = dead.byte().argsort(dim=1, stable=True)[:, :n]           # the live ones first, token 0 leading
                packing = first, columns[:, first:a].clone(), keep
                for x in k, v, k_norm[..., None], F[:, None, :, None], columns[:, None, :, None]:
                    x[:, :, a - n:a] = _take(x[:, :, first:a], keep)
                first = a - n
        blocks.append((a, b, first, F[:, first:b].clone(), packing))
        P, F_rows, S, _ = _probabilities(q[:, a:b], k3[:, first:b], F[:, first:b], vote, constants, buffer)
        if skip and S.amin() < 0:
            return None
        y[:, :, a:b] = torch.bmm(P, v3[:, first:b]).view(B, H, b - a, D)
        if tau is not None:                                     # each of the columns before `first` counts as tau
            M[:, a:b] = torch.arange(a, b) - first - F_rows[:, :-1].clamp(max=tau).sum(dim=2) / tau
        F[:, first:b] = F_rows[:, -1]
        live.computed += B * (b - a) * (b - first)
        live.total += B * (b - a) * b
    return *blocks, columns


def _backward(q, k, v, vote, tau, parameters, blocks, dy, dM):
    """dq, dk, dv (B, H, T, D) and the gradients of the parameters."""
    B, H, T, D = q.shape
    *blocks, columns = blocks
    q, dy = _scaled(q), dy.contiguous().flatten(0, 1)
    k, v = k.contiguous(), v.contiguous()                       # to be taken from, many times
    packed_k, packed_v = _take(k, columns), _take(v, columns)   # as the forward left them
    k3, v3 = packed_k.flatten(0, 1), packed_v.flatten(0, 1)
    dq = torch.empty_like(q)
    dkv = q.new_zeros(B, 2, H, D, T)                            # transposed: products with P are faster so
    # G[j] = sum of dF[i,j] over the rows i of later blocks: the recurrence of F, run backwards
    G = q.new_zeros(B, T)
    dparameters = [torch.zeros_like(p) for p in parameters]
    constants, buffers = _Constants(T, q.dtype), q.new_empty(2, B * H * min(BLOCK, T) * T)
    for a, b, first, F, packing in reversed(blocks):
        R, N = b - a, b - first
        P, F_rows, S, (L0, votes) = _probabilities(q[:, a:b], k3[:, first:b], F, vote, constants, buffers[0], grad=True)
        dL = buffers[1][:P.numel()].view(P.shape)
        torch.bmm(dy[:, a:b], v3[:, first:b].transpose(1, 2), out=dL)           # dP
        torch._softmax_backward_data(dL, P, -1, P.dtype, grad_input=dL)         # dL, in its place
        dL_heads = dL.view(B, H, R, N)
        dF = dL_heads.sum(dim=1).neg_()                                         # (B, R, N)
        if tau is not None:
            dF -= (F_rows[:, :-1] <= tau) * (dM[:, a:b, None] / tau)
        # dS[k,j] = sum of dF[i,j] over i > k; before the first row, all of it
        dS = torch.baddbmm(G[:, None, first:b], constants.sums_below(R).expand(B, -1, -1), dF)         # (B, R+1, N)
        G[:, first:b] = dS[:, 0]
        if votes.requires_grad:
            dS = constants.may_vote(dS[:, 1:])
            dL0, *more = torch.autograd.grad(votes, (L0, *parameters), dS, retain_graph=True, allow_unused=True)
            if dL0 is not None:
                dL_heads[:, 0] += dL0
            for total, d in zip(dparameters, more):
                total += 0 if d is None else d
        dq[:, a:b] = torch.bmm(dL, k3[:, first:b])
        dkv[:, 0, ..., first:b] += torch.bmm(q[:, a:b].transpose(1, 2), dL).view(B, H, D, N)
        dkv[:, 1, ..., first:b] += torch.bmm(dy[:, a:b].transpose(1, 2), P).view(B, H, D, N)
        if packing:
            first_before, columns_before, keep = packing
            packed_k[:, :, first_before:a] = _take(k, columns_before)
            packed_v[:, :, first_before:a] = _take(v, columns_before)
            for x in dkv.view(B, -1, T), G[:, None]:
                packed = x[..., first:a].clone()
                x[..., first_before:a] = 0
                x[..., first_before:a].scatter_(2, keep[:, None].expand(packed.shape), packed)
    dk, dv = dkv.transpose(3, 4).unbind(dim=1)
    return dq.mul_(D**-0.5).view(B, H, T, D), dk, dv, *dparameters


def _probabilities(q, k, F, vote, constants, buffer, grad=False):
    """A block of rows: q (B*H, R, D) scaled, k (B*H, N, D), the last R being the rows' own, F (B, N) as it enters.

    Returns P (B*H, R, N), which lies in the buffer; F (B, R+1, N) of each row and of the row after the block; the votes
    S (B, R, N) that count; and, where grad is set, head 0's logits and all votes with their graph.
    """
    R, (B, N) = q.size(1), F.shape
    P = buffer[:len(q) * R * N].view(len(q), R, N)
    torch.bmm(q, k.transpose(1, 2), out=P)                      # L, the logits
    L = P.view(B, -1, R, N)                                     # the same memory
    L0 = L[:, 0].clone().requires_grad_() if grad else L[:, 0]
    with torch.set_grad_enabled(grad):
        votes = vote(L0)
    S = constants.may_vote(votes.detach())
    F_rows = torch.baddbmm(F[:, None], constants.sums_above(R).expand(B, -1, -1), S)
    L.sub_(F_rows[:, None, :-1])
    L[..., -R:] += constants.future(R)
    torch.softmax(P, dim=-1, out=P)
    fn.threshold_(P, TINY, 0.0)
    return P, F_rows, S, (L0, votes)


class _Constants:
    """Matrices of zeros and ones that blocks of R rows over up to T columns take slices of."""

    def __init__(self, T, dtype):
        R = min(BLOCK, T)
        self.votes = torch.ones(R, T, dtype=dtype)
        self.votes[:, T - R:].tril_(-1)                         # 1 where j < i; the last columns are the rows' own
        self.minus_inf = torch.full((R, R), -math.inf, dtype=dtype).triu_(1)
        self.below = torch.ones(R + 1, R, dtype=dtype).tril_(-1)

    def may_vote(self, S):
        """S (B, R, N) with zeros where a row has no vote: on token 0, on itself and on the future."""
        S = S * self.votes[-S.size(1):, -S.size(2):]
        S[:, :, 0] = 0
        return S

    def future(self, R):
        return self.minus_inf[:R, :R]

    def sums_above(self, R):
        """(R+1, R): times S, for each row the sum of those above it, and last the sum of all."""
        return self.below[:R + 1, :R]

    def sums_below(self, R):
        """(R+1, R): times dF, first the sum of all rows, then for each row the sum of those below it."""
        return self.sums_above(R).flip(0, 1)


def _scaled(q):
    """(B, H, T, D) -> (B*H, T, D), divided by √D."""
    return (q * q.size(3)**-0.5).flatten(0, 1)


def _take(x, columns):
    """x (B, H, N, D), columns (B, M) -> (B, H, M, D)."""
    taken = x.new_empty(*x.shape[:2], columns.size(1), x.size(3))
    for b, j in enumerate(columns):
        torch.index_select(x[b], 1, j, out=taken[b])
    return taken


def bounds(q, k):
    """|k|, and Q and m as they hold from each row on, all (B, H, T), from k and q/√D (B, H, T, D)."""
    itself = (q * k).sum(dim=3)
    before = fn.pad((q[:, :, 1:] * k[:, :, :-1]).sum(dim=3), (1, 0), value=-math.inf)
    first = (q @ k[:, :, 0, :, None])[..., 0]
    first[:, :, :2] = -math.inf                                 # which the other two have counted
    l = torch.stack([itself, before, first]).logsumexp(dim=0)

    def largest_from(x):
        return x.flip(2).cummax(dim=2).values.flip(2)
    return k.norm(dim=3), largest_from(q.norm(dim=3)), -largest_from(-l)


def _can_be_negative(vote, q, k):
    """Whether a vote on some logit that these queries and keys can have is below 0, as far as 1,000 examples tell."""
    reach = q[:, 0].norm(dim=2).amax() * k[:, 0].norm(dim=2).amax() * q.size(3)**-0.5
    logits = torch.linspace(-1, 1, 1001, dtype=q.dtype) * reach
    return bool((vote(logits.expand(len(q), 1, -1).clone())[..., 1:] < 0).any())
