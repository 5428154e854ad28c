"""Train with one rule changed, or with another method in its place, to see what matters.

    python -m lab.ablate no_relu config/selective_small.py --out_dir=out/no_relu
    python -m lab.ablate window=32 config/selective_small.py --out_dir=out/window

Everything else is train.py. All of these are one recurrence, F <- F + S, with P = softmax(L - F).
They differ in who votes, on what, and how much:

    standard            S = 0
    window=K            S[i,j] = inf for j = i - K + 2: a token K - 1 back is gone for good
    alibi               S[i,j] = m[h], a constant of the head: only distance counts (up to token 0
                        and one step)
    fox                 S[i,j] = -log σ(gate of i): the reader alone decides, and treats all earlier
                        tokens alike
    selective           S[i,j] = max(0, L[0,i,j]): reader and token decide together

These rules change the votes, and set --selective (2410.02703 section 3):

    no_relu             negative votes count: S = L[0], so a masked token can be unmasked
    fox                 S[i,j] = softplus(-L[0,i,0] - 4), after the Forgetting Transformer (arXiv
                        2503.02130). The gate of row i is its logit of token 0, q.k of a key that is
                        the same in all texts, so a linear function of the row at no new parameters.
                        Theirs has a gate of its own for each head, and acts at once.

These rules change what is masked. They set --selective, too, and build T x T tensors:

    first_too           token 0 may be masked, too
    self_too            a token may mask itself for later rows
    last_head           the last head selects instead of head 0
    window=K            no votes: token 0 and the newest K - 1 tokens, which a budget of K tokens
                        keeps under oldest-first eviction
    alibi               no votes: logits fall with distance by 2^(-8h/H) a token in head h = 1 ... H
                        (arXiv 2108.12409)
    alibi=K             alibi on token 0 and the newest K - 1 tokens alone
    votes_and_alibi     both, to see what either adds to the other

These rules change the temperatures, and set --ssa=q (2411.12892 section 3):

    position_only       the position-aware part alone as in the authors' code:
                        1 + exp(-exp(β)) log n, one β a layer
    ssmax               the scalable softmax (arXiv 2501.19399): s log n, one s a head

Last, double_heads is standard attention with twice the heads, of the same size, and so with twice
its parameters.

A checkpoint does not record its rule: sample.py and prune.py would apply the published one, or
refuse it. To resume or evaluate, give the rule again.
"""

import contextlib
import dataclasses
import math
import sys

from support import settings  # before torch, see support/__init__.py

import torch
import torch.nn as nn
import torch.nn.functional as fn

import model as m
import train
from support.settings import UserError

# ---- Votes ---------------------------------------------------------------------------------------


class NoReLU(m.CausalSelfAttention):
    def vote(self, L0):
        return L0


class Fox(m.CausalSelfAttention):
    def vote(self, L0):
        gate = fn.softplus(-L0[..., :1] - 4)  # -log σ, which starts near 0.02 a token
        return gate.expand_as(L0)


# ---- What is masked ------------------------------------------------------------------------------


class Masks(m.CausalSelfAttention):
    """Selective attention with T x T tensors, and what a rule can change in it."""

    head = 0  # which votes
    first = 1  # the first token that may be masked
    newest = -1  # the newest one, counted from the row

    def votes(self, L, i, j):
        """S (B, T, T), from the logits L (B, T, T) of the head that votes."""
        return torch.where((self.first <= j) & (j <= i + self.newest), self.vote(L), 0.0)

    def bias(self, i, j):
        """What is added to the logits of rows i (T, 1) and columns j (1, T)."""
        return 0.0

    @staticmethod
    def attention(q, k, v, rule, dropout=0.0, memory_tau=None):
        i = torch.arange(q.size(2), device=q.device)[:, None]  # (T, 1)
        j = i.T  # (1, T)
        L = m.logits(q[:, [rule.head]], k[:, [rule.head]])[:, 0]  # (B, T, T)
        S = rule.votes(L, i, j)
        F = rule.accumulate(torch.zeros_like(S[:, 0]), S)[:, :-1]  # (B, T, T)
        bias = (rule.bias(i, j) - F[:, None]).masked_fill(j > i, -math.inf)
        y = fn.scaled_dot_product_attention(q, k, v, bias.to(q.dtype), dropout_p=dropout)
        if memory_tau is None:
            return y, None
        return y, m.memory_requirement(F, i[:, 0], memory_tau)


