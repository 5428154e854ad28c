"""Faster functions for what model.py computes, put into a model from outside.

    line = kernels.install(model)       # training: selective attention by cpu.py or gpu.py (Triton)
    kernels.fast_rows(model)            # generation on a CPU: linear layers fast for a single row

The rule: model.py alone says what is computed. A kernel takes the place of model.py's function in a
layer only after this layer has given the same numbers with it: outputs, memory requirement and
gradients, on an example in which tokens die. If it does not, model.py's plain code trains, and
`install` says so in its line. So an edit of model.py always counts, and a kernel that cannot follow
it steps aside.
"""

import contextlib
import copy
import importlib
from functools import partial

import torch
import torch.nn as nn

import model as m
from kernels import cpu, linear
from kernels.cpu import live_share as live_share  # train.py and lab/bench.py say it
from support.settings import one_line

KERNELS = {
    'auto': 'the fastest that gives the numbers of model.py',
    'none': "model.py's plain code",
    'listing': "the paper's T x T listing",
    'cpu': 'kernels/cpu.py',
    'gpu': 'kernels/gpu.py (Triton)',
}


def install(model, kernel='auto', dtype=torch.float32):
    """Choose what computes selective attention in the layers of a GPT. Returns a line that says it.

    kernel: one of KERNELS; dtype: of q, k and v, as autocast will make them. Call it when the model
    is on its device. Raises ValueError for a kernel that is unknown, or that is asked for by name
    and does not pass, and for an edit of model.py that fails on an example.
    """
    if kernel not in KERNELS:
        raise ValueError(f'kernel {kernel!r}: it is one of {", ".join(KERNELS)}')
    layers = [block.attn for block in model.transformer.h if block.attn.selects]
    device = model.lm_head.weight.device
    for layer in layers:
        layer.__dict__.pop('attention', None)  # back to model.py's own
    if not layers:
        return "attention: torch's scaled_dot_product_attention"
    if kernel == 'none':
        return f'attention: {KERNELS[kernel]}, as --kernel=none asks'
    name = kernel
    if kernel == 'auto':
        name = 'gpu' if device.type == 'cuda' else 'cpu'
    attention, why_not = load(name, device, dtype, model.config)
    for layer in layers:
        why_not = why_not or check(attention, layer, device, dtype)
    if not why_not:
        for layer in layers:
            layer.attention = attention
        return f'attention: {KERNELS[name]}, which gives the numbers of model.py{cpu.note}'
    if kernel != 'auto':
        raise ValueError(f'--kernel={kernel} cannot run: {why_not}')
    return f"attention: model.py's plain code, not {KERNELS[name]}: {why_not}"


@contextlib.contextmanager
def within(model, K):
    """In this context layers keep K tokens while they train, by F, as in generation; 0: all."""
    layers = []
    if K:
        layers = [module for module in model.modules() if hasattr(module, 'attention')]
    usual = [layer.attention for layer in layers]
    for layer in layers:
        layer.attention = partial(m.selective_attention_within, K=K)
    yield
    for layer, attention in zip(layers, usual):
        layer.attention = attention


def fast_rows(model):
    """Make the linear layers of a model on a CPU fast for a single row, as in generation."""
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.device.type == 'cpu':
            module.forward = partial(linear.forward, module)


def load(name, device, dtype, config):
    """The function of a kernel, and why it is not for this device, dtype or config; '' if it is."""
    if name == 'listing':
        return m.selective_attention_listing, ''
    if config.dropout:
        return None, 'dropout of attention weights is not in it'
    try:
        kernel = importlib.import_module(f'kernels.{name}')  # Triton comes with CUDA only
    except Exception as e:  # an old Triton raises AttributeError
        return None, f'it cannot be imported ({one_line(e)})'
    return kernel.selective_attention, unfit(kernel, device, dtype, config.head_size)


def unfit(kernel, device, dtype, D):
    """Why a kernel is not for this device, dtype or head size D, in a few words; '' if it is."""
    if dtype not in kernel.DTYPES:
        return f'it does not take {dtype} here'
    if device.type not in kernel.DEVICES:
        return f'it does not run on {device.type} here'
    if D not in kernel.HEAD_SIZES:
        return f'a head has {D} channels, it takes {kernel.HEAD_SIZES}'
    if device.type == 'cpu':
        return ''
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f'{torch.cuda.get_device_name(device)} is older than compute capability 8.0'
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == 'highest':
        return 'without tensor cores, at full float32 precision, it would be slow'
    return ''


# ---- The check -----------------------------------------------------------------------------------


