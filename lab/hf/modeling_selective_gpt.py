"""model.py in Hugging Face's transformers. lab/export_hf.py copies this file and model.py.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, budgets=32)
    model.generate(**tokenizer(text, return_tensors='pt'), max_new_tokens=50)

`budgets` and `policy` are those of model.py's KVCache, for `generate` and for the logits of whole
texts. They stand in config.json, or are keywords of `from_pretrained`, or of `generate`;
budgets='none' keeps every token. In training mode every token is kept, too. Texts of a batch may
be padded on the left when a model generates, on either side when it scores.
"""

import dataclasses

import torch
import torch.nn.functional as fn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .model import GPT, GPTConfig, KVCache, prefill


class SelectiveGPTConfig(PretrainedConfig):
    """The fields of GPTConfig, and how a text is read without training.

    budgets, policy: those of KVCache. budgets None or 'none' keeps every token.
    keep_bos: <|endoftext|> takes the place of the first token of a text that fills block_size. A
    model that was trained with it reads such windows; lm-evaluation-harness cuts it off long texts.
    """

    model_type = 'selective_gpt'
    attribute_map = {
        'max_position_embeddings': 'block_size',
        'hidden_size': 'n_embd',
        'num_hidden_layers': 'n_layer',
        'num_attention_heads': 'n_head',
    }

    def __init__(self, budgets=None, policy='selective', keep_bos=False, **kwargs):
        self.budgets = budgets
        self.policy = policy
        self.keep_bos = keep_bos
        for field in dataclasses.fields(GPTConfig):
            setattr(self, field.name, kwargs.pop(field.name, field.default))
        kwargs.setdefault('tie_word_embeddings', True)
        super().__init__(**kwargs)


class Memory(Cache):
    """What generation remembers: KVCaches within the budgets, and the text itself.

    One KVCache serves the whole batch. Where padding differs, each text has its own, because
    positions differ, too. The text is for learned positions, whose window slides.
    """

    def __init__(self, model, budgets=None, policy=None):
        super().__init__(layers=[])
        config = model.config
        if budgets is None:
            budgets = config.budgets
        self.gpt = model.gpt
        self.budgets = None if budgets == 'none' else budgets
        self.policy = policy or config.policy
        self.seen = 0
        self.texts = []  # the newest tokens of each cache
        self.caches = []

    def get_seq_length(self, layer_idx=0):
        """How many columns of the input have been read, padding included."""
        return self.seen

    def new_cache(self, batch_size):
        return KVCache(self.gpt, batch_size, self.budgets, self.policy)

    def read(self, ids, mask, last):
        """Logits of the next tokens (B, T, V), or, for `last`, of the last of them (B, 1, V)."""
        if self.caches:
            parts = ids.split(len(ids) // len(self.caches))
        else:
            parts = unpadded(ids, mask)
            self.texts = [part[:, :0] for part in parts]
            self.caches = [self.new_cache(len(part)) for part in parts]
        self.seen += ids.size(1)
        width = 1 if last else ids.size(1)
        rows = []
        for n, part in enumerate(parts):
            self.texts[n] = torch.cat([self.texts[n], part], dim=1)
            logits = self.read_text(n, part, last)
            rows.append(fn.pad(logits, (0, 0, width - logits.size(1), 0)))  # zeros for padding
        return torch.cat(rows)

    def read_text(self, n, new, last):
        """Logits of the tokens `new`, which text n ends with."""
        size = self.gpt.config.block_size
        seen = int(self.caches[n].position)
        if self.gpt.config.learned_positions and seen + new.size(1) > size:
            # positions end: the newest half is read anew, as by `stream`
            new = self.texts[n][:, -max(1, size // 2 if seen else size) :]
            self.caches[n] = self.new_cache(len(new))
        self.texts[n] = self.texts[n][:, -size:]
        if last:
            return prefill(self.gpt, new, self.caches[n])
        return read(self.gpt, new, self.caches[n])

    def reorder_cache(self, beam_idx):
        """Beam search: text b continues text beam_idx[b]."""
        if len(self.caches) > 1:
            raise ValueError('beam search needs texts without padding')
        self.texts = [text[beam_idx] for text in self.texts]
        for layer in self.caches[0].layers:
            for name in 'kvFj':
                setattr(layer, name, getattr(layer, name)[beam_idx])

    def crop(self, *_):
        raise ValueError('a cache cannot forget its newest tokens: this needs use_cache=False')


class SelectiveGPTForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = SelectiveGPTConfig
    _tied_weights_keys = {'gpt.lm_head.weight': 'gpt.transformer.wte.weight'}

    def __init__(self, config):
        super().__init__(config)
        names = [field.name for field in dataclasses.fields(GPTConfig)]
        self.gpt = GPT(GPTConfig(**{name: getattr(config, name) for name in names}))
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
    def forward(
        self,
        input_ids,
        attention_mask=None,
        past_key_values=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """Logits, those of the last logits_to_keep tokens alone if that is not 0; and the loss.

        past_key_values: a Memory, whose text input_ids continue. labels: as input_ids, -100 where
        no loss is wanted.
        """
        memory = past_key_values
        if memory is None and use_cache:
            memory = Memory(self)
        if memory is None:
            logits = self.score(input_ids, attention_mask)
        else:
            logits = memory.read(input_ids, attention_mask, last=logits_to_keep == 1)
        logits = logits[:, -logits_to_keep:]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=memory)

    def score(self, ids, mask):
        """Logits (B, T, V) of whole texts. Padding on the left moves to the right, unseen there."""
        left = padding(mask)
        ids = turned(ids, [-n for n in left])
        if self.config.keep_bos and ids.size(1) == self.config.block_size:
            ids = ids.clone()
            ids[:, 0] = self.config.bos_token_id
        memory = Memory(self)
        if self.training or memory.budgets is None:
            logits = self.gpt(ids, ids)[0]
        else:
            logits = read(self.gpt, ids, memory.new_cache(len(ids)))
        return turned(logits, left)

    def generate(self, *args, budgets=None, policy=None, **kwargs):
        """transformers' generate, with at most `budgets` tokens remembered in each layer."""
        if kwargs.get('use_cache') is not False:
            kwargs.setdefault('past_key_values', Memory(self, budgets, policy))
        return super().generate(*args, **kwargs)


def read(gpt, ids, cache):
    """The logits of all tokens (B, T, V), read into the cache in blocks of rows as by `prefill`."""
    logits = [gpt(rows, rows, cache=cache)[0] for rows in ids.split(64, dim=1)]
    return torch.cat(logits, dim=1)


def unpadded(ids, mask):
    """Texts (B, T) as one batch; or, where there is padding on the left, each without it."""
    if mask is not None and not mask[:, -1].all():
        raise ValueError("generation needs padding on the left: tokenizer.padding_side = 'left'")
    left = padding(mask)
    if not any(left):
        return [ids]
    return [row[None, n:] for row, n in zip(ids, left)]


def padding(mask):
    """How many columns of padding each text has on its left: a list, empty without a mask."""
    if mask is None:
        return []
    begins = fn.pad(mask.int(), (1, 0)).diff(dim=1) == 1
    if (begins.sum(dim=1) != 1).any():
        raise ValueError(
            'an attention mask is 1 from the first token of each text to its last, and 0 elsewhere'
        )
    return begins.int().argmax(dim=1).tolist()


def turned(x, by):
    """x (B, T, …) with row b turned by by[b] columns, as torch.roll does it."""
    if not any(by):
        return x
    return torch.stack([row.roll(n, dims=0) for row, n in zip(x, by)])
