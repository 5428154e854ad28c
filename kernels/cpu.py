"""Selective attention on a CPU, skipping masked tokens. model.py is complete without it.

It computes what `model.selective_attention` computes, forward and backward, but skips what no later
row can see. While no vote is negative, F only grows. A row is never masked from itself, from the
token before it or from token 0, so these bound the denominator of its softmax from below:

    l[h,i]   = log( sum of exp L[h,i,j] over j in {0, i-1, i} )
    P[h,i,j] ≤ exp( |q[h,i]| |k[h,j]| / √D − F[i,j] − l[h,i] )          by Cauchy and Schwarz

Let Q[h] be the largest |q[h,i]|/√D and m[h] the smallest l[h,i] of the rows i from b on. From there
column j is dead if

    Q[h] |k[h,j]| − m[h] − F[b,j] < log(ε/T)        for every head h, ε being half the rounding of 1

so that all dead columns together weigh less in a row than rounding error. With memory_tau,
F[b,j] > memory_tau must hold, too: then M is exact and its gradient there is zero.

Blocks of 64 rows walk down the sequence. For each, cpu.c makes the logits of head 0, here they
become votes, and cpu.c adds them up and lists the columns that are alive for the next block. Then
it attends over all lists at once. The backward attends first, then walks up again.

In generation, `decode` lets cpu.c compute the single new row of each sequence.

cpu.c is compiled when it is first needed. There is no such kernel in Python: without a compiler
model.py's plain code trains.
"""

import ctypes
import functools
import glob
import hashlib
import math
import os
import shlex
import subprocess
import tempfile
import time

import torch

import model

DEVICES = ('cpu',)
DTYPES = (torch.float32, torch.float64)
HEAD_SIZES = range(1, 1025)
BLOCK = 64  # rows of a block, as in cpu.c
SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'cpu.c')


def selective_attention(q, k, v, rule, dropout=0.0, memory_tau=None):
    """As `model.selective_attention`: q, k, v (B, H, T, D) -> y (B, H, T, D), M (B, T) or None.

    rule: the layer. F is the running sum of rule.vote, logits of head 0 (B, R, N) -> votes, each a
    function of its own logit and of column 0, token 0. Its derivative, and that of the layer's
    parameters that it reads, come from autograd. If a vote is negative, nothing is skipped.
    Dropout, and other types than float32 and float64, are left to model.py. Raises RuntimeError
    where cpu.c cannot be compiled.
    """
    if dropout or q.dtype not in DTYPES:
        return model.selective_attention(q, k, v, rule, dropout, memory_tau)
    model.expect_shape('k', k, q.shape)  # cpu.c would read what lies behind it
    model.expect_shape('v', v, q.shape)
    parameters = [p for p in rule.parameters() if p.requires_grad]
    grad = torch.is_grad_enabled()
    y, M = _SelectiveAttention.apply(q, k, v, rule, memory_tau, grad, *parameters)
    if memory_tau is None:
        return y, None
    return y, M


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
    """parameters: those that the votes may depend on. grad: whether a backward may follow."""

    @staticmethod
    def forward(ctx, q, k, v, rule, tau, grad, *parameters):
        B, H, T, D = q.shape
        ctx.tau = tau or 0.0
        c = _known(q, k, v, ctx.tau)
        c.update(norm=q.new_empty(B, H, T), M=q.new_empty(B, T))
        c.update(Q=q.new_empty(B, H, c['blocks']), m=q.new_empty(B, H, c['blocks']))
        c['list'] = torch.empty(c['blocks'], B, T, dtype=torch.int32)
        c['count'] = torch.empty(c['blocks'], B, dtype=torch.int32)
        _call('bounds', c)
        blocks = None
        if not _can_be_negative(rule, c):
            blocks = _walk(c, rule, grad, skip=True)
        if blocks is None:  # a vote is negative
            blocks = _walk(c, rule, grad, skip=False)
        c.update(y=q.new_empty(B, T, H, D), l=q.new_empty(B, H, T))
        F = blocks[0::3]
        _call('forward', c, table=_table(F, F, F))
        ctx.blocks = len(blocks)
        saved = [c[name] for name in SAVED]
        ctx.save_for_backward(q, k, v, *saved, *blocks, *parameters)
        return c['y'].transpose(1, 2), c['M']

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dM):
        q, k, v, *saved = ctx.saved_tensors
        B, H, T, D = q.shape
        c = _known(q, k, v, ctx.tau)
        c.update(zip(SAVED, saved))
        blocks = saved[len(SAVED) :][: ctx.blocks]
        parameters = saved[len(SAVED) + ctx.blocks :]
        F, L0, votes = blocks[0::3], blocks[1::3], blocks[2::3]
        # groups of blocks have dk and dv of their own, so that there is work for all threads
        groups = min(len(F), math.ceil(2 * c['threads'] / B))
        c['dy'], c['dy_step'] = _by_token(dy)
        dq = q.new_zeros(1, B, T, H, D)
        dk, dv = q.new_zeros(2, groups, B, T, H, D)
        c.update(dM=dM.contiguous(), groups=groups, dq=dq, dk=dk, dv=dv, G=q.new_zeros(B, T))
        dS = [torch.empty_like(x) for x in F]
        _call('backward', c, table=_table(F, dS, F))
        dparameters = [None] * len(parameters)
        if votes[0].requires_grad:
            inputs = [*L0, *parameters]
            # the graph is retained, as a factor that is no leaf may serve other layers, too
            grads = torch.autograd.grad(
                votes, inputs, [x.mT for x in dS], retain_graph=True, allow_unused=True
            )
            dparameters = grads[len(L0) :]
            if grads[0] is not None:
                dL0 = [x.mT.contiguous() for x in grads[: len(L0)]]
                _call('voter_gradients', c, table=_table(F, dS, dL0))
        if groups > 1:
            dk[0] = dk.sum(dim=0)
            dv[0] = dv.sum(dim=0)
        dqkv = [x[0].transpose(1, 2) for x in (dq, dk, dv)]
        return *dqkv, None, None, None, *dparameters


