"""What lab/bench.py measures, and how: models with data for them, times, peak memory, the table."""

import multiprocessing
import os
import re
import resource
import time
import types
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
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


class Subject:
    """A selective model to measure, and a batch x, y (B, T) for it, B = tokens / T and at least 1.

    source: one of SHAPES, with random weights, or the folder of a trained run, which has a T and
    SSA of its own. Raises UserError for a run that is not selective.
    """

    def __init__(self, cfg, source, T, ssa=''):
        self.cfg, self.source = cfg, source
        self.random = source in SHAPES
        self.memory_tau = None  # trained without memory loss
        if self.random:
            torch.manual_seed(0)
            config = m.GPTConfig(block_size=T, selective=True, ssa=ssa, **SHAPES[source])
            self.gpt = m.GPT(config).to(cfg.device).eval()
        else:
            self.gpt, checkpoint = ckpt.load_model(source, cfg.device)
            if not self.gpt.config.selective:
                raise UserError(f'{source} has standard attention, whose cost no weights change')
        self.layers = [block.attn for block in self.gpt.transformer.h]
        self.dtype = devices.pick_dtype('auto', cfg.device)
        self.install('auto')
        self.T = self.gpt.config.block_size
        self.B = max(1, cfg.tokens // self.T)
        if self.random:
            x = torch.randint(config.vocab_size, (self.B, T))
            y = x
        else:
            if checkpoint['config']['memory_loss']:
                self.memory_tau = checkpoint['config']['memory_tau']
            bos = ckpt.starts_with_bos(checkpoint)
            dataset = data.load_dataset(checkpoint['dataset'])
            x, y = dataset.batch('val', 0, self.B, self.T, bos=bos)
        self.x = x.to(cfg.device)
        self.y = y.to(cfg.device)

    def install(self, kernel):
        """See kernels.install."""
        return kernels.install(self.gpt, kernel, getattr(torch, self.dtype))

    @torch.no_grad()
    def queries_keys_values(self):
        """What the attention of each layer gets on x: [(q, k, v), …], (B, H, T, D) each."""
        recorders = [Recorder() for _ in self.layers]
        with devices.autocast(self.cfg.device, self.dtype):
            self.gpt(self.x, cache=types.SimpleNamespace(layers=recorders, position=0))
        return [recorder.qkv for recorder in recorders]


class Recorder:
    """Stands in for a LayerCache, and keeps what the attention of the layer gets."""

    def attend(self, q, k, v, i, rule):
        self.qkv = q, k, v
        return m.selective_attention(q, k, v, rule)[0]


def times(cases, rounds, device):
    """{case: milliseconds} of cases, {case: function}: medians of rounds in which they take turns.

    A round more comes first, to warm up.
    """
    taken = {}
    for _ in range(rounds + 1):
        for case, once in cases.items():
            synchronize(device)
            started = time.perf_counter()
            once()
            synchronize(device)
            taken.setdefault(case, []).append(1000 * (time.perf_counter() - started))
    return {case: float(np.median(taken[case][1:])) for case in cases}


def synchronize(device):
    if device != 'cpu':
        torch.accelerator.synchronize()


def peak_memory(make, device):
    """MiB at the peak of a process of its own, which calls make() and twice what that returns."""
    spawn = multiprocessing.get_context('spawn')
    try:
        with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as process:
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


class Table:
    """The rows of a benchmark, printed as they come."""

    def __init__(self):
        self.rows = []
        print('part       shape       T case                                      value unit')

    def time(self, part, subject, cases):
        """A row with the milliseconds of each of cases, {case: function}."""
        cfg = subject.cfg
        self.group(part, subject, 'ms', times(cases, cfg.rounds, cfg.device))

    def group(self, part, subject, unit, values):
        """A row for each of values, {case: figure}. The ratio of each is to the first one."""
        shape = 'run'
        if subject.random:
            shape = subject.source
        first = next(iter(values.values()))
        for case, value in values.items():
            row = {'part': part, 'shape': shape, 'T': subject.T, 'batch': subject.B, 'case': case}
            self.rows.append({**row, 'value': value, 'unit': unit, 'ratio': value / first})
            figures = f'{value:12,.2f} {unit:8} {value / first:8.2f}x'
            print(f'{part:10} {shape:6} {subject.T:>6} {case:34} {figures}', flush=True)

    def print_growth(self, parts):
        """The exponent p of value ~ T^p for a sequence, of cases that have several lengths T."""
        found = {}
        for row in self.rows:
            if row['part'] in parts:
                name = f'{row["part"]:10} {row["shape"]:6} growth {row["case"]:34}'
                found.setdefault(name, {})[row['T']] = row['value'] / row['batch']
        for name, values in found.items():
            if len(values) > 1:
                p, _ = np.polyfit(np.log(list(values)), np.log(list(values.values())), 1)
                print(f'{name} T^{p:.2f}')
