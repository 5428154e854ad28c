"""GPT-2's weights: from the Hugging Face hub, or from a folder in its layout (config.json and model.safetensors).

    python train.py config/finetune_gpt2_ssa.py                 init_from = 'gpt2', with SSA put in
    python sample.py --init_from=gpt2-xl --start="The answer is"
    python -m support.pretrained gpt2-xl                        download now, for a run without a network

Downloads are checked by size and by the hash that the hub gives, and kept in cache_dir; one process at a time may
download a model. The logits equal those of Hugging Face's transformers.
"""
import os
from dataclasses import dataclass, field

import torch

from model import GPT, GPTConfig
from support import checkpoint as ckpt, files, settings
from support.download import download
from support.settings import UserError

MODELS = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
SHAPE = ('vocab_size', 'n_layer', 'n_head', 'n_embd', 'bias', 'gelu')     # given by the weights, not by the settings


@dataclass
class PretrainedConfig:
    # pretrained weights
    base_url: str = 'https://huggingface.co'    # the hub, or a mirror of it
    cache_dir: str = 'data/pretrained'          # where downloads are kept


@dataclass
class FetchConfig(PretrainedConfig):
    # what
    models: list = field(default_factory=lambda: ['gpt2'])      # gpt2, gpt2-medium, gpt2-large, gpt2-xl


def load_model(init_from, out_dir, cfg, device='cpu'):
    """A model, ready to use on the device, and its checkpoint: <out_dir>/ckpt.pt for 'resume', else see `load`."""
    if init_from == 'resume':
        return ckpt.load_model(out_dir, device)
    checkpoint = load(init_from, cfg)
    return ckpt.build(checkpoint).to(device).eval(), checkpoint


def check(name):
    """Raises UserError unless name is one of MODELS or an existing folder."""
    if name not in MODELS and not os.path.isdir(name):
        raise UserError(f"init_from {name!r}: no such folder, and none of {', '.join(MODELS)}")


def load(name, cfg):
    """The weights of a GPT-2 as a checkpoint for `checkpoint.build`.

    name: one of MODELS, or a folder. cfg: a PretrainedConfig. Raises UserError if there is no GPT-2 to be had.
    Assumes GPT-2's tokenizer, or bytes where the vocabulary is too small for it.
    """
    try:
        import safetensors.torch
    except ImportError:
        raise UserError(f'init_from {name!r} needs the package safetensors: pip install safetensors') from None
    check(name)
    folder = fetch(name, cfg) if name in MODELS else name
    args = read_config(os.path.join(folder, 'config.json'))
    path = os.path.join(folder, 'model.safetensors')
    try:
        state = convert(safetensors.torch.load_file(path))
    except FileNotFoundError:
        raise UserError(f'{path} does not exist (weights in several files or another format are not read)') from None
    except (OSError, safetensors.SafetensorError) as e:
        raise UserError(f'{path} cannot be read, download it again ({e})') from None
    settings.check(GPTConfig, args, os.path.join(folder, 'config.json'))
    try:
        with torch.device('meta'):              # its shapes alone
            expected = GPT(GPTConfig(**args)).state_dict()
    except ValueError as e:
        raise UserError(f"{os.path.join(folder, 'config.json')}: {e}") from None
    wrong = [key for key, x in expected.items() if key not in state or state[key].shape != x.shape]
    if wrong:
        raise UserError(f'{path} does not fit model.py as config.json describes it ({wrong[0]}): delete it')
    return {'model': state, 'model_args': args, 'pretrained': name, 'config': {}, 'iter_num': 0, 'val_loss': None,
            'val_iter': None, 'dataset': None, 'tokenizer': 'gpt2' if args['vocab_size'] >= 50257 else 'bytes'}


def read_config(path):
    """The fields of GPTConfig from a config.json of transformers; UserError for what model.py does not compute."""
    sizes = {'n_positions': 1024, 'vocab_size': 50257, 'n_layer': 12, 'n_head': 12, 'n_embd': 768}
    count = range(1, 2**31)
    c = files.read_json(path, {**{f'{name}?': count for name in sizes}, 'n_inner?': (None, count),
                               'activation_function?': str}, 'it must describe a GPT-2, as transformers writes it')
    # the defaults of transformers' GPT2Config
    c = {**sizes, 'n_inner': None, 'activation_function': 'gelu_new', **c}
    n_inner = c['n_inner'] or 4 * c['n_embd']
    for key, have, want in [
            ('model_type', c.get('model_type'), 'gpt2'), ('n_inner', n_inner, 4 * c['n_embd']),
            ('layer_norm_epsilon', c.get('layer_norm_epsilon', 1e-5), 1e-5),
            ('scale_attn_weights', c.get('scale_attn_weights', True), True),
            ('scale_attn_by_inverse_layer_idx', c.get('scale_attn_by_inverse_layer_idx', False), False),
            ('tie_word_embeddings', c.get('tie_word_embeddings', True), True)]:
        if have != want:
            raise UserError(f'{path}: {key} is {have!r}, model.py computes only with {want!r}')
    gelu = {'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh', 'gelu': 'none'}.get(c['activation_function'])
    if gelu is None:
        raise UserError(f'{path}: activation_function {c["activation_function"]!r} is not a GELU')
    return {'block_size': c['n_positions'], 'bias': True, 'gelu': gelu,
            **{key: c[key] for key in ('vocab_size', 'n_layer', 'n_head', 'n_embd')}}


def convert(tensors):
    """Hugging Face's tensors under our names, in float32. Its Conv1D has matrices (in, out), ours are (out, in)."""
    state = {}
    for name, x in tensors.items():
        name = 'transformer.' + name.removeprefix('transformer.')
        if name.endswith(('.attn.bias', '.attn.masked_bias', 'lm_head.weight')):    # causal masks; the tied weight
            continue
        if name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight')) and x.dim() == 2:
            x = x.t()
        state[name] = x.float().contiguous()
    if 'transformer.wte.weight' in state:
        state['lm_head.weight'] = state['transformer.wte.weight']
    return state


def fetch(name, cfg):
    """The folder of one of MODELS in the cache, after downloading what is missing of it."""
    folder = os.path.join(cfg.cache_dir, name)
    missing = [file for file in ('config.json', 'model.safetensors') if not os.path.exists(os.path.join(folder, file))]
    if missing:
        with files.locked(folder):
            for file in missing:
                url = f'{cfg.base_url.rstrip("/")}/openai-community/{name}/resolve/main/{file}'
                download(url, os.path.join(folder, file))
    return folder


def main():
    cfg = settings.parse(FetchConfig, positional='models')
    for name in cfg.models:
        if name not in MODELS:
            raise UserError(f'{name!r} is unknown: it is one of {", ".join(MODELS)}')
    for name in cfg.models:
        load(name, cfg)                         # checks what is there already, too
        print(os.path.join(cfg.cache_dir, name))


if __name__ == '__main__':
    settings.run(main)
