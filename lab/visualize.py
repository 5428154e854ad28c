"""See what a model forgets in a text, when, and who made it: one HTML file that needs no network.

    python -m lab.visualize --out_dir=out/selective_small --start="def f(self):"
    python -m lab.visualize --out_dir=out/selective_small --start=FILE:model.py --cut --budgets=32
    python sample.py --out_dir=out/selective_small | python -m lab.visualize --start=- --cut
    python -m lab.visualize --start=FILE:model.py --cut --text | less -R
    python -m lab.visualize --start=FILE:model.py --cut --png

A selective model shows F, the votes behind it and how many tokens each layer needs; SSA its temperatures.
"""
import base64
import codecs
import itertools
import json
import math
import os
import sys
import zlib
from dataclasses import dataclass

import numpy as np
import torch

import data
from lab.plot import import_pyplot, save_figure, write
from model import F_dtype, KVCache, LayerCache, attend, memory_requirement
from support import checkpoint as ckpt, devices, files, settings
from support.settings import UserError


@dataclass
class VisualizeConfig:
    out_dir: str = 'out/selective_small'    # folder of ckpt.pt
    start: str = ''                         # the text to read: text, FILE:path, or - for standard input
    to: str = ''                            # the page; '': <out_dir>/visualize.html
    png: bool = False                       # also write the panels beside the page, as PNG (needs matplotlib)
    text: bool = False                      # also print the text, what is forgotten at its end dimmed
    cut: bool = False                       # of a text longer than block_size, read what fits, from its beginning
    budgets: str = ''                       # tokens that a layer may keep: a number, 4,9,16,8 or a budgets.json; 'none'
    policy: str = 'selective'               # what is dropped at the budget ['selective', 'oldest', 'random']
    memory_tau: float = 1.0                 # the F at which a token counts as wholly masked [1e-3 to 1e6]
    device: str = 'auto'                    # 'cuda', 'mps', 'cpu'; 'auto': the best one there is


# ----------------------------------------------------------------------------------------------------------------------
# The numbers


@dataclass
class Reading:
    """What a model did with a text of T tokens. Arrays are numpy; row i is the query, column j the key."""
    F: np.ndarray               # (L, T, T) how much the rows before i have masked column j; zeros without selection
    votes: np.ndarray           # (L, T, T) what row i adds to it; nothing for columns that its layer has dropped
    dropped_at: np.ndarray      # (L, T) the first row that does without the column; T: it stays to the end
    M: np.ndarray               # (L, T) the memory requirement of each row, in a reading without budgets
    temperatures: dict          # 'q', 'k' or 'v' -> (L, T, H)


class Recorder(LayerCache):
    """A layer's memory that does all rows in one call of the attention core, and keeps their F and what they drop."""

    def __init__(self, budget, policy):
        self.K, self.policy = budget, policy        # as `forget` reads them; budget None: nothing is dropped

    def attend(self, q, k, v, i, vote):
        F = q.new_zeros(len(q), len(i), dtype=F_dtype(q.dtype))
        y, self.F, self.hidden = attend(q, k, v, F, i, i[None], vote, self.forget if self.K is not None else None)
        return y


@torch.no_grad()
def record(model, idx, budgets=None, policy='selective'):
    """One pass of the model over idx (1, T), as context pruning in its parallel form: a Recorder for each layer."""
    cache = KVCache(model, 1, budgets, policy)
    cache.layers = [Recorder(K if budgets is not None else None, cache.policy) for K in cache.budgets]
    model(idx, cache=cache)
    return cache.layers


def read(model, idx, budgets=None, policy='selective', memory_tau=1.0):
    """The Reading of idx, int64 (1, T). Raises ValueError where budgets or policy do not fit the model."""
    T, i = idx.size(1), torch.arange(idx.size(1), device=idx.device)
    temperatures = {name: [] for name in model.config.ssa}
    hooks = [block.attn.ssa[name].register_forward_hook(lambda _, __, tau, name=name: temperatures[name].append(tau[0]))
             for block in model.transformer.h for name in temperatures]
    try:
        layers = record(model, idx, budgets, policy)
    finally:
        for hook in hooks:
            hook.remove()
    free = layers if budgets is None else record(model, idx)            # M is defined without budgets
    F = torch.cat([layer.F for layer in layers])                                            # (L, T+1, T)
    hidden = torch.cat([layer.hidden for layer in layers])                                  # (L, T, T)
    M = torch.cat([memory_requirement(layer.F[:, :-1], i, memory_tau) for layer in free])
    past = i[:, None] >= i
    return Reading(
        F=F[:, :-1].cpu().numpy(),
        votes=F.diff(dim=1).masked_fill(hidden, 0).cpu().numpy(),
        dropped_at=(T - (hidden & past).sum(dim=1)).cpu().numpy(),              # a dropped column never returns
        M=M.cpu().numpy(),
        temperatures={name: torch.stack(taus).cpu().numpy() for name, taus in temperatures.items()})


