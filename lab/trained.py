"""Trained checkpoints for lab/bench.py: what attention costs depends on what the model has learned to mask."""
import dataclasses
import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as fn

import data
import kernels
import model as m
from kernels import cpu
from lab.measure import times
from support import checkpoint as ckpt
from support.settings import UserError


@dataclass
class Run:
    """A selective checkpoint: its model, its context length T, and the memory_tau of its loss, None without one."""
    gpt: m.GPT
    T: int
    memory_tau: float | None
    checkpoint: dict

    def batch(self, tokens):
        """Validation data x, y (B, T), with B = tokens / T, at least 1."""
        dataset = data.load_dataset(self.checkpoint['dataset'])
        return dataset.batch('val', 0, max(1, tokens // self.T), self.T, bos=ckpt.starts_with_bos(self.checkpoint))


def load(out_dir, device='cpu'):
    gpt, checkpoint = ckpt.load_model(out_dir, device)
    if not gpt.config.selective:
        raise UserError(f'{out_dir} has standard attention, whose cost does not depend on what it learned')
    config = checkpoint['config']
    return Run(gpt, gpt.config.block_size, config['memory_tau'] if config['memory_loss'] else None, checkpoint)


@torch.no_grad()
def queries_keys_values(run, tokens, device='cpu'):
    """[(q, k, v), ...], (B, H, T, D) each: what the attention of each layer gets on validation data."""
    seen = []

    def record(q, k, v, vote, dropout=0.0, memory_tau=None):
        seen.append((q, k, v))
        return m.selective_attention(q, k, v, vote, dropout, memory_tau)
    for block in run.gpt.transformer.h:
        block.attn.attention = record
    run.gpt(run.batch(tokens)[0].to(device))
    return seen


def attention_cases(run, tokens, device='cpu'):
    """For each layer: {case: function that runs its attention forward and backward}, and the share that is computed."""
    layers = queries_keys_values(run, tokens, device)
    kernels.install(run.gpt, dtype=layers[0][0].dtype)
    for block, qkv in zip(run.gpt.transformer.h, layers):
        qkv = [x.detach().requires_grad_() for x in qkv]
        dy = torch.randn_like(qkv[0])

        def case(attention, qkv=qkv, dy=dy):
            def once():
                y, M = attention(*qkv)
                outputs, grads = ([y], [dy]) if M is None else ([y, M], [dy, torch.ones_like(M)])
                torch.autograd.grad(outputs, qkv, grads)
            return once

        def standard(q, k, v):
            return fn.scaled_dot_product_attention(q, k, v, is_causal=True), None
        ways = {'selective': block.attn.attention, 'selective, rows': m.selective_attention}
        cases = {'standard': case(standard)} | {name: case(functools.partial(
            way, vote=block.attn.vote, memory_tau=run.memory_tau)) for name, way in ways.items()}
        kernels.live_share()
        cases['selective']()
        yield cases, kernels.live_share()


def step_case(run, selective, tokens, device='cpu'):
    """A training step of the run, or of standard attention in its place. The learning rate is 0: the weights stay."""
    standard = dataclasses.replace(run.gpt.config, selective=False, vote_scale=False)
    gpt = run.gpt if selective else m.GPT(standard).to(device)
    kernels.install(gpt.train())
    x, y = (t.to(device) for t in run.batch(tokens))
    optimizer = gpt.configure_optimizers(0.1, 0.0, (0.9, 0.95), device)
    epsilon = run.checkpoint['config']['memory_loss'] if selective else 0.0

    def once():
        _, loss, *memory = gpt(x, y, memory_tau=run.memory_tau if selective else None)
        (loss + epsilon * memory[0] if memory else loss).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return once


@torch.no_grad()
def still_needed(layer, q, k):
    """What a cache without budgets could not drop after the last row, by the bound of kernels/cpu.py: {case: (B, T)}.

    q, k (B, H, T, D), as attention gets them in this layer; no vote may be negative. The bound needs the longest query
    and the smallest denominator of the rows to come. 'queries as seen' takes those of the text so far, which proves
    nothing about later rows. Where qk_norm bounds both, there is 'any query', too.
    """
    D, T = q.size(3), q.size(2)
    k_norm, longest_q, least = cpu.bounds(q * D**-0.5, k)
    votes = layer.vote(q[:, 0] @ k[:, 0].transpose(1, 2) * D**-0.5).tril(-1)        # (B, T, T)
    votes[:, :, 0] = 0
    F = votes.sum(dim=1)                                        # (B, T), as the next row would have it
    cases = {'queries as seen': (longest_q[:, :, :1], least[:, :, :1])}
    if layer.config.qk_norm and not layer.config.ssa:
        # an RMS-normalised vector is √D long before its weights, and rotation keeps it so
        longest_q, longest_k = layer.q_norm.weight.abs().max(), D**0.5 * layer.k_norm.weight.abs().max()
        # of the three logits two are of keys as long as can be, the third is that of token 0
        least = torch.logaddexp(math.log(2) - longest_q * longest_k, -longest_q * k_norm[:, :, :1])
        cases['any query'] = longest_q, least
    log_eps = math.log(torch.finfo(q.dtype).eps / 2 / T)
    needed = {name: (longest * k_norm - least).amax(dim=1) - F >= log_eps for name, (longest, least) in cases.items()}
    for alive in needed.values():
        alive[:, 0] = True                                      # it has no votes
    return needed


def measure(table, cfg, parts, peak_memory):
    """attention, step, memory and forget of each run in --out_dir, at its own T."""
    runs = {out_dir: load(out_dir, cfg.device) for out_dir in cfg.out_dir.split(',')}   # before any is measured
    for out_dir, run in runs.items():
        common = dict(shape='run', T=run.T, batch=max(1, cfg.tokens // run.T))
        if 'attention' in parts:
            totals, shares = {}, []
            for l, (cases, live) in enumerate(attention_cases(run, cfg.tokens, cfg.device)):
                values = {name: 1e3 * s for name, s in times(cases, cfg.rounds, cfg.device, cfg.clock).items()}
                shares.append(live if live is not None else 1.0)
                table.group('layer', values={f'{n}, layer {l}, live {shares[-1]:.0%}' if n == 'selective' else
                                             f'{n}, layer {l}': v for n, v in values.items()}, unit='ms', **common)
                totals = {name: totals.get(name, 0) + v for name, v in values.items()}
            table.group('attention', values=totals, unit='ms', live=float(np.mean(shares)), **common)
        names = {'standard': False, 'selective': True}
        if 'step' in parts:
            cases = {name: step_case(run, selective, cfg.tokens, cfg.device) for name, selective in names.items()}
            values = times(cases, cfg.rounds, cfg.device, cfg.clock)
            table.group('step', values={n: 1e3 * s for n, s in values.items()}, unit='ms', **common)
        if 'memory' in parts:
            table.group('memory', values={name: peak_memory([name, out_dir, run.T, cfg.tokens, cfg.device]) / 2**20
                                          for name in names}, unit='MiB', **common)
        if 'forget' in parts:
            values = {'full cache': run.T}
            layers = queries_keys_values(run, cfg.tokens, cfg.device)
            for l, (block, (q, k, _)) in enumerate(zip(run.gpt.transformer.h, layers)):
                for name, alive in still_needed(block.attn, q, k).items():
                    values[f'layer {l}, {name}'] = alive.float().sum(dim=1).mean().item()
            table.group('forget', values=values, unit='tokens', **common)
    for part in parts:
        if part != 'forget':
            table.growth(part, 'run')
