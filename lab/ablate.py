"""Train with one rule changed, or with another method in its place: to see what matters. Everything else is train.py.

    python -m lab.ablate no_relu config/selective_small.py --out_dir=out/no_relu
    python -m lab.ablate window=32 config/selective_small.py --out_dir=out/window

All of these are one recurrence, F <- F + S, with P = softmax(L - F), and differ in who votes, on what, and how much:

    standard            S = 0
    window=K            S[i,j] = inf for j = i - K + 2: a token K - 1 back is gone for good
    alibi               S[i,j] = m[h], a constant of the head: distance alone (up to token 0 and one step)
    fox                 S[i,j] = -log σ(gate of i): the reader decides alone, and treats all earlier tokens alike
    selective           S[i,j] = max(0, L[0,i,j]): reader and token decide together

Votes, with --selective (2410.02703 section 3):

    as_published        nothing is changed: what the others are compared with
    no_relu             negative votes count: S = L[0], so a masked token can be unmasked
    fox                 S[i,j] = softplus(-L[0,i,0] - 4), after the Forgetting Transformer (arXiv 2503.02130). The gate
                        of row i is its logit of token 0: q.k of a key that is the same in all texts, so a linear
                        function of the row, at no new parameters. Theirs has its own gate for each head, and acts at
                        once.

What is masked, with --selective. T x T matrices:

    first_too           token 0 may be masked, too
    self_too            a token may mask itself for later rows
    at_once             a row's vote acts on that row already, not on later rows only
    last_head           the last head selects instead of head 0
    groups              one selector for every two heads, which mask for these two alone
    window=K            no votes: token 0 and the newest K - 1 tokens, as a budget of K with policy 'oldest' keeps
    alibi               no votes: logits fall with distance by 2^(-8h/H) a token in head h = 1 ... H (arXiv 2108.12409)
    alibi=K             that, of token 0 and the newest K - 1 tokens alone
    votes_and_alibi     both, to see what either adds to the other

Temperatures, with --ssa (2411.12892 section 3):

    no_position         --ssa=qv without the position-aware part
    position_on_values  --ssa=qv with the position-aware part on values, too, as in the paper's ablation
    position_only       --ssa=q, the position-aware part alone as in the authors' code: 1 + exp(-exp(β)) log n, one β
                        a layer
    ssmax               --ssa=q, the scalable softmax (arXiv 2501.19399): s log n, one s a head

And double_heads: standard attention with twice the heads, of the same size, and so twice its parameters.

The checkpoint of a rule does not know it: sample.py and prune.py would apply the published one, or refuse it. To
resume, give the same rule again.
"""
import contextlib
import functools
import os
import sys

import torch
import torch.nn as nn
import torch.nn.functional as fn

import model as m
import train
from support import checkpoint as ckpt, settings
from support.settings import UserError

# ---- Votes: (layer, logits of head 0 (B, R, N)) -> S


def no_relu(layer, L0):
    return L0


def fox(layer, L0):
    return fn.softplus(-L0[..., :1] - 4).expand_as(L0)          # -log σ(gate), which starts near 0.02 a token


# ---- What is masked: as `model.selective_attention`, (q, k, v, vote, dropout, memory_tau) -> y, M


def listing(rule, q, k, v, vote, dropout=0.0, memory_tau=None):
    """As `model.selective_attention_listing`, with one rule changed. M of several selectors is their mean."""
    H, T, D = q.shape[1:]
    i = torch.arange(T, device=q.device)[:, None]               # (T, 1)
    j = i.T                                                     # (1, T)
    L = (q @ k.transpose(-2, -1) * D**-0.5).to(m.F_dtype(q.dtype))      # (B, H, T, T)
    selectors = {'groups': range(0, H, 2), 'last_head': [H - 1]}.get(rule, [0])
    S = torch.stack([vote(L[:, h]) for h in selectors], dim=1)  # (B, selectors, T, T)
    S = S * (j <= i if rule == 'self_too' else j < i) * (j >= 0 if rule == 'first_too' else j > 0)
    F = S.cumsum(dim=-2) if rule == 'at_once' else S.cumsum(dim=-2) - S
    L = L - F.repeat_interleave(-(-H // len(selectors)), dim=1)[:, :H]      # each selector's F for its own heads
    if rule == 'votes_and_alibi':
        L = L + by_distance(H, i)
    P = fn.dropout(L.masked_fill(j > i, float('-inf')).softmax(dim=-1), dropout, training=dropout > 0)
    M = None if memory_tau is None else m.memory_requirement(F.transpose(0, 1), i[:, 0], memory_tau).mean(dim=0)
    return P.to(v.dtype) @ v, M


def by_distance(H, i):
    """What ALiBi adds to the logits of rows i (T, 1): (H, T, T)."""
    slopes = 2.0 ** (-8 * torch.arange(1, H + 1, device=i.device) / H)
    return slopes[:, None, None] * (i.T - i)


def newest(K, alibi, q, k, v, vote, dropout=0.0, memory_tau=None):
    """Token 0 and the newest K - 1 tokens, the row's own among them; all where K is None. alibi: whether logits fall
    with distance. M is the tokens before a row that it sees."""
    H, T = q.shape[1:3]
    i = torch.arange(T, device=q.device)[:, None]               # (T, 1)
    j = i.T                                                     # (1, T)
    seen = (j <= i) & ((j > i - (K or T) + 1) | (j == 0))       # (T, T)
    bias = by_distance(H, i) if alibi else torch.zeros(T, T, device=q.device)
    y = fn.scaled_dot_product_attention(q, k, v, attn_mask=bias.masked_fill(~seen, float('-inf')).to(q.dtype),
                                        dropout_p=dropout)
    return y, None if memory_tau is None else (seen.sum(dim=1) - 1.0).expand(len(q), -1)


# ---- Temperatures of the queries: in the place of `model.Temperature`


class PositionOnly(nn.Module):
    def __init__(self, config, position_aware):
        super().__init__()
        self.beta = nn.Parameter(torch.tensor([1.5]))           # the authors' start: 1 + 0.011 log n

    def forward(self, x, activations, pos):
        return 1 + (torch.exp(-torch.exp(self.beta)) * torch.log(pos + 1.0))[:, None]   # (T, 1)


class ScalableSoftmax(nn.Module):
    def __init__(self, config, position_aware):
        super().__init__()
        self.s = nn.Parameter(torch.full((config.n_head,), 0.43))       # 1 at the ninth token

    def forward(self, x, activations, pos):
        return self.s * torch.log(pos + 2.0)[:, None]           # (T, H); n + 1, as log 1 = 0


def no_position(config, position_aware, original=m.Temperature):
    made = original(config, position_aware)
    if position_aware:
        made.alpha.data.fill_(-1e4)                             # sigmoid(alpha) = 0
        made.alpha.requires_grad_(False)
    return made


def position_on_values(config, position_aware, original=m.Temperature):
    return original(config, position_aware=True)                # of values as of queries


# ---- Twice the heads


class DoubleHeads(m.CausalSelfAttention):
    """Attention of 2H heads of D channels, where the model has H."""

    def __init__(self, config):
        super().__init__(config)
        C = config.n_embd
        self.c_attn = nn.Linear(C, 6 * C, bias=config.bias)
        self.c_proj = nn.Linear(2 * C, C, bias=config.bias)

    def forward(self, x, pos, cache=None, memory_tau=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, 2 * self.config.n_head, -1).unbind(dim=2)        # (B, T, 2H, D)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.config.rope:
            q, k = m.rotate(q, k, pos)
        y = fn.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, 2 * C)), None