def _walk(c, rule, grad, skip):
    """F (B, N, 64), L0 and votes (B, 64, N) of each block, in one list. None: a vote is negative.

    N is the length of the longest list. In a short block, rows beyond the end have logits of 0.
    """
    B, T = c['B'], c['T']
    c.update(F=c['norm'].new_zeros(B, T), skip=int(skip), n=-1)
    N = _call('walk', c)
    blocks = []
    for n, a in enumerate(range(0, T, BLOCK)):
        L = c['norm'].new_empty(B, N, BLOCK)
        F = torch.empty_like(L)
        _call('voter_logits', c, n=n, N=N, L0=L)
        L0 = L.mT.requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            votes = rule.vote(L0)
        model.expect_shape('vote(L0)', votes, L0.shape)
        blocks += F, L0, votes
        N = _call('walk', c, votes=votes.detach().to(L.dtype).mT.contiguous(), F_rows=F)
        if N < 0:
            return None
        rows = min(BLOCK, T - a)
        live[0] += rows * int(c['count'][n].sum())
        live[1] += rows * B * (a + rows)
    return blocks


def _can_be_negative(rule, c):
    """Whether a vote on a logit that these q and k can have is negative, by 1,000 examples.

    This cannot be left to the votes of the blocks, which are not computed where columns are dead.
    """
    norm = c['norm']
    largest = c['Q'][:, 0, 0].max() * norm[:, 0].max()
    logits = torch.linspace(-largest, largest, 1001, dtype=norm.dtype)
    votes = rule.vote(logits.repeat(len(norm), 1, 1))
    return bool(votes.amin() < 0)


# ---- Calling cpu.c -------------------------------------------------------------------------------

# what its functions get, in its order: numbers, and addresses of tensors
FIELDS = (
    'B H T D blocks threads groups n N skip q_step k_step v_step dy_step tau log_eps q k v y l F M '
    'norm Q m list count L0 votes F_rows dy dM dq dk dv G table'
).split()
SAVED = 'y', 'l', 'list', 'count'  # of these, for the backward
note = ''  # that cpu.c was compiled, for the line that names the kernel


def _known(q, k, v, tau):
    """{field: tensor or number} to begin with."""
    B, H, T, D = q.shape
    c = dict(B=B, H=H, T=T, D=D, blocks=math.ceil(T / BLOCK), threads=torch.get_num_threads())
    for name, x in zip('qkv', (q, k, v)):
        c[name], c[f'{name}_step'] = _by_token(x)
    c['tau'] = torch.tensor(tau, dtype=torch.float64)
    c['log_eps'] = torch.tensor(torch.finfo(q.dtype).eps / 2 / T, dtype=torch.float64).log()
    return c


def _by_token(x):
    """x (B, H, T, D) -> (B, T, H, D) with a token's heads side by side, and its step in memory."""
    _, H, T, D = x.shape
    x = x.detach().transpose(1, 2)
    step = x.stride(1)
    if x.stride() != (T * step, step, D, 1):
        return x.contiguous(), H * D
    return x, step


def _table(*panels):
    """What cpu.c knows of each block: N, and the addresses of F, dF and dL0."""
    rows = []
    for F, dF, dL0 in zip(*panels):
        rows.append([F.size(1), F.data_ptr(), dF.data_ptr(), dL0.data_ptr()])
    return torch.tensor(rows)


def _call(function, c, **more):
    """What a function of cpu.c returns. more: fields that are added to c."""
    c.update(more)
    values = _array([c.get(name, 0) for name in FIELDS])
    return getattr(library(c['q'].dtype), function)(values)


