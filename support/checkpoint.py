"""Checkpoints, budgets and logs: what a run leaves in its out_dir, and how it is read again.

A checkpoint is a dictionary of plain values and tensors, <out_dir>/ckpt.pt:

    model, optimizer, scaler    state dicts
    model_args                  the fields of GPTConfig
    config                      every setting of the run
    iter_num, val_loss          steps done; validation loss at the last evaluation, None before the first
    val_iter                    the step of that evaluation
    pretrained                  init_from of the weights that the run began with, None if it began from scratch
    dataset, tokenizer          names: what the model was trained on, and what turns its tokens into text
"""
import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import re

import torch

from model import GPT, GPTConfig
from support import files
from support.settings import UserError

BUDGETS = {'budgets': [int], 'checkpoint': str, 'policy?': str}         # the part of budgets.json that generation needs
FIGURES = {'iter': range(2**63), **{f'{name}?': float for name in (
    'loss', 'val_loss', 'memory', 'accuracy', 'lr', 'tokens_per_s', 'seconds', 'mfu')}}         # a line of log.jsonl


def save(out_dir, checkpoint):
    """Write <out_dir>/ckpt.pt; the old one stays until the new one is whole."""
    try:
        files.write_file(os.path.join(out_dir, 'ckpt.pt'), lambda f: torch.save(checkpoint, f))
    except RuntimeError as e:                   # how torch.save reports a write that fails
        raise UserError(f'cannot write {out_dir}/ckpt.pt: {str(e).splitlines()[0][:200]}') from None


def load(out_dir, device='cpu'):
    """The checkpoint of out_dir as a dictionary. Raises UserError if it is missing or damaged."""
    path = os.path.join(out_dir, 'ckpt.pt')
    if not os.path.isfile(path):
        raise UserError(f'{path} does not exist: train first, or give another --out_dir')
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        if not all(isinstance(checkpoint[name], dict) for name in ('model', 'model_args')):
            raise TypeError
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, IndexError, TypeError, ValueError, AttributeError,
            OSError) as e:
        raise UserError(f'{path} is damaged, or not a checkpoint of train.py ({type(e).__name__})') from None
    return checkpoint


def is_added(name):
    """Whether a parameter of this name is one that SSA or selection adds to GPT-2."""
    return '.ssa.' in name or name.endswith('.vote_scale')


def starts_with_bos(checkpoint):
    """Whether <|endoftext|> stood in front of every window that the model was trained on."""
    return bool(checkpoint.get('config', {}).get('bos', False))


def model_args(checkpoint):
    """The model_args of a checkpoint with the fields that are newer than it, and without those that are gone."""
    args = {name: value for name, value in checkpoint['model_args'].items() if name != 'kernel'}
    unknown = set(args) - {f.name for f in dataclasses.fields(GPTConfig)}
    if unknown:
        raise UserError(f'the checkpoint does not fit model.py: it has {sorted(unknown)[0]}, which this version of '
                        'model.py does not know')
    return dataclasses.asdict(GPTConfig(**args))


def build(checkpoint, **changes):
    """The model of a checkpoint. changes: fields of GPTConfig to set otherwise.

    Besides dropout these may be a smaller block_size, which crops learned positions, and selective, vote_scale and ssa:
    the parameters that they add get the values of a new model.
    """
    args = {**model_args(checkpoint), **changes}
    try:
        model = GPT(GPTConfig(**args))
        # torch.compile prefixes the names of the parameters
        state = {k.removeprefix('_orig_mod.'): v for k, v in checkpoint['model'].items()}
        if not args['rope']:
            wpe = state['transformer.wpe.weight']
            if args['block_size'] > len(wpe):
                raise ValueError(f'it has {len(wpe)} positions: --block_size={len(wpe)} is the largest')
            state['transformer.wpe.weight'] = wpe[:args['block_size']]
        fresh = {k: v for k, v in model.state_dict().items() if is_added(k) and k not in state}
        model.load_state_dict({**state, **fresh})
    except (ValueError, RuntimeError, TypeError, KeyError, AttributeError) as e:
        raise UserError(f'the checkpoint does not fit model.py: {" ".join(str(e).split())[:300]}') from None
    return model


