"""Checkpoints, budgets and logs: what a run leaves in its out_dir, and how it is read again.

A checkpoint is a dictionary of plain values and tensors, <out_dir>/ckpt.pt:

    model, optimizer, scaler    state dicts
    model_args                  the fields of GPTConfig
    config                      every setting of the run
    iter_num, val_loss          steps done; validation loss at the last evaluation, None before the first
    val_iter                    the step of that evaluation
    pretrained                  init_from of the weights that the run began with, None if it began from scratch
    dataset, tokenizer          names: what the model was trained on, and what turns its tokens into text
    data                        a hash of the data set's tokens
"""
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import zipfile

import torch

import model as model_py
from model import GPT, GPTConfig
from support import files, settings
from support.settings import UserError

NUMBER = (None, range(2**63))
CHECKPOINT = {'model': {str: torch.Tensor}, 'optimizer?': dict, 'scaler?': dict, 'model_args': dict, 'config?': dict,
              'iter_num?': range(2**63), 'val_loss?': (None, float), 'val_iter?': NUMBER, 'pretrained?': (None, str),
              'dataset?': (None, str), 'tokenizer': str, 'data?': (None, str)}
ABSENT = {'config': {}, 'iter_num': 0, 'val_loss': None, 'val_iter': None, 'pretrained': None, 'dataset': None}
# settings that a resumed run may change: in silence those of the machine, with a word those of the pace
MACHINE = 'out_dir init_from eval_only resume_changed dataset device compile kernel base_url cache_dir'.split()
PACE = 'max_iters lr_decay_iters eval_interval eval_iters log_interval dtype'.split()
BUDGETS = {'budgets': [int], 'checkpoint': str, 'policy?': str}         # the part of budgets.json that generation needs
FIGURES = {'iter': range(2**63), **{f'{name}?': float for name in (
    'loss', 'val_loss', 'memory', 'accuracy', 'live', 'lr', 'tokens_per_s', 'seconds', 'mfu')}}         # a line of log.jsonl


def save(out_dir, checkpoint):
    """Write <out_dir>/ckpt.pt; the old one stays until the new one is whole."""
    try:
        files.write_file(os.path.join(out_dir, 'ckpt.pt'), lambda f: torch.save(checkpoint, f))
    except RuntimeError as e:                   # how torch.save reports a write that fails
        if settings.is_out_of_memory(e):
            raise
        raise UserError(f'cannot write {out_dir}/ckpt.pt: the disk is full, or takes no file of this size') from None


def load(out_dir, device='cpu'):
    """The checkpoint of out_dir as a dictionary. Raises UserError if it is missing or damaged."""
    path = os.path.join(out_dir, 'ckpt.pt')
    if not os.path.isfile(path):
        raise UserError(f'{path} does not exist: train first, or name another folder')
    try:
        with zipfile.ZipFile(path) as f:        # torch.save writes checksums of all entries, torch.load ignores them
            if wrong := f.testzip():
                raise ValueError(f'the checksum of {wrong} is wrong')
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        if problem := files.misfit(checkpoint, CHECKPOINT):
            raise ValueError(problem)
    except Exception as e:                      # whatever a damaged file makes of torch.load
        if settings.is_out_of_memory(e):
            raise
        why = str(e).splitlines()[0][:100] if type(e) is ValueError else type(e).__name__
        raise UserError(f'{path} is damaged, or not a checkpoint of train.py ({why})') from None
    return {**ABSENT, **checkpoint}


