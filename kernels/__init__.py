"""Faster functions for what model.py computes, put into a model from outside.

    line = kernels.install(model)       # training: selective attention by cpu.py or gpu.py (Triton)
    kernels.fast_rows(model)            # generation on a CPU: linear layers fast for a single row

The rule: model.py alone says what is computed. A kernel takes the place of model.py's function in a
layer only after this layer has given the same numbers with it: outputs, memory requirement and
gradients, on an example in which tokens die. If it does not, model.py's plain code trains, and
`install` says so in its line. So an edit of model.py always counts, and a kernel that cannot follow
it steps aside.
"""

import copy
import importlib
from functools import partial

import torch
import torch.nn as nn

import model as m
from kernels import linear
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
        return f'attention: {KERNELS[name]}, which gives the numbers of model.py'
    if kernel != 'auto':
        raise ValueError(f'--kernel={kernel} cannot run: {why_not}')
    return f"attention: model.py's plain code, not {KERNELS[name]}: {why_not}"


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


def check(attention, layer, device, dtype):
    """'' if this layer gives the same numbers with `attention` as with model.py's function.

    Else what is wrong, in a few words. The layer runs on random inputs that differ in strength
    between two sequences: in the first, nearly all tokens die within the 200 rows, in the
    second few. Parameters are moved away from where they start, as vote_scale, for one, hides at 0
    what it does. Raises ValueError if the layer itself fails, as after an edit of model.py.
    """
    wide = m.F_dtype(dtype)
    layer = copy.deepcopy(layer).eval().to(wide)
    g = torch.Generator().manual_seed(0)
    x, dy = torch.randn(2, 2, 200, layer.config.n_embd, generator=g).to(device, wide)
    x[0] *= 1.5
    x[1] *= 0.7
    for p in layer.parameters():
        if p.dim() < 2:
            p.data += 0.5
        else:
            p.data = torch.randn(p.shape, generator=g).to(p) * p.size(1) ** -0.5

    def exact(q, k, v, *args, **options):
        """model.py's function on q, k, v rounded as a kernel gets them, and then no more."""
        y, M = type(layer).attention(q.to(wide), k.to(wide), v.to(wide), *args, **options)
        return y.to(q.dtype), M

    tolerances = {wide: 1e-4 if device.type == 'cpu' else 5e-3}
    tolerances.setdefault(dtype, 0.1)  # rounding hides small differences: float32 is tried, too
    for memory_tau in None, 1.0:
        for tried, tolerance in tolerances.items():
            try:
                expected = results(exact, layer, x, dy, memory_tau, tried)
            except Exception as e:  # whatever an edited model.py may raise
                raise ValueError(f'model.py fails on an example ({why(e)})') from None
            try:
                found = results(attention, layer, x, dy, memory_tau, tried)
            except Exception as e:  # whatever a compiler, a driver or a GPU may raise
                return f'it fails here ({why(e)})'
            for name, want in expected.items():
                got = found[name]
                error = (tolerance * want.abs().max()).item()
                if got.shape != want.shape or not torch.allclose(got, want, rtol=0, atol=error):
                    return f'on an example it gives other numbers than this model.py ({name})'
    return ''


@torch.enable_grad()
def results(attention, layer, x, dy, memory_tau, dtype):
    """{name: what a layer computes with this function for attention}: y, M and all gradients."""
    layer.attention = attention
    inputs = {'x': x.requires_grad_(), **dict(layer.named_parameters())}
    pos = torch.arange(x.size(1), device=x.device)
    with torch.autocast(x.device.type, dtype, enabled=dtype != x.dtype):
        y, M = layer(x, pos, memory_tau=memory_tau)
    found = {'y': y}
    loss = (y * dy).sum()
    if memory_tau is not None:
        found['M'] = M
        loss = loss + M.sum()
    grads = torch.autograd.grad(loss, list(inputs.values()), materialize_grads=True)
    for name, grad in zip(inputs, grads):
        found[f'the gradient of {name}'] = grad
    return found


def why(e):
    return one_line(f'{type(e).__name__}: {e}', 200)