def _array(values):
    """What cpu.c gets: numbers, and addresses of tensors."""
    numbers = (ctypes.c_int64 * len(values))()
    for i, x in enumerate(values):
        if isinstance(x, torch.Tensor):
            x = x.data_ptr()
        numbers[i] = x
    return numbers


@functools.cache
def library(dtype):
    """cpu.c for float32 or float64, compiled for this machine if that was not done before.

    It lies in a folder that only this user can write to, and its name is made of the source, the
    compiler and what the compiler knows of the machine. Raises RuntimeError if that fails.
    """
    command = shlex.split(os.environ.get('CC', 'cc')) + ['-O3', '-march=native', '-fno-math-errno']
    if dtype == torch.float64:
        command.append('-Dreal=double')
    machine = _run([*command, '-dM', '-E', '-x', 'c', os.devnull])
    with open(SOURCE) as f:
        key = hashlib.sha256(f'{command} {machine} {f.read()}'.encode()).hexdigest()[:16]
    cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    folder = os.path.join(cache, 'selective-attention')
    os.makedirs(folder, mode=0o700, exist_ok=True)
    found = os.stat(folder)
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise RuntimeError(f'others can write to {folder}, where cpu.c would be compiled')
    path = os.path.join(folder, f'cpu-{key}.so')
    if not os.path.exists(path):
        _compile(command, folder, path)
    found = ctypes.CDLL(path)
    found.walk.restype = ctypes.c_int64
    return found


def _compile(command, folder, path):
    """Beside the others, then renamed: another process may do the same."""
    global note
    start = time.perf_counter()
    # torch's own OpenMP: the threads of two would wait for each other
    openmp = glob.glob(os.path.join(os.path.dirname(torch.__file__), 'lib', 'libgomp*.so*'))
    with tempfile.TemporaryDirectory(dir=folder) as here:
        part = os.path.join(here, 'cpu.so')
        command = [*command, '-shared', '-fPIC', '-o', part, SOURCE, *openmp, '-lm']
        try:
            _run([*command, '-fopenmp'])
        except RuntimeError:  # clang on a Mac has none: one thread
            _run(command)
        os.replace(part, path)
    note = f'; cpu.c took {time.perf_counter() - start:.1f} s to compile'


def _run(command):
    """What a command prints. RuntimeError if it cannot run, or fails."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except OSError as e:
        raise RuntimeError(f'there is no C compiler ({e}); install gcc, or set CC') from None
    except subprocess.CalledProcessError as e:
        raise RuntimeError(f'{command[0]} fails: {e.stderr.strip()}') from None


# ---- Generation ----------------------------------------------------------------------------------


def decode(layer, x, pos, turn, cache, memory_tau):
    """CausalSelfAttention.forward, in which cpu.c computes a single row of each sequence.

    cpu.c does everything between c_attn and c_proj except the vote. Gradients, autocast and what
    `_knows` does not cover are left to model.py.
    """
    usual = torch.is_grad_enabled() or torch.is_autocast_enabled('cpu')
    if usual or not _knows(layer, x, cache):
        return type(layer).forward(layer, x, pos, turn, cache, memory_tau)
    H = layer.config.n_head
    qkv = layer.c_attn(x).contiguous()
    L = x.new_empty(len(x), H, cache.K + 16)
    y = torch.empty_like(x)
    turn = turn or (0, 0)
    norm = 0, 0, 0
    if layer.config.qk_norm:
        eps = torch.tensor(layer.q_norm.eps, dtype=torch.float64)
        norm = layer.q_norm.weight, layer.k_norm.weight, eps
    row = [*cache.k.shape, H, cache.n, getattr(cache.policy, 'sinks', 0)]
    row += [qkv, pos, cache.k, cache.v, cache.F, cache.j, L, y, *turn, *norm, 0]
    row = _array(row)
    cpu = library(x.dtype)
    cache.n = cpu.row_logits(row)
    if layer.selects:
        L0 = L[:, :1, : cache.n]
        votes = layer.vote(L0).to(x.dtype).contiguous()
        model.expect_shape('vote(L0)', votes, L0.shape)
        row[-1] = votes.data_ptr()
    cpu.row_attend(row)
    return layer.resid_dropout(layer.c_proj(y)), None


def _knows(layer, x, cache):
    """Whether x (B, 1, C) is a row of each sequence of a cache that cpu.c can read.

    It knows eviction by F where votes are, and by age where none are; no voter, no other cache.
    """
    policy = model.Selective if layer.selects else model.Oldest
    if type(cache) is not model.LayerCache or type(cache.policy) is not policy:
        return False
    c = layer.config
    shape = len(x), c.kv_heads, cache.K, c.head_size
    known = x.is_cpu and x.dtype == cache.k.dtype in DTYPES and not c.voter
    return known and x.size(1) == 1 and cache.k.shape == shape
