"""What the tests of the kernels share: a rule, and all numbers that attention gives with it."""

import torch

import model as m


class Rule(torch.nn.Module):
    """A layer with these parameters, in float64. vote: its rule; None: model.py's."""

    vote = m.CausalSelfAttention.vote
    accumulate = m.CausalSelfAttention.accumulate
    masks = True

    def __init__(self, vote=None, **parameters):
        super().__init__()
        self.vote_scale = None
        if vote is not None:
            self.vote = vote
        for name, value in parameters.items():
            value = torch.tensor(value, dtype=torch.float64)
            setattr(self, name, torch.nn.Parameter(value))


def results(attention, qkv, rule, memory_tau=None):
    """y, M and all gradients of a loss that weighs each number of y and M."""
    qkv = [x.detach().requires_grad_() for x in qkv]
    y, M = attention(*qkv, rule, memory_tau=memory_tau)
    found = {'y': y, 'M': M}
    if memory_tau is None:
        assert found.pop('M') is None
    g = torch.Generator().manual_seed(1)
    loss = 0.0
    for x in found.values():
        loss = loss + (x * torch.randn(x.shape, generator=g).to(x.device)).sum()
    grads = torch.autograd.grad(loss, [*qkv, *rule.parameters()], materialize_grads=True)
    return found | dict(zip(['dq', 'dk', 'dv', *dict(rule.named_parameters())], grads))


def compare(attention, qkv, rule, memory_tau=None, tolerance=1e-12, least=1e-3):
    """The numbers are those of the paper's listing in float64.

    tolerance: the largest error, as a part of the largest number, which counts as at least `least`.
    """
    found = results(attention, qkv, rule, memory_tau)
    assert found['y'].dtype == qkv[0].dtype
    exact = [x.double() for x in qkv]
    wanted = results(m.selective_attention_listing, exact, rule.double(), memory_tau)
    for name, want in wanted.items():
        error = (found[name] - want).abs().max() / want.abs().max().clamp(min=least)
        assert error < tolerance, f'{name} is wrong by {error:.1e}'
