"""The papers' claims at a small scale: train what they compare, and write what came out.

    python -m lab.reproduce --list
    python -m lab.reproduce gate headline               --list says how long, on two cores
    python -m lab.reproduce gate --quick                one seed, few steps, at most 3 minutes
    python -m lab.reproduce gate --dataset=mine --steps=20000       on a text of yours, for longer

Runs are python train.py, or python -m lab.ablate, in processes of one thread each. Finished runs
are kept, and stopped ones are resumed. A claim writes its section of RESULTS.md, between two
markers, and a picture into results/; the words around the markers stay. A quick version is printed
and not written. Begin with the gate, which says whether text and runs can show anything about long
context.
"""

import math
import os
import pathlib
import platform
import re
import shlex
import signal
import sys
from dataclasses import dataclass
from statistics import mean

from support import settings  # before torch, see support/__init__.py

import torch

import data
import model as m
import prepare_text
import train
from lab import plot, runs, tasks
from lab.runs import LEGEND, holds, kinds_table, spread, table
from support import checkpoint as ckpt
from support.settings import UserError, option


# ---- Data ----------------------------------------------------------------------------------------


def task_data(r, task, **changed):
    """The folder of a synthetic data set, made where it is missing. changed: settings of tasks."""
    name = task
    for key, value in changed.items():
        name += f'_{key}_{value}'
    cfg = tasks.TaskConfig(tasks=[task], name=name, data_dir=r.cfg.data_dir, **changed)
    folder = os.path.join(cfg.data_dir, cfg.name)
    if not os.path.isfile(os.path.join(folder, 'meta.json')):
        tasks.make(task, cfg)
    elif data.read_meta(folder)['source'] != tasks.described(task, cfg):
        raise UserError(f'{folder} has other settings: delete it, or give another --data_dir')
    return folder


