"""The papers' claims at a small scale: train what they compare, and write what came out.

    python -m lab.reproduce --list
    python -m lab.reproduce gate headline               --list says how long, on two cores
    python -m lab.reproduce gate --quick                one seed, few steps, at most 3 minutes
    python -m lab.reproduce gate --dataset=mine --steps=20000       on a text of yours, for longer

Runs are python train.py, or python -m lab.ablate, in processes of one thread each. Finished runs
are kept, and stopped ones are resumed. A claim prints its tables and writes them into
results/CLAIM.md, with a picture beside it. A quick version goes into <out_dir>/quick instead. Begin
with the gate, which says whether text and runs can show anything about long context.
"""

import os
import shlex
import signal
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
from lab.runs import LEGEND, Run, kinds_table, spread, table
from lab.ssa import denoising, graph
from support import files
from support.settings import option


# ---- Data ----------------------------------------------------------------------------------------


def task_data(r, task, **changed):
    """The folder of a synthetic data set, made where it is missing. changed: settings of tasks."""
    name = f'claims_{task}'
    for key, value in changed.items():
        name += f'_{key}_{value}'
    cfg = tasks.TaskConfig(name=name, data_dir=r.cfg.data_dir, **changed)
    folder = f'{cfg.data_dir}/{name}'
    if data.known_meta(folder).get('source') != tasks.described(task, cfg):
        tasks.make(task, cfg)
    return folder


def text(r, T=256):
    """--config, and flags for --dataset with a context of T tokens and as many a step."""
    root = r.cfg.data_dir
    if r.cfg.dataset == 'stdlib' and not data.known_meta(f'{root}/stdlib'):
        prepare_text.prepare(prepare_text.TextConfig(data_dir=root))
    dataset = data.load_dataset(r.cfg.dataset, root)
    r.about = f'Text: {data.summary(dataset.path)}.'
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
    losses = kinds_table(r, 'attention', arms)
    standard = mean(arms['standard'].losses.means())
    verdict = '**The gate passes.**'
    for K in Ks:
        gap = mean(arms[f'newest {K}'].losses.means()) - standard
        if gap <= 0 or K <= 32 and gap < 0.05:
            verdict = '**The gate fails.**'
    return verdict, LEGEND, losses, r.curves(arms)


def headline(r):
    """2410.02703 section 7: 16x, 25x, 47x less memory at contexts of 512, 1,024 and 2,048 for the
    loss of standard attention (theirs: 32, 41, 44 tokens a layer). Here at 256, 512, 1,024, with
    what simple baselines do. Takes 160 minutes."""
    models = {
        'standard': '',
        'ALiBi': 'alibi --selective',
        'selective': '--selective',
        'memory loss 0.1': '--selective --memory_loss=0.1',
        'memory loss 0.02': '--selective --memory_loss=0.02',
    }
    parts = [LEGEND]
    for T in settings.numbers(r.cfg.contexts, '--contexts', low=32):
        arms = r.train(models, 1000, text(r, T))
        losses = kinds_table(r, 'attention', arms)
        parts += [f'**Context {T}**', losses, equal_memory(r, T, arms)]
    return parts


MEMORY = """Tokens kept, by layer, for the loss of standard attention, confirmed on unseen windows;
and the loss of all / of recall tokens, with all of its context and with as many tokens:"""