def check_resume(checkpoint, cfg):
    """Raises UserError where cfg would make another run of the checkpoint's; returns what differs, as a line, or ''."""
    args, was = model_args(checkpoint), checkpoint['config']
    if missing := {'optimizer', 'scaler'} - set(checkpoint):
        raise UserError(f'{cfg.out_dir}/ckpt.pt has no {min(missing)}: it can be read, not resumed')
    for name, value in args.items():
        if name != 'dropout' and getattr(cfg, name) != value:
            raise UserError(f'{cfg.out_dir}/ckpt.pt has {name}={value!r}, this run {getattr(cfg, name)!r}: resume with '
                            f'--{name}={value}')
    now = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in MACHINE}
    told = {name: f'{name}={value!r} (was {was[name]!r})' for name, value in now.items()
            if was.get(name, value) != value}
    other = ', '.join(text for name, text in told.items() if name not in PACE)
    if other and not cfg.resume_changed:
        raise UserError(f'{cfg.out_dir} would become another run by {other}: resume it as it was, or with '
                        '--resume_changed')
    if checkpoint['iter_num'] >= cfg.max_iters:
        raise UserError(f'{cfg.out_dir} is done, {checkpoint["iter_num"]} of {cfg.max_iters} steps: raise --max_iters')
    return f"resumed with {', '.join(told.values())}" if told else ''


def check_data(checkpoint, dataset, cfg):
    """Raises UserError for a data set of another tokenizer than the checkpoint's, or that would make it another run."""
    if checkpoint['tokenizer'] != dataset.tokenizer_name:
        raise UserError(f'data set {cfg.dataset} has the tokenizer {dataset.tokenizer_name}, the model '
                        + checkpoint['tokenizer'])
    if cfg.init_from == 'resume' and not (cfg.eval_only or cfg.resume_changed):
        known = checkpoint.get('data')      # checkpoints of the first version have the name alone
        if known != dataset.fingerprint() if known else checkpoint['dataset'] != cfg.dataset:
            raise UserError(f'data set {cfg.dataset} is not what {cfg.out_dir} began with, {checkpoint["dataset"]}, or '
                            'was made again since: give that one, or --resume_changed')


def is_added(name):
    """Whether GPT-2 has no parameter of this name: SSA, selection or a variant has added it."""
    return not re.search(r'\.(wte|wpe|c_attn|c_proj|c_fc|ln_1|ln_2|ln_f)\.|^lm_head\.', name)


def starts_with_bos(checkpoint):
    """Whether <|endoftext|> stood in front of every window that the model was trained on."""
    return bool(checkpoint.get('config', {}).get('bos', False))


def model_args(checkpoint):
    """The model_args of a checkpoint with the fields that are newer than it, and without those that are gone."""
    args = {name: value for name, value in checkpoint['model_args'].items() if name != 'kernel'}
    return dataclasses.asdict(GPTConfig(**settings.check(GPTConfig, args, 'the checkpoint does not fit model.py')))


def build(checkpoint, **changes):
    """The model of a checkpoint. changes: fields of GPTConfig to set otherwise.

    Besides dropout these may be a smaller block_size, which crops learned positions, and selective, vote_scale and ssa:
    the parameters that they add get the values of a new model.
    """
    args = {**model_args(checkpoint), **changes}
    try:
        # torch.compile prefixes the names of the parameters
        state = {k.removeprefix('_orig_mod.'): v for k, v in checkpoint['model'].items()}
        size, last = (args['vocab_size'], args['n_embd']), f"transformer.h.{args['n_layer'] - 1}.ln_1.weight"
        if state['transformer.wte.weight'].shape != size or last not in state:      # before a model of any size is made
            raise ValueError('its weights are of another size than its model_args')
        if not all(x.isfinite().all() for x in state.values()):
            raise ValueError('its weights are not finite')
        if not args['rope']:
            wpe = state['transformer.wpe.weight']
            if args['block_size'] > len(wpe):
                raise ValueError(f'it has {len(wpe)} positions: --block_size={len(wpe)} is the largest')
            state['transformer.wpe.weight'] = wpe[:args['block_size']]
        model = GPT(GPTConfig(**args))
        fresh = {k: v for k, v in model.state_dict().items() if is_added(k) and k not in state}
        model.load_state_dict({**state, **fresh})
    except (ValueError, RuntimeError, TypeError, KeyError, AttributeError) as e:
        raise UserError(f'the checkpoint does not fit model.py: {" ".join(str(e).split())[:300]}') from None
    return model


def load_model(out_dir, device='cpu'):
    """The trained model of out_dir, ready to use on the device, and its checkpoint."""
    checkpoint = load(out_dir, device)
    return build(checkpoint).to(device).eval(), checkpoint


