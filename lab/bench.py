"""What selective attention costs and context pruning saves, as ratios of what one run measured.

    python -m lab.bench                         everything, most of an hour on two CPU cores
    python -m lab.bench --quick                 small sizes, under two minutes
    python -m lab.bench --what=step,memory --shapes=124m --lengths=1024,2048
    python -m lab.bench --out_dir=out/a,out/b   trained selective models, each at its own length

    attention   attention alone, forward and backward; `live` is the share that is computed
    step        a whole training step
    memory      peak memory of a training step
    decode      one token from a KV cache, beside transformers' GPT-2 where that is installed
    prefill     a prompt of T tokens is read
    generate    1,000 tokens at the last length: with a cache, within budgets, and without a cache,
                as nanoGPT does it
    profile     the operators that attention consists of (only when asked for)
    forget      what a cache without budgets could drop at no loss (only when asked for)

Times are medians of rounds in which the cases take turns (A B C, A B C, …), after a round to warm
up. Peak memory is that of a process of its own on a CPU, and torch's on CUDA. The lines `growth`
give the exponent p of time or memory ~ T^p for each sequence, fitted over the lengths. The ratio is
to the first case of a group. The table goes to --to as JSON, too.

Random weights mask little, as at the start of training. Trained ones get their validation data.
"""

import json
import math
import platform
import re
import sys
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
BATCHES = 1, 32  # of generation
LISTING = 2048  # the longest T of the listing in attention alone: it takes T x T memory


@dataclass
class BenchConfig:
    what: str = option('attention,step,memory,decode,prefill,generate', 'parts, with commas')
    out_dir: str = option('', "folders of trained selective runs, with commas; '': random weights")
    shapes: str = option('small,124m', 'sizes of the models with random weights')
    lengths: str = option('256,512,1024,2048,4096', 'context lengths T of these [64 to 2**20]')
    tokens: int = option(4096, 'tokens of a batch of B = tokens / T, at least 1', low=1)
    rounds: int = option(5, 'rounds of which the median is taken', low=1, high=60)
    quick: bool = option(False, 'the small shape, two lengths, three rounds')
    device: str = option('auto', "'cuda', 'mps', 'cpu'")
    to: str = option('out/bench.json', 'the table as JSON')


# ---- Attention and training ----------------------------------------------------------------------


def standard(q, k, v, rule, memory_tau):
    """torch's own attention, as if it were model.selective_attention: y, and no M."""
    return fn.scaled_dot_product_attention(q, k, v, is_causal=True), None


def forward_backward(attention, qkv, rule, memory_tau):
    """A function that runs attention forward and backward, and returns y."""
    qkv = [x.detach().requires_grad_() for x in qkv]

    def once():
        y, M = attention(*qkv, rule, memory_tau=memory_tau)
        loss = y.sum()
        if M is not None:
            loss = loss + M.sum()
        torch.autograd.grad(loss, qkv)
        return y

    return once


def layers(subject):
    """For each layer {case: function that runs its attention}; for random ones, the first layer."""
    for layer, qkv in zip(subject.layers, subject.queries_keys_values()):
        forms = {
            'standard': standard,
            'selective': layer.attention,
            'selective, rows': m.selective_attention,
        }
        if subject.T <= LISTING:
            forms['selective, listing'] = m.selective_attention_listing
        if not layer.selects:
            forms = dict.fromkeys(forms, standard)
        cases = {}
        for case, attention in forms.items():
            cases[case] = forward_backward(attention, qkv, layer, subject.memory_tau)
        yield cases
        if subject.random:
            break


def attention_part(table, subject):
    totals, live = {}, {}
    for l, cases in enumerate(layers(subject)):
        kernels.live_share()
        cases['selective']()
        live[f'layer {l}'] = 100 * (kernels.live_share() or 1.0)
        named = {}
        for case, ms in measure.times(cases, subject.cfg.rounds, subject.cfg.device).items():
            named[f'{case}, layer {l}'] = ms
            totals[case] = totals.get(case, 0.0) + ms
        if not subject.random:
            table.group('layer', subject, 'ms', named)
    table.group('attention', subject, 'ms', totals)
    table.group('live', subject, '%', live)


def profile_part(table, subject):
    """The operators of the first layer's attention, as torch prints them."""
    cases = next(layers(subject))
    for case in 'standard', 'selective':
        cases[case]()
        with torch.profiler.profile() as profile:
            cases[case]()
        operators = profile.key_averages().table('self_cpu_time_total', row_limit=8)
        print(f'{subject.source}, T = {subject.T}, {case}\n{operators}')


