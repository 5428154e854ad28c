"""Checkpoints, budgets and logs: what a run leaves in its out_dir, and how it is read again.

A checkpoint is a dictionary of plain values and tensors, <out_dir>/ckpt.pt:

    model                   the state dict of the model
    optimizer               {class of an optimizer: {name of a parameter: what is kept for it}}
    scaler                  the state dict of the gradient scaler
    model_args              the fields of GPTConfig
    config                  every setting of the run
    iter_num, val_loss      steps done, and the validation loss at the last evaluation
    pretrained              init_from of the weights that the run began with; None: from scratch
    dataset, tokenizer      names: what it was trained on, and what turns its tokens into text
"""

import contextlib
import hashlib
import json
import os
import re
import zipfile

import torch

from model import GPT, GPTConfig, check_budgets, is_gpt2
from support import files, settings
from support.settings import UserError, one_line

# what a run from scratch begins with
ABSENT = {'iter_num': 0, 'val_loss': None, 'pretrained': None, 'dataset': None, 'config': {}}
# settings that may change when a run is resumed
FREE = (
    'out_dir init_from eval_only resume_changed device dtype compile kernel '
    'max_iters lr_decay_iters eval_interval eval_iters log_interval'
).split()


# ---- Saving and loading --------------------------------------------------------------------------


def save(out_dir, checkpoint):
    """Write <out_dir>/ckpt.pt; the old one stays until the new one is whole.

    Raises UserError for weights that are not finite, and where it cannot be written.
    """
    path = f'{out_dir}/ckpt.pt'
    if name := not_finite(checkpoint['model']):
        raise UserError(f'{name} is not finite; {path} stays; try a lower learning rate')
    try:
        with files.replacing(path) as f:
            torch.save(checkpoint, f)
    except (OSError, RuntimeError) as e:  # the latter is what torch makes of a full disk
        raise UserError(f'cannot write {path}, is the disk full? ({e})') from None


def not_finite(state):
    """The name of a tensor that has NaN or infinite numbers, or None."""
    for name, x in state.items():
        if not x.isfinite().all():
            return name


def load(out_dir):
    """The checkpoint of out_dir as a dictionary. Raises UserError if it is missing or damaged.

    model_args has all fields, also those that are newer than the checkpoint.
    """
    path = f'{out_dir}/ckpt.pt'
    if not os.path.isfile(path):
        raise UserError(f'{path} does not exist: train first, or name another folder')
    try:
        with zipfile.ZipFile(path) as f:
            if damaged := f.testzip():  # torch.save writes checksums, which torch.load ignores
                raise ValueError(damaged)
        checkpoint = {**ABSENT, **torch.load(path, map_location='cpu', weights_only=True)}
        if lacking := {'model', 'model_args', 'tokenizer'} - checkpoint.keys():
            raise ValueError(f'it has no {", ".join(lacking)}')
        args = checkpoint['model_args']
        args.pop('kernel', None)  # of the first version
        checkpoint['model_args'] = vars(GPTConfig(**args))
    except Exception as e:  # whatever a damaged file makes of torch.load
        raise UserError(
            f'{path} is damaged, or not a checkpoint of this train.py and model.py ({e!r})'
        ) from None
    return checkpoint


def check_resume(checkpoint, cfg):
    """Raise UserError if settings that must not change differ from the checkpoint's."""
    before = {**checkpoint['config'], **checkpoint['model_args']}
    changes = []
    for name, value in vars(cfg).items():
        if name not in FREE and before.get(name, value) != value:
            changes.append(f'{name}={value!r} (was {before[name]!r})')
    if changes and not cfg.resume_changed:
        raise UserError(
            f'{cfg.out_dir} would become another run by {", ".join(changes)}: '
            'resume it as it was, or with --resume_changed'
        )


def starts_with_bos(checkpoint):
    """Whether <|endoftext|> stood in front of every window that the model was trained on."""
    return checkpoint['config'].get('bos', False)


