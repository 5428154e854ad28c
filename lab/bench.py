"""What selective attention costs and context pruning saves, as ratios of what one run measured.

    python -m lab.bench                         everything, most of an hour on two CPU cores
    python -m lab.bench --quick                 small sizes, under two minutes
    python -m lab.bench --what=step,memory --shapes=124m --lengths=1024,2048
    python -m lab.bench --out_dir=out/a,out/b   trained selective models, each at its own length

    attention   attention alone, forward and backward; `live` is the share that is computed
    step        a whole training step
    memory      peak memory of a training step
    decode      one token from a KV cache, beside transformers' GPT-2 where that is installed
    generate    1,000 tokens at the last length: with a cache, within budgets, and without a cache,
                as nanoGPT does it

Times are medians of rounds in which the cases take turns (A B C, A B C, …), after a round to warm
up. Peak memory is that of a process of its own on a CPU, and torch's on CUDA. The ratio is to the
first case of a group. The table goes to --to as JSON, too.

Random weights mask little, as at the start of training. Trained ones get their validation data.
"""

import itertools
import json
import platform
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

from support import devices, files, settings  # before torch, see support/__init__.py

import torch
import torch.nn.functional as fn

import kernels
import model as m
from lab import measure
from support.settings import UserError, option

# What trains: SSA's letters, and the kernel of selective attention; without one nothing votes.
MODELS = {
    'standard': ('', ''),
    'selective': ('', 'auto'),
    'selective, listing': ('', 'listing'),
    'SSA': ('qv', ''),
    'selective + SSA': ('qv', 'auto'),
}
LISTING = 2048  # the longest T of the listing in attention alone: it takes T x T memory


@dataclass
class BenchConfig:
    what: str = option('attention,step,memory,decode,generate', 'parts, with commas')
    out_dir: str = option('', "folders of trained selective runs, with commas; '': random weights")
    shapes: str = option('small,124m', 'sizes of the models with random weights')
    lengths: str = option('256,512,1024,2048,4096', 'context lengths T of these, from 64 on')
    tokens: int = option(4096, 'tokens of a batch of B = tokens / T, at least 1', low=1)
    rounds: int = option(5, 'rounds of which the median is taken', low=1, high=60)
    quick: bool = option(False, 'the small shape, two lengths, three rounds')
    device: str = option('auto', "'cuda', 'mps', 'cpu'")
    to: str = option('out/bench.json', 'the table as JSON')


# ---- The parts: generators of groups, (name, unit, {case: value}) --------------------------------


def standard(q, k, v, rule, memory_tau):
    """torch's own attention, as if it were model.selective_attention: y, and no M."""
    return fn.scaled_dot_product_attention(q, k, v, is_causal=True), None


def forward_backward(attention, qkv, layer, memory_tau):
    """A function that runs attention forward and backward, and returns y."""
    qkv = [x.detach().requires_grad_() for x in qkv]

    def once():
        y, M = attention(*qkv, layer, memory_tau=memory_tau)
        loss = y.sum()
        if M is not None:
            loss = loss + M.sum()
        torch.autograd.grad(loss, qkv)
        return y

    return once


def forms(layer, qkv, memory_tau):
    """{case: function that runs the attention of a layer on qkv}.

    A layer without votes has standard attention in every case.
    """
    found = {
        'standard': standard,
        'selective': layer.attention,
        'selective, rows': m.selective_attention,
        'selective, listing': m.selective_attention_listing,
    }
    if qkv[0].size(2) > LISTING:
        del found['selective, listing']
    for case, attention in found.items():
        if not layer.selects:
            attention = standard
        found[case] = forward_backward(attention, qkv, layer, memory_tau)
    return found


def attention_part(subject):
    """Each layer, and their sum; of random weights the first layer alone."""
    totals = Counter()
    inputs = subject.queries_keys_values()
    for l, layer in enumerate(subject.layers):
        cases = forms(layer, inputs[l], subject.memory_tau)
        kernels.live_share()
        cases['selective']()
        live = kernels.live_share() or 1.0
        yield f'layer {l}', '%', {'live': 100 * live}
        taken = subject.times(cases)
        yield f'layer {l}', 'ms', taken
        totals.update(taken)  # a Counter adds
        if subject.random:
            break
    yield 'attention', 'ms', totals


def training_step(case, cfg, source, T):
    """A function that trains one of MODELS. The learning rate is 0, so the weights stay."""
    subject = measure.Subject(cfg, source, T, *MODELS[case])
    gpt = subject.gpt.train()
    optimizers = gpt.configure_optimizers(0.1, 0.0, (0.9, 0.95), cfg.device)

    def once():
        with devices.autocast(cfg.device, subject.dtype):
            _, *losses = gpt(subject.x, subject.y, memory_tau=subject.memory_tau)
        sum(losses).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return once


def training_steps(subject):
    """{case: function that makes a training step}, of a trained model with votes and without."""
    cases = list(MODELS)
    if not subject.random:
        cases = 'standard', 'selective'
    size = subject.cfg, subject.source, subject.T
    return {case: partial(training_step, case, *size) for case in cases}


