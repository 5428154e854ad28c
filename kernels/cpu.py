"""Selective attention in training at about the cost of standard attention. model.py is complete without it.

On a CPU this file computes what `model.selective_attention` computes, with a backward written by hand: it keeps F at
the boundaries of the blocks alone, T^2/block numbers for all heads together, and makes the rest again, block by block,
in two buffers of H * T * block numbers that every block reuses. On an NVIDIA GPU triton_kernels.py does the like, if it
proves there that it can. Elsewhere, and with dropout, the plain code in model.py runs. `pick` chooses.

`Linear` is nn.Linear, but faster on a CPU where it has a single row, as in the generation of one text.
"""
import functools
import warnings

import torch
import torch.nn as nn


class Linear(nn.Linear):
    """A linear layer whose single rows, those of generating one text, are the work of every core.

    Such a row costs what reading the weights costs, and torch leaves it to one core. As a batch of products, one for
    every 64 outputs, it is shared out: twice as fast on two cores.
    """

    def forward(self, x):
        """x (..., in_features) -> (..., out_features)."""
        if x.device.type != 'cpu' or x.numel() != self.in_features or self.out_features % 64:
            return super().forward(x)
        weight = self.weight.view(-1, 64, self.in_features)
        y = torch.bmm(x.reshape(1, 1, -1).expand(len(weight), -1, -1), weight.transpose(1, 2)).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def pick(q, dropout, kernel='auto'):
    """The function for queries q (B, H, T, D), like `selective_attention` below; None: model.py's plain code.

    kernel: 'auto', the fastest that is sure to run; 'rows', the plain code; 'triton', triton_kernels.py, or a ValueError
    that says why not.
    """
    if kernel == 'triton' or kernel == 'auto' and q.is_cuda and dropout == 0:
        why_not = 'it has no dropout' if dropout else _why_not_triton(q.device, q.dtype, q.size(3), kernel)
        if why_not and kernel == 'triton':
            raise ValueError(f"kernel='triton' cannot run: {why_not}")
        return None if why_not else _triton
    if kernel == 'auto' and q.device.type == 'cpu' and q.dtype in (torch.float32, torch.float64) and dropout == 0:
        return selective_attention
    return None


def _triton(q, k, v, tau=None, scale=None):
    from kernels import gpu as triton_kernels                                       # here, as Triton comes with torch for CUDA alone
    return triton_kernels.selective_attention(q, k, v, tau, scale)


def _why_not_triton(device, dtype, D, kernel):
    if kernel == 'auto' and dtype == torch.float32 and torch.get_float32_matmul_precision() == 'highest':
        return 'without tensor cores it would be slow'          # so says what it compiles to
    why_not = _try_triton(device, dtype, D)
    if why_not and kernel == 'auto':
        warnings.warn(f"selective attention runs model.py's plain code, not the Triton kernel: {why_not}")
    return why_not


# torch.compile shall ask it while tracing and keep the answer. That is torch.compiler.assume_constant_result, which
# would import the compiler, three seconds at every start, to set no more than this.
_why_not_triton._dynamo_marked_constant = True


@functools.cache
def _try_triton(device, dtype, D):
    """'' if triton_kernels.py gives the numbers of model.py for a small example, else what is wrong. Asked once."""
    try:
        from kernels import gpu as triton_kernels
    except ImportError as e:
        return f'triton cannot be imported ({e})'
    from model import selective_attention as plain
    interpreted = triton_kernels.INTERPRETED
    if device.type != 'cuda' and not interpreted:
        return f'it is for GPUs, this is {device.type} (TRITON_INTERPRET=1, set before the start, would run it, slowly)'
    if D not in triton_kernels.HEAD_SIZES:
        return f'a head has {D} channels, which is none of {triton_kernels.HEAD_SIZES}'
    if dtype not in triton_kernels.DTYPES or interpreted and dtype == torch.bfloat16:
        return f'it does not take {dtype}' + ' in the interpreter' * interpreted
    if device.type == 'cuda' and torch.cuda.get_device_capability(device) < (8, 0):
        return f'{torch.cuda.get_device_name(device)} is older than compute capability 8.0'

    def run(attention, dtype, tau):
        qkv, scale = example.to(dtype).requires_grad_(), torch.tensor(0.5, device=device, requires_grad=True)
        y, M = attention(*(t.transpose(1, 2) for t in qkv.split(D, dim=3)), tau=tau, scale=scale)      # as the model does
        loss = (y.float() * weight).sum() + (M.sum() if tau else 0)
        return y, *([M] if tau else []), *torch.autograd.grad(loss, (qkv, scale))
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            example = torch.randn(2, 137, 2, 4 * D, generator=torch.Generator().manual_seed(0)).to(device)  # (B, T, H, 4D)
            example, weight = example[..., :3 * D].to(dtype), example[..., 3 * D:].transpose(1, 2)
            for tau in (None, 1.0):                             # two programs on a GPU
                for got, want in zip(run(triton_kernels.selective_attention, dtype, tau), run(plain, torch.float32, tau)):
                    if not (got - want).abs().max() <= 0.1 * want.abs().max():      # nan fails, too
                        return 'on this device its numbers are not those of model.py'
    except Exception as e:                                      # whatever a compiler, a driver or a GPU may raise
        return f'it fails on this device ({" ".join(f"{type(e).__name__}: {e}".split())[:200]})'
    return ''


