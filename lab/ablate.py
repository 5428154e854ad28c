"""Train with one rule of a method changed, to see which rules matter. Everything else is train.py.

    python -m lab.ablate no_relu config/selective_small.py --out_dir=out/no_relu

Rules of selective attention (2410.02703 section 3), with the papers' equations as full T x T matrices:

    as_published    nothing is changed: what the others are compared with
    first_too       token 0 may be masked, too
    self_too        a token may mask itself for later rows
    no_relu         negative votes count: S = L[0], so a masked token can be unmasked
    at_once         a row's vote acts on that row already, not on later rows only
    last_head       the last head selects instead of head 0
    groups          one selector for every two heads, which mask for these two alone

Others:

    no_position     SSA without the position-aware part of the query temperature (2411.12892 section 3)
    double_heads    standard attention with twice the heads, of the same size, and so twice its parameters

But for no_position, the checkpoint does not know the rule: sample.py and prune.py would apply the published one to it, or
refuse it (double_heads). To resume, give the same rule again.
"""
import math
import sys

import torch
import torch.nn as nn
import torch.nn.functional as fn

import model as m
import train
from support import settings
from support.settings import UserError


def attention(rule, q, k, v, dropout=0.0, tau=None, scale=None):
    """As `model.selective_attention`, with one rule changed. The memory requirement of several selectors is their mean."""
    H, T, D = q.shape[1:]
    i = torch.arange(T, device=q.device)
    future, oneself = i > i[:, None], i == i[:, None]           # (T, T)
    L = (q @ k.transpose(-2, -1) * D**-0.5).float()             # (B, H, T, T)
    S = L[:, {'groups': slice(0, H, 2), 'last_head': slice(H - 1, H)}.get(rule, slice(0, 1))]   # (B, selectors, T, T)
    S = S if rule == 'no_relu' else S.relu()
    S = S.masked_fill(future if rule == 'self_too' else future | oneself, 0)
    S = S if rule == 'first_too' else S * (i > 0)
    S = S if scale is None else S * scale
    F = S.cumsum(dim=-2) if rule == 'at_once' else S.cumsum(dim=-2) - S
    L = L - F.repeat_interleave(-(-H // F.size(1)), dim=1)[:, :H]       # each selector's F for its own heads
    P = fn.dropout(L.masked_fill(future, float('-inf')).softmax(dim=-1), dropout, training=dropout > 0)
    return P.to(v.dtype) @ v, m.memory_requirement(F.transpose(0, 1), i, tau).mean(dim=0) if tau is not None else None


class DoubleHeads(m.CausalSelfAttention):
    """Standard attention of 2H heads of D channels, where the model has H."""

    def __init__(self, config):
        super().__init__(config)
        C = config.n_embd
        self.c_attn = nn.Linear(C, 6 * C, bias=config.bias)
        self.c_proj = nn.Linear(2 * C, C, bias=config.bias)

    def forward(self, x, i, cache=None, memory_tau=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, 2 * self.config.n_head, -1).permute(2, 0, 3, 1, 4)     # (B, 2H, T, D)
        y = fn.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, 2 * C)), None


RULES = 'as_published', 'first_too', 'self_too', 'no_relu', 'at_once', 'last_head', 'groups', 'no_position', 'double_heads'


def change(rule):
    """Change the rule in model.py, for the rest of this process."""
    if rule == 'no_position':
        def temperature(config, position_aware, original=m.Temperature):
            made = original(config, position_aware)
            if position_aware:
                made.alpha.data.fill_(-math.inf)                # sigmoid(alpha) = 0
                made.alpha.requires_grad_(False)
            return made
        m.Temperature = temperature
    elif rule == 'double_heads':
        m.CausalSelfAttention = DoubleHeads
    else:
        m.selective_attention = lambda *args, **kwargs: attention(rule, *args, **kwargs)


def main():
    if '--help' in sys.argv or '-h' in sys.argv:
        print(__doc__)
        return
    rule = sys.argv.pop(1) if len(sys.argv) > 1 else ''
    if rule not in RULES:
        raise UserError(f"the rule comes first, one of {', '.join(RULES)}")
    cfg = settings.parse(train.TrainConfig)
    if not {'no_position': 'q' in cfg.ssa, 'double_heads': not cfg.selective and not cfg.ssa}.get(rule, cfg.selective):
        raise UserError(f'{rule} changes nothing in a model with selective={cfg.selective} and ssa={cfg.ssa!r}')
    if rule == 'double_heads' and cfg.dropout:
        raise UserError('double_heads has no dropout')
    change(rule)
    sys.argv.append('--kernel=rows')                            # the code that is changed
    train.main()


if __name__ == '__main__':
    settings.run(main)
