"""What lab/bench.py and lab/gpu.py measure, and how: models with data, times, rows."""

import platform
import statistics
import time
from types import SimpleNamespace

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
LINE = (
    '{part:10} {shape:16} T = {T:<6} {case:22} {value:12,.2f} {unit:8} {ratio:8.2f}x'
    '{threads:4} threads'
)


class Subject:
    """A selective model to measure, and a batch x, y (B, T) for it, B = tokens / T and at least 1.

    source: one of SHAPES, with random weights, or the folder of a trained run, which has SSA of its
    own, and a T where 0 is given. kernel: see kernels.install; '': nothing votes. Raises UserError
    for a run that is not selective.
    """

    def __init__(self, cfg, source, T, ssa='', kernel='auto'):
        self.cfg = cfg
        self.source = source
        self.name = source
        self.random = source in SHAPES
        self.memory_tau = None
        if self.random:
            self.name = f'{source}, random'
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
        self.T = T or config.block_size
        self.B = max(1, cfg.tokens // self.T)
        if self.random:
            x = y = torch.randint(config.vocab_size, (self.B, self.T))
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


def machine(cfg):
    """The name of what a table was measured on."""
    if 'cuda' in cfg.device:
        return torch.cuda.get_device_name()
    return f'{platform.machine()}, {torch.get_num_threads()} threads'


def peak_memory(once):
    """MiB on a GPU that once() takes beyond what is there before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    once()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def group(subject, part, unit, values):
    """Print and return a row for each of values, {case: value}. Ratios are to the first one."""
    rows = []
    first = next(iter(values.values()))
    for case, value in values.items():
        row = {
            'part': part,
            'shape': subject.name,
            'T': subject.T,
            'batch': subject.B,
            'threads': torch.get_num_threads(),
            'case': case,
            'value': value,
            'unit': unit,
            'ratio': value / first,
        }
        print(LINE.format(**row), flush=True)
        rows.append(row)
    return rows
