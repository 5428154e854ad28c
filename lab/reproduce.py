"""The papers' claims at a small scale: train what they compare, and write what came out.

    python -m lab.reproduce --list
    python -m lab.reproduce gate headline               --list says how long, on two cores
    python -m lab.reproduce gate --quick                one seed, few steps, a few minutes
    python -m lab.reproduce gate --dataset=mine --steps=20000       on a text of yours, for longer

Runs are python train.py, or python -m lab.ablate, in processes of one thread each. Finished runs
are kept, and stopped ones are resumed. A claim prints its tables and writes them into
<out_dir>/CLAIM.md, with a picture beside it; a quick version has <out_dir>/quick. Begin with the
gate, which says whether text and runs can show anything about long context.
"""

import os
import shlex
import sys
from dataclasses import dataclass
from statistics import mean

from support import settings  # before torch, see support/__init__.py

import torch

import data
import prepare_text
import train
from lab import plot, runs, tasks
from lab.real import eviction, finetune, retrofit
from lab.runs import LEGEND, losses_table, spread
from lab.ssa import denoising, graph
from support import files
from support.settings import option


# ---- Data ----------------------------------------------------------------------------------------


def task_data(task, name='', **changed):
    """A synthetic Dataset, made where it is missing. changed: settings of lab.tasks, with a name
    of their own."""
    name = f'claims_{name or task}'
    if not data.known_meta(f'data/{name}'):
        tasks.make(tasks.TaskConfig([task], name=name, **changed))
    return data.load_dataset(name)


def text(r, T=256):
    """--config, and flags for --dataset with a context of T tokens and as many a step."""
    prepare_text.provide(r.cfg.dataset)
    path = data.load_dataset(r.cfg.dataset).path
    size = settings.parse(train.TrainConfig, [r.cfg.config])
    batch_size = size.batch_size * size.block_size // T
    return [r.cfg.config, f'--dataset={path}', f'--block_size={T}', f'--batch_size={batch_size}']


# ---- The claims. Each takes a Runner and returns the parts of its section ------------------------

SMALL = ['--n_layer=2', '--n_embd=64']
ATTENTIONS = {
    'standard': '',
    'selective': '--selective',
    'SSA': '--ssa=qv',
    'selective + SSA': '--selective --ssa=qv',
}


def gate(r):
    """Whether text and runs can show anything: standard attention must beat the same model trained
    on token 0 and the newest K - 1 tokens, for every K, and those with K = 32 and fewer must lose
    0.05 nats at least. Takes 40 minutes."""
    Ks = settings.numbers(r.cfg.windows, '--windows', low=2)
    models = {'standard': ''}
    for K in Ks:
        models[f'newest {K}'] = f'window={K} --selective'
    models['ALiBi'] = 'alibi --selective'
    models['selective'] = '--selective'
    models['selective and ALiBi'] = 'votes_and_alibi --selective'
    arms = r.train(models, 1000, text(r))
    losses = losses_table(arms)
    standard = arms['standard'].losses.nats.mean()
    verdict = '**The gate passes.**'
    for K in Ks:
        gap = arms[f'newest {K}'].losses.nats.mean() - standard
        if gap <= 0 or K <= 32 and gap < 0.05:
            verdict = '**The gate fails.**'
    return verdict, LEGEND, losses, r.curves(arms)


VOTERS = {
    'selective': '--selective',
    'memory loss 0.1': '--selective --memory_loss=0.1',
    'memory loss 0.02': '--selective --memory_loss=0.02',
}


def headline(r):
    """2410.02703 section 7: 16x, 25x, 47x less memory at contexts of 512, 1,024 and 2,048 for the
    loss of standard attention (theirs: 32, 41, 44 tokens a layer). Here at 256, 512, 1,024, with
    what simple baselines do. Takes 160 minutes."""
    parts = [LEGEND]
    for T in settings.numbers(r.cfg.contexts, '--contexts', low=32):
        arms = r.train({'standard': '', 'ALiBi': 'alibi --selective', **VOTERS}, 1000, text(r, T))
        parts += [f'**Context {T}**', losses_table(arms), MEMORY, equal_memory(r, T, arms)]
    return parts


MEMORY = """Tokens kept, by layer, for the loss of standard attention, confirmed on unseen windows;
and the loss of all / of recall tokens, of standard attention with the whole context and of others
with as many tokens:"""


