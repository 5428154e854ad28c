"""See what a model forgets in a text, when, and who made it: one HTML file that needs no network.

    python -m lab.visualize --out_dir=out/selective_small --start="def f(self):"
    python -m lab.visualize --out_dir=out/selective_small --start=FILE:model.py --cut --budgets=32
    python sample.py --out_dir=out/selective_small | python -m lab.visualize --start=- --cut

A selective model shows F, the votes behind it and how many tokens each layer needs; SSA its
temperatures.
"""

import base64
import codecs
import contextlib
import functools
import json
import math
import os
import pathlib
import zlib
from dataclasses import dataclass

from support import settings  # before torch, see support/__init__.py

import numpy as np
import torch

import data
from lab.plot import write
from model import POLICIES, F_dtype, KVCache, LayerCache, attend, check_budgets, memory_requirement
from support import checkpoint as ckpt, devices, files
from support.settings import UserError, option


@dataclass
class VisualizeConfig:
    out_dir: str = option('out/selective_small', 'folder of ckpt.pt')
    start: str = option('', 'the text to read: text, FILE:path, or - for standard input')
    to: str = option('', "the page; '': <out_dir>/visualize.html")
    cut: bool = option(False, 'of a text longer than block_size, read what fits')
    budgets: str = option('', 'tokens that a layer keeps: a number, 4,9,16,8, a budgets.json; none')
    policy: str = option('selective', 'what is dropped at the budget', choices=POLICIES)
    memory_tau: float = option(1.0, 'the F of a token that is wholly masked', low=1e-3)
    device: str = option('auto', "'cuda', 'mps', 'cpu'; 'auto': the best one there is")


# ---- The numbers ---------------------------------------------------------------------------------


@dataclass
class Reading:
    """What a model did with a text of T tokens, in numpy. Row i is the query, column j the key."""

    F: np.ndarray  # (L, T, T) how much the rows before i have masked column j
    votes: np.ndarray  # (L, T, T) what row i adds to it; 0 for columns that its layer has dropped
    dropped_at: np.ndarray  # (L, T) the first row that does without the column; T: none does
    M: np.ndarray  # (L, T) the memory requirement of each row, in a reading without budgets
    temperatures: dict  # 'q', 'k' or 'v' -> (L, T, H)


class Recorder(LayerCache):
    """A layer's memory that reads all rows at once, with context pruning in its parallel form.

    For the attention core it also stands for the layer's rule, and so it hears the votes.
    """

    def __init__(self, budget, policy):
        self.K = budget
        self.policy = policy

    def attend(self, q, k, v, i, rule):
        F = q.new_zeros(len(q), len(i), dtype=F_dtype(q.dtype))
        self.rule = rule
        self.S = F[:, None].expand(-1, len(i), -1)  # (1, T, T), for a layer without votes
        listener = None if rule is None else self
        y, F, hidden = attend(q, k, v, F, i, i[None], listener, self.forget)
        if (self.S < 0).any() or not torch.allclose(F[:, 1:], self.S.cumsum(dim=1), atol=1e-4):
            raise UserError(
                'the page can only draw sums of votes that are never negative: this model has '
                'votes below 0, or accumulates them in another way'
            )
        self.F = F[:, :-1]  # (1, T, T)
        self.votes = self.S.masked_fill(hidden, 0)
        dropped = hidden & (
            i[:, None] >= i
        )  # for good, so the rows that lack a column are the last
        self.dropped_at = len(i) - dropped.sum(dim=1)  # (1, T)
        return y

    def vote(self, L0):
        return self.rule.vote(L0)

    def accumulate(self, F, S):
        self.S = S
        return self.rule.accumulate(F, S)


@torch.no_grad()
def record(model, idx, budgets=None, policy='selective'):
    """A Recorder of each layer of a model that has read idx (1, T)."""
    cache = KVCache(model, 1, budgets, policy)
    cache.layers = [Recorder(budget, cache.policy) for budget in cache.budgets]
    model(idx, cache=cache)
    return cache.layers


def read(model, idx, budgets=None, policy='selective', memory_tau=1.0):
    """The Reading of idx, int64 (1, T).

    Raises ValueError where budgets or policy do not fit the model, and UserError for a rule of
    votes that the page cannot draw.
    """
    temperatures = {name: [] for name in model.config.ssa}

    def keep(name, module, inputs, tau):
        temperatures[name].append(tau)

    with contextlib.ExitStack() as stack:
        for block in model.transformer.h:
            for name, module in block.attn.ssa.items():
                hook = module.register_forward_hook(functools.partial(keep, name))
                stack.enter_context(hook)
        layers = record(model, idx, budgets, policy)
    free = layers
    if budgets is not None:
        free = record(model, idx)  # M is defined without budgets
    i = torch.arange(idx.size(1), device=idx.device)
    return Reading(
        F=joined(layer.F for layer in layers),
        votes=joined(layer.votes for layer in layers),
        dropped_at=joined(layer.dropped_at for layer in layers),
        M=joined(memory_requirement(layer.F, i, memory_tau) for layer in free),
        temperatures={name: joined(taus) for name, taus in temperatures.items()},
    )


def joined(tensors):
    """Tensors (1, ...), one of each layer, as one array (L, ...)."""
    return torch.cat(list(tensors)).cpu().numpy()