def load_optimizer(optimizer, scaler, model, checkpoint):
    """Give optimizer and scaler their state in the checkpoint; learning rates, decay and betas are of the settings.

    Moments go by the names of parameters, because the groups may differ: SSA has its own where ssa_lr is not 1.
    """
    name_of = {p: name for name, p in model.named_parameters() if p.requires_grad}
    names, now, saved = set(name_of.values()), optimizer.state_dict(), checkpoint['optimizer']
    trained = [name for name in checkpoint['model'] if name in names]

    def group(name):
        return 2 if len(saved['param_groups']) == 3 and '.ssa.' in name else int(checkpoint['model'][name].dim() < 2)
    try:
        moments = dict(zip(sorted(trained, key=group), (saved['state'].get(n) for n in range(len(trained)))))
        order = [name_of[p] for g in optimizer.param_groups for p in g['params']]
        optimizer.load_state_dict({'param_groups': now['param_groups'], 'state': {
            n: moments[name] for n, name in enumerate(order) if moments.get(name)}})
        for p, state in optimizer.state.items():
            if state['exp_avg'].shape != p.shape or state['exp_avg_sq'].shape != p.shape or not state['step'] >= 0:
                raise ValueError
        scaler.load_state_dict(checkpoint['scaler'])
    except (ValueError, RuntimeError, TypeError, KeyError, AttributeError):
        raise UserError("the checkpoint's optimizer does not fit its model: it cannot be resumed") from None


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


def read_budgets(text, out_dir, model, policy=None):
    """The setting `budgets` as KVCache takes it: None, a number, or a list of one number for each layer.

    text: 'none', a number, a list like 4,9,16,8 or a budgets.json of prune.py; '' is <out_dir>/budgets.json if there
    is one. Raises UserError for anything else, and for a file that was made for other weights or, where the policy is
    given, for another policy.
    """
    own = os.path.join(out_dir, 'budgets.json')
    if text == 'none' or not text and not os.path.isfile(own):
        return None
    if re.fullmatch(r'[0-9]{1,9}(,[0-9]{1,9})*,?', text):
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
    """<out_dir>/log.jsonl: the settings of the run in its first line, then every figure.

    A resumed run continues it, and adds a line with its own settings where they differ.
    """

    def __init__(self, cfg, start):
        """start: the step that the run begins with; a resumed run computes again what a killed one logged after it."""
        self.path = os.path.join(cfg.out_dir, 'log.jsonl')
        lines = [line for line in read_lines(self.path) if 'config' in line or line['iter'] < start
                 or line['iter'] == start and 'val_loss' in line] if start and os.path.isfile(self.path) else []
        before = next((line['config'] for line in reversed(lines) if 'config' in line), None)
        config = {**dataclasses.asdict(cfg), 'init_from': before.get('init_from', '')} if before else \
            dataclasses.asdict(cfg)
        if config != before:
            lines.append({'config': config, 'from': start})
        files.write_file(self.path, ''.join(json.dumps(line) + '\n' for line in lines))
        self.file = open(self.path, 'a', buffering=1)

    def write(self, **figures):
        """Append a line of figures."""
        try:
            self.file.write(json.dumps(figures) + '\n')
        except OSError as e:
            raise UserError(f'cannot write {self.path}: {e.strerror}') from None


def read_log(out_dir):
    """The figures of a run as dictionaries, in order. Leaves out the settings, and lines that a kill cut short."""
    return [line for line in read_lines(os.path.join(out_dir, 'log.jsonl')) if 'iter' in line]


def read_lines(path):
    """The lines of a log.jsonl, settings and figures, that are whole."""
    lines = []
    try:
        with open(path, encoding='utf-8', errors='replace') as f:
            for line in f:
                with contextlib.suppress(ValueError):
                    lines.append(files.parse_json(line, ({'config': dict}, FIGURES)))
    except OSError as e:
        raise UserError(f'cannot read {path}: {e.strerror}') from None
    return lines
