"""Write a checkpoint as a folder for Hugging Face's transformers, with tokenizer and model card.

    python -m lab.export_hf --out_dir=out/selective_small --folder=out/selective_small_hf

    model = AutoModelForCausalLM.from_pretrained('out/selective_small_hf', trust_remote_code=True)

A standard model becomes a plain GPT-2, which needs no code of ours, and which init_from=<folder>
reads again. Any other one takes model.py along, as it is, and lab/hf/modeling_selective_gpt.py;
so does a standard model with budgets, which GPT-2 does not have.
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
from support import checkpoint as ckpt, files

# what README.md of an export begins with
SIGN = 'library_name: transformers\npipeline_tag: text-generation\n---\n# '
LAB = pathlib.Path(__file__).parent
CODE = [pathlib.Path(m.__file__), LAB / 'hf/modeling_selective_gpt.py']
# the fields of GPTConfig that GPT-2 has, too
GPT2 = 'block_size vocab_size n_layer n_head n_embd dropout bias gelu'.split()


@dataclass
class ExportConfig:
    out_dir: str = option('out/selective_small', 'folder of ckpt.pt')
    folder: str = option('', "where the files go; '': <out_dir>/hf")
    budgets: str = option('', "a number, 4,9,16,8 or a budgets.json; '': its own; 'none'")
    policy: str = option('selective', f'what is dropped at the budget: {", ".join(m.POLICIES)}')


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
    if os.path.isdir(folder) and os.listdir(folder) and not os.path.isfile(readme):
        raise UserError(f'{folder} has files that are not an export: choose another --folder')
    tokenizer = data.get_tokenizer(checkpoint['tokenizer'])
    c = model.config
    fields = dict(vars(c))
    state = model.state_dict()
    del state['lm_head.weight']  # tied
    code = []
    plain = budgets is None and is_plain(c, state)
    if plain:
        config, tensors = gpt2(c, state)
        plain = agrees(model, config, tensors)
    if not plain:
        fields.update(budgets=budgets, policy=policy)
        config = {**OURS, **fields}
        tensors = {f'gpt.{name}': x for name, x in state.items()}
        code = CODE
    ends = 'bos_token', 'eos_token', 'pad_token'
    for end in ends:
        config[f'{end}_id'] = tokenizer.eot_token
    tokenizer_config = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'model_max_length': c.block_size,
        'padding_side': 'left',
        **dict.fromkeys(ends, data.END_OF_TEXT),
    }
    # README.md first, so that an export which was stopped can be repeated
    content = {
        'README.md': card(os.path.basename(os.path.abspath(folder)), checkpoint, fields),
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


def is_plain(c, state):
    """Whether GPT-2 computes the same: each field that it does not know has its default value."""
    known = {name: getattr(c, name) for name in GPT2}
    return c.learned_positions and c == type(c)(**known) and all(map(m.is_gpt2, state))


@torch.no_grad()
def agrees(model, config, tensors):
    """Whether transformers' GPT-2 has the model's logits: an edit of model.py may have no flag."""
    import transformers

    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).eval()
    theirs.load_state_dict(tensors, strict=False)
    idx = torch.arange(min(64, config['n_positions'], config['vocab_size']))[None]
    return torch.allclose(theirs(idx).logits, model(idx, idx)[0], rtol=1e-3, atol=1e-3)


def gpt2(c, state):
    """(config, tensors) of a standard model in the layout of transformers' GPT-2."""
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
        'vocab_size': c.vocab_size,
        'n_positions': c.block_size,
        'n_layer': c.n_layer,
        'n_head': c.n_head,
        'n_embd': c.n_embd,
        'activation_function': 'gelu_new' if c.gelu == 'tanh' else 'gelu',
        'embd_pdrop': c.dropout,
        'resid_pdrop': c.dropout,
        'attn_pdrop': c.dropout,
    }
    return config, tensors


# ---- The tokenizer -------------------------------------------------------------------------------

# The file spells the bytes of a token as GPT-2 does. Those that are not printable are letters, too.
LETTERS = dict(zip([*range(33), *range(127, 161), 173], range(256, 324)))


def tokenizer_json(tokenizer, bos):
    """A tiktoken.Encoding as tokenizer.json; with bos, <|endoftext|> goes in front of each text.

    tiktoken joins any two tokens whose bytes together are one, the lowest rank first. The file
    lists such pairs as merges, in that order.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    ranks = tokenizer._mergeable_ranks
    vocab = {}
    merges = []
    for token, rank in ranks.items():
        vocab[spell(token)] = rank
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                merges.append((spell(left), spell(right)))
    fast = Tokenizer(models.BPE(vocab, merges))
    # ByteLevel splits a text as tiktoken's pattern of gpt2 does
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([data.END_OF_TEXT])
    if bos:
        fast.post_processor = processors.TemplateProcessing(
            single=f'{data.END_OF_TEXT} $A',
            special_tokens=[(data.END_OF_TEXT, tokenizer.eot_token)],
        )
    return fast.to_str()


def spell(token):
    return token.decode('latin-1').translate(LETTERS)


# ---- The model card ------------------------------------------------------------------------------

CARD = """---
{sign}{name}

| | |
|---|---|
| data | {run[dataset]} |
| tokenizer | {run[tokenizer]} |
| steps | {run[iter_num]} |
| validation loss, nats a token | {run[val_loss]!s:.6} |
{rows}
`selective` is selective attention ([arXiv 2410.02703](https://arxiv.org/abs/2410.02703)), `ssa`
names what has temperatures ([arXiv 2411.12892](https://arxiv.org/abs/2411.12892)).

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained('{name}'{trust})
model = AutoModelForCausalLM.from_pretrained('{name}'{trust})
prompt = tokenizer('Once', return_tensors='pt')
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))
```
"""
BUDGETS = """
`budgets=32` in `from_pretrained` or `generate` keeps 32 tokens in each layer; a list has a number
for each layer, `budgets='none'` keeps all.
"""


def card(name, run, fields):
    """README.md of the folder: what the model is, and how to load it."""
    rows = ''
    for key, value in fields.items():
        rows += f'| {key} | {value} |\n'
    end = trust = ''
    if 'budgets' in fields:
        end = BUDGETS
        trust = ', trust_remote_code=True'
    return CARD.format(sign=SIGN, name=name, run=run, rows=rows, trust=trust) + end


def main():
    cfg = settings.parse(ExportConfig)
    folder = cfg.folder or f'{cfg.out_dir}/hf'
    model, checkpoint = ckpt.load_model(cfg.out_dir)
    budgets = ckpt.read_budgets(cfg.budgets, cfg.out_dir, model, cfg.policy)
    try:
        export(model, checkpoint, folder, budgets, cfg.policy)
    except ImportError:
        raise UserError('this needs safetensors and tokenizers: pip install transformers') from None
    print(f'{folder} is a model for transformers: its README.md says how to load it')


if __name__ == '__main__':
    settings.run(main)