def step_case(case, cfg, source, T):
    """A function that trains one of MODELS. The learning rate is 0, so the weights stay."""
    ssa, kernel = MODELS[case]
    subject = measure.Subject(cfg, source, T, ssa)
    memory_tau = subject.memory_tau
    if kernel:
        subject.install(kernel)
    else:
        memory_tau = None
        for layer in subject.layers:
            layer.selects = False
    gpt = subject.gpt.train()
    optimizers = gpt.configure_optimizers(0.1, 0.0, (0.9, 0.95), cfg.device)

    def once():
        with devices.autocast(cfg.device, subject.dtype):
            _, *losses = gpt(subject.x, subject.y, memory_tau=memory_tau)
        sum(losses).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return once


def models(subject):
    """Which of MODELS are compared: for a trained one whether it selects, as it has SSA or not."""
    if subject.random:
        return list(MODELS)
    return ['standard', 'selective']


def step_part(table, subject):
    cases = {}
    for case in models(subject):
        cases[case] = step_case(case, subject.cfg, subject.source, subject.T)
    table.time('step', subject, cases)


def memory_part(table, subject):
    peaks = {}
    for case in models(subject):
        make = partial(step_case, case, subject.cfg, subject.source, subject.T)
        peaks[case] = measure.peak_memory(make, subject.cfg.device)
    table.group('memory', subject, 'MiB', peaks)


# ---- What could be forgotten ---------------------------------------------------------------------


@torch.no_grad()
def still_needed(layer, q, k):
    """Which tokens a cache without budgets must keep after the last row, whatever follows: (B, T).

    q, k (B, H, T, D), as attention gets them in this layer. By the bound of kernels/cpu.py, which
    needs the longest query to come: qk_norm bounds it. Raises UserError for a layer without, and if
    F falls, as then what is masked may come back.
    """
    if not layer.config.qk_norm or layer.config.ssa:
        raise UserError('forget: only qk_norm, without SSA, bounds the queries that may follow')
    B, _, T, D = q.shape
    i = torch.arange(T, device=q.device)
    F = torch.zeros(B, T, device=q.device)
    _, F, _ = m.attend(q[:, :1], k[:, :1], k[:, :1], F, i, i[None], layer)  # (B, T+1, T)
    if (F.diff(dim=1) < 0).any():
        raise UserError('forget: F falls here, so what is masked may come back')
    # an RMS-normalised vector is √D long before its weights, and rotation keeps it so
    longest_q = layer.q_norm.weight.abs().max()  # divided by √D, as in the logits
    longest_k = D**0.5 * layer.k_norm.weight.abs().max()
    k_norm = k.norm(dim=3)
    # the least denominator: two logits are of keys as long as can be, the third is of token 0
    two = math.log(2) - longest_q * longest_k
    least = torch.logaddexp(two, -longest_q * k_norm[:, :, :1])
    most = (longest_q * k_norm - least).amax(dim=1) - F[:, -1]  # log of the largest P to come
    needed = most >= math.log(torch.finfo(q.dtype).eps / 2 / T)
    needed[:, 0] = True  # token 0 is never masked
    return needed


def forget_part(table, subject):
    needed = {'full cache': subject.T}
    for l, (layer, (q, k, _)) in enumerate(zip(subject.layers, subject.queries_keys_values())):
        if layer.selects:
            needed[f'layer {l}'] = still_needed(layer, q, k).sum().item() / subject.B
    table.group('forget', subject, 'tokens', needed)


# ---- Generation ----------------------------------------------------------------------------------


def filled(gpt, B, budgets, text):
    """A KV cache that has read text (1, n), the same in each of B sequences."""
    cache = m.KVCache(gpt, 1, budgets)
    m.prefill(gpt, text, cache)
    cache.repeat(B)
    return cache


class GPT2:
    """transformers' GPT-2 of the size of gpt, whose cache has read text (1, n) in B sequences."""

    def __init__(self, gpt, B, text):
        import transformers

        sizes = {name: getattr(gpt.config, name) for name in measure.SHAPES['small']}
        sizes |= {'n_positions': gpt.config.block_size, 'bos_token_id': 0, 'eos_token_id': 0}
        config = transformers.GPT2Config(**sizes)
        self.model = transformers.GPT2LMHeadModel(config).to(text.device).eval()
        self.cache = self.model(text, use_cache=True, logits_to_keep=1).past_key_values
        self.cache.batch_repeat_interleave(B)

    def step(self, new):
        """Read the tokens new (B, 1), and forget them again."""
        self.model(new, past_key_values=self.cache, use_cache=True)
        self.cache.crop(-1)


