"""What selective attention costs and context pruning saves, as ratios of two things measured in one run.

    python -m lab.bench                         everything, about half an hour on two CPU cores
    python -m lab.bench --quick                 small sizes, under two minutes
    python -m lab.bench --what=step,memory --shapes=124m --lengths=1024,2048
    python -m lab.bench --out_dir=out/a,out/b   attention, step and memory of trained models, each at its own length

    attention   attention alone, forward and backward          step      a whole training step
    memory      peak memory of a training step                 decode    one token from a KV cache
    prefill     attention while a prompt is read               generate  1,000 tokens: cache, budgets, nanoGPT's way
    profile     the operators that attention alone consists of (only when asked for)
    forget      of trained models: what a cache without budgets could drop at no loss (only when asked for)

Times are medians of rounds in which the cases take turns (A B C, A B C, ...), after a round to warm up. Peak memory
is that of a process of its own on a CPU, and torch's on CUDA. The lines `growth` give the exponent p of time or memory
~ T^p, fitted over the lengths. The ratio is to the first case of a group. The table goes to --to as JSON, too.

Random weights mask little, as at the start of training. With --out_dir, queries, keys and values are those of trained
models on their validation data; `live` is the share of attention that is computed, the rest being masked for good.
"""
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as fn

import kernels
import model as m
from lab import trained
from lab.measure import Table, synchronize, times
from lab.peers import GPT2, XTransformers, transformers, x_transformers
from support import devices, files, settings
from support.settings import UserError

SHAPES = {'small': dict(n_layer=4, n_head=4, n_embd=128, vocab_size=257),
          '124m': dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50304)}
MODELS = {'standard': {}, 'selective': dict(selective=True), 'SSA': dict(ssa='qv'),
          'selective + SSA': dict(selective=True, ssa='qv')}


@dataclass
class BenchConfig:
    what: str = 'attention,step,memory,decode,prefill,generate'     # which parts, with commas
    out_dir: str = ''               # trained selective runs, with commas; '': random weights
    shapes: str = 'small,124m'      # 'small': 4 layers of 4 heads of 32; '124m': 12 layers of 12 heads of 64
    lengths: str = '256,512,1024,2048,4096'     # context lengths T [list of 64 to 2**20]
    tokens: int = 4096              # of a batch; the batch size is tokens / T, at least 1 [1 to 2**24]
    rounds: int = 5                 # of which the median is taken [1 to 1000]
    clock: str = 'wall'             # 'wall' or 'cpu': time of the process, steadier beside other work; one thread then
    quick: bool = False             # the small shape, two lengths, three rounds
    device: str = 'auto'            # 'cuda', 'mps', 'cpu'
    to: str = 'out/bench.json'      # the table as JSON
    case: str = ''                  # used by the part `memory` itself, to measure one case in a process of its own


# ----------------------------------------------------------------------------------------------------------------------
# What is compared


def selective(q, kernel):
    """Selective attention of a layer with this kernel, as a function of q, k, v like q; None where it cannot run."""
    _, H, _, D = q.shape
    gpt = m.GPT(m.GPTConfig(block_size=2, vocab_size=2, n_layer=1, n_head=H, n_embd=H * D, selective=True)).to(q.device)
    try:
        kernels.install(gpt, kernel, q.dtype)
    except ValueError:
        return None
    layer = gpt.transformer.h[0].attn
    return lambda q, k, v: layer.attention(q, k, v, layer.vote)[0]


def attentions(q):
    """What takes queries like q, by name; 'selective' is the kernel of kernels/ for its device, if it runs there."""
    cases = {'standard': lambda q, k, v: fn.scaled_dot_product_attention(q, k, v, is_causal=True),
             'selective': selective(q, 'gpu' if q.is_cuda else 'cpu'), 'selective, rows': selective(q, 'none'),
             'selective, listing': selective(q, 'listing')}
    if x_transformers():
        attend = x_transformers().attend.Attend(causal=True, selective=True)
        cases['selective, x-transformers'] = lambda q, k, v: attend(q, k, v)[0]
    return {name: case for name, case in cases.items() if case}