def selective_attention(q, k, v, tau=None, block=None, scale=None):
    """As `model.selective_attention`: q, k, v (B, H, T, D) -> y (B, H, T, D), memory requirement (B, T) or None."""
    block = block or (64 if q.size(2) <= 1024 else 128)
    y, M = _SelectiveAttention.apply(q, k, v, tau, block, scale)
    return y, M if tau is not None else None


class _SelectiveAttention(torch.autograd.Function):

    @staticmethod
    def forward(ctx, q, k, v, tau, block, scale):
        B, H, T, D = q.shape
        q, k, v = (q * D**-0.5).contiguous(), k.contiguous(), v.contiguous()
        q3, k3, v3 = (t.view(B * H, T, D) for t in (q, k, v))   # bmm wants three dimensions
        y = torch.empty_like(q)
        M = q.new_empty(B, T if tau is not None else 0)
        blocks = _blocks(T, block)
        F = q.new_zeros(B, T)                                   # as it enters the block
        boundaries = q.new_zeros(len(blocks), B, T)
        buffer = q.new_empty(B * H * block * T)
        for n, (a, b) in enumerate(blocks):
            boundaries[n] = F
            P, S, F_rows = _probabilities(q3[:, a:b], k3[:, :b], F[:, :b], a, buffer, scale)
            y.view(B * H, T, D)[:, a:b] = torch.bmm(P, v3[:, :b])
            if tau is not None:
                M[:, a:b] = torch.arange(a, b) - F_rows.clamp(max=tau).sum(dim=2) / tau
            F[:, :b] = F_rows[:, -1] + (S[:, -1] if scale is None else S[:, -1] * scale)
        ctx.save_for_backward(q, k, v, boundaries, scale)
        ctx.tau, ctx.block = tau, block
        return y, M

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dM):
        q, k, v, boundaries, scale = ctx.saved_tensors
        B, H, T, D = q.shape
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        q3, k3, v3, dy3, dq3, dk3, dv3 = (t.view(B * H, T, D) for t in (q, k, v, dy.contiguous(), dq, dk, dv))
        # G[j] = sum of dF[i,j] over the rows i of later blocks: the recurrence of F, run backwards
        G = q.new_zeros(B, T)
        dscale = torch.zeros_like(scale) if scale is not None else None
        buffers = q.new_empty(2, B * H * ctx.block * T)
        for n, (a, b) in reversed(list(enumerate(_blocks(T, ctx.block)))):
            P, S, F_rows = _probabilities(q3[:, a:b], k3[:, :b], boundaries[n, :, :b], a, buffers[0], scale)
            dy_rows = dy3[:, a:b]
            dv3[:, :b].baddbmm_(P.transpose(1, 2), dy_rows)
            dL = _view(buffers[1], P.shape)
            torch.bmm(dy_rows, v3[:, :b].transpose(1, 2), out=dL)                   # dP
            torch._softmax_backward_data(dL, P, -1, P.dtype, grad_input=dL)         # dL, in its place
            dL_heads = dL.view(B, H, b - a, b)
            dF = dL_heads.sum(dim=1).neg_()                                         # (B, R, b)
            if ctx.tau is not None:
                dF.sub_((F_rows <= ctx.tau) * (dM[:, a:b, None] / ctx.tau))
            # dS[k,j] = sum of dF[i,j] over i > k
            sums = dF.cumsum(dim=1)
            G[:, :b] += sums[:, -1]
            dS = G[:, None, :b] - sums
            if scale is not None:                                                   # so far dS is that of scale * S
                dscale += (dS * S).sum()
                dS.mul_(scale)
            dL_heads[:, 0] += dS.mul_(S > 0)
            dq3[:, a:b] = torch.bmm(dL, k3[:, :b])
            dk3[:, :b].baddbmm_(dL.transpose(1, 2), q3[:, a:b])
        return dq.mul_(D**-0.5), dk, dv, None, None, dscale


def _blocks(T, block):
    return [(a, min(a + block, T)) for a in range(0, T, block)]


def _view(buffer, shape):
    return buffer[:shape.numel()].view(shape)


def _probabilities(q, k, F, a, buffer, scale):
    """The rows from a on: q (B*H, R, D) scaled, k (B*H, a+R, D), F (B, a+R) as it enters them.

    Returns P (B*H, R, a+R), which lies in the buffer, and S (unscaled) and F of each row, (B, R, a+R).
    """
    P = _view(buffer, torch.Size((q.size(0), q.size(1), k.size(1))))
    torch.bmm(q, k.transpose(1, 2), out=P)                      # L, the logits
    L = P.view(F.size(0), -1, q.size(1), k.size(1))             # (B, H, R, a+R), the same memory
    S = L[:, 0].clamp(min=0)
    S[:, :, 0] = 0                                              # token 0 is never masked
    S[:, :, a:].tril_(-1)                                       # the diagonal block: no vote on itself or the future
    F_rows = S.cumsum(dim=1).sub_(S)
    if scale is not None:
        F_rows.mul_(scale)
    F_rows.add_(F[:, None])
    L.sub_(F_rows[:, None])
    future = torch.full((q.size(1), q.size(1)), float('-inf'), dtype=q.dtype).triu_(1)
    L[..., a:].add_(future)
    torch.softmax(P, dim=-1, out=P)
    return P, S, F_rows
