"""Faster functions for what model.py computes, put into a model from outside. Nothing here changes a result.

    line = kernels.install(model)       # training, evaluation: selective attention by cpu.py, or by gpu.py (Triton)
    kernels.fast_rows(model)            # generation on a CPU: linear layers that share a single row among the cores

The rule: model.py alone says what is computed. A kernel takes the place of `model.selective_attention` in a layer only
after it has given the numbers of this model.py with the votes of this layer: outputs, memory requirement and gradients,
on an example in which tokens die. If it does not, model.py's plain code trains, and `install` says so in its line. So
an edit to model.py always counts, and a kernel that cannot follow it steps aside.
"""
import copy
import importlib

import torch
import torch.nn as nn

import model as m
from kernels.linear import Linear

KERNELS = {'auto': 'the fastest that gives the numbers of model.py', 'none': "model.py's plain code",
           'listing': "the paper's T x T listing", 'cpu': 'kernels/cpu.py', 'gpu': 'kernels/gpu.py (Triton)'}


def install(model, kernel='auto', dtype=torch.float32):
    """Choose what computes selective attention in the layers of a GPT. Returns one line that says what, and why.

    kernel: one of KERNELS; dtype: of q, k and v, as autocast will make them. Call it when the model is on its device.
    Raises ValueError for a kernel that is unknown, or that is insisted on ('cpu', 'gpu') and does not pass.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel {kernel!r}: it is one of {', '.join(KERNELS)}")
    layers, device = [block.attn for block in model.transformer.h], model.lm_head.weight.device
    for layer in layers:
        layer.__dict__.pop('attention', None)                   # back to model.py's own
    if not model.config.selective:
        return "attention: torch's scaled_dot_product_attention"
    if kernel == 'none':
        return f'attention: {KERNELS[kernel]}, as --kernel=none asks'
    if kernel == 'listing':                                     # which is model.py, too, so it runs in any case
        differs = check(m.selective_attention_listing, layers[0], device, dtype)
        for layer in layers:
            layer.attention = m.selective_attention_listing
        return f'attention: {KERNELS[kernel]}, as --kernel=listing asks' + f'; but {differs}' * bool(differs)
    name = {'auto': 'gpu' if device.type == 'cuda' else 'cpu'}.get(kernel, kernel)
    why_not = 'dropout of attention weights is not in it' if model.config.dropout else ''
    try:
        attention = importlib.import_module(f'kernels.{name}').selective_attention      # Triton comes with CUDA alone
    except ImportError as e:
        why_not = f'it cannot be imported ({e})'
    for layer in layers:
        why_not = why_not or unfit(name, device, dtype, layer) or check(attention, layer, device, dtype)
    if why_not and kernel != 'auto':
        raise ValueError(f'--kernel={kernel} cannot run: {why_not}')
    if why_not:
        return f"attention: model.py's plain code, not {KERNELS[name]}: {why_not}"
    for layer in layers:
        layer.attention = attention
    return f'attention: {KERNELS[name]}, which gives the numbers of model.py'


def live_share():
    """The share of pairs (row, column) that kernels/cpu.py computed since the last call, None if it did not run.

    Columns that provably no later row can see are dropped; without that it would be 1.
    """
    from kernels import cpu
    return cpu.live.share()


def fast_rows(model):
    """Make the linear layers of a model on a CPU fast for a single row, as in the generation of one text."""
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.device.type == 'cpu':
            module.__class__ = Linear


def unfit(name, device, dtype, layer):
    """Why a kernel is not for this device, dtype or head size, in a few words; '' if it is."""
    if name == 'cpu':
        return '' if device.type == 'cpu' and dtype in (torch.float32, torch.float64) else \
            f'it is for float32 and float64 on a CPU, this is {dtype} on {device.type}'
    from kernels import gpu
    D = layer.config.n_embd // layer.config.n_head
    if device.type != 'cuda' and not gpu.INTERPRETED:
        return f'it is for GPUs, this is {device.type} (with TRITON_INTERPRET=1 set at the start it runs, slowly)'
    if D not in gpu.HEAD_SIZES:
        return f'a head has {D} channels, it takes {gpu.HEAD_SIZES}'
    if dtype not in gpu.DTYPES or gpu.INTERPRETED and dtype == torch.bfloat16:
        return f'it does not take {dtype}' + ' in the interpreter' * gpu.INTERPRETED
    if device.type == 'cuda' and torch.cuda.get_device_capability(device) < (8, 0):
        return f'{torch.cuda.get_device_name(device)} is older than compute capability 8.0'
    if device.type == 'cuda' and dtype == torch.float32 and torch.get_float32_matmul_precision() == 'highest':
        return 'without tensor cores, at full float32 precision, it would be slow'
    return ''


def check(attention, layer, device, dtype):
    """'' if attention gives the numbers of `model.selective_attention` with this layer's votes, else what is wrong.

    q, k and v are random and differ in strength between the two sequences: in the first, nearly all tokens die within
    the example's T rows, in the second few. Parameters that the votes depend on, like vote_scale, are first moved away
    from where they start, as at 0 they may hide what they do.
    """
    layer = copy.deepcopy(layer)
    H, T, D = layer.config.n_head, 200, layer.config.n_embd // layer.config.n_head
    params = list(layer.parameters())
    examples = torch.randn(4, 2, T, H, D, generator=torch.Generator().manual_seed(0))
    examples[:, 0] *= 1.5
    examples[:, 1] *= 0.7

    def run(attention, dtype, memory_tau):
        # heads beside one another in memory, as the model has them
        q, k, v, dy = (x.to(device, dtype).requires_grad_().transpose(1, 2) for x in examples)
        y, M = attention(q, k, v, layer.vote, memory_tau=memory_tau)
        loss = (y.float() * dy).sum() + (M.sum() if memory_tau is not None else 0.0)
        grads = torch.autograd.grad(loss, [q, k, v, *params], allow_unused=True)
        return {'y': y, 'M': M, **{f'the gradient of {name}': g for name, g in
                                   zip(['q', 'k', 'v', *(n for n, _ in layer.named_parameters())], grads)}}

    # bfloat16's rounding hides small differences, so such a kernel is tried in float32, too, on a GPU with TF32's
    tries = [(torch.promote_types(dtype, torch.float32), 1e-4 if device.type == 'cpu' else 5e-3)]
    tries += [(dtype, 0.1)] if dtype in (torch.bfloat16, torch.float16) else []
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        try:
            used = run(m.selective_attention, tries[0][0], 1.0)
        except Exception as e:                                  # whatever an edited model.py may raise
            return f'the votes of this model.py cannot be tried on an example ({_one_line(e)})'
        for name, p in layer.named_parameters():
            if used[f'the gradient of {name}'] is not None:
                p.data += 0.5
        for memory_tau in (None, 1.0):
            expected = run(m.selective_attention, tries[0][0], memory_tau)
            for tried_dtype, tolerance in tries:
                try:
                    found = run(attention, tried_dtype, memory_tau)
                except Exception as e:                          # whatever a compiler, a driver or a GPU may raise
                    return f'it fails here ({_one_line(e)})'
                for name, want in expected.items():
                    got = found[name]
                    if want is None and got is None:
                        continue
                    if want is None or got is None or not (got - want).abs().max() <= tolerance * want.abs().max():
                        return f'on an example it gives other numbers than this model.py ({name})'  # NaN ends here, too
    return ''


def _one_line(e):
    return ' '.join(f'{type(e).__name__}: {e}'.split())[:200]