@torch.no_grad()
def decode_part(table, subject):
    """A step with a full cache and with budgets of T/32, and how large the caches are."""
    gpt, K = subject.gpt, max(2, subject.T // 32)
    kernels.fast_rows(gpt)
    text = subject.x[:1, : -subject.cfg.rounds - 2]
    for B in BATCHES:
        new = text[:, :1].repeat(B, 1)
        steps, sizes = {}, {}
        for case, budgets in {'full cache': None, f'budgets of {K}': K}.items():
            cache = filled(gpt, B, budgets, text)
            steps[case] = partial(gpt, new, cache=cache)
            sizes[f'{case}, its size'] = cache.bytes() / 2**20
        if find_spec('transformers'):
            steps["transformers' GPT-2, its cache"] = partial(GPT2(gpt, B, text).step, new)
        table.time(f'decode{B}', subject, steps)
        table.group(f'decode{B}', subject, 'MiB', sizes)


@torch.no_grad()
def prefill_part(table, subject):
    """Blocks of rows over a full cache, the same within budgets of T/64, and all rows at once."""
    gpt, text, K = subject.gpt, subject.x[:1], max(2, subject.T // 64)
    cases = {
        'full cache': partial(filled, gpt, 1, None, text),
        f'budgets of {K}': partial(filled, gpt, 1, K, text),
        'all at once, no cache': partial(gpt, text),
    }
    table.time('prefill', subject, cases)


@torch.no_grad()
def generate_part(table, subject):
    """Tokens a second in 1,000 steps after the first token, and in 100 steps of batches of 32.

    Without a cache, a step costs more the longer the text: the one in the middle stands for all.
    """
    gpt, K = subject.gpt, max(2, subject.T // 32)
    kernels.fast_rows(gpt)
    for B, steps in zip(BATCHES, (1000, 100)):
        n = min(steps, subject.T - 1)
        text = subject.x[:1].repeat(B, 1)
        cases = {
            'full cache': partial(gpt.generate, text[:, :1], n),
            f'budgets of {K}': partial(gpt.generate, text[:, :1], n, budgets=K),
            'no cache (nanoGPT)': partial(gpt, text[:, : n // 2]),
        }
        taken = measure.times(cases, 1, subject.cfg.device)
        taken['no cache (nanoGPT)'] *= n
        rates = {case: 1000 * B * n / ms for case, ms in taken.items()}
        table.group(f'generate{B}', subject, 'tokens/s', rates)


# ---- The command ---------------------------------------------------------------------------------

PARTS = {
    'attention': attention_part,
    'step': step_part,
    'memory': memory_part,
    'decode': decode_part,
    'prefill': prefill_part,
    'generate': generate_part,
    'profile': profile_part,
    'forget': forget_part,
}


def listed(option, text, known):
    """The words of an option's list; UserError for one that is unknown."""
    words = text.split(',')
    for word in words:
        if word not in known:
            raise UserError(f'--{option}: {word!r} is not one of {", ".join(known)}')
    return words


def listed_lengths(text):
    for word in text.split(','):
        if not re.fullmatch('[0-9]{2,7}', word) or not 64 <= int(word) <= 2**20:
            raise UserError(f'--lengths: {word!r} is not a whole number from 64 to {2**20}')
    return [int(word) for word in text.split(',')]


def main():
    cfg = settings.parse(BenchConfig)
    if cfg.quick:
        cfg.shapes, cfg.lengths, cfg.rounds = 'small', '256,512', 3
    parts = listed('what', cfg.what, PARTS)
    sources = listed('shapes', cfg.shapes, measure.SHAPES)
    lengths = listed_lengths(cfg.lengths)
    files.check_output(cfg.to, '.json', '"machine"')
    cfg.device = devices.pick_device(cfg.device)
    if cfg.out_dir:
        sources, lengths = cfg.out_dir.split(','), [0]
        for out_dir in sources:
            subject = measure.Subject(cfg, out_dir, 0)
            print(f'{out_dir}: T = {subject.T}, {subject.install("auto")}')
    machine = f'{platform.machine()}, {torch.get_num_threads()} threads'
    if 'cuda' in cfg.device:
        machine = torch.cuda.get_device_name()
    print(f'{machine}, torch {torch.__version__}, medians of {cfg.rounds} rounds')
    table = measure.Table()
    for part in parts:
        chosen = lengths
        if part == 'generate':  # it is slow
            chosen = lengths[-1:]
        for source in sources:
            for T in chosen:
                PARTS[part](table, measure.Subject(cfg, source, T))
    table.print_growth(('attention', 'step', 'memory'))
    content = {'machine': machine, 'torch': torch.__version__, 'rounds': cfg.rounds}
    content |= {'command': ' '.join(sys.argv[1:]), 'rows': table.rows}
    files.write_file(cfg.to, json.dumps(content, indent=1))
    print(cfg.to)


if __name__ == '__main__':
    settings.run(main)
