"""Where a model runs, and how it is kept: the one place that picks a device, saves and loads checkpoints and logs.

A checkpoint is a dictionary of plain values and tensors, <out_dir>/ckpt.pt:

    model, optimizer, scaler    state dicts
    model_args                  the fields of GPTConfig
    config                      every setting of the run
    iter_num, val_loss          steps done; validation loss at the last evaluation, None before the first
    val_iter                    the step of that evaluation
    pretrained                  the init_from of the weights that the run began with, None if it began from scratch
    dataset, tokenizer          names; what the model was trained on, and what turns its tokens into text
"""
import contextlib
import dataclasses
import hashlib
import json
import os
import pickle

import torch

from support import settings
from model import GPT, GPTConfig
from support.settings import UserError


def pick_device(name='auto'):
    """'auto' is cuda, then mps, then cpu. Raises UserError for a device that is not there."""
    if name == 'auto':
        return 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f'device {name!r} cannot be used here: {str(e).splitlines()[0]}') from None
    return name


def pick_dtype(name, device):
    """'auto' is bfloat16 on a GPU that has it, float16 on one that has not, and float32 elsewhere."""
    if name == 'auto':
        name = 'float32' if 'cuda' not in device else 'bfloat16' if torch.cuda.is_bf16_supported(False) else 'float16'
    if name not in ('float32', 'bfloat16', 'float16'):
        raise UserError(f"dtype {name!r}: it is 'auto', 'float32', 'bfloat16' or 'float16'")
    return name


def autocast(device, dtype):
    """The context in which a model runs in dtype; float32 needs none."""
    if dtype == 'float32':
        return contextlib.nullcontext()
    return torch.autocast(device_type=torch.device(device).type, dtype=getattr(torch, dtype))


def save(out_dir, checkpoint):
    """Write <out_dir>/ckpt.pt beside and rename it, so that a kill at any moment leaves a whole one."""
    path = os.path.join(out_dir, 'ckpt.pt')
    with open(path + '.tmp', 'wb') as f:
        torch.save(checkpoint, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + '.tmp', path)


def load(out_dir, device='cpu'):
    """The checkpoint of out_dir as a dictionary. Raises UserError if it is missing or is none of ours."""
    path = os.path.join(out_dir, 'ckpt.pt')
    if not os.path.isfile(path):
        raise UserError(f'{path} does not exist: train first, or give another --out_dir')
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        checkpoint['model'], checkpoint['model_args']
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f'{path} is not a checkpoint of train.py, or is damaged ({type(e).__name__})') from None
    return checkpoint


def is_added(name):
    """Whether a parameter of this name is one that SSA or selection adds to GPT-2."""
    return '.ssa.' in name or name.endswith('.vote_scale')


def build(checkpoint, **changes):
    """The model of a checkpoint. changes: fields of GPTConfig to set otherwise.

    Besides kernel and dropout these may be a smaller block_size, which crops the positions, and selective, vote_scale
    and ssa: what they add to the model and the checkpoint has not is left as a new model has it.
    """
    args = {**checkpoint['model_args'], **changes}
    try:
        unknown = set(args) - {f.name for f in dataclasses.fields(GPTConfig)}
        if unknown:
            raise ValueError(f'it has {sorted(unknown)[0]}, which this version of model.py does not know')
        model = GPT(GPTConfig(**args))
        # torch.compile prefixes the names of the parameters
        state = {k.removeprefix('_orig_mod.'): v for k, v in checkpoint['model'].items()}
        wpe = state['transformer.wpe.weight']
        if args['block_size'] > len(wpe):
            raise ValueError(f'it has {len(wpe)} positions: --block_size={len(wpe)} is the largest')
        state['transformer.wpe.weight'] = wpe[:args['block_size']]
        fresh = {k: v for k, v in model.state_dict().items() if is_added(k) and k not in state}
        model.load_state_dict({**state, **fresh})
    except (ValueError, RuntimeError, TypeError, KeyError) as e:
        raise UserError(f'the checkpoint does not fit model.py: {" ".join(str(e).split())[:300]}') from None
    return model


def load_model(out_dir, device='cpu'):
    """The trained model of out_dir, ready to use on the device, and its checkpoint."""
    checkpoint = load(out_dir, device)
    return build(checkpoint, kernel='auto').to(device).eval(), checkpoint      # the run's kernel may not run here


def fingerprint(model):
    """16 hexadecimal digits that tell this model's weights from any other's."""
    digest = hashlib.sha256()
    for p in model.parameters():
        digest.update(p.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def read_budgets(text, out_dir, model, policy=None):
    """The setting `budgets` as KVCache takes it: None, a number or a list of one number for each layer.

    text: 'none', a number, a list like 4,9,16,8 or a budgets.json of prune.py; '' is <out_dir>/budgets.json if there
    is one. Raises UserError for what is none of these, and for a file that was made for other weights or, where the
    policy is given, another policy.
    """
    own = os.path.join(out_dir, 'budgets.json')
    if text == 'none' or (not text and not os.path.isfile(own)):
        return None
    if text and text.replace(',', '').isdigit():
        numbers = [int(n) for n in text.split(',') if n]
        return numbers[0] if len(numbers) == 1 else numbers
    path = text or own
    try:
        with open(path, encoding='utf-8') as f:
            found = json.load(f)
        budgets, made_for = found['budgets'], found['checkpoint']
    except OSError:
        raise UserError(f"--budgets: '{path}' is no number, no list like 4,9,16,8 and no file") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f'{path} is no budgets.json of prune.py') from None
    if made_for != fingerprint(model):
        raise UserError(f'{path} was made for another checkpoint: run prune.py again, or give --budgets=none')
    if policy not in (None, found.get('policy')):
        raise UserError(f"{path} was made for --policy={found.get('policy')}, this is {policy}")
    return budgets


class Log:
    """<out_dir>/log.jsonl: the settings of the run in its first line, then every figure. A resumed run goes on in it."""

    def __init__(self, cfg, start):
        """start: the step that the run begins with; what a killed run wrote after it is computed again."""
        path = os.path.join(cfg.out_dir, 'log.jsonl')
        kept = [line for line in read_log(cfg.out_dir) if line['iter'] < start
                or line['iter'] == start and 'val_loss' in line] if start and os.path.isfile(path) else []
        lines = [{'config': dataclasses.asdict(cfg)}, *kept]
        settings.write_file(path, ''.join(json.dumps(line) + '\n' for line in lines))
        self.file = open(path, 'a', buffering=1)

    def write(self, **figures):
        self.file.write(json.dumps(figures) + '\n')


def read_log(out_dir):
    """The figures of a run as dictionaries, in their order; half a line, from a kill in the middle, is left out."""
    lines = []
    with open(os.path.join(out_dir, 'log.jsonl'), encoding='utf-8') as f:
        for line in f:
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
    return [line for line in lines if 'iter' in line]
