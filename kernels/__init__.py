"""Faster functions for what model.py computes, put into a model from outside.

    line = kernels.install(model)       # training: selective attention by cpu.py or gpu.py (Triton)
    kernels.fast_rows(model)            # generation on a CPU: a single row is fast

The rule: model.py alone says what is computed. A kernel takes the place of model.py's function in a
layer only after this layer has given the same numbers with it: outputs, memory requirement and
gradients, on an example in which tokens die. If it does not, model.py's plain code trains, and
`install` says so in its line. So an edit of model.py always takes effect, and a kernel that
does not match it is not used.
"""

import contextlib
import copy
import dataclasses
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
    """Choose the function for selective attention in the layers of a GPT. Returns a line naming it.

    kernel: one of KERNELS; dtype: of q, k and v, as autocast will make them. Call it when the model
    is on its device. Raises ValueError for a kernel that is asked for by name and does not pass,
    and for an edit of model.py that fails on an example.
    """
    layers = [b.attn for b in model.transformer.h if b.attn.selects and b.attn.masks]
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


def fast_rows(model):
    """Make linear layers and attention of a model on a CPU fast for single rows, as in generation.

    Attention stays model.py's where cpu.c gives other numbers or cannot be compiled.
    """
    if model.lm_head.weight.device.type != 'cpu':
        return
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.numel() >= linear.LEAST:
            module.forward = partial(linear.forward, module)
    with contextlib.suppress(Exception):  # whatever an edited model.py may raise
        if same_rows(model, 1) and same_rows(model, -1):
            use_decode(model)


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
    why_not = ''
    if dtype not in kernel.DTYPES:
        why_not = f'it does not take {dtype} here'
    elif device.type not in kernel.DEVICES:
        why_not = f'it does not run on {device.type} here'
    elif config.head_size not in kernel.HEAD_SIZES:
        why_not = f'a head has {config.head_size} channels, it takes {kernel.HEAD_SIZES}'
    return kernel.selective_attention, why_not


# ---- The check -----------------------------------------------------------------------------------


def check(attention, layer, device, dtype, seed=0):
    """'' if this layer gives the same numbers with `attention` as with model.py's function.

    Else what is wrong, in a few words. seed: of the example. Raises ValueError if the layer itself
    fails, as after an edit of model.py.
    """
    # offsets of both signs, as a limit in the rule may hide one of them
    for memory_tau, offset in (None, 0.5), (1.0, 0.5), (1.0, -0.25):
        try:
            given = example(layer, memory_tau, seed, offset)
            expected = results(type(layer).attention, given)
        except Exception as e:  # whatever an edited model.py may raise
            raise ValueError(f'model.py fails on an example ({why(e)})') from None
        # rounding hides small differences: float32 is tried, too
        for tried in dict.fromkeys((m.F_dtype(dtype), dtype)):
            try:
                wrong = errors(results(attention, given, device, tried), expected)
            except Exception as e:  # whatever a compiler, a driver or a GPU may raise
                return f'it fails here ({why(e)})'
            for name, error in wrong.items():
                if not error <= tolerance(device, tried):  # nan is no better
                    return f'on an example it gives other numbers than this model.py ({name})'
    return ''