def token_texts(ids, tokenizer):
    """What to show for each token: its characters, each at the token that completes it.

    A token that completes none is '·'. Characters that are invisible or act (controls,
    right-to-left overrides, broken UTF-8) are written as escapes.
    """
    decoder = codecs.getincrementaldecoder('utf-8')('backslashreplace')
    texts = []
    for n, token in enumerate(ids):
        raw = b''
        if token < tokenizer.n_vocab:  # a padded vocabulary has ids without text
            raw = tokenizer.decode_single_token_bytes(token)
        text = ''
        for c in decoder.decode(raw, final=n == len(ids) - 1):
            text += c if c.isprintable() or c in '\n\t' else c.encode('unicode_escape').decode()
        texts.append(text or '·')
    return texts


# ---- The page ------------------------------------------------------------------------------------


LEAST_VOTE = 1e-4  # a smaller one is shown as none
TAU_STEPS = 5000  # temperatures are stored in steps of 1/5000


def packed(array):
    """An array's bytes, deflated, in base64: the page unpacks them with DecompressionStream."""
    return base64.b64encode(zlib.compress(np.ascontiguousarray(array).tobytes(), 9)).decode()


def vote_codes(votes):
    """Votes as bytes, and the step: 0 is none, code n is LEAST_VOTE * exp((n - 1) * step).

    Steps are equal ratios, so a vote, and F as a sum of votes, is off by at most half a step.
    """
    ratio = np.maximum(votes / LEAST_VOTE, 1)
    step = max(math.log(ratio.max()) / 254, 1e-6)
    codes = 1 + np.round(np.log(ratio) / step)
    return np.where(votes < LEAST_VOTE, 0, codes).astype(np.uint8), step


def page(reading, tokens, title, facts, config, budgets=None, memory_tau=1.0):
    """The HTML file as text. tokens as token_texts gives them; title and facts are plain text."""
    T = len(tokens)
    below = np.tril_indices(T, -1)  # nothing happens on the diagonal or above it
    masked = reading.F >= memory_tau
    gone = masked | (np.arange(T)[:, None] >= reading.dropped_at[:, None])  # (L, T, T)
    codes, step = vote_codes(reading.votes)
    temperatures = {}
    for name, layers in reading.temperatures.items():
        steps = (layers * TAU_STEPS).round().astype('<u2')
        temperatures[name] = [packed(layer) for layer in steps]
    content = {
        'title': title,
        'facts': facts,
        'tokens': tokens,
        'layers': config.n_layer,
        'heads': config.n_head,
        'selective': config.selective,
        'budgets': budgets,
        'memoryTau': memory_tau,
        'leastVote': LEAST_VOTE,
        'step': step,
        'votes': [packed(layer[below]) for layer in codes],
        'dropped': reading.dropped_at.tolist(),
        'forgotten': (T - gone.sum(axis=1)).tolist(),
        'M': np.round(reading.M.astype(float), 2).tolist(),
        'tauSteps': TAU_STEPS,
        'temperatures': temperatures,
    }
    template = pathlib.Path(__file__).with_suffix('.html').read_text(encoding='utf-8')
    # Inside <script> only '</' and '<!--' are special. No '<' at all is the simple way to have
    # neither.
    return template.replace('"DATA"', json.dumps(content).replace('<', '\\u003c'))


# ---- The command ---------------------------------------------------------------------------------


def main():
    cfg = settings.parse(VisualizeConfig)
    path = cfg.to or os.path.join(cfg.out_dir, 'visualize.html')
    files.check_output(path, '.html', '<!DOCTYPE html>')
    device = devices.pick_device(cfg.device)
    model, checkpoint = ckpt.load_model(cfg.out_dir, device)
    c = model.config
    if not c.selective and not c.ssa:
        raise UserError(
            f'{cfg.out_dir} has standard attention, which masks nothing and has no temperatures: '
            'there is nothing to show; give a run with selective=True or ssa=qv'
        )
    budgets = ckpt.read_budgets(cfg.budgets, cfg.out_dir, model, cfg.policy)
    if budgets is not None:
        try:
            budgets = check_budgets(c, budgets, cfg.policy)
        except ValueError as e:
            raise UserError(f'--budgets: {e}') from None
    tokenizer = data.get_tokenizer(checkpoint['tokenizer'])
    ids = read_tokens(cfg, tokenizer, c, ckpt.starts_with_bos(checkpoint))
    idx = torch.tensor([ids], device=device)
    reading = read(model, idx, budgets, cfg.policy, cfg.memory_tau)
    facts = f'{c.n_layer} layers of {c.n_head} heads, {len(ids)} tokens'
    if c.ssa:
        facts = f'SSA ({c.ssa}), {facts}'
    if c.selective:
        facts = f'selective attention, {facts}'
    tokens = token_texts(ids, tokenizer)
    write(path, page(reading, tokens, cfg.out_dir, facts, c, budgets, cfg.memory_tau).encode())


def read_tokens(cfg, tokenizer, config, bos):
    """The tokens of --start, as a list; UserError where the model cannot read them."""
    text = files.read_text(cfg.start, errors='replace')
    ids = data.encode_prompt(text, tokenizer, bos)
    size = config.block_size
    if cfg.cut:
        ids = ids[:size]
    if len(ids) < 2:
        raise UserError(f'--start has {len(ids)} tokens, a picture needs two')
    if len(ids) > size:
        raise UserError(
            f'--start has {len(ids)} tokens, the model reads {size}: --cut shows as many'
        )
    if max(ids) >= config.vocab_size:
        raise UserError(f'--start has token {max(ids)}, the model knows {config.vocab_size}')
    return ids


if __name__ == '__main__':
    settings.run(main)