class FirstToo(Masks):
    first = 0


class SelfToo(Masks):
    newest = 0


class LastHead(Masks):
    head = -1


class Window(Masks):
    """Token 0 and the newest K - 1 tokens, the row's own among them."""

    def votes(self, L, i, j):
        last = (0 < j) & (j == i - self.K + 2)
        return torch.zeros_like(L).masked_fill(last, math.inf)


class VotesAndAlibi(Masks):
    def bias(self, i, j):
        H = self.config.n_head
        slopes = 2.0 ** (-8 * torch.arange(1, H + 1, device=i.device) / H)
        return slopes[:, None, None] * (j - i)  # (H, T, T)


class Alibi(VotesAndAlibi, Window):
    pass


# ---- Twice the heads -----------------------------------------------------------------------------


class DoubleHeads(m.CausalSelfAttention):
    """Standard attention of 2H heads of D channels, where the model has H."""

    def __init__(self, config):
        C = config.n_embd
        super().__init__(dataclasses.replace(config, n_head=2 * config.n_head, n_embd=2 * C))
        self.c_attn = nn.Linear(C, 6 * C, bias=config.bias)
        self.c_proj = nn.Linear(2 * C, C, bias=config.bias)


# ---- Temperatures --------------------------------------------------------------------------------


class PositionOnly(nn.Module):
    def __init__(self, config, heads, position_aware):
        super().__init__()
        self.beta = nn.Parameter(torch.tensor([1.5]))  # the authors' start: 1 + 0.011 log n

    def forward(self, x, activations, pos):
        tau = 1 + torch.exp(-torch.exp(self.beta)) * torch.log(pos + 1.0)
        return tau[:, None]  # (T, 1)


class ScalableSoftmax(nn.Module):
    def __init__(self, config, heads, position_aware):
        super().__init__()
        self.s = nn.Parameter(torch.full((heads,), 0.43))  # 1 at the ninth token

    def forward(self, x, activations, pos):
        return self.s * torch.log(pos + 2.0)[:, None]  # (T, H); n + 1, as log 1 = 0


# --------------------------------------------------------------------------------------------------

TEMPERATURES = {'position_only': PositionOnly, 'ssmax': ScalableSoftmax}
RULES = {
    'no_relu': NoReLU,
    'fox': Fox,
    'first_too': FirstToo,
    'self_too': SelfToo,
    'last_head': LastHead,
    'window=K': Window,
    'alibi': Alibi,
    'alibi=K': Alibi,
    'votes_and_alibi': VotesAndAlibi,
    'double_heads': DoubleHeads,
    **TEMPERATURES,
}


@contextlib.contextmanager
def changed(rule):
    """model.py with this rule until the block ends: its class takes the place of the own one.

    UserError if there is no such rule.
    """
    name, equals, number = rule.partition('=')
    K = math.inf
    if equals:
        name += '=K'
        K = settings.fitting(int, {'low': 2}, number, rule)
    if name not in RULES:
        raise UserError(f'the rule comes first, one of {", ".join(RULES)}')
    place = 'CausalSelfAttention'
    if name in TEMPERATURES:
        place = 'Temperature'
    own = getattr(m, place)
    setattr(m, place, type(name, (RULES[name],), {'K': K}))
    try:
        yield
    finally:
        setattr(m, place, own)


def main():
    if '--help' in sys.argv:
        print(__doc__)
        return
    rule = ''.join(sys.argv[1:2])
    with changed(rule):
        sys.argv[1] = '--selective'  # without which a rule would do nothing
        if rule in TEMPERATURES:
            sys.argv[1] = '--ssa=q'
        if rule == 'double_heads':
            sys.argv[1] = '--selective=False'
        train.main()


if __name__ == '__main__':
    settings.run(main)