def token_texts(ids, tokenizer):
    """What to show for each token: its characters, each at the token that completes it ('·' before that).

    Characters that are invisible or act (controls, right-to-left overrides, broken UTF-8) are written as escapes.
    """
    decoder, texts = codecs.getincrementaldecoder('utf-8')('backslashreplace'), []
    for n, token in enumerate(ids):
        known = token < tokenizer.n_vocab                               # a padded vocabulary has ids without text
        raw = tokenizer.decode_single_token_bytes(token) if known else b''
        text = decoder.decode(raw, final=n == len(ids) - 1)
        texts.append(''.join(c if c.isprintable() or c in '\n\t' else c.encode('unicode_escape').decode()
                             for c in text) or '·')
    return texts


# ----------------------------------------------------------------------------------------------------------------------
# The page


LEAST_VOTE = 1e-4           # a smaller one is shown as none
TAU_STEPS = 5000            # temperatures are stored in steps of 1/5000


def packed(array):
    """Bytes of an array, deflated, in base64: the page unpacks them with DecompressionStream('deflate')."""
    return base64.b64encode(zlib.compress(np.ascontiguousarray(array).tobytes(), 9)).decode()


def vote_codes(votes):
    """Votes as bytes, and the step: 0 is none, code n is LEAST_VOTE * exp((n - 1) * step).

    Steps are equal ratios, so a vote, and F as a sum of votes, is off by at most half a step.
    """
    step = max(math.log(max(votes.max(), LEAST_VOTE) / LEAST_VOTE) / 254, 1e-6)
    with np.errstate(divide='ignore'):
        codes = 1 + np.round(np.log(votes / LEAST_VOTE) / step)
    return np.where(votes < LEAST_VOTE, 0, codes).astype(np.uint8), step


def page(reading, tokens, title, facts, config, budgets=None, policy='selective', memory_tau=1.0):
    """The HTML file as text. tokens as token_texts gives them; title and facts are plain text too."""
    T = len(tokens)
    below = np.tril_indices(T, -1)                          # nothing happens on the diagonal or above it
    gone = (reading.F >= memory_tau) | (np.arange(T)[:, None] >= reading.dropped_at[:, None])     # (L, T, T)
    codes, step = vote_codes(reading.votes)
    content = {
        'title': title, 'facts': facts, 'tokens': tokens, 'layers': config.n_layer, 'heads': config.n_head,
        'selective': config.selective, 'budgets': budgets, 'policy': policy, 'memoryTau': memory_tau,
        'leastVote': LEAST_VOTE, 'step': step, 'votes': [packed(c[below]) for c in codes],
        'dropped': reading.dropped_at.tolist(), 'forgotten': (T - gone.sum(axis=1)).tolist(),
        'M': np.round(reading.M.astype(float), 2).tolist(),
        'tauSteps': TAU_STEPS,
        'temperatures': {name: [packed((t * TAU_STEPS).round().astype('<u2')) for t in taus]
                         for name, taus in reading.temperatures.items()}}
    with open(os.path.join(os.path.dirname(__file__), 'visualize.html'), encoding='utf-8') as f:
        template = f.read()
    # Inside <script> only '</' and '<!--' are special; no '<' at all is the simple way to have neither.
    return template.replace('"DATA"', json.dumps(content).replace('<', '\\u003c'))


# ----------------------------------------------------------------------------------------------------------------------
# Terminal and PNG


def dimmed(reading, tokens, memory_tau=1.0):
    """The text for a terminal, once for each layer: dim is masked for the last token, struck through is dropped."""
    T, out = len(tokens), ''
    for l, (F, dropped_at) in enumerate(zip(reading.F[:, -1], reading.dropped_at)):
        styles = np.where(dropped_at < T, '2;9', np.where(F >= memory_tau, '2', '0'))
        out += f'\x1b[1mlayer {l}: of {T - 1} earlier tokens the last one sees {(styles[:-1] == "0").sum()}\x1b[0m\n'
        for style, run in itertools.groupby(range(T), styles.__getitem__):
            out += f'\x1b[{style}m' + ''.join(tokens[j] for j in run) + '\x1b[0m'
        out += '\n\n'
    return out


