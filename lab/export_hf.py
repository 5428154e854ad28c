"""Write a checkpoint as a folder that Hugging Face's transformers loads, with its tokenizer and a model card.

    python -m lab.export_hf --out_dir=out/selective_small --folder=out/selective_small_hf

    model = AutoModelForCausalLM.from_pretrained('out/selective_small_hf', trust_remote_code=True)

A standard model becomes a plain GPT-2, which needs no code of ours, and which init_from=<folder> reads again. Any other
one takes model.py along, as it is, and lab/hf/modeling_selective_gpt.py. Budgets go into generation_config.json.
"""
import dataclasses
import json
import os
from dataclasses import dataclass

import torch

import data
import model as m
from support import checkpoint as ckpt, files, settings
from support.settings import UserError

SIGN = 'library_name: transformers\npipeline_tag: text-generation\n---\n# '     # what README.md of an export begins with
CODE = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'hf', 'modeling_selective_gpt.py')


@dataclass
class ExportConfig:
    out_dir: str = 'out/selective_small'    # folder of ckpt.pt
    folder: str = ''                        # where the files go; '': <out_dir>/hf
    budgets: str = ''                       # for generation: a number, 4,9,16,8 or a budgets.json; '': its own; 'none'
    policy: str = 'selective'               # what generation drops at the budget ['selective', 'oldest', 'random']


def export(model, checkpoint, folder, budgets=None, policy='selective'):
    """Write the files. Returns their names. Raises UserError if that is impossible."""
    try:
        import safetensors.torch
    except ImportError:
        raise UserError('this needs the package safetensors: pip install safetensors') from None
    # README.md is written first, so an export that was stopped can be repeated
    if os.path.isdir(folder) and os.listdir(folder):
        files.check_output(os.path.join(folder, 'README.md'), '.md', SIGN)
        if not os.path.isfile(os.path.join(folder, 'README.md')):
            raise UserError(f'{folder} has files that are not an export: choose another --folder')
    c, tokenizer = model.config, data.get_tokenizer(checkpoint['tokenizer'])
    bos = ckpt.starts_with_bos(checkpoint)
    eot = min(tokenizer.eot_token, c.vocab_size - 1)        # a GPT-2 of other tokens may have a smaller vocabulary
    plain = not (c.selective or c.ssa or c.rope or c.qk_norm)
    tensors, config = gpt2(model) if plain else ours(model)
    special = {'bos_token_id': eot, 'eos_token_id': eot, 'pad_token_id': eot}
    generation = {**special, 'budgets': budgets, 'policy': policy} if budgets is not None and not plain else special
    content = {
        'README.md': card(model, checkpoint, os.path.basename(os.path.abspath(folder)), plain, generation),
        'model.safetensors': safetensors.torch.save(tensors, metadata={'format': 'pt'}),
        'tokenizer.json': json.dumps(tokenizer_json(tokenizer, bos), ensure_ascii=False),
        'tokenizer_config.json': json.dumps({
            'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': c.block_size, 'padding_side': 'left',
            **{f'{kind}_token': data.END_OF_TEXT for kind in ('bos', 'eos', 'pad')}}, indent=1),
        'generation_config.json': json.dumps(generation, indent=1)}
    if not plain:
        for path in m.__file__, CODE:
            with open(path, encoding='utf-8') as f:
                content[os.path.basename(path)] = f.read()
    # last, because without it the folder is not a model
    content['config.json'] = json.dumps({**config, **special, 'dtype': 'float32'}, indent=1)
    if os.path.isfile(os.path.join(folder, 'config.json')):
        os.remove(os.path.join(folder, 'config.json'))
    for name, x in content.items():
        files.write_file(os.path.join(folder, name), x)
    return sorted(content)


def gpt2(model):
    """(tensors, config) of a standard model in the layout of transformers' GPT-2."""
    c, tensors = model.config, {}
    for name, x in model.state_dict().items():
        if name == 'lm_head.weight':                                    # tied
            continue
        linear = name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight'))
        tensors[name] = (x.t() if linear else x).float().contiguous()   # their Conv1D keeps matrices (in, out)
        if not c.bias and (linear or '.ln_' in name):                   # GPT-2 has biases everywhere
            tensors[name.removesuffix('weight') + 'bias'] = torch.zeros(len(x))
    return tensors, {'architectures': ['GPT2LMHeadModel'], 'model_type': 'gpt2', 'vocab_size': c.vocab_size,
                     'n_positions': c.block_size, 'n_layer': c.n_layer, 'n_head': c.n_head, 'n_embd': c.n_embd,
                     'activation_function': 'gelu_new' if c.gelu == 'tanh' else 'gelu', 'layer_norm_epsilon': 1e-5,
                     'embd_pdrop': c.dropout, 'resid_pdrop': c.dropout, 'attn_pdrop': c.dropout}


def ours(model):
    """(tensors, config) for the classes of modeling_selective_gpt.py."""
    tensors = {f'gpt.{name}': x.contiguous() for name, x in model.state_dict().items() if name != 'lm_head.weight'}
    module = os.path.basename(CODE).removesuffix('.py')
    return tensors, {'architectures': ['SelectiveGPTForCausalLM'], 'model_type': 'selective_gpt',
                     'auto_map': {'AutoConfig': f'{module}.SelectiveGPTConfig',
                                  'AutoModelForCausalLM': f'{module}.SelectiveGPTForCausalLM'},
                     **dataclasses.asdict(model.config)}

# ----------------------------------------------------------------------------- tokenizer