def text(r, T=256):
    """--config, and flags for --dataset with a context of T tokens and as many a step."""
    name = r.cfg.dataset
    meta = os.path.join(r.cfg.data_dir, name, 'meta.json')
    if name == 'stdlib' and not os.path.isfile(meta):
        prepare_text.prepare(prepare_text.TextConfig(data_dir=r.cfg.data_dir))
    dataset = data.load_dataset(name, r.cfg.data_dir)
    r.about = (
        f'Text: {dataset.name}, {dataset.tokens("train"):,} tokens of the tokenizer '
        f'{dataset.tokenizer_name} ({dataset.tokens("val"):,} for validation).'
    )
    size = settings.parse(train.TrainConfig, [r.cfg.config])
    batch_size = max(1, size.batch_size * size.block_size // T)
    flags = [f'--dataset={dataset.path}', f'--block_size={T}', f'--batch_size={batch_size}']
    return [r.cfg.config, *flags]


# ---- The claims. Each takes a Runner and returns the parts of its section ------------------------

SMALL = ['--n_layer=2', '--n_embd=64']
ATTENTIONS = {
    'standard': '',
    'selective': '--selective',
    'SSA': '--ssa=qv',
    'selective + SSA': '--selective --ssa=qv',
}


def first(r, models):
    """As many of the models as --models asks for."""
    count = r.cfg.models or len(models)
    return dict(list(models.items())[:count])


def gate(r):
    """Whether text and runs can show anything: standard attention must beat the same model trained
    on token 0 and the newest K - 1 tokens, for every K, and those with K = 32 and fewer must lose
    0.05 nats at least. Takes 40 minutes."""
    Ks = numbers(r.cfg, 'windows', 2)
    models = {'standard': ''}
    for K in Ks:
        models[f'newest {K}'] = f'window={K} --selective'
    models['ALiBi'] = 'alibi --selective'
    models['selective'] = '--selective'
    models['selective and ALiBi'] = 'votes_and_alibi --selective'
    arms = r.train(first(r, models), 1000, 100, text(r))
    losses = kinds_table(r, 'attention', arms)
    standard = mean(arms['standard'].losses.means())
    verdict = 'passes'
    gaps = []
    for K in Ks[: len(arms) - 1]:
        gap = mean(arms[f'newest {K}'].losses.means()) - standard
        gaps.append(f'newest {K} {gap:+.3f}')
        if gap <= 0 or K <= 32 and gap < 0.05:
            verdict = 'fails'
    verdict = f'**The gate {verdict}**: against standard {", ".join(gaps)}.'
    return verdict, LEGEND, losses, r.curves(arms)


def headline(r):
    """2410.02703 section 7: 16x, 25x, 47x less memory at contexts of 512, 1,024 and 2,048 for the
    loss of standard attention (theirs: 32, 41, 44 tokens a layer). Here at 256, 512, 1,024, with
    what simple baselines do. Takes 120 minutes."""
    models = {
        'standard': '',
        'selective': '--selective',
        'memory loss 0.1': '--selective --memory_loss=0.1',
        'memory loss 0.02': '--selective --memory_loss=0.02',
    }
    parts = [LEGEND]
    kept = {}  # {name: {context: [tokens kept a layer, of each seed]}}
    for T in numbers(r.cfg, 'contexts', 32):
        arms = r.train(first(r, models), 1000, 100, text(r, T))
        parts.append(f'**Context {T}**')
        parts.append(kinds_table(r, 'attention', arms))
        parts.append(equal_memory(r, T, arms, kept))
    kept["the paper's"] = {512: [32], 1024: [41], 2048: [44]}
    lines = {}
    for name, points in kept.items():
        lines[name] = list(points), list(map(mean, points.values()))
    title = "at standard attention's loss"
    labels = title, 'context', 'tokens kept a layer', '{x:,.0f}'
    parts.append(r.picture(plot.draw(plot.import_pyplot(), lines, {}, *labels)))
    return parts


MEMORY = """Tokens kept, by layer, for the loss of standard attention, confirmed on unseen windows;
and the loss of all / of recall tokens, with all of its context and with as many tokens:"""
WHOLE = 'all of its context'
COLUMNS = ['model', 'kept by F', 'saving by F', 'saving by age', WHOLE, 'by F']
COLUMNS += ['newest', 'random', 'standard, newest', 'trained on as many', 'ALiBi, newest']


def equal_memory(r, T, arms, kept):
    """What each arm keeps of T tokens for standard attention's loss, and what others do with it.

    Adds the tokens kept a layer to kept.
    """
    jobs = []
    for arm in arms.values():
        if arm.name == 'standard':
            continue
        for run, base in zip(arm.runs, arms['standard'].runs):
            for policy in 'selective', 'oldest':
                jobs.append((run, policy, f'--baseline={base.folder}'))
    runs.search(r, jobs, 'baseline', r.windows(max(32, 16384 // T)))
    rows = []
    for n in range(r.cfg.seeds):
        some = {name: arm.runs[n] for name, arm in arms.items()}
        for row in rows_of_seed(r, T, n + 1, some, kept):
            row['model'] += f', seed {n + 1}'
            rows.append(row)
    return f'{MEMORY}\n\n{runs.markdown(COLUMNS, rows)}'


def rows_of_seed(r, T, seed, some, kept):
    """Rows of the table of `equal_memory` for some, {name: Run}.

    The controls are trained on as many tokens as the model keeps that keeps the fewest.
    """
    windows = r.windows(max(64, 32768 // T))

    def losses(*args, **options):
        found = runs.token_losses(*args, windows=windows, **options)
        return f'{found.means()[0]:.3f} / {found.means("recall")[0]:.3f}'

    base = some.pop('standard')
    rows = [{'model': 'standard', WHOLE: losses(base)}]
    fewest = math.inf  # tokens a layer
    for name, run in some.items():
        row = {'model': name, 'kept by F': 'above the loss of standard', WHOLE: losses(run)}
        rows.append(row)
        for policy, how in ('oldest', 'age'), ('selective', 'F'):
            point = holds(run, policy, 'baseline')
            row[f'saving by {how}'] = 'none'
            if point:
                row[f'saving by {how}'] = f'{point["saving"]:.1f}x'
                budgets = point['budgets']
                points = kept.setdefault(f'{name}, by {how}', {})
                points.setdefault(T, []).append(mean(budgets))
        if point:  # of the last policy, by F
            row['kept by F'] = ' '.join(map(str, budgets))
            row['by F'] = losses(run, budgets=budgets)
            row['newest'] = losses(run, budgets=budgets, policy='oldest')
            row['random'] = losses(run, budgets=budgets, policy='random')
            row['standard, newest'] = losses(base, budgets=budgets, policy='oldest')
            if mean(budgets) < fewest:
                fewest = mean(budgets)
                best = row
    if fewest < math.inf:
        K = max(2, round(fewest))
        models = {'window': f'window={K} --selective', 'ALiBi': 'alibi --selective'}
        controls = r.train(models, 1000, 100, text(r, T), seeds=[seed])
        alibi = controls['ALiBi'].runs[0]
        best['trained on as many'] = losses(controls['window'].runs[0])
        best['ALiBi, newest'] = losses(alibi, rule=f'alibi={K}')
        rows.append({'model': 'ALiBi', WHOLE: losses(alibi)})
    return rows


def heads(r):
    """2410.02703 sections 4, 5: selective attention with H heads is as good as standard attention
    with about twice as many. Takes 15 minutes."""
    models = {'standard': '', 'standard, 2x heads': 'double_heads', 'selective': '--selective'}
    arms = r.train(models, 1000, 150, text(r))
    losses = kinds_table(r, 'attention', arms)
    standard, double, selective = [mean(arm.losses.means()) for arm in arms.values()]
    verdict = (
        f'Against standard attention: selective attention {selective - standard:+.4f}, twice the '
        f'heads {double - standard:+.4f}.'
    )
    return verdict, LEGEND, losses, r.curves(arms)


def rules(r):
    """2410.02703 section 3: which of the rules matter, whose votes, and other methods that are the
    same recurrence. Takes 30 minutes."""
    models = {
        'standard': '',
        'selective': '--selective',
        'newest 16': 'window=16 --selective',
        'ALiBi': 'alibi --selective',
        'the reader alone votes (fox)': 'fox --selective',
        'the last head selects': 'last_head --selective',
        'a selector for every two heads': 'groups --selective',
        'no ReLU': 'no_relu --selective',
        'token 0 may be masked': 'first_too --selective',
        'votes act at once': 'at_once --selective',
        'a token may mask itself': 'self_too --selective',
    }
    arms = r.train(first(r, models), 300, 150, text(r, 128) + SMALL)
    return LEGEND, kinds_table(r, 'rule', arms), r.curves(arms)


def ssa(r):
    """2411.12892: SSA is better with under 0.5% new parameters; the ablation of q, k, v, position
    and sharing, the authors' code, the scalable softmax, and a sweep of the temperatures' learning
    rate. Takes 30 minutes."""
    models = {
        'standard': '',
        'qv, learning rate x 1': '--ssa=qv --ssa_lr=1',
        'qv, learning rate x 3': '--ssa=qv --ssa_lr=3',
        'qv, learning rate x 10': '--ssa=qv --ssa_lr=10',
        'qv, learning rate x 30': '--ssa=qv --ssa_lr=30',
        'position only (their code), x 10': 'position_only --ssa=q --ssa_lr=10',
        's log n (ssmax), x 10': 'ssmax --ssa=q --ssa_lr=10',
        'qv without position': 'no_position --ssa=qv',
        'qv, position on v, too': 'position_on_values --ssa=qv',
        'q': '--ssa=q',
        'v': '--ssa=v',
        'qkv': '--ssa=qkv',
        'qv without sharing': '--ssa=qv --ssa_sharing=False',
    }
    arms = r.train(first(r, models), 300, 150, text(r, 128) + SMALL)
    size = parameters(arms['standard'])

    def cells(arm):
        row = against(arm, arms['standard'], "steps to standard's loss")
        row['new parameters'] = f'{1 - size / parameters(arm):.2%}'
        row['entropy of attention'] = spread([runs.entropy(run) for run in arm.runs], '{:.3f}')
        return row

    return table('temperatures', arms, cells), r.curves(arms)


def parameters(arm):
    """The number of parameters of an arm's models."""
    return runs.load(arm.runs[0])[0].num_params()


def against(arm, base, steps):
    """Cells of an arm with temperatures. steps: the header of how soon it has the loss of base."""
    goal = mean(base.last('val_loss'))
    return {
        'validation loss': spread(arm.last('val_loss')),
        f'against {base.name}': f'{mean(arm.last("val_loss")) - goal:+.4f}',
        steps: spread(arm.crossings('val_loss', goal), '{:.0f}'),
        'position part': runs.position_part(arm),
    }


def finetune(r):
    """2411.12892: with SSA added to it, a trained model reaches the loss of continued training in
    1.45x fewer steps (theirs, second-hand). Here one model is trained, and continued with several
    seeds. Takes 15 minutes."""
    # GPT-2's build, so that the model can be exported as GPT-2
    flags = [*text(r, 128), *SMALL, '--rope=False', '--bias=True', '--gelu=tanh']
    base = r.train({'base': ''}, 600, 150, flags, seeds=[1])['base'].runs[0]
    weights = ckpt.fingerprint(runs.load(base)[0])
    folder = os.path.join(r.cfg.out_dir, f'exported_{weights}')
    if not os.path.isfile(os.path.join(folder, 'config.json')):
        runs.command(['-m', 'lab.export_hf', f'--out_dir={base.folder}', f'--folder={folder}'])
    models = {
        'going on': '',
        'qv, learning rate x 1': '--ssa=qv --ssa_lr=1',
        'qv, learning rate x 10': '--ssa=qv --ssa_lr=10',
        'qv, learning rate x 100': '--ssa=qv --ssa_lr=100',
        'position only (their code)': 'position_only --ssa=q --ssa_lr=100',
    }
    flags += [
        f'--init_from={folder}',
        '--learning_rate=5e-4',
        '--min_lr=5e-5',
        '--eval_interval=20',
    ]
    arms = r.train(models, 200, 60, flags)

    def cells(arm):
        return against(arm, arms['going on'], 'steps to its loss')

    return table('put in', arms, cells), r.curves(arms)


def variable_assignment(r):
    """2410.02703 section 2: selective attention solves variable assignment and generalises;
    standard does less. Takes 20 minutes."""
    tests = {}
    for n in 2, 6, 12:
        header = f'{n} variables'
        tests[header] = task_data(r, 'variable_assignment', variables=n, records=2000, seed=1)
    parts = answers(r, 'variable_assignment', 1000, 250, ATTENTIONS, tests)
    return 'Trained on records of 3 variables, six questions in each.', *parts


def passkey(r):
    """2411.12892 section 5: passkey retrieval, 56.9% with standard attention and 74.4% with SSA
    (theirs, of a pre-trained model). Takes 10 minutes."""
    tests = {}
    for depth in 0.0, 0.5, 1.0:
        tests[f'depth {depth:g}'] = task_data(r, 'passkey', depth=depth, records=2000, seed=1)
    models = {**ATTENTIONS, 'SSA, learning rate x 10': '--ssa=qv --ssa_lr=10'}
    return answers(r, 'passkey', 600, 200, models, tests)


def denoising(r):
    """Selective copying: the signal among noise. 2411.12892 motivates the temperature of the values
    by noise, too, but compares mean squared errors of averages; this is a task in the same spirit,
    not their table. Takes 8 minutes."""
    return answers(r, 'denoising', 600, 200, ATTENTIONS, {})


def answers(r, task, steps, quick, models, tests):
    """The section of a synthetic task. tests: {header: folder of a data set of such records}."""
    trained = task_data(r, task)
    arms = r.train(models, steps, quick, ['config/tasks.py', f'--dataset={trained}'])

    def cells(arm):
        row = {
            'steps to 90%': spread(arm.crossings('accuracy', 0.9), '{:.0f}'),
            'accuracy': spread(arm.last('accuracy'), '{:.1%}'),
        }
        for header, folder in {'records right': trained, **tests}.items():
            right = [runs.records_right(run, folder) for run in arm.runs]
            row[header] = spread(right, '{:.1%}')
        return row

    words = 'Accuracy is that of single answers; after it, all answers of a record must be right.'
    picture = r.curves(arms, 'accuracy', 'accuracy of the answers')
    return words, table('attention', arms, cells), picture


def memory(r):
    """How much tasks need for 0.01 nats over a model's own loss, and what a model does that is
    trained to see as many tokens only. Nothing may be dropped in copying, everything but two tokens
    in parity; the others lie between. Takes 30 minutes."""
    parts = [memory_of(r, 'variable_assignment', 1000), memory_of(r, 'passkey', 600)]
    if not r.cfg.quick:
        parts.append(memory_of(r, 'denoising', 600))
        parts.append(memory_of(r, 'parity', 500))
        parts.append(memory_of(r, 'copying', 1000))
    return parts


def memory_of(r, task, steps):
    """The part of `memory` about a task."""
    folder = task_data(r, task)

    flags = ['config/tasks.py', f'--dataset={folder}']
    arms = r.train({'standard': '', 'selective': '--selective'}, steps, steps // 5, flags)
    searches = [('standard', 'oldest')]  # it has no F
    for policy in m.POLICIES:
        searches.append(('selective', policy))
    jobs = []
    for name, policy in searches:
        jobs += [(run, policy, '--tolerance=0.01') for run in arms[name].runs]
    runs.search(r, jobs, 'tolerance', r.windows(256))
    kept = 0
    for run in arms['selective'].runs:
        if point := holds(run, 'selective', 'tolerance'):
            kept = max(kept, math.ceil(mean(point['budgets'])))
    if kept:
        window = {f'newest {kept}, trained': f'window={kept} --selective'}
        arms.update(r.train(window, steps, steps // 5, flags))

    def cells(arm):
        row = {
            'validation loss': spread(arm.last('val_loss')),
            'accuracy': spread(arm.last('accuracy'), '{:.1%}'),
        }
        for header, policy in ('by F', 'selective'), ('newest', 'oldest'), ('random', 'random'):
            row[header] = ''
            if (arm.name, policy) in searches:
                points = [holds(run, policy, 'tolerance') for run in arm.runs]
                row[header] = spread([point and point['saving'] for point in points], '{:.1f}x')
        return row

    length = data.read_meta(folder)['record_len'] - 1
    return f'**{task}**, {length} tokens\n\n{table("model", arms, cells)}'


TEXT = gate, headline, heads, rules, ssa, finetune
TASKS = variable_assignment, passkey, denoising, memory
CLAIMS = {claim.__name__: claim for claim in TEXT + TASKS}


# ---- Sections ------------------------------------------------------------------------------------


def title(cfg, name):
    """The name of a claim's section; a text of one's own has its own."""
    if cfg.dataset != 'stdlib' and CLAIMS[name] in TEXT:
        return f'{name} {cfg.dataset}'
    return name


def section(page, title, body):
    """The page with the section of this title replaced, or put at the end."""
    begin = f'<!-- lab.reproduce {title} -->'
    end = f'<!-- end of {title} -->'
    before, found, rest = page.partition(begin)
    if not found:
        return f'{page.rstrip()}\n\n{begin}\n{body}\n{end}\n'
    if end not in rest:
        raise UserError(f"the marker '{end}' is missing: put it back where the section ends")
    return f'{before}{begin}\n{body}\n{end}{rest.partition(end)[2]}'


def footer(r):
    """How the figures of a section were made."""
    command = shlex.join(['python', '-m', 'lab.reproduce', *sys.argv[1:]])
    words = [
        f'`{command}`, seeds 1 to {r.cfg.seeds}. {r.about}',
        f'Runs of one thread each, {platform.machine()}, torch {torch.__version__}. A word in',
        'FLAGS is a rule: `python -m lab.ablate WORD` then takes the place of `python train.py`.',
        'The runs:',
    ]
    return '\n'.join([*words, '', *r.commands])


def numbers(cfg, name, low):
    """The numbers of a setting that is a list in text; UserError if it is none."""
    found = []
    for word in getattr(cfg, name).split(','):
        if not re.fullmatch('[0-9]{1,7}', word) or int(word) < low:
            raise UserError(f'--{name}={getattr(cfg, name)}: numbers of {low} and more, as 64,256')
        found.append(int(word))
    return found


@dataclass
class ReproduceConfig:
    claims: list = option([], 'which to run, written without dashes', choices=tuple(CLAIMS))
    list: bool = option(False, 'print what the claims are and how long each takes')
    quick: bool = option(False, 'a smaller version of each, in minutes')
    seeds: int = option(3, 'runs of each model, with the seeds 1, 2, 3, …', low=1, high=100)
    steps: int = option(0, "of each run; 0: the claim's own number", high=10**9)
    dataset: str = option('stdlib', 'text of the claims about text: data/<name>')
    config: str = option('config/claims.py', 'model and steps of the claims about text')
    windows: str = option('8,16,32,64', 'gate: the newest tokens that its models are trained on')
    contexts: str = option('256,512,1024', 'headline: tokens of context')
    models: int = option(0, 'only the first models of a claim; 0: all', high=100)
    device: str = option('cpu', 'of the runs')
    workers: int = option(os.cpu_count(), 'runs at a time', low=1)
    out_dir: str = option('out/reproduce', 'folder of the runs')
    data_dir: str = option('data', 'where the data sets are, or are made')
    to: str = option(
        'RESULTS.md', 'its sections are written here, pictures into results/ beside it'
    )


def main():
    cfg = settings.parse(ReproduceConfig, positional='claims')
    if cfg.list:
        for name, claim in CLAIMS.items():
            print(f'{name:20}', *claim.__doc__.split())
        return
    if not cfg.claims:
        raise UserError(f'which claims? {", ".join(CLAIMS)}')
    plot.import_pyplot()  # what can be wrong is known before the work
    signal.signal(signal.SIGTERM, runs.stop)
    if cfg.quick:
        cfg.seeds = 1
        cfg.windows = '16,64'
        cfg.contexts = '256'
        cfg.models = cfg.models or 5
        cfg.out_dir = os.path.join(cfg.out_dir, 'quick')
        cfg.to = os.path.join(cfg.out_dir, 'page')  # is not written, but pictures beside it
    runners = []
    for name in cfg.claims:
        r = runs.Runner(cfg, name, title(cfg, name))
        runners.append(r)
        if not cfg.quick:
            section(pathlib.Path(cfg.to).read_text('utf-8'), r.title, '')
    for r in runners:
        body = '\n\n'.join([*CLAIMS[r.claim](r), footer(r)])
        if cfg.quick:
            print(body)
        else:
            page = pathlib.Path(cfg.to).read_text('utf-8')
            plot.write(cfg.to, section(page, r.title, body).encode())


if __name__ == '__main__':
    settings.run(main)
