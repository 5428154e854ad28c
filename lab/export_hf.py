"""Write a checkpoint as a folder for Hugging Face's transformers, with tokenizer and model card.

    python -m lab.export_hf --out_dir=out/selective_small --folder=out/selective_small_hf

    model = AutoModelForCausalLM.from_pretrained('out/selective_small_hf', trust_remote_code=True)

A standard model becomes a plain GPT-2, which needs no code of ours, and which init_from=<folder>
reads again. Any other one takes model.py along, as it is, and lab/hf/modeling_selective_gpt.py;
so does a standard model with budgets, which GPT-2 does not have.
"""

import dataclasses
import json
import os
from dataclasses import dataclass

from support import settings  # before torch, see support/__init__.py
from support.settings import UserError, option

import torch

import data
import model as m
from support import checkpoint as ckpt, files

# what README.md of an export begins with
SIGN = 'library_name: transformers\npipeline_tag: text-generation\n---\n# '
CODE = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'hf', 'modeling_selective_gpt.py')
# the fields of GPTConfig that GPT-2 has, too
GPT2 = 'block_size vocab_size n_layer n_head n_embd dropout bias gelu'.split()


@dataclass
class ExportConfig:
    out_dir: str = option('out/selective_small', 'folder of ckpt.pt')
    folder: str = option('', "where the files go; '': <out_dir>/hf")
    budgets: str = option('', "a number, 4,9,16,8 or a budgets.json; '': its own; 'none'")
    policy: str = option('selective', 'what is dropped at the budget', choices=m.POLICIES)


def export(model, checkpoint, folder, budgets=None, policy='selective'):
    """Write the files; returns their names. Raises UserError where that is impossible."""
    try:
        import safetensors.torch
        import tokenizers  # noqa: F401
    except ImportError:
        raise UserError('this needs safetensors and tokenizers: pip install transformers') from None
    check_folder(folder)
    tokenizer = data.get_tokenizer(checkpoint['tokenizer'])
    if budgets is None and is_plain(model):
        config, tensors = gpt2(model)
        code = []
    else:
        config, tensors = ours(model)
        code = [m.__file__, CODE]
    if budgets is not None:
        config.update(budgets=budgets, policy=policy)
    eot = min(tokenizer.eot_token, model.config.vocab_size - 1)  # a foreign GPT-2 may have fewer
    special = dict.fromkeys(['bos_token_id', 'eos_token_id', 'pad_token_id'], eot)
    config.update(special, dtype='float32')
    tokenizer_config = dict.fromkeys(['bos_token', 'eos_token', 'pad_token'], data.END_OF_TEXT)
    tokenizer_config['tokenizer_class'] = 'PreTrainedTokenizerFast'
    tokenizer_config['model_max_length'] = model.config.block_size
    tokenizer_config['padding_side'] = 'left'
    # README.md first, so that an export which was stopped can be repeated
    content = {'README.md': card(model, checkpoint, os.path.abspath(folder), config)}
    content['model.safetensors'] = safetensors.torch.save(tensors, {'format': 'pt'})
    content['tokenizer.json'] = tokenizer_json(tokenizer, ckpt.starts_with_bos(checkpoint))
    content['tokenizer_config.json'] = json.dumps(tokenizer_config, indent=1)
    for path in code:
        with open(path, encoding='utf-8') as f:
            content[os.path.basename(path)] = f.read()
    # last, because without it the folder is not a model
    content['config.json'] = json.dumps(config, indent=1)
    if os.path.isfile(os.path.join(folder, 'config.json')):
        os.remove(os.path.join(folder, 'config.json'))
    for name, text in content.items():
        files.write_file(os.path.join(folder, name), text)
    return sorted(content)


def check_folder(folder):
    """Raise UserError if the folder has files that are not an export."""
    if not os.path.isdir(folder) or not os.listdir(folder):
        return
    readme = os.path.join(folder, 'README.md')
    files.check_output(readme, '.md', SIGN)
    if not os.path.isfile(readme):
        raise UserError(f'{folder} has files that are not an export: choose another --folder')


def is_plain(model):
    """Whether GPT-2 computes the same: each field that it does not know has its default value."""
    for field in dataclasses.fields(model.config):
        if field.name not in GPT2 and getattr(model.config, field.name) != field.default:
            return False
    return model.config.learned_positions and all(map(m.is_gpt2, model.state_dict()))


