"""Show what a model forgets in a text, when, and by whose votes, in one offline HTML file.

    python -m lab.visualize --out_dir=out/selective_small --start="def f(self):"
    python -m lab.visualize --out_dir=out/selective_small --start=FILE:model.py --budgets=32
    python sample.py --out_dir=out/selective_small | python -m lab.visualize --start=-

The page shows F of a selective model, the votes behind it and how many tokens each layer needs. Of
a long text it has the beginning, block_size tokens. The votes of a voter mask nothing: read masked
as voted against.
"""

import base64
import codecs
import json
import pathlib
import sys
import zlib
from dataclasses import dataclass
from functools import partial

from support import settings  # before torch, see support/__init__.py

import numpy as np
import torch

import data
from model import F_dtype, KVCache, attend
from support import checkpoint as ckpt, files
from support.settings import UserError, option


@dataclass
class VisualizeConfig:
    out_dir: str = option('out/selective_small', 'folder of ckpt.pt')
    start: str = option('FILE:model.py', 'what to read: text, FILE:path, or - for standard input')
    to: str = option('', "the page; '': <out_dir>/visualize.html")
    budgets: str = option('', 'tokens that a layer keeps: a number, 4,9,16,8, a budgets.json; none')


# ---- The numbers ---------------------------------------------------------------------------------


@dataclass
class Reading:
    """What a model did with a text of T tokens, in numpy. Row i is the query, column j the key."""

    F: np.ndarray  # (L, T, T) how much the rows before i have masked column j
    votes: np.ndarray  # (L, T, T) what row i adds to it; 0 for columns that its layer has dropped
    dropped_at: np.ndarray  # (L, T) the first row that does without the column; T: none does


def record(layer, q, k, v, i, rule, voting):
    """LayerCache.attend for all rows at once, which keeps what it computes in the layer."""
    F = q.new_zeros(len(q), len(i), dtype=F_dtype(q.dtype))
    forget = partial(layer.forget, layer.policy.start(k))
    y, F, hidden, _ = attend(q, k, v, F, i, i[None], rule, forget, voting=voting)
    layer.F = F[:, :-1]  # (1, T, T)
    layer.votes = F.diff(dim=1).masked_fill(hidden, 0)
    # A column is dropped for good, so the rows that see it come one after the other.
    layer.dropped_at = i + (~hidden).sum(dim=1)  # (1, T)
    return y


@torch.no_grad()
def read(model, idx, budgets=None):
    """The Reading of idx, int64 (1, T), by a selective model within budgets.

    Raises UserError for a rule of votes that the page cannot draw.
    """
    cache = KVCache(model, 1, budgets)
    for layer in cache.layers:
        layer.attend = partial(record, layer)
    model(idx, cache=cache)
    votes = joined(layer.votes for layer in cache.layers)
    if (votes < -1e-4).any():
        raise UserError('the page can only draw votes that are never negative and never fade')
    F = joined(layer.F for layer in cache.layers)
    return Reading(F, votes, joined(layer.dropped_at for layer in cache.layers))


def joined(layers):
    """What each layer has, (1, …), as an array (L, …)."""
    return torch.cat(list(layers)).cpu().numpy()


def token_texts(ids, tokenizer):
    """What to show for each token: its characters, each at the token that completes it.

    A token that completes none is '·'. Characters that are invisible or act (controls,
    right-to-left overrides, broken UTF-8) are written as escapes.
    """
    decoder = codecs.getincrementaldecoder('utf-8')('backslashreplace')
    texts = []
    for n, token in enumerate(ids):
        raw = tokenizer.decode_single_token_bytes(token)
        text = ''
        for c in decoder.decode(raw, final=n == len(ids) - 1):
            text += c if c.isprintable() or c in '\n\t' else c.encode('unicode_escape').decode()
        texts.append(text or '·')
    return texts


# ---- The page ------------------------------------------------------------------------------------


def packed(array):
    """Numbers as float32, deflated, in base64.

    They are rounded to float16, which is precise enough for a picture and leaves zeros to deflate.
    """
    numbers = array.astype(np.float16).astype('<f4')
    return base64.b64encode(zlib.compress(numbers.tobytes(), 9)).decode()


def page(reading, tokens, title, budgets=None):
    """The HTML file as text. tokens as token_texts gives them; title is plain text."""
    T = len(tokens)
    rows = np.arange(T)
    i, j = np.tril_indices(T, -1)  # nothing happens on the diagonal or above it
    # (L, T, T) how much of each column is masked; what is dropped is masked whole
    masked = reading.F.clip(max=1)
    masked[rows[:, None] >= reading.dropped_at[:, None]] = 1
    content = {
        'title': title,
        'tokens': tokens,
        'budgets': budgets,
        'votes': packed(reading.votes[:, i, j]),
        'dropped': reading.dropped_at.tolist(),
        'forgotten': (masked < 1).sum(axis=1).tolist(),  # the first row after those that see it
        'M': (rows - masked.sum(axis=2)).tolist(),
    }
    template = pathlib.Path(__file__).with_suffix('.html').read_text(encoding='utf-8')
    # Inside <script> only '</' and '<!--' are special. No '<' at all is the simple way to have
    # neither.
    return template.replace('"DATA"', json.dumps(content).replace('<', '\\u003c'))


# ---- The command ---------------------------------------------------------------------------------


def main():
    cfg = settings.parse(VisualizeConfig)
    path = cfg.to or f'{cfg.out_dir}/visualize.html'
    files.check_output(path, '.html', '<!DOCTYPE html>')
    model, checkpoint = ckpt.load_model(cfg.out_dir)
    if not model.config.selective:
        raise UserError(f'{cfg.out_dir} has no votes to show: give a run with selective=True')
    budgets = ckpt.read_budgets(cfg.budgets, cfg.out_dir, model, 'selective')
    tokenizer = data.get_tokenizer(checkpoint['tokenizer'])
    text = files.read_text(cfg.start)
    ids = data.encode_prompt(text, tokenizer, ckpt.starts_with_bos(checkpoint))
    if len(ids) < 2:
        raise UserError('--start is a single token, which has nothing to forget: give more text')
    shown = ids[: model.config.block_size]
    tokens = token_texts(shown, tokenizer)
    reading = read(model, torch.tensor([shown]), budgets)
    files.write_file(path, page(reading, tokens, cfg.out_dir, budgets))
    print(f'{path} has {len(tokens)} of {len(ids)} tokens', file=sys.stderr)


if __name__ == '__main__':
    settings.run(main)