def check(attention, layer, device, dtype, seed=0):
    """'' if this layer gives the same numbers with `attention` as with model.py's function.

    Else what is wrong, in a few words; see `results`. seed: of the example. Raises ValueError if
    the layer itself fails, as after an edit of model.py.
    """
    for memory_tau in None, 1.0:
        # rounding hides small differences: float32 is tried, too
        for tried in dict.fromkeys((m.F_dtype(dtype), dtype)):
            allowed = tolerance(device, tried)
            args = layer, device, tried, memory_tau, seed
            try:
                expected = results(exact, *args)
            except Exception as e:  # whatever an edited model.py may raise
                raise ValueError(f'model.py fails on an example ({why(e)})') from None
            try:
                parts = errors(results(attention, *args), expected)
            except Exception as e:  # whatever a compiler, a driver or a GPU may raise
                return f'it fails here ({why(e)})'
            for name, (norm, most) in parts.items():
                if not (norm <= allowed and most <= 5 * allowed):  # nan is no better
                    return f'on an example it gives other numbers than this model.py ({name})'
    return ''


def tolerance(device, dtype):
    """The part of the norm by which a kernel may be off. A single number may be by five times this.

    Measured with ten seeds, heads of 32 and 64, qk_norm and SSA, a right kernel is off by 1e-6 in
    float32, by 0.001 in TF32, as GPUs multiply float32, and by 0.004 to 0.009 in bfloat16, in which
    it rounds weights and y; a single number by up to 0.02. A scale that is wrong by 2% gives 0.02
    to 0.3, wrong rules give more.
    """
    if dtype != m.F_dtype(dtype):
        return 0.013
    return 2e-5 if device.type == 'cpu' else 4e-3


def exact(q, k, v, rule, *args, **options):
    """model.py's function in float32 or wider, whatever the dtype of q, k and v."""
    wide = m.F_dtype(q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        return type(rule).attention(q.to(wide), k.to(wide), v.to(wide), rule, *args, **options)


@torch.enable_grad()
def results(attention, layer, device, dtype, memory_tau=None, seed=0):
    """{name: what a function for attention gives in this layer}: y, M and their gradients.

    The layer runs on random inputs that differ in strength between two sequences: in the first,
    nearly all tokens die within the 200 rows, in the second few. Parameters are moved away from
    where they start, as vote_scale, for one, hides at 0 what it does. The gradients are those of
    q, k, v and of parameters that the rule reads. They go no further: linear layers are not the
    kernel's, and SSA's would sum up rounding errors beside which their own gradients are small.
    """
    wide = m.F_dtype(dtype)
    layer = copy.deepcopy(layer).eval().to(wide)
    g = torch.Generator().manual_seed(seed)
    x, dy = torch.randn(2, 2, 200, layer.config.n_embd, generator=g).to(device, wide)
    x[0] *= 1.5
    x[1] *= 0.7
    for p in layer.parameters():
        if p.dim() < 2:
            p.data += 0.5
        else:
            p.data = torch.randn(p.shape, generator=g).to(p) * p.size(1) ** -0.5
    inputs = dict(layer.named_parameters())
    found = {}

    def attend(q, k, v, *args, **options):
        # Every dtype holds the numbers of bfloat16, and products of them are exact in TF32: so a
        # vote near 0, where its gradient jumps, is not rounded to the other side.
        for name, given in dict(q=q, k=k, v=v).items():
            inputs[name] = given.detach().bfloat16().to(given.dtype).requires_grad_()
        y, M = attention(inputs['q'], inputs['k'], inputs['v'], *args, **options)
        found['y'] = y
        return y.to(q.dtype), M

    layer.attention = attend
    pos = torch.arange(x.size(1), device=device)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')  # on a GPU model.py would round as TF32 does
    try:
        with torch.autocast(device.type, dtype, enabled=dtype != wide):
            y, M = layer(x, pos, memory_tau=memory_tau)
        loss = (y * dy).sum()
        if memory_tau is not None:
            found['M'] = M
            # 4: that is most of vote_scale's gradient. Without it, that may be a small sum of large
            # numbers, which rounding changes, and is not compared.
            loss = loss + 4 * M.sum()
        grads = torch.autograd.grad(loss, list(inputs.values()), materialize_grads=True)
    finally:
        torch.set_float32_matmul_precision(precision)
    for name, grad in zip(inputs, grads):
        if grad.dim() or memory_tau is not None:  # see above
            found[f'the gradient of {name}'] = grad
    return found


def errors(found, expected):
    """{name: (error in norm, largest error)}, as parts of the norm and the largest number.

    Raises ValueError for a shape that is not the expected one.
    """
    parts = {}
    for name, want in expected.items():
        m.expect_shape(name, found[name], want.shape)
        wrong = found[name].float() - want
        norm = wrong.norm() / want.float().norm().clamp(min=1e-30)
        most = wrong.abs().max() / want.abs().max().clamp(min=1e-30)
        parts[name] = norm.item(), most.item()
    return parts


def why(e):
    return one_line(f'{type(e).__name__}: {e}', 200)
