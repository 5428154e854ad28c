"""What selective attention costs and context pruning saves, as ratios of what one run measured.

    python -m lab.bench                         everything, two hours on two CPU cores
    python -m lab.bench --what=attention,step --shapes=small --lengths=256,512      a minute or two
    python -m lab.bench --out_dir=out/a,out/b   trained selective models, each at its own length

    attention   attention alone, forward, and with backward; `live` is the share that is computed
    step        a whole training step, on a GPU also its memory beyond weights and optimizer
    decode      one token from a KV cache, beside transformers' GPT-2 where that is installed
    generate    1,000 tokens at the last length: with a cache, within budgets, and without a cache,
                as nanoGPT does it

Times are medians of rounds in which the cases take turns (A B C, A B C, …), after a round to warm
up. On a CPU all is measured with the default number of threads, then with one. The ratio is
to the first case of a group. The table goes to --to as JSON, too: `rows`, and `one_thread`.

Random weights mask little, as at the start of training: they say nothing about what selection
saves. Trained ones get their validation data.
"""

import itertools
import json
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
LONGEST = 2048  # T of attention alone by model.py's own functions: they take T x T memory


@dataclass
class BenchConfig:
    what: str = option('attention,step,decode,generate', 'parts, with commas')
    out_dir: str = option('', "folders of trained selective runs, with commas; '': random weights")
    shapes: str = option('small,124m', 'sizes of the models with random weights')
    lengths: str = option('256,512,1024,2048,4096', 'context lengths T of these, from 64 on')
    tokens: int = option(4096, 'tokens of a batch of B = tokens / T, at least 1', low=1)
    rounds: int = option(5, 'rounds of which the median is taken', low=1, high=60)
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


def forms(layer, T):
    """{case: function for the attention of a layer}.

    A layer without votes has standard attention in every case.
    """
    found = {'standard': standard, 'selective': layer.attention}
    if T <= LONGEST:
        found['selective, rows'] = m.selective_attention
        found['selective, listing'] = m.selective_attention_listing
    if not layer.selects:
        found = dict.fromkeys(found, standard)
    return found


def attention_part(subject):
    """Each layer, and their sum; of random weights the first layer alone."""
    totals = Counter()
    forward = Counter()
    tau = subject.memory_tau
    inputs = subject.queries_keys_values()
    for l, layer in enumerate(subject.layers):
        cases = {}
        forwards = {}
        for case, attention in forms(layer, subject.T).items():
            cases[case] = forward_backward(attention, inputs[l], layer, tau)
            forwards[case] = partial(attention, *inputs[l], layer, memory_tau=tau)
        kernels.live_share()
        cases['selective']()
        live = kernels.live_share() or 1.0
        yield f'layer {l}', '%', {'live': 100 * live}
        taken = subject.times(cases)
        yield f'layer {l}', 'ms', taken
        totals.update(taken)  # a Counter adds
        forward.update(subject.times(forwards))
        if subject.random:
            break
    yield 'forward', 'ms', forward
    yield 'attention', 'ms', totals


def training_step(case, cfg, source, T):
    """A function that trains one of MODELS. The learning rate is 0, so the weights stay."""
    subject = measure.Subject(cfg, source, T, *MODELS[case])
    gpt = subject.gpt.train()
    if 'cuda' in cfg.device:
        gpt.compile()  # as train.py does
    optimizers = gpt.configure_optimizers(0.1, 0.0, (0.9, 0.95), cfg.device)

    def once():
        with devices.autocast(cfg.device, subject.dtype):
            _, *losses = gpt(subject.x, subject.y, memory_tau=subject.memory_tau)
        sum(losses).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return once


def step_part(subject, cases=tuple(MODELS)):
    """Of a trained model its own step, and one without votes. A GPU knows more of it."""
    if not subject.random:
        cases = 'standard', 'selective'
    steps = {case: training_step(case, subject.cfg, subject.source, subject.T) for case in cases}
    taken = subject.times(steps)
    yield 'step', 'ms', taken
    if 'cuda' in subject.cfg.device:
        rates = {case: 1000 * subject.B * subject.T / taken[case] for case in cases}
        yield 'step', 'tokens/s', rates
        yield 'step', 'MFU', {case: devices.mfu(subject.gpt, rates[case]) or 0.0 for case in cases}
        yield 'step', 'MiB', {case: measure.peak_memory(steps[case]) for case in cases}


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
    other = transformers.GPT2LMHeadModel(config).to(gpt.lm_head.weight).eval()  # device, dtype
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
    parts = listed('what', cfg.what, PARTS)
    sources = listed('shapes', cfg.shapes, measure.SHAPES)
    lengths = settings.numbers(cfg.lengths, '--lengths', low=64, high=2**20)
    files.check_output(cfg.to, '.json', '"machine"')
    cfg.device = devices.pick_device(cfg.device)
    if cfg.out_dir:
        sources = cfg.out_dir.split(',')
        lengths = [0]  # a run has its own
    for source in sources:
        print(f'{source}: {measure.Subject(cfg, source, lengths[0]).kernel}')
    if not cfg.out_dir:
        print('The weights are random and mask little. For what selection saves, give --out_dir.')
    print(f'{measure.machine(cfg)}, torch {torch.__version__}, medians of {cfg.rounds} rounds')
    counts = [torch.get_num_threads()]
    if cfg.device == 'cpu' and counts[0] > 1:
        counts.append(1)
    tables = {count: [] for count in counts}
    for part, source, T in itertools.product(parts, sources, lengths):
        if part == 'generate' and T != lengths[-1]:  # it is slow
            continue
        for count in counts:
            torch.set_num_threads(count)
            subject = measure.Subject(cfg, source, T)
            for name, unit, values in PARTS[part](subject):
                tables[count] += measure.group(subject, name, unit, values)
    torch.set_num_threads(counts[0])
    content = {
        'machine': measure.machine(cfg),
        'torch': torch.__version__,
        'rounds': cfg.rounds,
        'command': ' '.join(sys.argv[1:]),
        'rows': tables[counts[0]],
        'one_thread': tables.get(1, []),
    }
    files.write_file(cfg.to, json.dumps(content, indent=1))
    print(cfg.to)


if __name__ == '__main__':
    settings.run(main)