def gpt2(model):
    """(config, tensors) of a standard model in the layout of transformers' GPT-2."""
    c = model.config
    tensors = {}
    for name, x in model.state_dict().items():
        if name == 'lm_head.weight':  # tied
            continue
        linear = name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight'))
        if not c.bias and (linear or '.ln_' in name):  # GPT-2 has biases everywhere
            tensors[name.removesuffix('weight') + 'bias'] = torch.zeros(len(x))
        if linear:  # their Conv1D keeps matrices (in, out)
            x = x.t()
        tensors[name] = x.float().contiguous()
    config = {
        'architectures': ['GPT2LMHeadModel'],
        'model_type': 'gpt2',
        'vocab_size': c.vocab_size,
        'n_positions': c.block_size,
        'n_layer': c.n_layer,
        'n_head': c.n_head,
        'n_embd': c.n_embd,
        'activation_function': 'gelu_new' if c.gelu == 'tanh' else 'gelu',
        'layer_norm_epsilon': 1e-5,
        'embd_pdrop': c.dropout,
        'resid_pdrop': c.dropout,
        'attn_pdrop': c.dropout,
    }
    return config, tensors


def ours(model):
    """(config, tensors) for the classes of modeling_selective_gpt.py."""
    tensors = {f'gpt.{name}': x.contiguous() for name, x in model.state_dict().items()}
    del tensors['gpt.lm_head.weight']  # tied
    config = {
        'architectures': ['SelectiveGPTForCausalLM'],
        'model_type': 'selective_gpt',
        'auto_map': {
            'AutoConfig': 'modeling_selective_gpt.SelectiveGPTConfig',
            'AutoModelForCausalLM': 'modeling_selective_gpt.SelectiveGPTForCausalLM',
        },
        **dataclasses.asdict(model.config),
    }
    return config, tensors


# ---- The tokenizer -------------------------------------------------------------------------------

# The file spells the bytes of a token as GPT-2 does. Those that are not printable are letters, too.
LETTERS = {}
for byte in [*range(33), *range(127, 161), 173]:
    LETTERS[byte] = 256 + len(LETTERS)


def tokenizer_json(tokenizer, bos):
    """A tiktoken.Encoding as tokenizer.json; with bos, <|endoftext|> goes in front of each text.

    tiktoken joins any two tokens whose bytes together are one, the lowest rank first. The file
    lists such pairs as merges, in that order.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    ranks = tokenizer._mergeable_ranks
    vocab = {}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        vocab[spell(token)] = ranks[token]
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
            pair=f'{data.END_OF_TEXT} $A $B',
            special_tokens=[(data.END_OF_TEXT, tokenizer.eot_token)],
        )
    return fast.to_str()


def spell(token):
    return token.decode('latin-1').translate(LETTERS)


# ---- The model card ------------------------------------------------------------------------------

# settings of train.py that the card names
RUN = 'batch_size gradient_accumulation_steps learning_rate min_lr weight_decay memory_loss seed'
CARD = """---
{sign}{name}

| | |
|---|---|
{facts}
`selective` is selective attention ([arXiv 2410.02703](https://arxiv.org/abs/2410.02703)), `ssa`
names what has temperatures ([arXiv 2411.12892](https://arxiv.org/abs/2411.12892)). Where `bos` is
True, `<|endoftext|>` stands in front of each text; the tokenizer adds it.

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


def card(model, checkpoint, folder, config):
    """README.md of the folder: what the checkpoint knows about itself, and how to load it."""
    run = checkpoint['config']
    facts = {
        'data': checkpoint['dataset'],
        'tokenizer': checkpoint['tokenizer'],
        'parameters': model.num_params(non_embedding=False),
        'steps': checkpoint['iter_num'],
        'validation loss, nats a token': checkpoint['val_loss'],
        'weights at the start': checkpoint['pretrained'],
        'bos': ckpt.starts_with_bos(checkpoint),
        **dataclasses.asdict(model.config),
        **{key: run[key] for key in RUN.split() if key in run},
        'budgets': config.get('budgets'),
        'policy': config.get('policy'),
    }
    rows = ''
    for key, value in facts.items():
        if isinstance(value, float):
            value = f'{value:.5g}'
        if value is not None:
            rows += f'| {key} | {value} |\n'
    name = os.path.basename(folder)
    plain = 'auto_map' not in config
    trust = '' if plain else ', trust_remote_code=True'
    text = CARD.format(sign=SIGN, name=name, facts=rows, trust=trust)
    return text if plain else text + BUDGETS


def main():
    cfg = settings.parse(ExportConfig)
    folder = cfg.folder or os.path.join(cfg.out_dir, 'hf')
    model, checkpoint = ckpt.load_model(cfg.out_dir)
    budgets = ckpt.read_budgets(cfg.budgets, cfg.out_dir, model, cfg.policy)
    if budgets is not None:
        try:
            budgets = m.check_budgets(model.config, budgets, cfg.policy)
        except ValueError as e:
            raise UserError(f'--budgets, --policy: {e}') from None
    names = export(model, checkpoint, folder, budgets, cfg.policy)
    print(f'{folder}: {", ".join(names)}')


if __name__ == '__main__':
    settings.run(main)
