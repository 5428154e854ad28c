"""Train with one rule of a method changed, to see which rules matter. Everything else is train.py.

    python -m lab.ablate no_relu config/selective_small.py --out_dir=out/no_relu

Rules of selective attention (2410.02703 section 3):

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

A checkpoint does not know the rule, except for no_position: sample.py and prune.py apply the published rule to it, or refuse
it (double_heads). To resume, give the same rule again.
"""
import inspect
import math
import sys

import torch
import torch.nn as nn
import torch.nn.functional as fn

import model as m
import train
from support import settings
from support.settings import UserError

EDITS = {       # a rule as an edit of `attend` in model.py: what stands there, and what takes its place
    'as_published': ('', ''),
    'first_too': ('(0 < j) & (j < i)', 'j < i'),
    'self_too': ('(0 < j) & (j < i)', '(0 < j) & (j <= i)'),
    'at_once': ('(L - F[:, None, :-1])', '(L - F[:, None, 1:])'),
    'last_head': ('vote(L[:, 0]', 'vote(L[:, -1]')}
RULES = *EDITS, 'no_relu', 'groups', 'no_position', 'double_heads'


def groups(q, k, v, vote, dropout=0.0, memory_tau=None):
    """As `model.selective_attention`, for two heads at a time. M is the mean of the selectors."""
    ys, Ms = zip(*(m.selective_attention(*(x[:, h:h + 2] for x in (q, k, v)), vote, dropout, memory_tau)
                   for h in range(0, q.size(1), 2)))
    return torch.cat(ys, dim=1), torch.stack(Ms).mean(dim=0) if memory_tau is not None else None


class DoubleHeads(m.CausalSelfAttention):
    """Standard attention of 2H heads of D channels, where the model has H."""

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
        y = fn.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, 2 * C)), None


def without_position(config, position_aware, original=m.Temperature):
    """A Temperature whose position-aware part is 0 and stays 0."""
    made = original(config, position_aware)
    if position_aware:
        made.alpha.data.fill_(-math.inf)                        # sigmoid(alpha) = 0
        made.alpha.requires_grad_(False)
    return made


def change(rule):
    """Change the rule in model.py, for the rest of this process."""
    if rule in EDITS:
        old, new = EDITS[rule]
        source = inspect.getsource(m.attend)
        if old not in source:
            raise UserError(f'{rule} changes {old!r} in model.attend, which has been edited')
        exec(source.replace(old, new), vars(m))                 # kernels.install notices, and model.py's code trains
    elif rule == 'no_relu':
        m.CausalSelfAttention.vote = lambda self, L0: L0
    elif rule == 'groups':
        m.CausalSelfAttention.attention = staticmethod(groups)
        sys.argv.append('--kernel=none')                        # which leaves `attention` as it is
    elif rule == 'no_position':
        m.Temperature = without_position
    else:
        m.CausalSelfAttention = DoubleHeads


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
    if rule == 'no_relu' and cfg.vote_scale:
        raise UserError('no_relu has no vote_scale')
    change(rule)
    train.main()


if __name__ == '__main__':
    settings.run(main)