def attention_cases(shape, T, tokens, device):
    H, B = shape['n_head'], max(1, tokens // T)
    dtype = getattr(torch, devices.pick_dtype('auto', device))
    qkv = torch.randn(B, T, 3 * shape['n_embd'], device=device, dtype=dtype)
    qkv[..., :2 * shape['n_embd']] *= 0.1                       # logits are small at the start of training: none masks
    qkv.requires_grad_()
    heads = lambda: [t.view(B, T, H, -1).transpose(1, 2) for t in qkv.split(shape['n_embd'], dim=2)]    # q, k, v

    def case(attend):
        def once():
            attend(*heads()).sum().backward()
            qkv.grad = None
        return once
    return {name: case(attend) for name, attend in attentions(heads()[0]).items()}


def step_case(name, shape, T, tokens, device):
    """A training step: forward, backward, optimizer."""
    torch.manual_seed(0)
    gpt = XTransformers(T, **shape) if name == 'selective, x-transformers' else \
        m.GPT(m.GPTConfig(block_size=T, **shape, **MODELS.get(name, dict(selective=True))))
    gpt.to(device)
    optimizer = gpt.configure_optimizers(0.1, 1e-4, (0.9, 0.95), device)
    idx = torch.randint(shape['vocab_size'], (max(1, tokens // T), T), device=device)
    dtype = devices.pick_dtype('auto', device)
    if isinstance(gpt, m.GPT):
        kernels.install(gpt, 'listing' if name == 'selective, listing' else 'auto', getattr(torch, dtype))

    def once():
        with devices.autocast(device, dtype):
            loss = gpt(idx, idx)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return once


def peak_memory(case):
    """Bytes at the peak of two training steps, or of generating, in a process of its own.

    case: [name, shape, T, tokens of the batch, device]; of generating: ['generate', shape, T, B, device, how], where how
    is the budgets as KVCache takes them, or 'no cache'.
    """
    result = subprocess.run([sys.executable, '-m', 'lab.bench', f'--case={json.dumps(case)}'],
                            capture_output=True, text=True)
    if result.returncode:
        raise UserError(f'{case[0]} at T = {case[2]}: {result.stderr.strip().splitlines()[-1]}')
    return int(result.stdout)


def model_for_generation(shape, T, device):
    gpt = m.GPT(m.GPTConfig(block_size=T, selective=True, **shape)).to(device).eval()
    kernels.fast_rows(gpt)
    return gpt


@torch.no_grad()
def generate_case(shape, T, B, device, how):
    """Generation at its largest: a cache is allocated whole at the start, and without one the last token costs most."""
    gpt = model_for_generation(SHAPES[shape], T, device)
    idx = torch.zeros(B, T - 1, dtype=torch.long, device=device)
    return lambda: gpt(idx) if how == 'no cache' else gpt.generate(idx[:, :1], 20, budgets=how)


def one_memory_case(name, shape, T, tokens, device, how=None):
    """shape: one of SHAPES, or the folder of a trained run."""
    if shape not in SHAPES:
        once = trained.step_case(trained.load(shape, device), name == 'selective', tokens, device)
    else:
        once = generate_case(shape, T, tokens, device, how) if name == 'generate' else \
            step_case(name, SHAPES[shape], T, tokens, device)
    for _ in range(2):
        once()
    if 'cuda' in device:
        return torch.cuda.max_memory_allocated()
    if os.path.exists('/proc/self/status'):     # Linux: ru_maxrss would be the parent's, too
        return 1024 * int(re.search(r'VmHWM:\s+(\d+)', open('/proc/self/status').read())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def filled(gpt, B, budgets, text):
    """A KV cache that has read the text (T,), the same in every sequence."""
    cache = m.KVCache(gpt, 1, budgets)
    m.prefill(gpt, text[None], cache)
    cache.repeat(B)
    return cache


def main():
    cfg = settings.parse(BenchConfig)
    if cfg.case:
        try:
            print(one_memory_case(*json.loads(cfg.case)))
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UserError('--case is what this script gives itself') from None
        return
    if cfg.quick:
        cfg.shapes, cfg.lengths, cfg.rounds = 'small', '256,512', 3
    parts, shapes = cfg.what.split(','), cfg.shapes.split(',')
    if set(parts) - {*PARTS, 'forget'}:
        raise UserError(f"--what={cfg.what}: the parts are {', '.join(PARTS)}, forget")
    of_runs = [part for part in parts if part in ('attention', 'step', 'memory', 'forget')]
    if cfg.out_dir and not of_runs:
        raise UserError(f'--what={cfg.what}: of trained models it is attention, step, memory, forget')
    if 'forget' in parts and not cfg.out_dir:
        raise UserError('--what=forget is about trained models: give their folders with --out_dir')
    if cfg.clock not in ('wall', 'cpu'):
        raise UserError(f"--clock={cfg.clock}: it is 'wall' or 'cpu'")
    if set(shapes) - set(SHAPES) or not all(t.isdigit() and int(t) > 1 for t in cfg.lengths.split(',')):
        raise UserError(f'--shapes is among {", ".join(SHAPES)}, --lengths are whole numbers like 256,512')
    if 'decode' in parts and min(map(int, cfg.lengths.split(','))) < cfg.rounds + 34:
        raise UserError(f'--rounds={cfg.rounds}: decode needs --lengths of {cfg.rounds + 34} and more for it')
    files.check_output(cfg.to, '.json', '"machine"')
    cfg.device = devices.pick_device(cfg.device)
    machine = torch.cuda.get_device_name() if 'cuda' in cfg.device else \
        f'{platform.machine()}, {torch.get_num_threads()} threads'
    print(f'{machine}, torch {torch.__version__}, medians of {cfg.rounds} rounds, {cfg.clock} time')
    print(f"{'part':10} {'shape':6} {'T':>6} {'case':34} {'value':>12} {'unit':8} {'ratio':>9}")
    table, lengths = Table(), [int(t) for t in cfg.lengths.split(',')]
    if cfg.out_dir:
        shapes, parts = [], of_runs
        trained.measure(table, cfg, parts, peak_memory)
    for shape in shapes:
        for part in parts:
            PARTS[part](table, cfg, shape, lengths)
            if part != 'profile':
                table.growth(part, shape)
    files.write_file(cfg.to, json.dumps({'machine': machine, 'torch': torch.__version__, 'rounds': cfg.rounds,
                                            'command': ' '.join(sys.argv[1:]), 'rows': table.rows}, indent=1))
    print(cfg.to)


# ----------------------------------------------------------------------------------------------------------------------
# The parts


def attention_part(table, cfg, shape, lengths):
    for T in lengths:
        cases = attention_cases(SHAPES[shape], T, cfg.tokens, cfg.device)
        values = times(cases, cfg.rounds, cfg.device, cfg.clock)
        table.group('attention', shape, T, {n: 1e3 * s for n, s in values.items()}, 'ms', batch=max(1, cfg.tokens // T))


def step_part(table, cfg, shape, lengths):
    names = [*MODELS, 'selective, listing', *['selective, x-transformers'] * bool(x_transformers())]
    for T in lengths:
        cases = {name: step_case(name, SHAPES[shape], T, cfg.tokens, cfg.device) for name in names}
        values = times(cases, cfg.rounds, cfg.device, cfg.clock)
        table.group('step', shape, T, {n: 1e3 * s for n, s in values.items()}, 'ms', batch=max(1, cfg.tokens // T))


def memory_part(table, cfg, shape, lengths):
    for T in lengths:
        values = {name: peak_memory([name, shape, T, cfg.tokens, cfg.device]) / 2**20
                  for name in [*MODELS, 'selective, listing']}
        table.group('memory', shape, T, values, 'MiB', batch=max(1, cfg.tokens // T))


@torch.no_grad()
def decode_part(table, cfg, shape, lengths):
    """A step and its attention alone, with a full cache and with budgets of T/32; and without a cache at all."""
    s = SHAPES[shape]
    for T in lengths:
        gpt = model_for_generation(s, T, cfg.device)
        text = torch.randint(s['vocab_size'], (T - cfg.rounds - 2,), device=cfg.device)
        K = max(2, T // 32)
        for B in (1, 32):
            caches = {'full cache': filled(gpt, B, None, text), f'budgets of {K}': filled(gpt, B, K, text)}
            new = text[:B, None].clone()
            cases = {name: lambda cache=cache: gpt(new, cache=cache) for name, cache in caches.items()}
            if transformers():
                cases["transformers' GPT-2, its cache"] = GPT2(s, T, B, text, cfg.device).decode(new)
            values = times(cases, cfg.rounds, cfg.device, cfg.clock)
            table.group(f'decode{B}', shape, T, {n: 1e3 * v for n, v in values.items()}, 'ms/step')
            q, k, v = torch.randn(3, B, s['n_head'], 1, s['n_embd'] // s['n_head'], device=cfg.device).unbind()
            values = times({f'{name}, attention alone': lambda cache=cache: [
                layer.attend(q, k, v, cache.position, torch.relu) for layer in cache.layers]
                for name, cache in caches.items()}, cfg.rounds, cfg.device, cfg.clock)
            table.group(f'decode{B}', shape, T, {n: 1e3 * v for n, v in values.items()}, 'ms/step')
            table.group(f'decode{B}', shape, T, {f'{n}, its size': c.bytes() / 2**20 for n, c in caches.items()}, 'MiB')


@torch.no_grad()
def prefill_part(table, cfg, shape, lengths):
    """The attention of one layer while a prompt is read: blocks over a full cache, over budgets, and all at once."""
    s = SHAPES[shape]
    H, D = s['n_head'], s['n_embd'] // s['n_head']
    for T in lengths:
        dtype = getattr(torch, devices.pick_dtype('auto', cfg.device))
        q, k, v = torch.randn(3, 1, H, T, D, device=cfg.device, dtype=dtype).unbind()
        K = max(2, T // 64)

        def read(budget):
            cache = m.LayerCache(1, H, budget, D, 'selective', cfg.device, dtype)
            for a in range(0, T, 64):                           # as model.prefill does
                rows = slice(a, a + 64)
                i = torch.arange(T, device=cfg.device)[rows]
                cache.attend(q[:, :, rows], k[:, :, rows], v[:, :, rows], i, torch.relu)
        cases = {'full cache': lambda: read(T), f'budgets of {K}': lambda: read(K)}
        at_once = selective(q, 'auto')
        cases['all at once, no cache'] = lambda: at_once(q, k, v)
        values = times(cases, cfg.rounds, cfg.device, cfg.clock)
        table.group('prefill', shape, T, {n: 1e3 * v for n, v in values.items()}, 'ms')


@torch.no_grad()
def generate_part(table, cfg, shape, lengths):
    """1,000 tokens after the first (100 in batches of 32); without a cache, as nanoGPT does it, the mean of nine steps
    along the way."""
    s = SHAPES[shape]
    for T in [T for T in lengths if T >= 1024][:1] or lengths[-1:]:
        n = min(50 if cfg.quick else 1000, T - 1)
        gpt = model_for_generation(s, T, cfg.device)
        for B in (1, 32):
            idx = torch.randint(s['vocab_size'], (B, T), device=cfg.device)
            n = n if B == 1 else n // 10    # a step costs the same at every length, but not without a cache: B = 1 only
            at = [max(1, round(n * part / 8)) for part in range(9)] if B == 1 else []
            values = {}
            for name, budgets in {'full cache': None, f'budgets of {max(2, T // 32)}': max(2, T // 32)}.items():
                cache, started = m.KVCache(gpt, B, budgets), time.perf_counter()
                for _ in m.stream(gpt, idx[:, :1], n, cache=cache):
                    pass
                synchronize(cfg.device)
                values[name] = (time.perf_counter() - started) / n
            if at:
                each = times({str(t): lambda t=t: gpt(idx[:, :t]) for t in at}, 1, cfg.device)
                values['no cache (nanoGPT)'] = float(np.mean(list(each.values())))
            table.group(f'generate{B}', shape, T, {name: B / v for name, v in values.items()}, 'tokens/s')
            ways = {'full cache': None, f'budgets of {max(2, T // 32)}': max(2, T // 32), 'no cache (nanoGPT)': 'no cache'}
            table.group(f'generate{B}', shape, T, {f'{name}, peak of the process': peak_memory(
                ['generate', shape, T, B, cfg.device, how]) / 2**20 for name, how in ways.items()}, 'MiB')


def profile_part(table, cfg, shape, lengths):
    """The operators of standard attention and of ours, in percent of the whole; the ratio is to all of standard's."""
    for T in lengths:
        for name, once in list(attention_cases(SHAPES[shape], T, cfg.tokens, cfg.device).items())[:2]:
            once()
            with torch.profiler.profile() as profile:
                for _ in range(cfg.rounds):
                    once()
            ops = {op.key.removeprefix('aten::')[-29:]: op.self_cpu_time_total for op in profile.key_averages()}
            total = sum(ops.values())
            standard = total if name == 'standard' else standard
            for op in sorted(ops, key=ops.get, reverse=True)[:8]:
                table.add(part='profile', shape=shape, T=T, case=f'{name[:3]}: {op}', unit='%',
                          value=100 * ops[op] / total, ratio=ops[op] / standard)


PARTS = {'attention': attention_part, 'step': step_part, 'memory': memory_part, 'decode': decode_part,
         'prefill': prefill_part, 'generate': generate_part, 'profile': profile_part}

if __name__ == '__main__':
    settings.run(main)
