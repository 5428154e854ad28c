"""Write a standard model in Hugging Face's layout, so that transformers, and what reads its files, can use it.

    python -m lab.export_hf --out_dir=out/standard_small --folder=out/standard_small_hf

Makes config.json and model.safetensors; init_from=<folder> reads them again. A tokenizer is not written: a model of
the tokenizer gpt2 takes that of openai-community/gpt2. SSA and selective attention have no place in this layout.
"""
import json
import os
from dataclasses import dataclass

import torch

import data
from support import checkpoint as ckpt, settings
from support.settings import UserError


@dataclass
class ExportConfig:
    out_dir: str = 'out/standard_small'     # folder of ckpt.pt
    folder: str = ''                        # where the files go; '': <out_dir>/hf


def export(model, folder, eot_token):
    """Write the model to the folder. eot_token: the id of the end of a text. Raises UserError if it cannot be."""
    try:
        import safetensors.torch
    except ImportError:
        raise UserError('this needs the package safetensors: pip install safetensors') from None
    c = model.config
    for flag in 'selective', 'ssa', 'rope', 'qk_norm':
        if getattr(c, flag):
            raise UserError(f"the model has {flag}={getattr(c, flag)!r}, for which Hugging Face's GPT-2 has no place")
    tensors = {}
    for name, x in model.state_dict().items():
        if name == 'lm_head.weight':                                    # tied
            continue
        linear = name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight'))
        tensors[name] = (x.t() if linear else x).float().contiguous()   # their Conv1D keeps matrices (in, out)
        if not c.bias and (linear or '.ln_' in name):                   # GPT-2 has biases everywhere
            tensors[name.removesuffix('weight') + 'bias'] = torch.zeros(len(x))
    config = {'architectures': ['GPT2LMHeadModel'], 'model_type': 'gpt2', 'vocab_size': c.vocab_size,
              'n_positions': c.block_size, 'n_layer': c.n_layer, 'n_head': c.n_head, 'n_embd': c.n_embd,
              'activation_function': 'gelu_new' if c.gelu == 'tanh' else 'gelu', 'layer_norm_epsilon': 1e-5,
              'embd_pdrop': c.dropout, 'resid_pdrop': c.dropout, 'attn_pdrop': c.dropout,
              'bos_token_id': eot_token, 'eos_token_id': eot_token}
    weights, description = os.path.join(folder, 'model.safetensors'), os.path.join(folder, 'config.json')
    try:
        os.makedirs(folder, exist_ok=True)
        safetensors.torch.save_file(tensors, weights + '.tmp', metadata={'format': 'pt'})
        with open(description + '.tmp', 'w', encoding='utf-8') as f:
            json.dump(config, f, indent=1)
        os.replace(weights + '.tmp', weights)
        os.replace(description + '.tmp', description)
    except (OSError, safetensors.SafetensorError) as e:
        raise UserError(f'{folder} cannot be written: {e}') from None


def main():
    cfg = settings.parse(ExportConfig)
    folder = cfg.folder or os.path.join(cfg.out_dir, 'hf')
    model, checkpoint = ckpt.load_model(cfg.out_dir)
    export(model, folder, data.get_tokenizer(checkpoint['tokenizer']).eot_token)
    print(f'{folder}: config.json, model.safetensors ({model.num_params(non_embedding=False):,} parameters)')


if __name__ == '__main__':
    settings.run(main)