def step_part(subject):
    steps = {case: make() for case, make in training_steps(subject).items()}
    yield 'step', 'ms', subject.times(steps)


def memory_part(subject):
    steps = training_steps(subject)
    device = subject.cfg.device
    yield 'memory', 'MiB', {case: measure.peak_memory(steps[case], device) for case in steps}


def caches(subject):
    """{case: budgets}."""
    K = max(2, subject.T // 32)
    return {'full cache': None, f'budgets of {K}': K}


def transformers_step(gpt, text, new):
    """A step of transformers' GPT-2 of the size of gpt: it reads new (B, 1) after text (1, n)."""
    import transformers

    c = gpt.config
    config = transformers.GPT2Config(
        n_layer=c.n_layer,
        n_head=c.n_head,
        n_embd=c.n_embd,
        vocab_size=c.vocab_size,
        n_positions=c.block_size,
        bos_token_id=0,
        eos_token_id=0,
    )
    other = transformers.GPT2LMHeadModel(config).to(text.device).eval()
    cache = other(text, use_cache=True, logits_to_keep=1).past_key_values
    cache.batch_repeat_interleave(len(new))

    def once():
        other(new, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return once


@torch.no_grad()
def decode_part(subject):
    """A step with a full cache and with budgets of T/32, and how large the caches are."""
    gpt = subject.gpt
    kernels.fast_rows(gpt)
    text = subject.x[:1, : -subject.cfg.rounds - 2]
    for B in 1, 32:
        new = text[:, :1].repeat(B, 1)
        steps = {}
        sizes = {}
        for case, budgets in caches(subject).items():
            cache = m.KVCache(gpt, 1, budgets)
            m.prefill(gpt, text, cache)
            cache.repeat(B)
            steps[case] = partial(gpt, new, cache=cache)
            sizes[case] = cache.bytes() / 2**20
        if find_spec('transformers'):
            steps["transformers' GPT-2"] = transformers_step(gpt, text, new)
        yield f'decode{B}', 'ms', subject.times(steps)
        yield f'cache{B}', 'MiB', sizes


@torch.no_grad()
def generate_part(subject):
    """Tokens a second in 1,000 steps after the first token, and in 100 steps of batches of 32.

    Without a cache, a step costs more the longer the text: the one in the middle stands for all.
    """
    gpt = subject.gpt
    kernels.fast_rows(gpt)
    for B, steps in (1, 1000), (32, 100):
        n = min(steps, subject.T - 1)
        text = subject.x[:1, :n].repeat(B, 1)
        cases = {}
        for case, budgets in caches(subject).items():
            cases[case] = partial(gpt.generate, text[:, :1], n, budgets=budgets)
        cases['no cache (nanoGPT)'] = partial(gpt, text[:, : n // 2])
        taken = subject.times(cases, rounds=1)
        taken['no cache (nanoGPT)'] *= n
        rates = {case: 1000 * B * n / ms for case, ms in taken.items()}
        yield f'generate{B}', 'tokens/s', rates


# ---- The command ---------------------------------------------------------------------------------

PARTS = {
    'attention': attention_part,
    'step': step_part,
    'memory': memory_part,
    'decode': decode_part,
    'generate': generate_part,
}


def listed(option, text, known):
    """The words of an option's list; UserError for one that is unknown."""
    words = text.split(',')
    for word in words:
        if word not in known:
            raise UserError(f'--{option}: {word!r} is not one of {", ".join(known)}')
    return words


def main():
    cfg = settings.parse(BenchConfig)
    if cfg.quick:
        cfg.shapes = 'small'
        cfg.lengths = '256,512'
        cfg.rounds = 3
    parts = listed('what', cfg.what, PARTS)
    sources = listed('shapes', cfg.shapes, measure.SHAPES)
    lengths = settings.numbers(cfg.lengths, '--lengths', low=64, high=2**20)
    files.check_output(cfg.to, '.json', '"machine"')
    cfg.device = devices.pick_device(cfg.device)
    if cfg.out_dir:
        sources = cfg.out_dir.split(',')
        lengths = [0]  # a run has its own
        for out_dir in sources:
            print(f'{out_dir}: {measure.Subject(cfg, out_dir, 0).kernel}')
    machine = f'{platform.machine()}, {torch.get_num_threads()} threads'
    if 'cuda' in cfg.device:
        machine = torch.cuda.get_device_name()
    print(f'{machine}, torch {torch.__version__}, medians of {cfg.rounds} rounds')
    rows = []
    for part, source, T in itertools.product(parts, sources, lengths):
        if part == 'generate' and T != lengths[-1]:  # it is slow
            continue
        subject = measure.Subject(cfg, source, T)
        for name, unit, values in PARTS[part](subject):
            rows += measure.group(subject, name, unit, values)
    content = {
        'machine': machine,
        'torch': torch.__version__,
        'rounds': cfg.rounds,
        'command': ' '.join(sys.argv[1:]),
        'rows': rows,
    }
    files.write_file(cfg.to, json.dumps(content, indent=1))
    print(cfg.to)


if __name__ == '__main__':
    settings.run(main)
