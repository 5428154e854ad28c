"""Weights of the GPT-2 and the Llama family, from the Hugging Face hub or a folder in its layout.

    python train.py config/finetune_gpt2.py --ssa=qv    init_from = 'gpt2', with SSA put in
    python sample.py --init_from=gpt2-xl --start="The answer is"
    python sample.py --init_from=HuggingFaceTB/SmolLM2-135M --start="The capital of France is"

A folder has config.json, tokenizer.json and model.safetensors, one file or several with an index.
The hub's own library downloads and keeps them; its variables HF_ENDPOINT and HF_HOME set the server
and the folder. The logits equal those of Hugging Face's transformers.
"""

import os

import torch

import data
from model import GPTConfig
from support import bpe, files, settings
from support import checkpoint as ckpt
from support.settings import UserError, one_line

# given by the weights, not by the settings
SHAPE = (
    'vocab_size n_layer n_head n_embd bias gelu llama n_kv_head n_inner tied rope rope_base'
).split()
GELUS = {'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh', 'gelu': 'none'}
# fields of GPTConfig: entries of config.json
GPT2 = {
    'block_size': 'n_positions',
    'vocab_size': 'vocab_size',
    'n_layer': 'n_layer',
    'n_head': 'n_head',
    'n_embd': 'n_embd',
}
LLAMA = {
    'block_size': 'max_position_embeddings',
    'vocab_size': 'vocab_size',
    'n_layer': 'num_hidden_layers',
    'n_head': 'num_attention_heads',
    'n_kv_head': 'num_key_value_heads',
    'n_embd': 'hidden_size',
    'n_inner': 'intermediate_size',
}
# the only values that model.py supports
GPT2_ONLY = {
    'model_type': 'gpt2',
    'layer_norm_epsilon': 1e-5,
    'scale_attn_weights': True,
    'scale_attn_by_inverse_layer_idx': False,
    'tie_word_embeddings': True,
}
LLAMA_ONLY = {
    'rms_norm_eps': 1e-5,
    'hidden_act': 'silu',
    'attention_bias': False,
    'mlp_bias': False,
    'rope_type': 'default',
    'type': 'default',  # what rope_type was called before
    'partial_rotary_factor': 1.0,
    'sliding_window': None,
    'quantization_config': None,
}
# parts of Llama's names: of ours; one after the other
LLAMA_NAMES = {
    'model.layers.': 'transformer.h.',
    'model.embed_tokens.': 'transformer.wte.',
    'model.norm.': 'transformer.ln_f.',
    '.input_layernorm.': '.ln_1.',
    '.post_attention_layernorm.': '.ln_2.',
    '.self_attn.o_proj.': '.attn.c_proj.',
    '.self_attn.': '.attn.',
    '.gate_proj.': '.c_gate.',
    '.up_proj.': '.c_fc.',
    '.down_proj.': '.c_proj.',
}


def load_model(init_from, out_dir, device='cpu'):
    """A model, ready to use on the device, and its checkpoint.

    That is <out_dir>/ckpt.pt for 'resume', else what `load` gives.
    """
    if init_from == 'resume':
        return ckpt.load_model(out_dir, device)
    checkpoint = load(init_from)
    return ckpt.build(checkpoint).to(device).eval(), checkpoint


def load(name):
    """The weights of a GPT-2 or a Llama as a checkpoint for `checkpoint.build`.

    name: a folder, or a model on the hub. Raises UserError if there is no such model to be had.
    """
    folder = name
    if not os.path.isdir(name):
        folder = fetch(name)
    args = read_config(f'{folder}/config.json')
    tensors = read_tensors(folder)
    tokenizer, bos = bpe.read(folder)
    if data.vocabulary(tokenizer) > args['vocab_size']:
        raise UserError(f'{folder}: the tokenizer has more tokens than the embedding has rows')
    convert = convert_llama if args['llama'] else convert_gpt2
    try:
        state = convert(tensors)
    except (KeyError, RuntimeError) as e:
        raise UserError(f'{folder}: the weights are damaged ({e}): download them again') from None
    if bad := ckpt.not_finite(state):
        raise UserError(f'{folder}: {bad} is not finite: download the weights again')
    if args['tied']:
        state['lm_head.weight'] = state.get('transformer.wte.weight')
    return {
        **ckpt.ABSENT,
        'model': state,
        'model_args': vars(GPTConfig(**args)),
        'config': {'bos': bos},
        'pretrained': name,
        'tokenizer': tokenizer,
    }


