"""What lab/bench.py measures, and how: models with data for them, times, peak memory, rows."""

import multiprocessing
import os
import re
import resource
import statistics
import time
from types import SimpleNamespace
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

import data
import kernels
import model as m
from support import checkpoint as ckpt, devices
from support.settings import UserError

SHAPES = {
    'small': {'n_layer': 4, 'n_head': 4, 'n_embd': 128, 'vocab_size': 257},
    '124m': {'n_layer': 12, 'n_head': 12, 'n_embd': 768, 'vocab_size': 50304},
}
# what is printed of a row
LINE = '{part:10} {shape:16} T = {T:<6} {case:22} {value:12,.2f} {unit:8} {ratio:8.2f}x'


class Subject:
    """A selective model to measure, and a batch x, y (B, T) for it, B = tokens / T and at least 1.

    source: one of SHAPES, with random weights, or the folder of a trained run, which has a T and
    SSA of its own. kernel: see kernels.install; '': nothing votes. Raises UserError for a run that
    is not selective.
    """

    def __init__(self, cfg, source, T, ssa='', kernel='auto'):
        self.cfg = cfg
        self.source = source
        self.random = source in SHAPES
        self.memory_tau = None
        if self.random:
            torch.manual_seed(0)
            config = m.GPTConfig(block_size=T, selective=True, ssa=ssa, **SHAPES[source])
            self.gpt = m.GPT(config).to(cfg.device).eval()
        else:
            self.gpt, checkpoint = ckpt.load_model(source, cfg.device)
            config = self.gpt.config
            if not config.selective:
                raise UserError(f'{source} has standard attention, whose cost no weights change')
            if checkpoint['config']['memory_loss'] and kernel:
                self.memory_tau = checkpoint['config']['memory_tau']
        self.T = config.block_size
        self.B = max(1, cfg.tokens // self.T)
        if self.random:
            x = y = torch.randint(config.vocab_size, (self.B, T))
        else:
            dataset = data.load_dataset(checkpoint['dataset'])
            bos = ckpt.starts_with_bos(checkpoint)
            x, y = dataset.batch('val', 0, self.B, self.T, bos=bos)
        self.x = x.to(cfg.device)
        self.y = y.to(cfg.device)
        self.layers = [block.attn for block in self.gpt.transformer.h]
        if not kernel:
            for layer in self.layers:
                layer.selects = False
        self.dtype = devices.pick_dtype('auto', cfg.device)
        self.kernel = kernels.install(self.gpt, kernel or 'none', getattr(torch, self.dtype))

    @torch.no_grad()
    def queries_keys_values(self):
        """What the attention of each layer gets on x: [(q, k, v), …], (B, H, T, D) each."""
        found = []

        def attend(q, k, v, i, rule):
            found.append((q, k, v))
            return m.selective_attention(q, k, v, rule)[0]

        recorder = SimpleNamespace(attend=attend)  # in the place of each LayerCache
        with devices.autocast(self.cfg.device, self.dtype):
            self.gpt(
                self.x, cache=SimpleNamespace(layers=[recorder] * len(self.layers), position=0)
            )
        return found

    def times(self, cases, rounds=None):
        """{case: milliseconds} of {case: function}: medians of rounds in which they take turns.

        A round more comes first, to warm up.
        """
        taken = {case: [] for case in cases}
        for _ in range(1 + (rounds or self.cfg.rounds)):
            for case, once in cases.items():
                self.synchronize()
                started = time.perf_counter()
                once()
                self.synchronize()
                taken[case].append(1000 * (time.perf_counter() - started))
        return {case: statistics.median(taken[case][1:]) for case in cases}

    def synchronize(self):
        if self.cfg.device != 'cpu':
            torch.accelerator.synchronize()


def peak_memory(make, device):
    """MiB at the peak of a process of its own, which calls make() and twice what that returns."""
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as process:
            return process.submit(own_peak, make, device).result()
    except BrokenProcessPool:
        raise UserError('a process was killed: there may be too little memory for it') from None


def own_peak(make, device):
    once = make()
    once()
    once()
    if 'cuda' in device:
        return torch.cuda.max_memory_allocated() / 2**20
    if os.path.exists('/proc/self/status'):  # Linux, where ru_maxrss may be that of the parent
        with open('/proc/self/status') as f:
            return int(re.search(r'VmHWM:\s+(\d+)', f.read())[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def group(subject, part, unit, values):
    """Print and return a row for each of values, {case: value}. Ratios are to the first one."""
    rows = []
    first = next(iter(values.values()))
    where = {'part': part, 'shape': subject.source, 'T': subject.T, 'batch': subject.B}
    for case, value in values.items():
        row = {**where, 'case': case, 'value': value, 'unit': unit, 'ratio': value / first}
        print(LINE.format(**row), flush=True)
        rows.append(row)
    return rows