def equal_memory(r, T, arms):
    """What each arm keeps of T tokens for standard attention's loss, and what others do with it.

    For each model that can be pruned another one is trained on as many of the newest tokens.
    """
    standard = arms['standard'].runs
    alibi = arms['ALiBi'].runs
    jobs = []
    for name, arm in arms.items():
        if name in ('standard', 'ALiBi'):
            continue
        for run, base in zip(arm.runs, standard):
            jobs.append((run, 'selective', base.folder))
            jobs.append((run, 'oldest', base.folder))
    runs.search(r, jobs, r.windows(max(32, 16384 // T)))
    windows = r.windows(max(64, 32768 // T))

    def losses(run, *pruning):
        return runs.token_losses(run, windows, *pruning).shown()

    rows = []
    for n in range(r.cfg.seeds):
        for name, arm in arms.items():
            run = arm.runs[n]
            row = {
                'model': f'{name}, seed {n + 1}',
                'kept by F': '',
                'saving by F': '',
                'saving by age': '',
                'all of its context': losses(run),
            }
            rows.append(row)
            if point := runs.holds(run, 'oldest'):
                row['saving by age'] = f'{point["saving"]:.1f}x'
            point = runs.holds(run, 'selective')
            if not point:
                continue
            budgets = point['budgets']
            K = round(mean(budgets))
            window = {'window': f'window={K} --selective'}
            control = r.train(window, 1000, text(r, T), seeds=[n + 1])['window']
            row |= {
                'kept by F': ' '.join(map(str, budgets)),
                'saving by F': f'{point["saving"]:.1f}x',
                'by F': losses(run, budgets),
                'newest': losses(run, budgets, 'oldest'),
                'random': losses(run, budgets, 'random'),
                'standard, newest': losses(standard[n], budgets, 'oldest'),
                'ALiBi, newest': losses(Run(alibi[n].folder, f'alibi={K}')),
                'trained on as many': losses(control.runs[0]),
            }
    return f'{MEMORY}\n\n{runs.markdown(rows)}'


def heads(r):
    """2410.02703 sections 4, 5: selective attention with H heads is as good as standard attention
    with about twice as many. Takes 15 minutes."""
    models = {'standard': '', 'standard, 2x heads': 'double_heads', 'selective': '--selective'}
    arms = r.train(models, 1000, text(r))
    return LEGEND, kinds_table(r, 'attention', arms), r.curves(arms)


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
    arms = r.train(models, 300, text(r, 128) + SMALL)
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
    arms = r.train(models, 300, [*text(r, 128), *SMALL, '--eval_interval=20'])
    return runs.against(arms, 'standard'), r.curves(arms)


def variable_assignment(r):
    """2410.02703 section 2: selective attention solves variable assignment and generalises;
    standard does less. Takes 20 minutes."""
    tests = {}
    for n in 2, 6, 12:
        folder = task_data(r, 'variable_assignment', variables=n, records=2000, seed=1)
        tests[f'{n} variables'] = folder
    parts = answers(r, 'variable_assignment', 1000, ATTENTIONS, tests)
    return 'Trained on records of 3 variables, six questions in each.', *parts


def passkey(r):
    """2411.12892 section 5: passkey retrieval, 56.9% with standard attention and 74.4% with SSA
    (theirs, of a pre-trained model). Takes 10 minutes."""
    tests = {}
    for depth in 0.0, 0.5, 1.0:
        tests[f'depth {depth:g}'] = task_data(r, 'passkey', depth=depth, records=2000, seed=1)
    models = {**ATTENTIONS, 'SSA, learning rate x 10': '--ssa=qv --ssa_lr=10'}
    return answers(r, 'passkey', 600, models, tests)


def answers(r, task, steps, models, tests):
    """The section of a synthetic task. tests: {header: folder of a data set of such records}."""
    trained = task_data(r, task)
    arms = r.train(models, steps, ['config/tasks.py', f'--dataset={trained}'])

    def cells(arm):
        first = arm.first(lambda line: line['accuracy'] >= 0.9)
        row = {
            'first evaluation at 90%, step': spread(first, '{:.0f}'),
            'accuracy': spread(arm.last('accuracy'), '{:.1%}'),
        }
        for header, folder in {'records right': trained, **tests}.items():
            right = [runs.records_right(run, folder) for run in arm.runs]
            row[header] = spread(right, '{:.1%}')
        return row

    return (
        'Accuracy is that of single answers; after it, all answers of a record must be right.',
        table('attention', arms, cells),
        r.curves(arms, 'accuracy', 'accuracy of the answers'),
    )


CLAIMED = gate, headline, heads, rules, ssa, variable_assignment, passkey, graph, denoising
CLAIMS = {claim.__name__: claim for claim in (*CLAIMED, eviction, retrofit, finetune)}


# ---- The command -------------------------------------------------------------------------------


def footer(r):
    """How the figures of a section were made."""
    commands = '\n'.join(dict.fromkeys(r.commands))  # each once
    text = f"""`python -m lab.reproduce {shlex.join(sys.argv[1:])}`, seeds 1 to {r.cfg.seeds}.
{r.about}
Runs of one thread each, torch {torch.__version__}."""
    if not commands:
        return text
    return f"""{text} A word in FLAGS is a rule:
`python -m lab.ablate WORD` then takes the place of `python train.py`. The runs:

{commands}"""


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
    model: str = option(
        'HuggingFaceTB/SmolLM2-135M', 'eviction, retrofit, finetune: a language model, or a run'
    )
    texts: str = option('wikitext', 'of the same: what they are measured on, data/<name>,…')
    device: str = option('cpu', 'of the runs')
    workers: int = option(os.cpu_count(), 'runs at a time', low=1)
    out_dir: str = option('out/reproduce', 'folder of the runs')
    data_dir: str = option('data', 'where the data sets are, or are made')
    to: str = option('results', 'folder of the tables and pictures')


def main():
    cfg = settings.parse(ReproduceConfig, positional='claims')
    if cfg.list or not cfg.claims:
        for name, claim in CLAIMS.items():
            print(f'{name:20}', *claim.__doc__.split())
        return
    plot.import_pyplot()  # what can be wrong is known before the work
    signal.signal(signal.SIGTERM, runs.stop)
    os.environ['OMP_NUM_THREADS'] = '1'  # of the runs
    if cfg.quick:
        cfg.seeds = 1
        cfg.windows = '16,64'
        cfg.contexts = '256'
        cfg.out_dir += '/quick'
        cfg.to = cfg.out_dir
    for name in cfg.claims:
        title = name
        if cfg.dataset != 'stdlib':
            title += f'_{os.path.basename(cfg.dataset)}'
        r = runs.Runner(cfg, title)
        body = '\n\n'.join([*CLAIMS[name](r), footer(r)])
        print(body)
        files.write_file(f'{cfg.to}/{title}.md', f'# {title}\n\n{body}\n')


if __name__ == '__main__':
    settings.run(main)
