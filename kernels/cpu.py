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

Blocks of 64 rows walk down the sequence. For each, cpu.c makes the logits of head 0, here they
become votes, and cpu.c adds them up and lists the columns that are alive for the next block. Then
it attends over all lists at once. The backward attends first, then walks up again.

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
        ctx.tau = tau or 0.0
        call = Call(q, k, v)
        blocks = _walk(call, rule, ctx.tau, grad, skip=True)
        if blocks is None:  # a vote was negative
            blocks = _walk(call, rule, ctx.tau, grad, skip=False)
        B, H, T, D = q.shape
        y = call.new('y', B, T, H, D)
        call.new('l', B, H, T)
        call('forward', _panels(blocks[0::3]))
        ctx.blocks = len(blocks)
        made = [call.kept[name] for name in SAVED]
        ctx.save_for_backward(q, k, v, *made, *blocks, *parameters)
        return y.transpose(1, 2), call.kept['M']

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dM):
        q, k, v, *saved = ctx.saved_tensors
        call = Call(q, k, v)
        call.keep_tokens('dy', dy)
        call.keep(dM=dM.contiguous(), **dict(zip(SAVED, saved)))
        blocks = saved[len(SAVED) :][: ctx.blocks]
        parameters = saved[len(SAVED) + ctx.blocks :]
        F, L0, votes = blocks[0::3], blocks[1::3], blocks[2::3]
        # groups of blocks have dk and dv of their own, so that there is work for all threads
        groups = min(len(F), math.ceil(2 * torch.get_num_threads() / len(q)))
        call.problem.groups = groups
        B, H, T, D = q.shape
        dq = call.new('dq', B, T, H, D, zero=True)
        dk = call.new('dk', groups, B, T, H, D, zero=True)
        dv = call.new('dv', groups, B, T, H, D, zero=True)
        call.new('G', B, T, zero=True)
        dS = [torch.empty_like(x) for x in F]
        call('backward', _panels(F, dS), ctx.tau)
        dparameters = [None] * len(parameters)
        if votes[0].requires_grad:
            # the graph is retained, as a factor that is no leaf may serve other layers, too
            grads = torch.autograd.grad(
                votes, [*L0, *parameters], [x.mT for x in dS], retain_graph=True, allow_unused=True
            )
            dparameters = grads[len(L0) :]
            if grads[0] is not None:
                dL0 = [x.mT.contiguous() for x in grads[: len(L0)]]
                call('voter_gradients', _panels(F, dS, dL0))
        if groups > 1:
            dk[0] = dk.sum(dim=0)
            dv[0] = dv.sum(dim=0)
        dqkv = [x.transpose(1, 2) for x in (dq, dk[0], dv[0])]
        return *dqkv, None, None, None, *dparameters


def _walk(call, rule, tau, grad, skip):
    """F (B, N, 64), L0 and votes (B, 64, N) of each block, in one list. None: a vote is negative.

    N is the length of the longest list. In a short block, rows beyond the end have logits of 0.
    """
    q = call.kept['q']
    B, T = q.shape[:2]
    call.new('F', B, T, zero=True)
    call.new('M', B, T)
    log_eps = math.log(torch.finfo(q.dtype).eps / 2 / T)
    call('bounds')
    skip = skip and not _can_be_negative(rule, call)
    options = tau, log_eps, int(skip)
    N = call('walk', -1, 0, None, None, *options)
    blocks = []
    for n in range(call.problem.blocks):
        L = q.new_empty(B, N, BLOCK)
        F = torch.empty_like(L)
        call('voter_logits', n, N, L)
        L0 = L.mT.requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            votes = rule.vote(L0)
        model.expect_shape('vote(L0)', votes, L0.shape)
        S = votes.detach().to(L.dtype).mT.contiguous()
        blocks += F, L0, votes
        N = call('walk', n, N, S, F, *options)
        if N < 0:
            return None
    rows = torch.arange(0, T, BLOCK)
    rows = (rows + BLOCK).clamp(max=T) - rows
    live[0] += int((call.kept['count'].sum(dim=1) * rows).sum())
    live[1] += int(B * (rows.cumsum(0) * rows).sum())
    return blocks


def _panels(*parts):
    """What cpu.c knows of each block: N, and the addresses of F, dF and dL0, as far as given."""
    table = torch.zeros(len(parts[0]), 4, dtype=torch.long)
    for i, panels in enumerate(parts):
        table[:, i + 1] = torch.tensor([x.data_ptr() for x in panels])
    table[:, 0] = torch.tensor([x.size(1) for x in parts[0]])
    return table


