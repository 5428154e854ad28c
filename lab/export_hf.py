"""Write a model as a folder for Hugging Face's transformers, with its tokenizer.

    python -m lab.export_hf --out_dir=out/selective_small --folder=out/selective_small_hf

    model = AutoModelForCausalLM.from_pretrained('out/selective_small_hf', trust_remote_code=True)

What GPT-2 or Llama computes becomes a plain GPT-2 or Llama, which needs no code of ours, and which
init_from=<folder> reads again. Any other model is exported with an unchanged model.py and
lab/hf/modeling_selective_gpt.py; so is one with budgets, which GPT-2 and Llama do not have.
"""

import json
import os
import pathlib
from dataclasses import dataclass

from support import settings  # before torch, see support/__init__.py
from support.settings import UserError, option

import torch

import data
import model as m
from support import bpe, files, pretrained
from support import checkpoint as ckpt

SIGN = 'library_name: transformers\npipeline_tag: text-generation\n---\n# '
# README.md of an export
CARD = f"""---
{SIGN}A model of lab/export_hf.py

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
prompt = tokenizer('Once', return_tensors='pt')
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))
```

If model.py is in this folder, `budgets=32` in `from_pretrained` or `generate` keeps 32 tokens in
each layer. A list has a number for each layer, and `budgets='none'` keeps all. `policy` is what is
dropped: POLICIES in model.py. In config.json `selective` is selective attention
([arXiv 2410.02703](https://arxiv.org/abs/2410.02703)), and `ssa` names what has temperatures
([arXiv 2411.12892](https://arxiv.org/abs/2411.12892)).
"""
LAB = pathlib.Path(__file__).parent
CODE = [pathlib.Path(m.__file__), LAB / 'hf/modeling_selective_gpt.py']


@dataclass
class ExportConfig:
    out_dir: str = option('out/selective_small', 'folder of ckpt.pt')
    init_from: str = option('resume', "'resume': ckpt.pt; or a folder, or a model on the hub")
    folder: str = option('', "where the files go; '': hf in that folder")
    budgets: str = option('', "a number, 4,9,16,8 or a budgets.json; '': its own; 'none'")
    policy: str = option('selective', f'eviction policy: {", ".join(m.POLICIES)}')


# config.json of an export that takes our code along
OURS = {
    'architectures': ['SelectiveGPTForCausalLM'],
    'model_type': 'selective_gpt',
    'auto_map': {
        'AutoConfig': 'modeling_selective_gpt.SelectiveGPTConfig',
        'AutoModelForCausalLM': 'modeling_selective_gpt.SelectiveGPTForCausalLM',
    },
}


def export(model, checkpoint, folder, budgets=None, policy='selective'):
    """Write the files. Raises UserError where the folder does not take them.

    budgets, policy: as for KVCache; what the model remembers, unless its user says otherwise.
    """
    import safetensors.torch

    readme = f'{folder}/README.md'
    files.check_output(readme, '.md', SIGN)
    if list(pathlib.Path(folder).glob('*')) and not os.path.isfile(readme):
        raise UserError(f'{folder} has files that are not an export: choose another --folder')
    tokenizer = data.get_tokenizer(checkpoint['tokenizer'])
    state = model.state_dict()
    if model.config.tied:
        del state['lm_head.weight']
    layout = gpt2
    if model.config.llama:
        layout = llama
    config, tensors = layout(model.config, state)
    code = []
    if budgets is not None or not agrees(model, config, tensors):
        code = CODE
        config = {**OURS, **vars(model.config), 'budgets': budgets, 'policy': policy}
        tensors = {f'gpt.{name}': x for name, x in state.items()}
    ends = 'bos_token', 'eos_token', 'pad_token'
    for end in ends:
        config[f'{end}_id'] = tokenizer.eot_token
    tokenizer_config = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'model_max_length': model.config.block_size,
        **dict.fromkeys(ends, data.END_OF_TEXT),
    }
    if tokenizer.name == data.label(tokenizer.name):  # otherwise tokenizer.json says it all
        tokenizer_config['tiktoken'] = tokenizer.name
    # README.md first, so that an export which was stopped can be repeated
    content = {
        'README.md': CARD,
        'model.safetensors': safetensors.torch.save(tensors, {'format': 'pt'}),
        'tokenizer.json': tokenizer_json(tokenizer, ckpt.starts_with_bos(checkpoint)),
        'tokenizer_config.json': json.dumps(tokenizer_config, indent=1),
    }
    for path in code:
        content[path.name] = path.read_bytes()
    # last, because without it the folder is not a model
    content['config.json'] = json.dumps(config, indent=1)
    for file, text in content.items():
        files.write_file(f'{folder}/{file}', text)


# ---- A plain GPT-2 or Llama ----------------------------------------------------------------------