def write_panels(reading, stem, config, budgets=None):
    """<stem>_F.png and <stem>_M.png of a selective model, <stem>_tau.png of SSA. Token texts are not in them."""
    plt = import_pyplot()
    L, T = reading.M.shape

    def panels(count, width, height):
        columns = min(count, 4)
        rows = math.ceil(count / columns)
        figure, axes = plt.subplots(rows, columns, squeeze=False, figsize=(width * columns, height * rows),
                                    sharex=True, sharey=True, layout='constrained')
        for ax in axes.flat[count:]:
            ax.remove()
        return figure, axes.flat[:count]

    if config.selective:
        figure, axes = panels(L, 3, 3)
        rows, blues = np.arange(T), plt.get_cmap('Blues').with_extremes(under='0.7', over='0.95')
        for l, ax in enumerate(axes):
            left = np.where(rows[:, None] < reading.dropped_at[l], np.exp(-reading.F[l]), -1)
            left = np.where(rows[:, None] < rows, 2, left)
            image = ax.imshow(left, vmin=0, vmax=1, cmap=blues, interpolation='nearest')
            ax.set(title=f'layer {l}', xlabel='token j', ylabel='seen from row i')
        figure.colorbar(image, ax=list(axes), label='attention left, $e^{-F}$' + ('; grey: dropped' if budgets else ''))
        save_figure(figure, stem + '_F.png')

        figure, axes = panels(L, 3, 2.2)
        for l, ax in enumerate(axes):
            ax.plot(rows, color='0.6', linestyle=':', label='all earlier tokens')
            ax.plot(reading.M[l], color='#0072b2', label='needed, M')
            if budgets:
                ax.axhline(budgets[l], color='#d55e00', linestyle='--', label='budget')
            ax.set(title=f'layer {l}', xlabel='row i', ylabel='tokens',
                   ylim=(0, 1.05 * max(reading.M.max(), *budgets or [1])))
        axes[0].legend(fontsize='small')
        save_figure(figure, stem + '_M.png')

    if reading.temperatures:
        figure, axes = panels(L * len(reading.temperatures), 3, 2.2)
        high = max(taus.max() for taus in reading.temperatures.values())
        low = min(taus.min() for taus in reading.temperatures.values())
        titles = [(name, l) for name in reading.temperatures for l in range(L)]
        for ax, (name, l) in zip(axes, titles):
            image = ax.imshow(reading.temperatures[name][l].T, vmin=low, vmax=high, cmap='viridis', aspect='auto',
                              interpolation='nearest')
            ax.set(title=f'{name}, layer {l}', xlabel='token', ylabel='head')
        figure.colorbar(image, ax=list(axes), label=r'temperature $\tau$')
        save_figure(figure, stem + '_tau.png')


# ----------------------------------------------------------------------------------------------------------------------


def main():
    cfg = settings.parse(VisualizeConfig)
    if cfg.png:
        import_pyplot()                                     # fail before the work
    path = cfg.to or os.path.join(cfg.out_dir, 'visualize.html')
    files.check_output(path, '.html', '<!DOCTYPE html>')
    device = devices.pick_device(cfg.device)
    model, checkpoint = ckpt.load_model(cfg.out_dir, device)
    c = model.config
    if not c.selective and not c.ssa:
        raise UserError(f'{cfg.out_dir} has standard attention, which masks nothing and has no temperatures: '
                        'there is nothing to show; give a run with selective=True or ssa=qv')
    if not c.selective and (cfg.text or cfg.budgets not in ('', 'none')):
        raise UserError(f'{cfg.out_dir} has SSA without selective attention: its temperatures can be shown, but '
                        'nothing is forgotten, so leave out --text and --budgets')
    budgets = ckpt.read_budgets(cfg.budgets, cfg.out_dir, model, cfg.policy) if c.selective else None

    tokenizer = data.get_tokenizer(checkpoint['tokenizer'])
    ids = data.encode_prompt(files.read_text(cfg.start, errors='replace'), tokenizer, ckpt.starts_with_bos(checkpoint))
    if cfg.cut:
        ids = ids[:c.block_size]
    if len(ids) < 2:
        raise UserError(f'--start has {len(ids)} tokens, a picture needs two: give text, FILE:path, or - for stdin')
    if len(ids) > c.block_size:
        raise UserError(f'--start has {len(ids)} tokens, the model reads {c.block_size}: --cut shows as many')
    if max(ids) >= c.vocab_size:
        raise UserError(f'--start has token {max(ids)}, the model knows {c.vocab_size}')
    try:
        reading = read(model, torch.tensor([ids], device=device), budgets, cfg.policy, cfg.memory_tau)
    except ValueError as e:
        raise UserError(f'--budgets: {e}') from None
    if isinstance(budgets, int):
        budgets = [budgets] * c.n_layer

    tokens = token_texts(ids, tokenizer)
    attention = ' and '.join(['selective attention'] * c.selective + [f'SSA ({c.ssa})'] * bool(c.ssa))
    facts = f'{attention}, {c.n_layer} layers of {c.n_head} heads, {len(ids)} tokens'
    html = page(reading, tokens, cfg.out_dir, facts, c, budgets, cfg.policy, cfg.memory_tau)
    write(path, html.encode())
    if cfg.png:
        write_panels(reading, os.path.splitext(path)[0], c, budgets)
    if cfg.text:
        print(dimmed(reading, tokens, cfg.memory_tau))


if __name__ == '__main__':
    settings.run(main)