def equal_memory(r, T, arms):
    """What each of VOTERS keeps of T tokens for standard attention's loss, and what others do with
    it. For each another model is trained on as many of the newest tokens."""
    standard = arms['standard'].folders
    windows = max(64, 32768 // T)

    def losses(folder, rule='', *pruning):
        return runs.token_losses(folder, rule, windows, *pruning).shown()

    rows = []
    for name in VOTERS:
        runs.search(r, arms[name].folders, standard, windows // 2)
        for n, folder in enumerate(arms[name].folders):
            row = {'model': f'{name}, seed {n + 1}'}
            rows.append(row)
            point = runs.holds(folder, 'selective')
            oldest = runs.holds(folder, 'oldest')
            if not point or not oldest:
                continue
            budgets = point['budgets']
            K = round(mean(budgets))
            window = {'window': f'window={K} --selective'}
            control = r.train(window, 1000, text(r, T), seeds=[n + 1])['window']
            row |= {
                'kept by F': ' '.join(map(str, budgets)),
                'saving by F': f'{point["saving"]:.1f}x',
                'saving by age': f'{oldest["saving"]:.1f}x',
                'standard': losses(standard[n]),
                'by F': losses(folder, '', budgets),
                'newest': losses(folder, '', budgets, 'oldest'),
                'ALiBi, newest': losses(arms['ALiBi'].folders[n], f'alibi={K}'),
                'trained on as many': losses(control.folders[0], control.rule),
            }
    return runs.markdown(rows)


def heads(r):
    """2410.02703 sections 4, 5: selective attention with H heads is as good as standard attention
    with about twice as many. Takes 15 minutes."""
    models = {'standard': '', 'standard, 2x heads': 'double_heads', 'selective': '--selective'}
    return LEGEND, losses_table(r.train(models, 1000, text(r)))


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
        'no ReLU': 'no_relu --selective',
        'token 0 may be masked': 'first_too --selective',
        'a token may mask itself': 'self_too --selective',
    }
    return LEGEND, losses_table(r.train(models, 300, text(r, 128) + SMALL))


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
        'qv without position': '--ssa=qv --ssa_alpha=-100',
        'q': '--ssa=q',
        'v': '--ssa=v',
        'qkv': '--ssa=qkv',
        'qv without sharing': '--ssa=qv --ssa_sharing=False',
    }
    arms = r.train(models, 300, [*text(r, 128), *SMALL, '--eval_interval=20'])
    return runs.steps_table(arms), r.curves(arms)


def variable_assignment(r):
    """2410.02703 section 2: selective attention solves variable assignment and generalises;
    standard does less. Trained on records of 3 variables, six questions in each. Takes 20
    minutes."""
    harder = task_data('variable_assignment', '12_variables', variables=12, records=2000, seed=1)
    return answers(r, 'variable_assignment', 1000, {'with 12 variables': harder})


def passkey(r):
    """2411.12892 section 5: passkey retrieval, 56.9% with standard attention and 74.4% with SSA
    (theirs, of a pre-trained model). Takes 10 minutes."""
    return answers(r, 'passkey', 600, {})


def answers(r, task, steps, tests):
    """The section of a synthetic task. tests: {header: another Dataset of it}."""
    trained = task_data(task)
    arms = r.train(ATTENTIONS, steps, ['config/tasks.py', f'--dataset={trained.path}'])
    rows = []
    for name, arm in arms.items():
        row = {'attention': name, 'FLAGS': arm.flags}
        for header, questions in {'records right': trained, **tests}.items():
            right = [runs.records_right(folder, questions) for folder in arm.folders]
            row[header] = spread(right, '{:.1%}')
        rows.append(row)
    return ALL_RIGHT, runs.markdown(rows), r.curves(arms, 'accuracy', 'accuracy of the answers')


ALL_RIGHT = (
    'In a record all answers must be right. The accuracy of the picture is of single answers.'
)


CLAIMED = (
    gate, headline, heads, rules, ssa, variable_assignment,
    passkey, graph, denoising, eviction, retrofit, finetune,
)  # fmt: skip
CLAIMS = {claim.__name__: claim for claim in CLAIMED}


# ---- The command -------------------------------------------------------------------------------


@dataclass
class ReproduceConfig:
    claims: list = option([], 'which to run, written without dashes', choices=tuple(CLAIMS))
    list: bool = option(False, 'print what the claims are and how long each takes')
    quick: bool = option(False, 'a smaller version of each, in minutes')
    seeds: int = option(3, 'runs of each model, with the seeds 1, 2, 3, …', low=1)
    steps: int = option(0, "steps of each run; 0: the claim's own number", high=10**9)
    dataset: str = option('stdlib', 'text of the claims about text: data/<name>')
    config: str = option('config/claims.py', 'model and steps of the claims about text')
    windows: str = option('8,16,32,64', 'gate: the newest tokens that its models are trained on')
    contexts: str = option('256,512,1024', 'headline: tokens of context')
    model: str = option(
        'HuggingFaceTB/SmolLM2-135M', 'eviction, retrofit, finetune: a language model, or a run'
    )
    texts: str = option('wikitext', 'texts that these claims measure on, data/<name>,…')
    device: str = option('cpu', 'device of the runs')
    workers: int = option(os.cpu_count(), 'runs at a time', low=1)
    out_dir: str = option('out/reproduce', 'folder of the runs, tables and pictures')


def main():
    cfg = settings.parse(ReproduceConfig, positional='claims')
    if cfg.list or not cfg.claims:
        for name, claim in CLAIMS.items():
            print(f'{name:20}', *claim.__doc__.split())
        return
    plot.import_pyplot()  # what can be wrong is known before the work
    os.environ['OMP_NUM_THREADS'] = '1'  # of the runs
    if cfg.quick:
        cfg.seeds = 1
        cfg.windows = '16,64'
        cfg.contexts = '256'
        cfg.out_dir += '/quick'
    for name in cfg.claims:
        title = name
        if cfg.dataset != 'stdlib':
            title += f'_{os.path.basename(cfg.dataset)}'
        r = runs.Runner(cfg, title)
        parts = CLAIMS[name](r)
        made = f"""`python -m lab.reproduce {shlex.join(sys.argv[1:])}`, seeds 1 to {cfg.seeds}.
Runs of one thread each, torch {torch.__version__}. A word in FLAGS is a rule of lab.ablate."""
        page = '\n\n'.join([f'# {title}', *parts, made])
        print(page)
        files.write_file(f'{cfg.out_dir}/{title}.md', page + '\n')


if __name__ == '__main__':
    settings.run(main)