@torch.no_grad()
def same_rows(model, sign):
    """Whether attention like that of a model gives the same numbers with cpu.decode.

    A small model reads 20 tokens at a budget of 8, one by one, and in one block, which is left to
    model.py's code. sign: of what is added to its parameters, see `check`.
    """
    sizes = dict(n_layer=1, n_inner=8, vocab_size=20, block_size=20)
    config = dataclasses.replace(model.config, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small = type(model)(config).eval()
        for p in small.parameters():
            noise = torch.randn_like(p) / config.n_embd**0.5
            p += sign * noise  # what starts at 0 hides what it does
    use_decode(small)
    policy = 'selective' if config.selective else 'streaming:2'
    idx = torch.arange(20)[None]
    expected, _ = small(idx, idx, cache=m.KVCache(small, 1, 8, policy))
    cache = m.KVCache(small, 1, 8, policy)
    rows = [small(new, cache=cache)[0] for new in idx.split(1, dim=1)]
    return torch.allclose(torch.cat(rows, dim=1), expected, atol=2e-5)


def use_decode(model):
    for module in model.modules():
        if type(module) is m.CausalSelfAttention:
            module.forward = partial(cpu.decode, module)


def tolerance(device, dtype):
    """The part of the norm by which a kernel may be off.

    Measured with ten seeds, heads of 32 and 64, with and without vote_scale, a right kernel is off
    by 1e-6 in float32, by 0.001 in TF32, as GPUs multiply float32, and by 0.002 to 0.004 in
    bfloat16, in which it rounds weights and y. A scale that is wrong by 2% gives 0.02, wrong rules
    give 0.3 and more.
    """
    if dtype != m.F_dtype(dtype):
        return 0.013
    return 2e-5 if device.type == 'cpu' else 4e-3


def example(layer, memory_tau, seed=0, offset=0.5):
    """A gradient of y, q, k and v, and the other arguments that a layer gives its attention.

    The numbers are random and differ in strength between two sequences: in the first, nearly all
    tokens die within the 200 rows, in the second few. Parameters of the layer are moved away from
    where they start, as vote_scale, for one, hides at 0 what it does.
    """
    layer = copy.deepcopy(layer).eval().float().cpu()
    for p in layer.parameters():
        p.data += offset
    g = torch.Generator().manual_seed(seed)
    strength = torch.tensor([1.5, 0.7]).view(2, 1, 1, 1)
    given = []

    def attend(q, k, v, *args, **options):
        for x in v, q, k, v:  # each with the strides that it has in training
            numbers = strength * torch.empty_like(x).normal_(generator=g)
            # Every dtype holds the numbers of bfloat16, and products of them are exact in TF32: so
            # a vote near 0, where its gradient jumps, is not rounded to the other side.
            given.append(numbers.bfloat16().float())
        given.extend([args, options])
        return type(layer).attention(q, k, v, *args, **options)

    layer.attention = attend
    x = torch.randn(2, 200, layer.config.n_embd, generator=g)
    layer(x, torch.arange(200), memory_tau=memory_tau)
    return given


@torch.enable_grad()
def results(attention, given, device='cpu', dtype=torch.float32):
    """{name: what a function for attention gives}: y, M and their gradients.

    given: see `example`. The gradients are those of q, k, v and of parameters that the rule reads.
    On the CPU no product is rounded as TF32 does.
    """
    *tensors, (rule, *args), options = given
    rule.to(device)
    dy, q, k, v = [x.to(device, dtype).requires_grad_() for x in tensors]
    with torch.autocast(q.device.type, dtype, enabled=dtype.itemsize < 4):
        y, M = attention(q, k, v, rule, *args, **options)
    found = {'y': y}
    inputs = {'q': q, 'k': k, 'v': v}
    loss = (y * dy).sum()
    if M is not None:
        found['M'] = M
        # 4: that is most of vote_scale's gradient. Without it, that may be a small sum of large
        # numbers, which rounding changes, and is not compared.
        loss = loss + 4 * M.sum()
        inputs.update(rule.named_parameters())
    grads = torch.autograd.grad(loss, list(inputs.values()), materialize_grads=True)
    for name, grad in zip(inputs, grads):
        found[f'the gradient of {name}'] = grad
    return found


def errors(found, expected):
    """{name: norm of the error}, a part of what is expected. ValueError for a wrong shape."""
    parts = {}
    for name, want in expected.items():
        m.expect_shape(name, found[name], want.shape)
        wrong = found[name].to(want) - want
        parts[name] = (wrong.norm() / want.norm().clamp(min=1e-30)).item()
    return parts


def why(e):
    return one_line(f'{type(e).__name__}: {e}', 200)