# ---- config.json ---------------------------------------------------------------------------------


def read_config(path):
    """The fields of GPTConfig from a config.json of transformers.

    Raises UserError for what model.py does not compute.
    """
    c = files.read_json(path, 'it must describe a GPT-2 or a Llama')
    llama = c.get('model_type') == 'llama'
    names = LLAMA if llama else GPT2
    args = {}
    for ours, theirs in names.items():
        where = f'{path}: {theirs}'
        args[ours] = settings.checked(GPTConfig, ours, c.get(theirs), where)
    if llama:
        for name in 'rope_scaling', 'rope_parameters':  # until transformers 5, and from then on
            c.update(c.get(name) or {})
        c.setdefault('rms_norm_eps', 1e-6)
        only = {**LLAMA_ONLY, 'head_dim': args['n_embd'] // max(1, args['n_head'])}
        args['rope'] = True
        base = c.get('rope_theta', 10000.0)
        args['rope_base'] = settings.checked(GPTConfig, 'rope_base', base, f'{path}: rope_theta')
        args['tied'] = c.get('tie_word_embeddings', False)
    else:
        only = {**GPT2_ONLY, 'n_inner': 4 * args['n_embd']}
        args['bias'] = True
        activation = c.get('activation_function', 'gelu_new')
        if str(activation) not in GELUS:
            raise UserError(f'{path}: activation_function {activation!r} is not a GELU')
        args['gelu'] = GELUS[activation]
        args['tied'] = True
    for key, wanted in only.items():
        value = c.get(key)
        if isinstance(value, float):
            value = round(value, 9)  # a GGUF has 1e-5 in single precision
        if value not in (None, wanted):
            raise UserError(f'{path}: {key} is {c[key]!r}, model.py computes only with {wanted!r}')
    return {**args, 'llama': llama}


# ---- The weights ---------------------------------------------------------------------------------


def read_tensors(folder):
    """{name: tensor} of model.safetensors, or of the files that its index names.

    Raises UserError where one is missing or cannot be read.
    """
    names = {'model.safetensors'}
    index = f'{folder}/model.safetensors.index.json'
    if os.path.isfile(index):
        where = files.read_json(index, 'download it again', weight_map=dict)['weight_map']
        names = set(where.values())
    tensors = {}
    for name in names:
        path = f'{folder}/{name}'
        try:
            from safetensors.torch import load_file

            tensors.update(load_file(path))
        except Exception as e:  # whatever a damaged file makes of it, or a package that is missing
            raise UserError(
                f'{path} does not exist or cannot be read ({e}): '
                'download it again, or pip install safetensors'
            ) from None
    return tensors


def convert_gpt2(tensors):
    """Hugging Face's tensors of a GPT-2 under our names, in float32.

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
    return state


def convert_llama(tensors):
    """The same of a Llama. Its queries, keys and values become one matrix, c_attn."""
    state = {}
    for name, x in tensors.items():
        for theirs, ours in LLAMA_NAMES.items():
            name = name.replace(theirs, ours)
        if not name.endswith('rotary_emb.inv_freq'):  # in old files; it follows from rope_theta
            state[name] = x.float()
    for name in list(state):
        if name.endswith('q_proj.weight'):
            parts = [state.pop(name.replace('q_proj', f'{letter}_proj')) for letter in 'qkv']
            state[name.replace('q_proj', 'c_attn')] = torch.cat(parts)
    return state


def fetch(name):
    """The folder in the hub library's cache that holds a model, which is downloaded once."""
    try:
        import huggingface_hub

        return huggingface_hub.snapshot_download(
            name, allow_patterns=['*.json', 'model*.safetensors']
        )
    except Exception as e:  # whatever a network may do, or a package that is not there
        raise UserError(
            f'init_from {name!r} is no folder, and cannot be downloaded ({type(e).__name__}: '
            f'{one_line(e, 300)}): check the network, pip install huggingface_hub, or give a folder'
        ) from None
