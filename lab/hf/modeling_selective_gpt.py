"""model.py in Hugging Face's transformers. lab/export_hf.py copies this file and model.py.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, budgets=32)
    model.generate(**tokenizer(text, return_tensors='pt'), max_new_tokens=50)

`budgets` and `policy` are those of model.py's KVCache, for `generate` and for the logits of whole
texts. They stand in config.json, or are keywords of `from_pretrained`, or of `generate`;
budgets='none' keeps every token. In training mode every token is kept, too. Texts of a batch may
be padded on the left when a model generates, on either side when it scores.
"""

import torch
import torch.nn.functional as fn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .model import GPT, GPTConfig, KVCache


class SelectiveGPTConfig(PretrainedConfig, GPTConfig):
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
    budgets: object = None
    policy: str = 'selective'
    keep_bos: bool = False
    tie_word_embeddings: bool = True


class Memory(Cache):
    """What generation remembers of a batch of texts.

    One Text serves the whole batch. Where there is padding, each text has its own, because
    positions differ, too.
    """

    def __init__(self, model, budgets=None, policy=None):
        super().__init__(layers=[])
        if budgets is None:
            budgets = model.config.budgets
        self.gpt = model.gpt
        self.budgets = None if budgets == 'none' else budgets
        self.policy = policy or model.config.policy
        self.seen = 0
        self.texts = []

    def get_seq_length(self, layer_idx=0):
        """How many columns of the input have been read, padding included."""
        return self.seen

    def read(self, ids, mask, keep):
        """Logits (B, keep, V) of the last tokens of ids (B, T), which continue the texts."""
        if self.texts:
            parts = ids.split(len(ids) // len(self.texts))
        else:
            parts = unpadded(ids, mask)
            for part in parts:
                self.texts.append(Text(self.gpt, part, self.budgets, self.policy))
        self.seen += ids.size(1)
        rows = []
        for text, part in zip(self.texts, parts):
            logits = text.read(part, keep)
            rows.append(fn.pad(logits, (0, 0, keep - logits.size(1), 0)))  # zeros for padding
        return torch.cat(rows)

    def reorder_cache(self, *_):
        raise ValueError('beam search needs use_cache=False')

    def crop(self, *_):
        raise ValueError('assisted generation is not possible: a cache cannot forget a token')


class Text:
    """A text, or several of the same length, and what is remembered of it within the budgets."""

    def __init__(self, gpt, ids, budgets, policy):
        self.gpt = gpt
        self.ids = ids[:, :0]
        self.cache = KVCache(gpt, len(ids), budgets, policy)

    def read(self, new, keep):
        """Logits of `new` (B, T), which continue the text; at least of the last `keep` tokens."""
        size = self.gpt.config.block_size
        if self.gpt.config.learned_positions:  # they end, and the text goes on as by `stream`
            new = new[:, -size:]
            self.ids = torch.cat([self.ids, new], dim=1)
            if int(self.cache.position) + new.size(1) > size:
                new = self.ids[:, -(size // 2) :]
                self.cache = KVCache(self.gpt, len(new), self.cache.budgets, self.cache.policy)
        return read(self.gpt, new, self.cache, keep)


class SelectiveGPTForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = SelectiveGPTConfig
    _tied_weights_keys = {'gpt.lm_head.weight': 'gpt.transformer.wte.weight'}

    def __init__(self, config):
        super().__init__(config)
        self.gpt = GPT(config)
        self.post_init()

    def _init_weights(self, module):
        """GPT initialises itself."""

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

        past_key_values: a Memory, whose texts input_ids continue. labels: as input_ids, -100 where
        no loss is wanted.
        """
        keep = logits_to_keep or input_ids.size(1)
        if use_cache and past_key_values is None:
            past_key_values = Memory(self)
        if past_key_values is None:
            logits = self.score(input_ids, attention_mask)[:, -keep:]
        else:
            logits = past_key_values.read(input_ids, attention_mask, keep)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss, logits, past_key_values)

    def score(self, ids, mask=None):
        """Logits (B, T, V) of whole texts. Padding on the left moves to the right, unseen there."""
        c = self.config
        if mask is not None and not mask[:, 0].all():
            left = mask.int().argmax(dim=1)
            return turned(self.score(turned(ids, -left)), left)
        if c.keep_bos and ids.size(1) == c.block_size:
            ids = ids.clone()
            ids[:, 0] = c.bos_token_id
        if self.training or c.budgets in (None, 'none'):
            return self.gpt(ids, ids)[0]
        cache = KVCache(self.gpt, len(ids), c.budgets, c.policy)
        return read(self.gpt, ids, cache, ids.size(1))

    def generate(self, *args, budgets=None, policy=None, **kwargs):
        """transformers' generate, with at most `budgets` tokens remembered in each layer."""
        if kwargs.get('use_cache') is not False:
            kwargs.setdefault('past_key_values', Memory(self, budgets, policy))
        return super().generate(*args, **kwargs)


def read(gpt, ids, cache, keep):
    """Logits of ids, read into the cache in blocks of rows; of keep=1 only the last of a block."""
    logits = []
    for rows in ids.split(64, dim=1):
        targets = rows if keep > 1 else None
        logits.append(gpt(rows, targets, cache=cache)[0])
    return torch.cat(logits, dim=1)


def unpadded(ids, mask):
    """Texts (B, T) as one batch; or, where there is padding on the left, each without it."""
    if mask is None or mask.all():
        return [ids]
    if not mask[:, -1].all():
        raise ValueError("generation needs padding on the left: tokenizer.padding_side = 'left'")
    return [row[None, seen] for row, seen in zip(ids, mask.bool())]


def turned(x, by):
    """x (B, T, …) with row b turned by by[b] columns."""
    return torch.stack([row.roll(n, dims=0) for row, n in zip(x, by.tolist())])
