"""model.py in Hugging Face's transformers. lab/export_hf.py copies this file and model.py.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, budgets=32)
    model.generate(**tokenizer(text, return_tensors='pt'), max_new_tokens=50)

`budgets` and `policy` are those of model.py's KVCache, for `generate` and for the logits of whole
texts. They stand in config.json, or are keywords of `from_pretrained`, or of `generate`;
budgets='none' keeps every token. In training mode every token is kept, too. Texts that are scored
may be padded on the right. The texts of a batch that `generate` continues have the same length.
"""

import torch
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
        'tie_word_embeddings': 'tied',
    }
    budgets: object = None
    policy: str = 'selective'
    keep_bos: bool = False


class Memory(Cache):
    """What is remembered of the texts of a batch, within the budgets."""

    def __init__(self, model, budgets=None, policy=None):
        super().__init__(layers=[])
        if budgets is None:
            budgets = model.config.budgets
        self.gpt = model.gpt
        self.budgets = None if budgets == 'none' else budgets
        self.policy = policy or model.config.policy
        self.seen = 0
        self.cache = None

    def get_seq_length(self, layer_idx=0):
        """How many tokens of each text have been read."""
        return self.seen

    def read(self, new, keep):
        """Logits of `new` (B, T), which continue the texts; at least of the last `keep` tokens.

        Raises ValueError where learned positions end.
        """
        c = self.gpt.config
        self.seen += new.size(1)
        if c.learned_positions and self.seen > c.block_size:
            raise ValueError(f'{self.seen} tokens do not fit into block_size {c.block_size}')
        if self.cache is None:
            self.cache = KVCache(self.gpt, len(new), self.budgets, self.policy)
        logits = []
        for rows in new.split(64, dim=1):
            targets = rows if keep > 1 else None  # without targets only the last row has logits
            logits.append(self.gpt(rows, targets, cache=self.cache)[0])
        return torch.cat(logits, dim=1)

    def reorder_cache(self, *_):
        raise ValueError('beam search needs use_cache=False')

    def crop(self, *_):
        raise ValueError('assisted generation is not possible: a cache cannot forget a token')


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
        c = self.config
        T = input_ids.size(1)
        keep = logits_to_keep or T
        if use_cache and past_key_values is None:
            past_key_values = Memory(self)
        memory = past_key_values
        if memory is None:  # a whole text
            if attention_mask is not None:
                attention_mask = attention_mask[:, :1]  # no token sees padding on its right
            if c.keep_bos and T == c.block_size:
                input_ids = input_ids.clone()
                input_ids[:, 0] = c.bos_token_id
            if c.budgets not in (None, 'none') and not self.training:
                memory = Memory(self)
        if attention_mask is not None and not attention_mask.all():
            raise ValueError(
                'padding on the left is not possible, and in generation none is: generate '
                "texts one by one, score them with tokenizer.padding_side = 'right'"
            )
        if memory is None:
            logits, _ = self.gpt(input_ids, input_ids)
        else:
            logits = memory.read(input_ids, keep)
        logits = logits[:, -keep:]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, c.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss, logits, past_key_values)

    def generate(self, *args, budgets=None, policy=None, **kwargs):
        """transformers' generate, with at most `budgets` tokens remembered in each layer."""
        if kwargs.get('use_cache') is not False:
            kwargs.setdefault('past_key_values', Memory(self, budgets, policy))
        elif budgets or policy:
            raise ValueError('budgets and policy need the cache: leave out use_cache=False')
        return super().generate(*args, **kwargs)
