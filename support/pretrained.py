"""GPT-2's weights, from the Hugging Face hub or from a folder in its layout.

    python train.py config/finetune_gpt2_ssa.py     init_from = 'gpt2', with SSA put in
    python sample.py --init_from=gpt2-xl --start="The answer is"

A folder has config.json and model.safetensors. The hub's own library downloads and keeps them; its
variables HF_ENDPOINT and HF_HOME say from where, and where. The logits equal those of Hugging
Face's transformers.
"""

import os

from support import checkpoint as ckpt
from support import files
from support.settings import UserError, one_line

MODELS = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
# given by the weights, not by the settings
SHAPE = ('vocab_size', 'n_layer', 'n_head', 'n_embd', 'bias', 'gelu')
# the defaults of transformers' GPT2Config, as far as model.py computes with nothing else
ONLY = {
    'model_type': 'gpt2',
    'layer_norm_epsilon': 1e-5,
    'scale_attn_weights': True,
    'scale_attn_by_inverse_layer_idx': False,
    'tie_word_embeddings': True,
}
GELUS = {'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh', 'gelu': 'none'}


def load_model(init_from, out_dir, device='cpu'):
    """A model, ready to use on the device, and its checkpoint.

    That is <out_dir>/ckpt.pt for 'resume', else what `load` gives.
    """
    if init_from == 'resume':
        return ckpt.load_model(out_dir, device)
    checkpoint = load(init_from)
    return ckpt.build(checkpoint).to(device).eval(), checkpoint


def load(name):
    """The weights of a GPT-2 as a checkpoint for `checkpoint.build`.

    name: one of MODELS, or a folder. Raises UserError if there is no GPT-2 to be had. Assumes
    GPT-2's tokenizer, or bytes where the vocabulary is too small for it.
    """
    try:
        import safetensors.torch
    except ImportError:
        raise UserError(
            f'init_from {name!r} needs the package safetensors: pip install safetensors'
        ) from None
    folder = name
    if name in MODELS:
        folder = fetch(name)
    elif not os.path.isdir(name):
        raise UserError(f'init_from {name!r}: no such folder, and none of {", ".join(MODELS)}')
    args = read_config(f'{folder}/config.json')
    path = f'{folder}/model.safetensors'
    try:
        state = convert(safetensors.torch.load_file(path))
    except (OSError, RuntimeError, safetensors.SafetensorError) as e:
        raise UserError(f'{path} does not exist or cannot be read ({e})') from None
    tokenizer = 'gpt2' if args['vocab_size'] >= 50257 else 'bytes'
    return {
        **ckpt.ABSENT,
        'model': state,
        'model_args': args,
        'pretrained': name,
        'tokenizer': tokenizer,
    }


def read_config(path):
    """The fields of GPTConfig from a config.json of transformers.

    Raises UserError for what model.py does not compute.
    """
    sizes = dict.fromkeys(['n_positions', 'vocab_size', 'n_layer', 'n_head', 'n_embd'], int)
    c = files.read_json(path, 'it must describe a GPT-2', **sizes, activation_function=str)
    for key, wanted in {**ONLY, 'n_inner': 4 * c['n_embd']}.items():
        if c.get(key) not in (None, wanted):
            raise UserError(f'{path}: {key} is {c[key]!r}, model.py computes only with {wanted!r}')
    activation = c['activation_function']
    if activation not in GELUS:
        raise UserError(f'{path}: activation_function {activation!r} is not a GELU')
    return {
        'block_size': c['n_positions'],
        'vocab_size': c['vocab_size'],
        'n_layer': c['n_layer'],
        'n_head': c['n_head'],
        'n_embd': c['n_embd'],
        'bias': True,
        'gelu': GELUS[activation],
    }


def convert(tensors):
    """Hugging Face's tensors under our names, in float32.

    Its Conv1D has matrices (in, out), ours are (out, in).
    """
    state = {}
    for name, x in tensors.items():
        name = 'transformer.' + name.removeprefix('transformer.')
        # causal masks, and the tied weight
        if name.endswith(('.attn.bias', '.attn.masked_bias', 'lm_head.weight')):
            continue
        if name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight')):
            x = x.t()
        state[name] = x.float().contiguous()
    if 'transformer.wte.weight' in state:
        state['lm_head.weight'] = state['transformer.wte.weight']
    return state


def fetch(name):
    """The folder of one of MODELS, where the library of the hub keeps it. It is downloaded once."""
    files = ['config.json', 'model.safetensors']
    try:
        import huggingface_hub

        return huggingface_hub.snapshot_download(f'openai-community/{name}', allow_patterns=files)
    except Exception as e:  # whatever a network may do, or a package that is not there
        raise UserError(
            f'{name} cannot be downloaded ({type(e).__name__}: {one_line(e, 300)}): '
            'check the network, pip install huggingface_hub, or give a folder'
        ) from None
