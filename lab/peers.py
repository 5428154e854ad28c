"""What lab/bench.py measures beside ours, where it is installed: the selective attention of x-transformers, and the
decoding of transformers' GPT-2: pip install x-transformers transformers."""
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


@functools.cache
def transformers():
    """The package; None where it is not installed."""
    try:
        import transformers
        return transformers
    except ImportError as e:
        print(f'transformers is left out, pip install transformers: {e}')


class GPT2:
    """Hugging Face's GPT-2 of a shape, with a cache that has read the text (n,) in every one of B sequences."""

    def __init__(self, shape, T, B, text, device):
        config = transformers().GPT2Config(n_positions=T, bos_token_id=0, eos_token_id=0, **shape)
        self.model = transformers().GPT2LMHeadModel(config).to(device).eval()
        self.cache = self.model(text[None], use_cache=True, logits_to_keep=1).past_key_values
        self.cache.batch_repeat_interleave(B)

    def decode(self, new):
        """A function that decodes the tokens new (B, 1) and forgets them again."""
        @torch.no_grad()
        def once():
            self.model(new, past_key_values=self.cache, use_cache=True)
            self.cache.crop(-1)
        return once