def tokenizer_json(tokenizer, bos):
    """A tiktoken.Encoding as tokenizer.json; with bos, texts get <|endoftext|> in front.

    The file spells the bytes of a token as GPT-2 does, one printable character for each, and lists merges where
    tiktoken has ranks: a token's merge joins the two parts that it has before it is made.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = iter(range(256, 512))
    letter = {b: chr(b if b in printable else next(other)) for b in range(256)}
    spell = lambda token: ''.join(letter[b] for b in token)
    ranks = tokenizer._mergeable_ranks
    merges = [[spell(part) for part in parts(token, ranks)] for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    end = {'SpecialToken': {'id': data.END_OF_TEXT, 'type_id': 0}}
    text, pair = {'Sequence': {'id': 'A', 'type_id': 0}}, {'Sequence': {'id': 'B', 'type_id': 0}}
    template = {'type': 'TemplateProcessing', 'single': [end, text], 'pair': [end, text, pair], 'special_tokens': {
        data.END_OF_TEXT: {'id': data.END_OF_TEXT, 'ids': [tokenizer.eot_token], 'tokens': [data.END_OF_TEXT]}}}
    return {
        'version': '1.0', 'truncation': None, 'padding': None, 'normalizer': None,
        'added_tokens': [{'id': tokenizer.eot_token, 'content': data.END_OF_TEXT, 'special': True, 'normalized': False,
                          'single_word': False, 'lstrip': False, 'rstrip': False}],
        'pre_tokenizer': {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True,
                          'use_regex': bool(merges)},           # tiktoken's pattern of gpt2 is ByteLevel's own
        'post_processor': template if bos else None,
        'decoder': {'type': 'ByteLevel', 'add_prefix_space': True, 'trim_offsets': True, 'use_regex': True},
        'model': {'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': None,
                  'end_of_word_suffix': None, 'fuse_unk': False, 'byte_fallback': False, 'ignore_merges': False,
                  'vocab': {spell(token): rank for token, rank in ranks.items()}, 'merges': merges}}


def parts(token, ranks):
    """The two tokens that byte-pair encoding joins last when it makes this token."""
    pieces = [bytes([b]) for b in token]
    while len(pieces) > 2:
        i = min(range(len(pieces) - 1), key=lambda i: ranks.get(pieces[i] + pieces[i + 1], len(ranks)))
        pieces[i:i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces

# ----------------------------------------------------------------------------- model card

RUN = ('batch_size', 'gradient_accumulation_steps', 'learning_rate', 'min_lr', 'weight_decay', 'memory_loss', 'freeze',
       'seed')      # settings of train.py that the card names


def card(model, checkpoint, name, plain, generation):
    """README.md of the folder: what the checkpoint knows about itself, and how to load it."""
    c, run = model.config, checkpoint['config']
    methods = [text for text, has in [
        ('selective attention ([arXiv 2410.02703](https://arxiv.org/abs/2410.02703))', c.selective),
        (f'SSA on {", ".join(c.ssa)} ([arXiv 2411.12892](https://arxiv.org/abs/2411.12892))', c.ssa)] if has]
    loss = checkpoint['val_loss']
    lines = ['---', 'library_name: transformers', 'pipeline_tag: text-generation', '---', f'# {name}', '',
             f'A GPT with {" and ".join(methods) or "standard attention"}, '
             f'{model.num_params(non_embedding=False):,} parameters.', '', '| | |', '|---|---|',
             f'| data | {checkpoint["dataset"]} |',
             f'| tokenizer | {checkpoint["tokenizer"]}, {c.vocab_size:,} tokens |',
             f'| steps | {checkpoint["iter_num"]:,} |',
             f'| validation loss | {"unknown" if loss is None else f"{loss:.4f} nats a token"} |']
    lines += [f'| weights at the start | {checkpoint["pretrained"]} |'] * bool(checkpoint['pretrained'])
    lines += [f'| {key} | {run[key]} |' for key in RUN if run.get(key)]
    lines += [f'| {key} | {value} |' for key, value in dataclasses.asdict(c).items() if key != 'vocab_size']
    if 'budgets' in generation:
        lines += [f'| budgets of generation | {generation["budgets"]} tokens a layer, policy {generation["policy"]} |']
    trust = '' if plain else ', trust_remote_code=True'
    lines += ['', 'Every text begins with `<|endoftext|>`; the tokenizer adds it.'] * ckpt.starts_with_bos(checkpoint)
    lines += ['', '```python', 'from transformers import AutoModelForCausalLM, AutoTokenizer',
              f"tokenizer = AutoTokenizer.from_pretrained('{name}'{trust})",
              f"model = AutoModelForCausalLM.from_pretrained('{name}'{trust})",
              "prompt = tokenizer('Once', return_tensors='pt')",
              f"print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))", '```']
    if not plain:
        lines += ['', '`model.generate(..., budgets=32)` keeps 32 tokens in each layer; a list has a number for each '
                  "layer, `budgets='none'` keeps all."]
    return '\n'.join(lines) + '\n'


def main():
    cfg = settings.parse(ExportConfig)
    folder = cfg.folder or os.path.join(cfg.out_dir, 'hf')
    model, checkpoint = ckpt.load_model(cfg.out_dir)
    budgets = ckpt.read_budgets(cfg.budgets, cfg.out_dir, model, cfg.policy)
    try:
        budgets = budgets and m.check_budgets(model.config, budgets, cfg.policy)
    except ValueError as e:
        raise UserError(f'--budgets, --policy: {e}') from None
    print(f'{folder}: {", ".join(export(model, checkpoint, folder, budgets, cfg.policy))}')


if __name__ == '__main__':
    settings.run(main)
