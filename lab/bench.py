"""What selective attention costs and context pruning saves, as ratios of what one run measured.

    python -m lab.bench                         all but parity, an hour on two CPU cores
    python -m lab.bench --what=attention,step --shapes=small --lengths=256,512      a minute or two
    python -m lab.bench --out_dir=out/a,out/b   trained selective models, each at its own length

    attention   attention alone, forward, and with backward; `live` is the share that is computed
    step        a whole training step, on a GPU also its memory beyond weights and optimizer
    decode      one token from a KV cache, beside transformers' GPT-2 where that is installed
    parity      the kernels that run here beside model.py: how far y, M and gradients are off, and
                how far they may be, see kernels.errors

Times are medians of rounds in which the cases take turns (A B C, A B C, …), after a round to warm
up. On a CPU all is measured with the default number of threads, then with one. The ratio is to the
first case of a group.

Random weights mask little, as at the start of training: they say nothing about what selection
saves. Trained ones get their validation data.
"""

import itertools
import platform
import statistics
import time
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

from support import checkpoint as ckpt, devices, pretrained, settings  # before torch

import torch
import torch.nn.functional as fn

import data
import kernels
import model as m
from support.settings import UserError, option

SHAPES = {
    'small': {'n_layer': 4, 'n_head': 4, 'n_embd': 128, 'vocab_size': 257},
    '124m': {'n_layer': 12, 'n_head': 12, 'n_embd': 768, 'vocab_size': 50304},
}
CASES = {'standard': '', 'selective': '', 'SSA': 'qv'}  # and their letters of SSA
# what is printed of a row
LINE = (
    '{part:10} {shape:16} T = {T:<6} {case:22} {value:12,.2f} {unit:8} {ratio:8.2f}x'
    '{threads:4} threads'
)


@dataclass
class BenchConfig:
    what: str = option('attention,step,decode', 'parts, with commas')
    out_dir: str = option('', "folders of trained selective runs, with commas; '': random weights")
    shapes: str = option('small,124m', 'sizes of the models with random weights')
    lengths: str = option('', "context lengths T from 64; '': a run's own, else 256,512,…,4096")
    tokens: int = option(4096, 'tokens of a batch of B = tokens / T, at least 1', low=1)
    rounds: int = option(5, 'rounds of which the median is taken', low=1, high=60)
    device: str = option('auto', "'cuda', 'mps', 'cpu'")


