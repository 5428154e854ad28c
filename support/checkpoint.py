"""Checkpoints, budgets and logs: what a run leaves in its out_dir, and how it is read again.

A checkpoint is a dictionary of plain values and tensors, <out_dir>/ckpt.pt:

    model                   the state dict of the model
    optimizer               {class of an optimizer: {name of a parameter: what is kept for it}}
    scaler                  the state dict of the gradient scaler
    model_args              the fields of GPTConfig
    config                  every setting of the run
    iter_num                steps done
    val_loss, val_iter      validation loss at the last evaluation, and its step; None before it
    pretrained              init_from of the weights that the run began with; None: from scratch
    dataset, tokenizer      names: what it was trained on, and what turns its tokens into text
    data, code              hashes of the data set's tokens and of model.py
"""

import contextlib
import hashlib
import json
import os
import re
import zipfile

import torch

import data
import model as model_py
from model import GPT, GPTConfig, check_budgets, is_gpt2
from support import files, settings
from support.settings import UserError, one_line

TYPES = {
    'model': dict,
    'model_args': dict,
    'tokenizer': str,
    'config': dict,
    'iter_num': int,
    'dataset': (str, None),
}
# what a run from scratch begins with, and a checkpoint of nanoGPT lacks
ABSENT = {
    'iter_num': 0,
    'val_loss': None,
    'val_iter': None,
    'pretrained': None,
    'dataset': None,
    'config': {},
}
# settings that a resumed run may change: in silence those of the machine, with a word those of pace
MACHINE = ('out_dir init_from eval_only resume_changed dataset device compile kernel').split()
PACE = 'max_iters lr_decay_iters eval_interval eval_iters log_interval dtype'.split()


# ---- Saving and loading --------------------------------------------------------------------------


def save(out_dir, checkpoint):
    """Write <out_dir>/ckpt.pt; the old one stays until the new one is whole."""
    path = f'{out_dir}/ckpt.pt'
    try:
        with files.replacing(path) as f:
            torch.save(checkpoint, f)
    except (OSError, RuntimeError) as e:  # the latter is what torch makes of a full disk
        raise UserError(f'cannot write {path}, is the disk full? ({e})') from None


def load(out_dir):
    """The checkpoint of out_dir as a dictionary. Raises UserError if it is missing or damaged."""
    path = f'{out_dir}/ckpt.pt'
    if not os.path.isfile(path):
        raise UserError(f'{path} does not exist: train first, or name another folder')
    try:
        with zipfile.ZipFile(path) as f:
            damaged = f.testzip()  # torch.save writes checksums, which torch.load ignores
        checkpoint = {**ABSENT, **torch.load(path, map_location='cpu', weights_only=True)}
        problem = damaged or files.misfit(checkpoint, TYPES)
    except Exception as e:  # whatever a damaged file makes of torch.load
        problem = repr(e)
    if problem:
        raise UserError(f'{path} is damaged, or not a checkpoint of train.py ({problem})')
    return checkpoint


def check_resume(checkpoint, cfg):
    """What a resumed run changes, as a list of texts. UserError where it would be another run."""
    was = {**checkpoint['config'], **model_args(checkpoint)}
    changes = []
    for name, value in vars(cfg).items():
        before = was.get(name, value)
        if before == value or name in MACHINE:
            continue
        change = f'{name}={value!r} (was {before!r})'
        changes.append(change)
        if name not in PACE and not cfg.resume_changed:
            raise UserError(
                f'{cfg.out_dir} would become another run by {change}: resume it as it was, '
                'or with --resume_changed'
            )
    if checkpoint.get('code') not in (None, code_fingerprint()):
        changes.append('another model.py, which may be another rule')
    done = checkpoint['iter_num']
    if not 0 <= done < cfg.max_iters:
        raise UserError(f'{cfg.out_dir} has {done} of {cfg.max_iters} steps: raise --max_iters')
    return changes