# ----------------------------------------------------------------------------------------------------------------------

VOTES = {'no_relu': no_relu, 'fox': fox}
LISTINGS = 'as_published', 'first_too', 'self_too', 'at_once', 'last_head', 'groups', 'votes_and_alibi'
TEMPERATURES = {'no_position': no_position, 'position_on_values': position_on_values, 'position_only': PositionOnly,
                'ssmax': ScalableSoftmax}
RULES = (*VOTES, *LISTINGS, 'window=K', 'alibi', 'alibi=K', *TEMPERATURES, 'double_heads')


def parse(rule):
    """(name of the rule, K or None); UserError if there is no such rule."""
    name, equals, K = rule.partition('=')
    if equals:
        name += '=K'
    if name not in RULES or equals and not (K.isascii() and K.isdigit() and len(K) < 8 and int(K) >= 2):
        raise UserError(f"the rule comes first, one of {', '.join(RULES)}, with K at least 2")
    return name, int(K) if equals else None


@contextlib.contextmanager
def changed(rule):
    """model.py with this rule, until the block ends."""
    name, K = parse(rule)
    layer = m.CausalSelfAttention
    before = [(m, name, getattr(m, name)) for name in ('selective_attention', 'Temperature', 'CausalSelfAttention')]
    before += [(layer, 'attention', staticmethod(m.selective_attention)), (layer, 'vote', layer.vote)]
    try:
        if name in VOTES:
            layer.vote = VOTES[name]
        elif name in TEMPERATURES:
            m.Temperature = TEMPERATURES[name]
        elif name == 'double_heads':
            m.CausalSelfAttention = DoubleHeads
        else:
            if name in ('window=K', 'alibi', 'alibi=K'):
                attention = functools.partial(newest, K, 'alibi' in name)
            else:
                attention = functools.partial(listing, name)
            # both: kernels compare themselves with the first, and step aside
            m.selective_attention, layer.attention = attention, staticmethod(attention)
        yield
    finally:
        for place, attribute, value in before:
            setattr(place, attribute, value)


def check(name, cfg):
    """UserError if the rule would change nothing in a model of these settings, or cannot be had with them."""
    if name in TEMPERATURES:
        fits = {'no_position': 'q' in cfg.ssa, 'position_on_values': 'v' in cfg.ssa}.get(name, cfg.ssa == 'q')
    else:
        fits = not cfg.selective and not cfg.ssa if name == 'double_heads' else cfg.selective
    if not fits:
        raise UserError(f'{name} does not fit a model with selective={cfg.selective} and ssa={cfg.ssa!r}: see --help')
    if name == 'double_heads' and cfg.dropout:
        raise UserError('double_heads has no dropout')
    if name in VOTES and cfg.vote_scale:
        raise UserError(f'{name} has no vote_scale')


def main():
    if '--help' in sys.argv or '-h' in sys.argv:
        print(__doc__)
        return
    rule = sys.argv.pop(1) if len(sys.argv) > 1 else ''
    name, _ = parse(rule)
    cfg = settings.parse(train.TrainConfig)
    if (cfg.eval_only or cfg.init_from == 'resume') and os.path.isfile(os.path.join(cfg.out_dir, 'ckpt.pt')):
        for key, value in ckpt.model_args(ckpt.load(cfg.out_dir)).items():      # the checkpoint decides
            setattr(cfg, key, value)
    check(name, cfg)
    with changed(rule):
        train.main()


if __name__ == '__main__':
    settings.run(main)
