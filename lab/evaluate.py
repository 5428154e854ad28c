"""Any benchmark of lm-evaluation-harness: checkpoints side by side in one table, each with and without a memory budget.

    pip install lm_eval==0.4.13
    python -m lab.evaluate --tasks=list | grep arc
    python -m lab.evaluate --out_dir=out/a,out/b,gpt2 --tasks=wikitext,lambada_openai,hellaswag,piqa,arc_easy
    python -m lab.evaluate --out_dir=out/a --tasks=passkey,passkey_4000 --budgets=64 --limit=10
    python -m lab.evaluate --out_dir=out/a --tasks=mine --include_path=my_tasks         # my_tasks/mine.yaml, local data

The harness has the tasks, downloads their data and computes the scores; its own model types give the same ones. It runs
in float32, so compare with --dtype=float32. With budgets, texts are read under the rules of context pruning; a model
without selective attention drops the oldest tokens then. A text longer than block_size loses its beginning; the table
says how many did. Answers are kept in --answers: the same command after a stop computes the missing ones.
"""
import contextlib
import dataclasses
import difflib
import hashlib
import inspect
import json
import logging
import os
import sqlite3
import sys
from dataclasses import dataclass

import requests
import torch

import data
import kernels
import model
from model import check_budgets
from support import checkpoint as ckpt, devices, files, pretrained, settings
from support.settings import UserError

OURS = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'harness')      # our own task files


@dataclass
class EvaluateConfig(pretrained.PretrainedConfig):
    # what
    out_dir: str = 'out/selective_small'        # folders of ckpt.pt, gpt2, gpt2-medium, … or folders, with commas
    tasks: str = 'passkey'                      # names of tasks or groups of the harness, with commas; 'list': all
    budgets: str = ''                           # also within: a number, 4,9,16,8 or a budgets.json; '': its own; 'none'
    # how
    include_path: str = ''                      # folder with more task files (.yaml)
    json: str = 'out/evaluate.json'             # where the figures go
    answers: str = 'out/evaluate_answers'       # folder of the harness's cache of answers; '': none
    limit: int = 0                              # items of each task; 0: all [0 to 1e9]
    num_fewshot: int = -1                       # examples before each item; -1: what the task says [-1 to 1000]
    batch_size: int = 8                         # texts at a time [1 to 100_000]
    device: str = 'auto'                        # 'cuda', 'mps', 'cpu'; 'auto': the best one there is
    dtype: str = 'auto'                         # bfloat16 where a GPU has it ['auto', 'float32', 'bfloat16', 'float16']

# ----------------------------------------------------------------------------- the harness

def load_harness():
    """The package lm_eval, silent. Without a network it uses what it has downloaded before, and asks nobody."""
    os.environ.setdefault('HF_DATASETS_DISABLE_PROGRESS_BARS', '1')
    os.environ.setdefault('DISABLE_MULTIPROC', '1')             # for standard errors
    if 'datasets' not in sys.modules:
        try:
            data.within(8, requests.head, os.environ.get('HF_ENDPOINT', 'https://huggingface.co'), timeout=5)
        except Exception:
            os.environ.setdefault('HF_HUB_OFFLINE', '1')        # else it tries for half a minute, for each task
    try:
        import lm_eval
        import lm_eval.tasks
    except ImportError as e:
        raise UserError(f'this needs lm-evaluation-harness: pip install lm_eval==0.4.13 ({e})') from None
    logging.getLogger('lm_eval').setLevel(logging.ERROR)
    return lm_eval


def task_manager(lm_eval, names, include_path):
    """The harness's TaskManager that knows all names: our tasks, those of include_path and, if need be, its own."""
    if include_path and not os.path.isdir(include_path):
        raise UserError(f'--include_path={include_path}: no such folder')
    paths = [OURS] + [include_path] * bool(include_path)
    manager = lm_eval.tasks.TaskManager(include_path=paths, include_defaults=False)
    if set(names) - set(manager.all_tasks):                     # there are thousands: reading them takes seconds
        manager = lm_eval.tasks.TaskManager(include_path=paths)
    for name in names:
        if name not in manager.all_tasks and name != 'list':
            near = difflib.get_close_matches(name, manager.all_tasks, 1)
            hint = f"; did you mean '{near[0]}'?" if near else '; --tasks=list shows all'
            raise UserError(f'--tasks: {name!r} is unknown{hint}')
    return manager