def _can_be_negative(rule, call):
    """Whether a vote on a logit that these q and k can have is negative, by 1,000 examples.

    This cannot be left to the votes of the blocks, which are not computed where columns are dead.
    """
    norm = call.kept['norm']
    largest = call.kept['Q'][:, 0, 0].max() * norm[:, 0].max()
    logits = torch.linspace(-largest, largest, 1001, dtype=norm.dtype)
    votes = rule.vote(logits.repeat(len(norm), 1, 1))
    return bool(votes.amin() < 0)


# ---- Calling cpu.c -------------------------------------------------------------------------------

SAVED = 'y', 'l', 'list', 'count'
FIELDS = (
    'B H T D blocks threads q_step k_step v_step dy_step q k v y l F M norm Q m list count '
    'dy dM dq dk dv G groups'
)


class Problem(ctypes.Structure):
    """As cpu.c has it: sizes, and addresses of tensors."""

    _fields_ = [(name, ctypes.c_int64) for name in FIELDS.split()]


class Call:
    """Calls functions of cpu.c on tensors, which it keeps by name."""

    def __init__(self, q, k, v):
        B, H, T, D = q.shape
        blocks = math.ceil(T / BLOCK)
        self.library = library(q.dtype)
        self.problem = Problem(B, H, T, D, blocks, torch.get_num_threads())
        self.kept = {}
        for name, x in zip('qkv', (q, k, v)):
            self.keep_tokens(name, x)
        self.new('norm', B, H, T)
        self.new('Q', B, H, blocks)
        self.new('m', B, H, blocks)
        self.keep(list=torch.empty(blocks, B, T, dtype=torch.int32))
        self.keep(count=torch.empty(blocks, B, dtype=torch.int32))

    def keep(self, **tensors):
        self.kept |= tensors
        for name, x in tensors.items():
            setattr(self.problem, name, x.data_ptr())

    def keep_tokens(self, name, x):
        """x (B, H, T, D). It is copied if the heads of a token do not lie side by side."""
        _, H, T, D = x.shape
        x = x.detach().transpose(1, 2)
        step = x.stride(1)
        if x.stride() != (T * step, step, D, 1):
            x = x.contiguous()
            step = H * D
        self.keep(**{name: x})
        setattr(self.problem, f'{name}_step', step)

    def new(self, name, *size, zero=False):
        """A tensor of this size, with the dtype of q."""
        x = self.kept['q'].new_empty(size)
        if zero:
            x.zero_()
        self.keep(**{name: x})
        return x

    def __call__(self, function, *args):
        converted = [ctypes.byref(self.problem)]
        for x in args:
            if isinstance(x, torch.Tensor):
                converted.append(ctypes.c_void_p(x.data_ptr()))
            elif isinstance(x, float):
                converted.append(ctypes.c_double(x))
            elif x is None:
                converted.append(ctypes.c_void_p())
            else:
                converted.append(ctypes.c_int64(x))
        return getattr(self.library, function)(*converted)


note = ''  # that cpu.c was compiled, for the line that names the kernel


@functools.cache
def library(dtype):
    """cpu.c for float32 or float64, compiled for this machine if that was not done before.

    It lies in a folder that only this user can write to, and its name is made of the source, the
    compiler and what the compiler knows of the machine. Raises RuntimeError if that fails.
    """
    global note
    compiler = shlex.split(os.environ.get('CC', 'cc'))
    flags = ['-O3', '-march=native', '-fno-math-errno']
    if dtype == torch.float64:
        flags.append('-Dreal=double')
    machine = _run([*compiler, *flags, '-dM', '-E', '-x', 'c', os.devnull])
    with open(SOURCE, 'rb') as f:
        key = hashlib.sha256(f.read() + machine.encode() + repr(flags).encode())
    cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    folder = os.path.join(cache, 'selective-attention')
    os.makedirs(folder, mode=0o700, exist_ok=True)
    found = os.stat(folder)
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise RuntimeError(f'others can write to {folder}, where cpu.c would be compiled')
    path = os.path.join(folder, f'cpu-{key.hexdigest()[:16]}.so')
    if not os.path.exists(path):
        start = time.perf_counter()
        _compile([*compiler, *flags], folder, path)
        note = f'; cpu.c took {time.perf_counter() - start:.1f} s to compile'
    found = ctypes.CDLL(path)
    found.walk.restype = ctypes.c_int64
    return found


def _compile(command, folder, path):
    """Beside the others, then renamed: another process may do the same."""
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


def _run(command):
    """What a command prints. RuntimeError if it cannot run, or fails."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except OSError as e:
        raise RuntimeError(f'there is no C compiler ({e}); install gcc, or set CC') from None
    except subprocess.CalledProcessError as e:
        raise RuntimeError(f'{command[0]} fails: {e.stderr.strip()}') from None
