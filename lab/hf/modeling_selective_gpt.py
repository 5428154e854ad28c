"""model.py in Hugging Face's transformers. lab/export_hf.py copies this file and model.py beside the weights.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.generate(**tokenizer(text, return_tensors='pt'), max_new_tokens=50, budgets=32)

`budgets` and `policy` are those of model.py's KVCache, keywords of `generate` or entries of the generation config;
budgets='none' keeps every token. Texts of a batch may be padded on the left; each then has a cache of its own.
"""
import dataclasses

import torch
import torch.nn.functional as fn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .model import GPT, GPTConfig, KVCache, check_budgets, prefill


class SelectiveGPTConfig(PretrainedConfig):
    """The fields of GPTConfig."""
    model_type = 'selective_gpt'
    attribute_map = {'max_position_embeddings': 'block_size', 'hidden_size': 'n_embd', 'num_hidden_layers': 'n_layer',
                     'num_attention_heads': 'n_head'}

    def __init__(self, **kwargs):
        for field in dataclasses.fields(GPTConfig):
            setattr(self, field.name, kwargs.pop(field.name, field.default))
        super().__init__(**{'tie_word_embeddings': True, **kwargs})

    def gpt_config(self):
        return GPTConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(GPTConfig)})


class Memory(Cache):
    """What generation remembers: KVCaches within the budgets, and the text itself, for when the window slides.

    One KVCache serves the whole batch; where padding differs, each text has its own, as its positions do.
    """

    def __init__(self, budgets=None, policy='selective'):
        super().__init__(layers=[])
        self.budgets, self.policy, self.seen = budgets, policy, 0
        self.texts, self.caches = [], []        # tokens read so far (B, n) and a KVCache: one of each, or one per text

    def get_seq_length(self, layer_idx=0):
        """How many columns of the input have been read, padding included."""
        return self.seen

    def reorder_cache(self, beam_idx):
        """Beam search: text b continues text beam_idx[b]."""
        if len(self.caches) > 1:
            raise ValueError('beam search needs texts without padding')
        self.texts = [text[beam_idx] for text in self.texts]
        for layer in self.caches[0].layers:
            for name, x in vars(layer).items():
                if isinstance(x, torch.Tensor):
                    setattr(layer, name, x[beam_idx])

    def crop(self, *_):
        raise ValueError('what a cache has dropped cannot come back: assisted generation needs use_cache=False')


class SelectiveGPTForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = SelectiveGPTConfig
    _tied_weights_keys = {'gpt.lm_head.weight': 'gpt.transformer.wte.weight'}

    def __init__(self, config):
        super().__init__(config)
        self.gpt = GPT(config.gpt_config())
        self.post_init()

    def _init_weights(self, module):
        """GPT initialises itself."""

    def get_input_embeddings(self):
        return self.gpt.transformer.wte

    def set_input_embeddings(self, value):
        self.gpt.transformer.wte = value

    def get_output_embeddings(self):
        return self.gpt.lm_head

    def set_output_embeddings(self, value):
        self.gpt.lm_head = value

    @can_return_tuple
    def forward(self, input_ids, attention_mask=None, past_key_values=None, labels=None, use_cache=None,
                logits_to_keep=0, **kwargs):
        """labels: as input_ids, -100 where no loss is wanted. past_key_values: a Memory; input_ids continue it."""
        memory = Memory() if past_key_values is None and use_cache else past_key_values
        if memory is None:
            logits = self._all(input_ids, attention_mask)
        else:
            logits = self._continue(input_ids, attention_mask, memory, last=logits_to_keep == 1)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = logits[:, keep]                                # the slice of 0 is all of them
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=memory)

    def _all(self, ids, mask):
        """Logits (B, T, V) without a cache. Padding on the left moves to the right, where no token sees it."""
        left = padding(mask)
        if left is None:
            return self.gpt(ids, ids)[0]
        T = torch.arange(ids.size(1), device=ids.device)
        ids = ids.gather(1, (T + left[:, None]) % len(T))
        logits = self.gpt(ids, ids)[0]
        return logits.gather(1, ((T - left[:, None]) % len(T))[..., None].expand_as(logits))

    def _continue(self, ids, mask, memory, last):
        """Logits of the next tokens (B, T, V), or, for `last`, of the last of them (B, 1, V)."""
        B, T = ids.shape
        if not memory.caches:
            left = padding(mask)
            if mask is not None and not mask[:, -1].all():
                raise ValueError("generation needs padding on the left: tokenizer.padding_side = 'left'")
            parts = [ids] if left is None else [row[None, n:] for row, n in zip(ids, left)]
            memory.texts, memory.caches = [part[:, :0] for part in parts], [None] * len(parts)
        else:
            parts = [ids] if len(memory.caches) == 1 else ids.split(1)
        logits = [self._read(part, memory, n, last) for n, part in enumerate(parts)]
        memory.seen += T
        return torch.cat([fn.pad(x, (0, 0, (1 if last else T) - x.size(1), 0)) for x in logits])    # zeros for padding

    def _read(self, new, memory, n, last):
        """Logits of the tokens `new`, which continue text n of the memory."""
        size, cache, ends = self.config.block_size, memory.caches[n], not self.config.rope
        text = torch.cat([memory.texts[n], new], dim=1)
        seen = int(cache.position) if cache is not None else 0
        if cache is None or ends and seen + new.size(1) > size:         # the window slides as in model.py's `stream`
            new = text if not ends else text[:, -size:] if cache is None else text[:, -max(1, size // 2):]
            cache = KVCache(self.gpt, len(new), memory.budgets, memory.policy)
        memory.texts[n], memory.caches[n] = text[:, -size:], cache
        if last:
            return prefill(self.gpt, new, cache)
        return torch.cat([self.gpt(rows, rows, cache=cache)[0] for rows in new.split(64, dim=1)], dim=1)

    def generate(self, inputs=None, generation_config=None, budgets=None, policy=None, **kwargs):
        """transformers' generate, with at most `budgets` tokens remembered in each layer: a number, or one for each."""
        configs = [c for c in (generation_config, self.generation_config) if c is not None]
        first = lambda name: next((v for c in configs if (v := getattr(c, name, None)) is not None), None)
        budgets = first('budgets') if budgets is None else budgets
        policy = policy or first('policy') or ('selective' if self.config.selective else 'oldest')
        use_cache = kwargs.get('use_cache', first('use_cache'))
        if kwargs.get('past_key_values') is None and use_cache is not False:
            budgets = None if budgets == 'none' else check_budgets(self.gpt.config, budgets, policy)
            kwargs['past_key_values'] = Memory(budgets, policy)
        return super().generate(inputs, generation_config=generation_config, **kwargs)


def padding(mask):
    """How many columns of padding each text has on its left (B,); None if no text has any."""
    if mask is None or mask.all():
        return None
    left, T = mask.int().argmax(dim=1), torch.arange(mask.size(1), device=mask.device)
    if (mask.bool() != (left[:, None] <= T) & (T < (left + mask.sum(dim=1))[:, None])).any():
        raise ValueError('the attention mask must be 1 from the first token of each text to its last, 0 elsewhere')
    return left if left.any() else None
