"""x-transformers, whose selective attention lab/bench.py measures beside ours: pip install x-transformers."""
import functools

import torch
import torch.nn.functional as fn

import model as m


@functools.cache
def x_transformers():
    """The package; None where it is not installed."""
    try:
        import x_transformers
        return x_transformers
    except ImportError as e:
        print(f'x-transformers is left out, pip install x-transformers: {e}')


class XTransformers(torch.nn.Module):
    """A model of theirs with the settings and the interface of ours."""

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