def load_task(manager, name, num_fewshot):
    """A task or a group of them, with its data. Raises UserError if the data or what the task needs is missing."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            loaded = manager.load([name])
    except Exception as e:              # each task has code of its own
        reason = ' '.join(str(e).split())[:200] or type(e).__name__
        raise UserError(f'task {name} cannot be loaded: {reason}') from None
    for task in loaded['tasks'].values():
        shots = task.get_config('num_fewshot')
        task.set_config('num_fewshot', (shots or 0) if num_fewshot < 0 or shots == 0 else num_fewshot)
        task.set_fewshot_seed(1234)
    return loaded


def evaluate(lm_eval, lm, loaded, cfg):
    """What the harness finds: {'results': {task: {'acc,none': …}}, 'n-samples': …, …}; and 'cut', a count of texts."""
    cached, path = lm, cfg.answers and os.path.join(cfg.answers, identity(lm) + '.db')
    if cfg.answers:
        if os.path.isfile(path):
            try:
                sqlite3.connect(path).execute('SELECT name FROM sqlite_master')
            except sqlite3.Error as e:
                raise UserError(f'{path}: {e}: delete it') from None
        cached = lm_eval.api.model.CachingLM(lm, path)
    with contextlib.redirect_stdout(sys.stderr):
        try:
            results = lm_eval.evaluate(lm=cached, task_dict=loaded, limit=cfg.limit or None, bootstrap_iters=100,
                                       log_samples=False)
        finally:
            if cfg.answers:
                cached.dbdict.close()
    cut = {name: sum(map(lm.loses_beginning, task.instances)) for name, task in loaded['tasks'].items()}
    return {'cut': cut, **{key: results[key] for key in ('results', 'versions', 'n-shot', 'n-samples')}}


def identity(lm):
    """Names the answers of a model: by its weights, its config, all that decides how it reads, and model.py."""
    what = [ckpt.fingerprint(lm.model), dataclasses.asdict(lm.model.config), lm.tokenizer.name, lm.bos, lm.budgets,
            lm.policy, lm.dtype, inspect.getsource(model), inspect.getsource(type(lm))]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]

# ----------------------------------------------------------------------------- checkpoints, the table

def subjects(name, cfg):
    """What to evaluate of one entry of out_dir: the model, and the model within its budgets if there are any."""
    from lab.harness.model import Model
    init_from = 'resume' if os.path.isfile(os.path.join(name, 'ckpt.pt')) else name
    gpt, checkpoint = pretrained.load_model(init_from, name, cfg, cfg.device)
    kernels.install(gpt, dtype=getattr(torch, cfg.dtype))
    budgets = ckpt.read_budgets(cfg.budgets, name, gpt)
    rest = dict(tokenizer=data.get_tokenizer(checkpoint['tokenizer']), bos=ckpt.starts_with_bos(checkpoint),
                batch_size=cfg.batch_size, device=cfg.device, dtype=cfg.dtype)
    whole = Model(name, gpt, **rest)
    if budgets is None:
        return [whole]
    try:
        budgets = check_budgets(gpt.config, budgets, whole.policy)
    except ValueError as e:
        raise UserError(f'--budgets: {name}: {e}') from None
    return [whole, Model(f'{name} @{sum(budgets)}', gpt, budgets=budgets, **rest)]


def table(results):
    """A column for each model, a row for each figure."""
    rows = {}
    for result in results:
        for task, figures in result['results'].items():
            for key, value in figures.items():
                metric, _, how = key.partition(',')
                if how and not metric.endswith('_stderr') and isinstance(value, (int, float)):
                    error = figures.get(f'{metric}_stderr,{how}')
                    text = f'{value:.4f}' if abs(value) < 1e5 else f'{value:.4g}'
                    text += f' ±{error:.4f}' if isinstance(error, float) and error < 1e5 else ''
                    row = f'{task} {metric}' + (f' ({how})' if how != 'none' else '')
                    rows.setdefault(row, {})[result['name']] = text
        for task, count in result['cut'].items():
            if count:
                rows.setdefault(f'{task}: texts that lost their beginning', {})[result['name']] = str(count)
    names = [result['name'] for result in results]
    first = max(map(len, rows), default=0)
    widths = [max(len(text) for text in (name, *(cells.get(name, '') for cells in rows.values()))) for name in names]
    lines = [' ' * first + ''.join(f'  {name:>{w}}' for name, w in zip(names, widths))]
    lines += [f'{row:<{first}}' + ''.join(f'  {cells.get(name, "-"):>{w}}' for name, w in zip(names, widths))
              for row, cells in rows.items()]
    return '\n'.join(lines)


def check(cfg):
    """The device and dtype to use. Raises UserError if they are not there, or the results cannot be written."""
    try:
        for path in cfg.json, cfg.answers and os.path.join(cfg.answers, 'x'):
            os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        new = not os.path.exists(cfg.json)
        open(cfg.json, 'a').close()
        if new:
            os.remove(cfg.json)
    except OSError as e:
        raise UserError(f'cannot write {e.filename}: {e.strerror}') from None
    files.check_output(cfg.json, '', '"settings"')
    cfg.device = devices.pick_device(cfg.device)
    cfg.dtype = devices.pick_dtype(cfg.dtype, cfg.device)


def main():
    cfg = settings.parse(EvaluateConfig)
    asked = dataclasses.asdict(cfg)
    names = cfg.tasks.split(',')
    lm_eval = load_harness()
    manager = task_manager(lm_eval, names, cfg.include_path)
    if names == ['list']:
        return print(*manager.all_tasks, sep='\n')
    check(cfg)
    tasks, results, failed = {}, [], []
    for name in names:
        try:
            tasks[name] = load_task(manager, name, cfg.num_fewshot)
        except UserError as e:
            failed.append(str(e))
            print(f'without it: {e}', file=sys.stderr)
    for name in cfg.out_dir.split(',') if tasks else []:
        try:
            for lm in subjects(name, cfg):
                results.append({'name': lm.name, 'budgets': lm.budgets, 'results': {}, 'versions': {}, 'n-shot': {},
                                'n-samples': {}, 'cut': {}})
                for task, loaded in tasks.items():
                    print(f'{lm.name}: {task} …', file=sys.stderr, flush=True)
                    for key, value in evaluate(lm_eval, lm, loaded, cfg).items():
                        results[-1][key].update(value)
                    content = {'settings': asked, 'lm_eval': lm_eval.__version__, 'results': results}
                    files.write_file(cfg.json, json.dumps(content, indent=1))
        except UserError as e:
            failed.append(str(e))
    if results:
        print(table(results))
    if failed:
        raise UserError('; '.join(failed))


if __name__ == '__main__':
    settings.run(main)