def check_data(checkpoint, dataset, cfg):
    """Raise UserError for a data set of another tokenizer, or that would make it another run."""
    if checkpoint['tokenizer'] != dataset.tokenizer_name:
        raise UserError(
            f'data set {cfg.dataset} has the tokenizer {data.label(dataset.tokenizer_name)}, '
            f'the model {data.label(checkpoint["tokenizer"])}'
        )
    if cfg.eval_only or cfg.resume_changed:
        return
    if checkpoint.get('data') not in (None, dataset.fingerprint()):
        raise UserError(
            f'data set {cfg.dataset} is not what {cfg.out_dir} began with, '
            f'{checkpoint["dataset"]}, or was made again since: give that one, or --resume_changed'
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


def code_fingerprint():
    """16 hexadecimal digits of a hash of model.py, which tells an edited one."""
    with open(model_py.__file__, 'rb') as f:
        return hashlib.sha256(f.read()).hexdigest()[:16]


# ---- The model -----------------------------------------------------------------------------------


def model_args(checkpoint):
    """The fields of GPTConfig, with those that are newer than the checkpoint."""
    args = dict(checkpoint['model_args'])
    args.pop('kernel', None)  # of the first version
    for name, value in args.items():
        args[name] = settings.checked(GPTConfig, name, value, f'the checkpoint: {name}')
    return vars(GPTConfig(**args))


def build(checkpoint, add_new=False, **changes):
    """The model of a checkpoint.

    changes: fields of GPTConfig to set otherwise, such as dropout, or a smaller block_size, which
    crops learned positions. add_new: what GPT-2 does not have may be missing, as after a change of
    vote_scale or ssa, and is then as in a new model. Raises UserError where the two do not fit.
    """
    state = {}
    try:
        for name, x in checkpoint['model'].items():
            state[name.removeprefix('_orig_mod.')] = x  # torch.compile prefixes names
            if not x.isfinite().all():
                raise ValueError(f'{name} is not finite')
        args = model_args(checkpoint)
        config = GPTConfig(**{**args, **changes})
        if config.block_size > args['block_size']:
            raise ValueError(f'--block_size={args["block_size"]} is the largest')
        if config.learned_positions:
            wpe = state['transformer.wpe.weight']
            state['transformer.wpe.weight'] = wpe[: config.block_size]
        model = GPT(config)
        lacking, unknown = model.load_state_dict(state, strict=False)
    except (ValueError, RuntimeError, TypeError, KeyError, AttributeError) as e:
        raise UserError(f'the checkpoint does not fit model.py: {one_line(e, 300)}') from None
    if unknown:
        raise UserError(f'the checkpoint has {", ".join(unknown)}, which model.py does not know')
    if add_new:
        lacking = [name for name in lacking if is_gpt2(name)]
    if lacking:
        raise UserError(f'the checkpoint has no {", ".join(lacking)}, which model.py needs')
    return model


def load_model(out_dir, device='cpu'):
    """The trained model of out_dir, ready to use on the device, and its checkpoint."""
    checkpoint = load(out_dir)
    return build(checkpoint).to(device).eval(), checkpoint


# ---- The optimizers ------------------------------------------------------------------------------


def names_of(optimizer, model):
    """The names of an optimizer's parameters, in the order in which its state_dict numbers them."""
    name_of = {p: name for name, p in model.named_parameters()}
    return [name_of[p] for group in optimizer.param_groups for p in group['params']]


def optimizer_state(optimizers, model):
    """{class of an optimizer: {name of a parameter: what it keeps for it}}, for a checkpoint."""
    found = {}
    for optimizer in optimizers:
        states = found.setdefault(type(optimizer).__name__, {})
        numbered = optimizer.state_dict()['state']
        for n, name in enumerate(names_of(optimizer, model)):
            states[name] = numbered.get(n, {})
    return found


def load_optimizers(optimizers, scaler, model, checkpoint):
    """Give optimizers and scaler their state in the checkpoint, whatever they keep.

    It is found by the names of parameters, so groups may differ. Learning rates and the like are
    those of the settings. Raises UserError where the state is not that of these optimizers.
    """
    try:
        saved = checkpoint['optimizer']
        for optimizer in optimizers:
            if len(saved.get('param_groups', ())) == len(optimizer.param_groups):
                numbered = saved['state']  # an earlier version numbered them, in the same order
            else:
                states = saved[type(optimizer).__name__]
                numbered = {}
                for name in names_of(optimizer, model):
                    numbered[len(numbered)] = states[name]
            optimizer.load_state_dict({**optimizer.state_dict(), 'state': numbered})
            for p, state in optimizer.state.items():
                for x in state.values():
                    if isinstance(x, torch.Tensor):
                        x.expand_as(p)  # fails for one that cannot belong to the parameter
        if checkpoint['scaler']:  # which is empty unless the run was in float16
            scaler.load_state_dict(checkpoint['scaler'])
    except KeyError as e:
        raise UserError(
            f'the checkpoint has no state of {e}, as of another optimizer or an earlier version: '
            'it can be read, not resumed'
        ) from None
    except Exception as e:  # whatever a state that is not theirs makes of them
        raise UserError(
            f"the checkpoint's optimizer does not fit, it cannot be resumed ({one_line(e, 300)})"
        ) from None


# ---- Budgets -------------------------------------------------------------------------------------


def read_budgets(text, out_dir, model, policy):
    """The setting `budgets`: None, or a list of a number for each layer.

    text: 'none', a number, a list like 4,9,16,8 or a budgets.json of prune.py; '' is
    <out_dir>/budgets.json if there is one. Raises UserError for anything else, for budgets that
    the model cannot have, and for a file that was made for other weights or another policy.
    """
    own = f'{out_dir}/budgets.json'
    budgets = None
    if text == 'none' or not text and not os.path.isfile(own):
        pass
    elif re.fullmatch('[0-9]{1,9}', text):
        budgets = int(text)
    elif re.fullmatch('[0-9]{1,9}(,[0-9]{1,9})+', text):
        budgets = [int(n) for n in text.split(',')]
    else:
        path = text or own
        hint = 'run prune.py again, or give a number, a list like 4,9,16,8 or none'
        found = files.read_json(path, hint, budgets=[int], checkpoint=str, policy=str)
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


class Log:
    """<out_dir>/log.jsonl: the settings of the run in its first line, then every figure.

    A resumed run continues it, after a line with its own settings.
    """

    def __init__(self, cfg, start):
        """start: the step that the run begins with. Lines of later steps go: they come again."""
        path = f'{cfg.out_dir}/log.jsonl'
        lines = []
        if start and os.path.isfile(path):
            for line in read_lines(path):
                step = line.get('iter', -1)  # -1: settings
                if step < start or step == start and 'val_loss' in line:
                    lines.append(line)
        lines.append({'config': vars(cfg), 'from': start})
        files.write_file(path, ''.join(json.dumps(line) + '\n' for line in lines))
        self.file = open(path, 'a', buffering=1)

    def write(self, **figures):
        """Append a line of figures."""
        self.file.write(json.dumps(figures) + '\n')


def read_log(out_dir, figure='iter'):
    """The lines of a run that have this figure as dictionaries, in order; all have 'iter'."""
    lines = read_lines(f'{out_dir}/log.jsonl')
    return [line for line in lines if figure in line]


def read_lines(path):
    """The lines of a log.jsonl, settings and figures. Leaves out those that a kill cut short.

    Raises OSError where there is no such file.
    """
    lines = []
    with open(path, encoding='utf-8', errors='replace') as f:
        for text in f:
            with contextlib.suppress(ValueError, RecursionError, TypeError):
                line = json.loads(text)
                numbers = {**dict.fromkeys(line, float), 'iter': int}  # of any name
                if not files.misfit(line, {'config': dict}) or not files.misfit(line, numbers):
                    lines.append(line)
    return lines
