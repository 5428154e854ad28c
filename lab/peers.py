"""Selective attention as others have it, for lab/bench.py to measure beside ours: the listing and x-transformers.

x-transformers (pip install x-transformers) is only imported where it is installed.
"""
import functools
import math

import torch
import torch.nn.functional as fn

import model as m


def listing(q, k, v):
    """Selective attention as the paper lists it and people write it: T x T tensors, all kept for the backward."""
    T, D = q.shape[2:]
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    L = (q @ k.transpose(-2, -1) * D**-0.5).masked_fill(future, -math.inf)
    keep = (1 - torch.eye(T, device=q.device)) * (torch.arange(T, device=q.device) > 0)
    S = L[:, 0].masked_fill(future, 0).relu() * keep
    F = fn.pad(S[:, :-1], (0, 0, 1, 0)).cumsum(dim=1)           # a vote acts on later rows
    return (L - F[:, None]).softmax(dim=-1).to(v.dtype) @ v


@functools.cache
def x_transformers():
    """The package, which has selective attention, too; None where it is not installed."""
    try:
        import x_transformers
        return x_transformers
    except ImportError as e:
        print(f'x-transformers is left out, pip install x-transformers: {e}')


class XTransformers(torch.nn.Module):
    """A model of theirs, as like ours as its settings make it, behind the face of ours."""

    def __init__(self, T, n_layer, n_head, n_embd, vocab_size):
        super().__init__()
        layers = x_transformers().Decoder(dim=n_embd, depth=n_layer, heads=n_head, attn_dim_head=n_embd // n_head,
                                          attn_selective=True, ff_no_bias=True)
        self.model = x_transformers().TransformerWrapper(num_tokens=vocab_size, max_seq_len=T, attn_layers=layers,
                                                         tie_embedding=True)
    configure_optimizers = m.GPT.configure_optimizers

    def forward(self, idx, targets):
        logits = self.model(idx)
        return logits, fn.cross_entropy(logits.flatten(0, 1), targets.flatten())