@torch.no_grad()
def agrees(model, config, tensors):
    """Whether transformers' GPT-2 or Llama is the same model as ours.

    Each field of GPTConfig that they do not know must have its default value. The logits must
    agree, too, as an edit of model.py may have no field.
    """
    import transformers

    c = model.config
    known = {name: getattr(c, name) for name in ('block_size', 'dropout', *pretrained.SHAPE)}
    if c != type(c)(**known):
        return False
    auto = transformers.AutoConfig.for_model(**config)
    theirs = transformers.AutoModelForCausalLM.from_config(auto).eval()
    try:
        _, unknown = theirs.load_state_dict(tensors, strict=False)
    except RuntimeError:  # other shapes, as of a GPT-2 with n_kv_head
        return False
    idx = torch.arange(min(64, c.block_size, c.vocab_size))[None]
    same = torch.allclose(theirs(idx).logits, model(idx, idx)[0], rtol=1e-3, atol=1e-3)
    return same and not unknown


def gpt2(c, state):
    """config.json and the tensors of a standard model in the layout of transformers' GPT-2."""
    tensors = {}
    for name, x in state.items():
        linear = name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight'))
        if not c.bias and (linear or '.ln_' in name):  # GPT-2 has biases everywhere
            tensors[name.replace('weight', 'bias')] = torch.zeros(len(x))
        if linear:  # their Conv1D keeps matrices (in, out)
            x = x.t().contiguous()
        tensors[name] = x
    config = {
        'architectures': ['GPT2LMHeadModel'],
        'model_type': 'gpt2',
        **{theirs: getattr(c, ours) for ours, theirs in pretrained.GPT2.items()},
        'activation_function': 'gelu_new' if c.gelu == 'tanh' else 'gelu',
        'embd_pdrop': c.dropout,
        'resid_pdrop': c.dropout,
        'attn_pdrop': c.dropout,
    }
    return config, tensors


def llama(c, state):
    """The same of a Llama. Queries, keys and values are matrices of their own there."""
    config = {
        'architectures': ['LlamaForCausalLM'],
        'model_type': 'llama',
        **{theirs: getattr(c, ours) for ours, theirs in pretrained.LLAMA.items()},
        'num_key_value_heads': c.kv_heads,
        'intermediate_size': c.n_inner or 4 * c.n_embd,
        'rms_norm_eps': 1e-5,
        'rope_theta': c.rope_base,
        'tie_word_embeddings': c.tied,
    }
    tensors = {}
    width = c.kv_heads * c.head_size
    for name, x in state.items():
        for theirs, ours in pretrained.LLAMA_NAMES.items():
            name = name.replace(ours, theirs)
        tensors[name] = x
        if 'c_attn' in name:
            parts = tensors.pop(name).split([c.n_embd, width, width])
            for letter, part in zip('qkv', parts):
                tensors[name.replace('c_attn', f'{letter}_proj')] = part
    return config, tensors


# ---- The tokenizer -------------------------------------------------------------------------------


def tokenizer_json(tokenizer, bos):
    """A tiktoken.Encoding as tokenizer.json; with bos, <|endoftext|> goes in front of each text.

    tiktoken joins any two tokens whose bytes together are one, the lowest rank first. The file
    lists such pairs as merges, in that order.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    words = {}
    for token, rank in tokenizer._mergeable_ranks.items():
        if rank < tokenizer.n_vocab:  # the others stand for bytes that a vocabulary lacks
            words[token.decode('latin-1').translate(bpe.LETTERS)] = rank
    merges = []
    for word in words:
        for cut in range(1, len(word)):
            pair = word[:cut], word[cut:]
            if words.keys() >= {*pair}:
                merges.append(pair)
    fast = Tokenizer(models.BPE({**words, **tokenizer._special_tokens}, merges))
    pieces = pre_tokenizers.Split(Regex(tokenizer._pat_str), 'isolated')
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.pre_tokenizer = pre_tokenizers.Sequence([pieces, letters])
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(list(tokenizer._special_tokens))
    if bos:
        fast.post_processor = processors.TemplateProcessing(
            single=f'{data.END_OF_TEXT} $A',
            special_tokens=[(data.END_OF_TEXT, tokenizer.eot_token)],
        )
    return fast.to_str()


# ---- The command ---------------------------------------------------------------------------------


def main():
    cfg = settings.parse(ExportConfig)
    source = cfg.init_from
    if source == 'resume':
        source = cfg.out_dir
    folder = cfg.folder or f'{source}/hf'
    model, checkpoint = pretrained.load_model(cfg.init_from, cfg.out_dir)
    budgets = ckpt.read_budgets(cfg.budgets, source, model, cfg.policy)
    try:
        export(model, checkpoint, folder, budgets, cfg.policy)
    except ImportError:
        raise UserError('this needs safetensors and tokenizers: pip install transformers') from None
    print(f'{folder} is a model for transformers: its README.md says how to load it')


if __name__ == '__main__':
    settings.run(main)