class Subject:
    """A model to measure, and a batch x, y (B, T) for it, B = tokens / T and at least 1.

    source: one of SHAPES, with random weights, or the folder of a trained run, which has SSA of its
    own, and a T where 0 is given. case: one of CASES; without 'selective' nothing votes. Raises
    UserError for a run that is not selective.
    """

    def __init__(self, cfg, source, T, case='selective'):
        self.cfg = cfg
        self.source = source
        self.memory_tau = None
        if source in SHAPES:
            torch.manual_seed(0)
            config = m.GPTConfig(block_size=T, selective=True, ssa=CASES[case], **SHAPES[source])
            self.gpt = m.GPT(config).to(cfg.device).eval()
            B = max(1, cfg.tokens // T)
            batch = torch.randint(config.vocab_size, (2, B, T))
        else:
            self.gpt, checkpoint = ckpt.load_model(source, cfg.device)
            if not self.gpt.config.selective or self.gpt.config.voter:
                raise UserError(f'{source} has standard attention, whose cost no weights change')
            T = T or self.gpt.config.block_size
            B = max(1, cfg.tokens // T)
            tokenizer = checkpoint['tokenizer']
            dataset = data.load_dataset(checkpoint['dataset'], tokenizer=tokenizer)
            batch = dataset.batch('val', 0, B, T, bos=ckpt.starts_with_bos(checkpoint))
            run = checkpoint['config']
            if run['memory_loss'] and case == 'selective':
                self.memory_tau = run['memory_tau']
        self.x, self.y = [tokens.to(cfg.device) for tokens in batch]
        self.layers = [block.attn for block in self.gpt.transformer.h]
        for layer in self.layers:
            layer.selects = case == 'selective'
        self.dtype = devices.pick_dtype('auto', cfg.device)
        self.kernel = kernels.install(self.gpt, dtype=getattr(torch, self.dtype))

    @torch.no_grad()
    def queries_keys_values(self):
        """What the attention of each layer gets on x: [(q, k, v), …], (B, H, T, D) each."""
        found = []
        installed = self.layers[0].attention

        def attention(q, k, v, *args):
            found.append((q, k, v))
            return installed(q, k, v, *args)

        for layer in self.layers:
            layer.attention = attention
        with devices.autocast(self.cfg.device, self.dtype):
            self.gpt(self.x)
        for layer in self.layers:
            layer.attention = installed
        return found

    def times(self, cases):
        """{case: milliseconds} of {case: function}: medians of rounds in which they take turns.

        A round more comes first, to warm up.
        """
        taken = {case: [] for case in cases}
        for _ in range(1 + self.cfg.rounds):
            for case, once in cases.items():
                started = time.perf_counter()
                once()
                self.x[0, 0].item()  # waits for a GPU
                taken[case].append(1000 * (time.perf_counter() - started))
        return {case: statistics.median(taken[case][1:]) for case in cases}


# ---- The parts: generators of groups, (name, unit, {case: value}) --------------------------------


def standard(q, k, v, rule, memory_tau):
    """torch's own attention, as if it were model.selective_attention: y, and no M."""
    return fn.scaled_dot_product_attention(q, k, v, is_causal=True), None


# None: what is installed in a layer
FORMS = {'standard': standard, 'selective': None}


def run_layers(subject, inputs, form, backward=True):
    """Run the attention of each layer of which there are inputs, (q, k, v). Returns the last y."""
    for layer, qkv in zip(subject.layers, inputs):
        attention = form or layer.attention
        qkv = [x.detach().requires_grad_(backward) for x in qkv]
        y, M = attention(*qkv, layer, memory_tau=subject.memory_tau)
        loss = y.sum()
        if M is not None:
            loss = loss + M.sum()
        if backward:
            torch.autograd.grad(loss, qkv)
    return y


def attention_part(subject):
    """All layers together; of random weights the first one."""
    inputs = subject.queries_keys_values()
    if subject.source in SHAPES:
        del inputs[1:]
    forward = {}
    both = {}
    for case, form in FORMS.items():
        forward[case] = partial(run_layers, subject, inputs, form, backward=False)
        both[case] = partial(run_layers, subject, inputs, form)
    kernels.live_share()
    both['selective']()
    if live := kernels.live_share():  # kernels/cpu.py counts it
        yield 'live', '%', {'selective': 100 * live}
    yield 'forward', 'ms', subject.times(forward)
    yield 'attention', 'ms', subject.times(both)


def training_step(subject):
    """A function that trains a subject. The learning rate is 0, so the weights stay."""
    gpt = subject.gpt.train()
    device = subject.cfg.device
    if 'cuda' in device:
        gpt.compile()  # as train.py does
    optimizers = gpt.configure_optimizers(0.1, 0.0, (0.9, 0.95), device)

    def once():
        with devices.autocast(device, subject.dtype):
            _, *losses = gpt(subject.x, subject.y, memory_tau=subject.memory_tau)
        sum(losses).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return once


def step_part(subject):
    """Of a trained model its own step, and one without votes. A GPU knows more of it."""
    cfg = subject.cfg
    B, T = subject.x.shape
    steps = {}
    for case, ssa in CASES.items():
        if subject.source in SHAPES or not ssa:
            steps[case] = training_step(Subject(cfg, subject.source, T, case))
    taken = subject.times(steps)
    yield 'step', 'ms', taken
    if 'cuda' not in cfg.device:
        return
    rates = {}
    memory = {}
    for case, once in steps.items():
        rates[case] = 1000 * B * T / taken[case]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once()
        memory[case] = (torch.cuda.max_memory_allocated() - before) / 2**20
    yield 'step', 'tokens/s', rates
    yield 'step', 'MiB', memory


def transformers_step(gpt, text, new):
    """A step of transformers' GPT-2 of the size of gpt: it reads new (B, 1) after text (1, n)."""
    import transformers

    size = {theirs: getattr(gpt.config, ours) for ours, theirs in pretrained.GPT2.items()}
    config = transformers.GPT2Config(**size, bos_token_id=0, eos_token_id=0)
    other = transformers.GPT2LMHeadModel(config).to(gpt.lm_head.weight).eval()  # device, dtype
    cache = other(text, logits_to_keep=1).past_key_values
    cache.batch_repeat_interleave(len(new))

    def once():
        other(new, past_key_values=cache)
        cache.crop(-1)

    return once


@torch.no_grad()
def decode_part(subject):
    """A step with a full cache and with budgets of T/32."""
    gpt = subject.gpt.to(getattr(torch, subject.dtype))
    kernels.fast_rows(gpt)
    K = max(2, subject.x.size(1) // 32)
    text = subject.x[:1, : -subject.cfg.rounds - 2]
    for B in 1, 32:
        new = text[:, :1].repeat(B, 1)
        steps = {}
        for case, budgets in ('full cache', None), (f'budgets of {K}', K):
            cache = m.KVCache(gpt, 1, budgets)
            m.prefill(gpt, text, cache)
            for layer in cache.layers:  # a text that was read once serves all
                for name in 'k', 'v', 'voting_k', 'F', 'A', 'j':
                    x = getattr(layer, name)
                    setattr(layer, name, x.repeat_interleave(B, dim=0))
            steps[case] = partial(gpt, new, cache=cache)
        if find_spec('transformers'):
            steps["transformers' GPT-2"] = transformers_step(gpt, text, new)
        yield f'decode{B}', 'ms', subject.times(steps)


def parity_part(subject):
    """Parts of a million of what model.py gives, in each dtype that a kernel takes here."""
    layer = subject.layers[0]
    device = subject.x.device
    given = kernels.example(layer, 1.0)
    expected = kernels.results(m.selective_attention, given)
    for name in 'gpu', 'cpu':
        for dtype in torch.float32, torch.bfloat16, torch.float16:
            attention, why_not = kernels.load(name, device, dtype, layer.config)
            if why_not:
                print(f'kernels/{name}.py, {dtype}: {why_not}')
                continue
            found = kernels.results(attention, given, device, dtype)
            values = {f'allowed in {dtype}': 1e6 * kernels.tolerance(device, dtype)}
            for case, error in kernels.errors(found, expected).items():
                values[case] = 1e6 * error
            yield f'{name}.py', 'ppm', values


PARTS = {
    'attention': attention_part,
    'step': step_part,
    'decode': decode_part,
    'parity': parity_part,
}


# ---- The command ---------------------------------------------------------------------------------


def show(subject, part, unit, values):
    """Print a line for each of values, {case: value}. Ratios are to the first one."""
    first = next(iter(values.values()))
    for case, value in values.items():
        row = {
            'part': part,
            'shape': subject.source,
            'T': subject.x.size(1),
            'threads': torch.get_num_threads(),
            'case': case,
            'value': value,
            'unit': unit,
            'ratio': value / first,
        }
        print(LINE.format(**row), flush=True)


def main():
    cfg = settings.parse(BenchConfig)
    parts = settings.fitting(list, {'choices': PARTS}, cfg.what.split(','), '--what')
    if cfg.out_dir:
        sources = cfg.out_dir.split(',')
        lengths = [0]  # a run has its own
    else:
        sources = settings.fitting(list, {'choices': SHAPES}, cfg.shapes.split(','), '--shapes')
        lengths = [256, 512, 1024, 2048, 4096]
        print('The weights are random and mask little. For what selection saves, give --out_dir.')
    if cfg.lengths:
        lengths = settings.numbers(cfg.lengths, '--lengths', low=64, high=2**20)
    cfg.device = devices.pick_device(cfg.device)
    machine = platform.machine()
    counts = [torch.get_num_threads()]
    if 'cuda' in cfg.device:
        machine = torch.cuda.get_device_name()
        torch.set_float32_matmul_precision('high')  # TF32, as in train.py
    elif counts != [1]:
        counts.append(1)
    print(f'{machine}, torch {torch.__version__}')
    for part, source, T, threads in itertools.product(parts, sources, lengths, counts):
        torch.set_num_threads(threads)
        subject = Subject(cfg, source, T)
        print(f'{source}: {subject.kernel}')
        for group in PARTS[part](subject):
            show(subject, *group)
    torch.set_num_threads(counts[0])


if __name__ == '__main__':
    settings.run(main)