def load_model(out_dir, device='cpu'):
    """The trained model of out_dir, ready to use on the device, and its checkpoint."""
    checkpoint = load(out_dir, device)
    return build(checkpoint).to(device).eval(), checkpoint


def load_optimizer(optimizer, model, checkpoint):
    """Give the optimizer the moments in the checkpoint; learning rates, decay and betas stay those of the settings.

    Moments go by the names of parameters, because the groups may differ: SSA has its own where ssa_lr is not 1.
    """
    name_of = {p: name for name, p in model.named_parameters() if p.requires_grad}
    names, now, saved = set(name_of.values()), optimizer.state_dict(), checkpoint['optimizer']
    trained = [name for name in checkpoint['model'] if name in names]

    def group(name):
        return 2 if len(saved['param_groups']) == 3 and '.ssa.' in name else int(checkpoint['model'][name].dim() < 2)
    moments = dict(zip(sorted(trained, key=group), (saved['state'].get(n) for n in range(len(trained)))))
    order = [name_of[p] for g in optimizer.param_groups for p in g['params']]
    optimizer.load_state_dict({'param_groups': now['param_groups'], 'state': {
        n: moments[name] for n, name in enumerate(order) if moments.get(name)}})


def fingerprint(model):
    """16 hexadecimal digits of a hash of the model's weights."""
    digest = hashlib.sha256()
    for p in model.parameters():
        digest.update(p.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def read_budgets(text, out_dir, model, policy=None):
    """The setting `budgets` as KVCache takes it: None, a number, or a list of one number for each layer.

    text: 'none', a number, a list like 4,9,16,8 or a budgets.json of prune.py; '' is <out_dir>/budgets.json if there
    is one. Raises UserError for anything else, and for a file that was made for other weights or, where the policy is
    given, for another policy.
    """
    own = os.path.join(out_dir, 'budgets.json')
    if text == 'none' or not text and not os.path.isfile(own):
        return None
    if re.fullmatch(r'([0-9]{1,9},?)+', text):
        numbers = [int(n) for n in text.split(',') if n]
        return numbers[0] if len(numbers) == 1 else numbers
    path = text or own
    if not os.path.isfile(path):
        raise UserError(f"--budgets: '{path}' is not a number, a list like 4,9,16,8 or a file")
    found = files.read_json(path, BUDGETS, 'run prune.py again, or give --budgets=none')
    if found['checkpoint'] != fingerprint(model):
        raise UserError(f'{path} was made for another checkpoint: run prune.py again, or give --budgets=none')
    if policy not in (None, found.get('policy')):
        raise UserError(f"{path} was made for --policy={found.get('policy')}, this is {policy}")
    return found['budgets']


class Log:
    """<out_dir>/log.jsonl: the settings of the run in its first line, then every figure. A resumed run continues it."""

    def __init__(self, cfg, start):
        """start: the step that the run begins with; a resumed run computes again what a killed one logged after it."""
        path = os.path.join(cfg.out_dir, 'log.jsonl')
        kept = [line for line in read_log(cfg.out_dir) if line['iter'] < start
                or line['iter'] == start and 'val_loss' in line] if start and os.path.isfile(path) else []
        lines = [{'config': dataclasses.asdict(cfg)}, *kept]
        files.write_file(path, ''.join(json.dumps(line) + '\n' for line in lines))
        self.file = open(path, 'a', buffering=1)

    def write(self, **figures):
        """Append a line of figures."""
        self.file.write(json.dumps(figures) + '\n')


def read_log(out_dir):
    """The figures of a run as dictionaries, in their order, without the settings and lines that a kill cut short."""
    path = os.path.join(out_dir, 'log.jsonl')
    lines = []
    try:
        with open(path, encoding='utf-8', errors='replace') as f:
            for line in f:
                with contextlib.suppress(ValueError):
                    lines.append(files.parse_json(line, FIGURES))
    except OSError as e:
        raise UserError(f'cannot read {path}: {e.strerror}') from None
    return lines