def fingerprint(model):
    """16 hexadecimal digits of a hash of the model's weights."""
    digest = hashlib.sha256()
    for p in model.parameters():
        digest.update(p.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


# ---- The model -----------------------------------------------------------------------------------


def build(checkpoint, add_new=False, **changes):
    """The model of a checkpoint.

    changes: fields of GPTConfig to set otherwise, such as dropout, or a smaller block_size, which
    crops learned positions. add_new: parameters that GPT-2 lacks may be missing, as after a
    change of vote_scale or ssa; these are initialised. Raises UserError where the two do not fit.
    """
    state = dict(checkpoint['model'])
    args = checkpoint['model_args']
    if changes.get('block_size', 0) > args['block_size']:
        raise UserError(f'the model knows {args["block_size"]} tokens of context, not more')
    try:
        model = GPT(GPTConfig(**{**args, **changes}))
        for name, x in model.state_dict().items():
            if add_new and not is_gpt2(name):
                state.setdefault(name, x)
            if name == 'transformer.wpe.weight':
                state[name] = state[name][: len(x)]
        model.load_state_dict(state)
    except (ValueError, RuntimeError, KeyError, IndexError) as e:
        raise UserError(f'the checkpoint does not fit model.py: {one_line(e, 300)}') from None
    return model


def load_model(out_dir, device='cpu'):
    """The trained model of out_dir, ready to use on the device, and its checkpoint."""
    checkpoint = load(out_dir)
    return build(checkpoint).to(device).eval(), checkpoint


# ---- The optimizers ------------------------------------------------------------------------------


def optimizer_state(optimizers, model):
    """{class of an optimizer: {name of a parameter: what it keeps for it}}, for a checkpoint."""
    names = {p: name for name, p in model.named_parameters()}
    found = {}
    for optimizer in optimizers:
        states = found.setdefault(type(optimizer).__name__, {})
        for p, state in optimizer.state.items():
            states[names[p]] = state
    return found


def load_optimizers(optimizers, scaler, model, checkpoint):
    """Restore the state of optimizers and scaler from a checkpoint.

    It is matched by the names of parameters, so groups may differ. Learning rates and the like come
    from the settings. Raises UserError where there is no state of these optimizers.
    """
    names = {p: name for name, p in model.named_parameters()}
    try:
        for optimizer in optimizers:
            states = checkpoint['optimizer'][type(optimizer).__name__]
            numbered = {}
            for group in optimizer.param_groups:
                for p in group['params']:
                    numbered[len(numbered)] = states.get(names[p], {})
            optimizer.load_state_dict({**optimizer.state_dict(), 'state': numbered})
        if checkpoint['scaler']:  # which is empty unless the run was in float16
            scaler.load_state_dict(checkpoint['scaler'])
    except KeyError as e:
        raise UserError(
            f'the checkpoint has no state of {e}, as of another optimizer or an earlier version: '
            'it can be read, not resumed'
        ) from None


# ---- Budgets -------------------------------------------------------------------------------------


def read_budgets(text, out_dir, model, policy):
    """The setting `budgets`: None, or a list of a number for each layer.

    text: 'none', a number, a list like 4,9,16,8 or a budgets.json of prune.py; '' is
    <out_dir>/budgets.json if there is one. Raises UserError for anything else, for budgets that
    the model cannot have, and for a file that was made for other weights or another policy.
    """
    path = text or f'{out_dir}/budgets.json'
    if text == 'none' or not text and not os.path.isfile(path):
        budgets = None
    elif re.fullmatch('[0-9,]+', text):
        budgets = settings.numbers(text, '--budgets')
        if len(budgets) == 1:
            budgets *= model.config.n_layer
    else:
        hint = 'run prune.py again, or give a number, a list like 4,9,16,8 or none'
        found = files.read_json(path, hint, budgets=list, checkpoint=str, policy=str)
        if found['checkpoint'] != fingerprint(model):
            raise UserError(f'{path} was made for another checkpoint: {hint}')
        if found['policy'] != policy:
            raise UserError(f'{path} was made for --policy={found["policy"]}, this is {policy}')
        budgets = found['budgets']
    try:
        checked = check_budgets(model.config, budgets, policy)
    except ValueError as e:
        raise UserError(f'--budgets, --policy: {e}') from None
    return budgets and checked


# ---- The log -------------------------------------------------------------------------------------


def open_log(cfg, start):
    """<out_dir>/log.jsonl with the settings of the run, open to append lines of figures.

    start: the step that the run begins with. A resumed run continues the file, but for the lines of
    later steps, because they come again.
    """
    path = f'{cfg.out_dir}/log.jsonl'
    lines = []
    if start and os.path.isfile(path):
        lines = [line for line in read_lines(path) if line.get('iter', -1) < start]
    lines.append({'config': vars(cfg), 'from': start})
    files.write_file(path, ''.join(json.dumps(line) + '\n' for line in lines))
    return open(path, 'a', buffering=1)


def read_log(out_dir, figure='iter'):
    """The lines of a run that have this figure as dictionaries, in order; all have 'iter'."""
    return [line for line in read_lines(f'{out_dir}/log.jsonl') if figure in line]


def read_lines(path):
    """The lines of a log.jsonl, settings and figures. Leaves out one that a kill cut short."""
    lines = []
    with open(path, encoding='utf-8') as f:
        for text in f:
            with contextlib.suppress(ValueError):
                lines.append(json.loads(text))
    return lines
