"""The papers' claims at a small scale: train what they compare, with several seeds, and write what came out.

    python -m lab.reproduce --list
    python -m lab.reproduce gate headline                   about the times that --list gives
    python -m lab.reproduce gate --quick                    one seed, few steps, at most 3 minutes; printed, not written
    python -m lab.reproduce gate --dataset=mine --steps=20000       on a text of yours, for longer

Runs are python train.py, or python -m lab.ablate, in processes of one thread each. Finished runs are kept, stopped ones
are resumed. A claim writes its section of RESULTS.md, between two markers, and a picture into results/; the words
around the markers stay. Begin with the gate: it says whether text and runs can show anything about long context.
"""
import math
import os
import platform
import signal
import statistics
from dataclasses import dataclass, field

import torch

import data
import prepare_text
import train
from lab import figures, plot, tasks
from lab.runs import Runner, command, curves, last, mean_loss, spread, steps_to, stop, table, tokens_kept
from support import checkpoint as ckpt
from support import settings
from support.settings import UserError


@dataclass
class ReproduceConfig:
    claims: list = field(default_factory=list)  # names of the claims, written without dashes
    list: bool = False                  # print the claims and how long each takes
    quick: bool = False                 # a smaller version of each, in minutes
    seeds: int = 3                      # runs of each model, with the seeds 1, 2, 3, … [1 to 100]
    steps: int = 0                      # of each run; 0: the claim's own number [0 to 1_000_000_000]
    # the claims about text: gate, headline, heads, rules, ssa, finetune
    dataset: str = ''                   # data/<name>; '': the offline default, stdlib
    config: str = 'config/claims.py'    # the size of models and steps; rules, ssa and finetune have smaller models
    windows: str = '8,16,32,64'         # gate: the newest tokens that its models are trained on
    contexts: str = '256,512,1024'      # headline: tokens of context
    models: int = 0                     # gate, headline, rules, ssa: the first so many models, 0: all [0 to 100]
    # where
    device: str = 'cpu'                 # of the runs
    workers: int = os.cpu_count()       # runs at a time [1 to 1000]
    out_dir: str = 'out/reproduce'      # folder of the runs
    data_dir: str = 'data'              # where the data sets are, or are made
    to: str = 'RESULTS.md'              # its sections are written here, pictures into results/ beside it


# ---- Data


def task_data(runner, task, **changed):
    """The folder of a synthetic data set, made where it is missing. changed: what differs from the task's settings."""
    cfg = tasks.TaskConfig(tasks=[task], name='_'.join([task, *(f'{key}_{value}' for key, value in changed.items())]),
                           data_dir=runner.cfg.data_dir, **changed)
    folder = os.path.join(cfg.data_dir, cfg.name)
    if not os.path.isfile(os.path.join(folder, 'meta.json')):
        tasks.make(task, cfg)
    elif data.read_meta(folder)['source'] != tasks.described(task, cfg):
        raise UserError(f'{folder} was made with other settings: delete it, or give another --data_dir')
    return folder


def text(runner, T=256):
    """Flags of a run on --dataset at a context of T tokens, with as many tokens a step as the config has."""
    cfg = runner.cfg
    folder = os.path.join(cfg.data_dir, cfg.dataset or 'stdlib')
    if not cfg.dataset and not os.path.isfile(os.path.join(folder, 'meta.json')):
        prepare_text.prepare(prepare_text.TextConfig(data_dir=cfg.data_dir))
    dataset = data.load_dataset(cfg.dataset or 'stdlib', cfg.data_dir)
    runner.about = (f'Text: {dataset.name}, {dataset.tokens("train"):,} tokens of the tokenizer '
                    f'{dataset.tokenizer_name} ({dataset.tokens("val"):,} for validation).')
    size = settings.parse(train.TrainConfig, [cfg.config])
    batch_size = max(1, size.batch_size * size.block_size // T)
    return [f'--dataset={dataset.path}', f'--block_size={T}', f'--batch_size={batch_size}']


# ---- The claims. Each takes a Runner and returns the text of its section

ATTENTIONS = {'standard': '', 'selective': '--selective', 'SSA': '--ssa=qv', 'selective + SSA': '--selective --ssa=qv'}


def gate(r):
    """Whether text and runs can show anything: standard attention must beat the same model trained on token 0 and the
    newest K - 1 tokens, for every K, and those with K = 32 and fewer must lose 0.05 nats at least."""
    Ks = [16, 64] if r.cfg.quick else [int(K) for K in r.cfg.windows.split(',')]
    models = {'standard': '', **{f'newest {K}': f'window={K} --selective' for K in Ks}, 'ALiBi': 'alibi --selective',
              'selective': '--selective', 'selective and ALiBi': 'votes_and_alibi --selective'}
    models = dict(list(models.items())[:max(1 + len(Ks), r.cfg.models or len(models))])     # its windows in any case
    runs = r.train(models, r.cfg.config, 1000, text(r), quick=100)
    losses = figures.measure(r, runs)
    gaps = {K: figures.mean_of(losses[f'newest {K}']) - figures.mean_of(losses['standard']) for K in Ks}
    passed = min(gaps.values()) > 0 and all(gap >= 0.05 for K, gap in gaps.items() if K <= 32)
    verdict = f"**The gate {'passes' if passed else 'fails'}**: against standard " + ', '.join(
        f'newest {K} {gap:+.3f}' for K, gap in gaps.items()) + '.'
    return '\n\n'.join([verdict, *by_kinds(r, 'attention', models, runs, losses)])


def by_kinds(r, first, models, runs, losses):
    """The parts of a section about losses by kind of target: what they are, the table, the picture."""
    return figures.LEGEND, figures.kinds_table(first, models, runs, losses), curves(r, r.title, runs)


def headline(r):
    """2410.02703 section 7: 16x, 25x, 47x less memory at contexts of 512, 1,024 and 2,048 for the loss of standard
    attention (theirs: 32, 41, 44 tokens a layer). Here at 256, 512, 1,024, with what simple baselines do."""
    models = {'standard': '', 'selective': '--selective', 'memory loss 0.1': '--selective --memory_loss=0.1',
              'memory loss 0.02': '--selective --memory_loss=0.02'}
    models = dict(list(models.items())[:r.cfg.models or None])
    parts, kept = [], {}
    for T in [256] if r.cfg.quick else map(int, r.cfg.contexts.split(',')):
        runs = r.train(models, r.cfg.config, 1000, text(r, T), quick=100)
        columns = {'requirement': last('memory', '{:.1%}')}
        parts += [f'**Context {T}**', figures.kinds_table('attention', models, runs, figures.measure(r, runs), columns),
                  figures.equal_memory(r, T, runs, kept, text(r, T))]
    return '\n\n'.join([figures.LEGEND, *parts, tokens_kept(r, kept)])


def heads(r):
    """2410.02703 sections 4, 5: selective attention with H heads is as good as standard attention with about twice as
    many."""
    models = {'standard': '', 'standard, 2x heads': 'double_heads', 'selective': '--selective'}
    runs = r.train(models, r.cfg.config, 1000, text(r), quick=150)
    losses = figures.measure(r, runs)
    standard, double, selective = (figures.mean_of(losses[name]) for name in models)
    verdict = (f'Against standard attention: selective attention {selective - standard:+.4f}, twice the heads '
               f'{double - standard:+.4f}.')
    return '\n\n'.join([verdict, *by_kinds(r, 'attention', models, runs, losses)])


def rules(r):
    """2410.02703 section 3: which of the rules matter, whose votes, and other methods that are the same recurrence."""
    models = {'standard': '', 'selective': '--selective', 'newest 16': 'window=16 --selective',
              'ALiBi': 'alibi --selective', 'the reader alone votes (fox)': 'fox --selective',
              'the last head selects': 'last_head --selective', 'a selector for every two heads': 'groups --selective',
              'no ReLU': 'no_relu --selective', 'token 0 may be masked': 'first_too --selective',
              'votes act at once': 'at_once --selective', 'a token may mask itself': 'self_too --selective'}
    models = dict(list(models.items())[:r.cfg.models or (5 if r.cfg.quick else None)])
    runs = r.train(models, r.cfg.config, 300, [*text(r, 128), '--n_layer=2', '--n_embd=64'], quick=150)
    return '\n\n'.join(by_kinds(r, 'rule', models, runs, figures.measure(r, runs)))


def ssa(r):
    """2411.12892: SSA is better with under 0.5% new parameters; the ablation of q, k, v, position and sharing, the
    authors' code, the scalable softmax, and a sweep of the temperatures' learning rate."""
    models = {'standard': '', **{f'qv, learning rate x {lr}': f'--ssa=qv --ssa_lr={lr}' for lr in (1, 3, 10, 30)},
              'position only (their code), x 10': 'position_only --ssa=q --ssa_lr=10',
              's log n (ssmax), x 10': 'ssmax --ssa=q --ssa_lr=10', 'qv without position': 'no_position --ssa=qv',
              'qv, position on v, too': 'position_on_values --ssa=qv',
              'q': '--ssa=q', 'v': '--ssa=v', 'qkv': '--ssa=qkv', 'qv without sharing': '--ssa=qv --ssa_sharing=False'}
    models = dict(list(models.items())[:r.cfg.models or (5 if r.cfg.quick else None)])
    runs = r.train(models, r.cfg.config, 300, [*text(r, 128), '--n_layer=2', '--n_embd=64'], quick=150)
    goal = mean_loss(runs['standard'])
    columns = {'validation loss': last('val_loss'), 'against standard': lambda some: f'{mean_loss(some) - goal:+.4f}',
               "steps to standard's loss": steps_to('val_loss', goal), 'position part': figures.position_part,
               'new parameters': lambda some: f'{figures.new_parameters(some[0]):.2%}',
               'entropy of attention': lambda some: spread([figures.entropy(run) for run in some], '{:.3f}')}
    return f"{table('temperatures', models, runs, columns)}\n\n{curves(r, '2 layers of 64, context 128', runs)}"


def finetune(r):
    """2411.12892: with SSA added to it, a trained model reaches the loss of continued training in 1.45x fewer steps
    (theirs, second-hand). Here one model is trained, and continued with several seeds."""
    size = [*text(r, 128), '--n_layer=2', '--n_embd=64', '--rope=False', '--bias=True', '--gelu=tanh']  # GPT-2's build
    base = r.train({'base': ''}, r.cfg.config, 600, size, quick=150, seeds=[1])['base'][0]
    folder = os.path.join(r.folder, f'exported_{ckpt.fingerprint(ckpt.load_model(base.folder)[0])}')
    if not os.path.isfile(os.path.join(folder, 'config.json')):
        command(['-m', 'lab.export_hf', f'--out_dir={base.folder}', f'--folder={folder}'])
    models = {'going on': '', **{f'qv, learning rate x {lr}': f'--ssa=qv --ssa_lr={lr}' for lr in (1, 10, 100)},
              'position only (their code)': 'position_only --ssa=q --ssa_lr=100'}
    runs = r.train(models, r.cfg.config, 200, [*size, f'--init_from={folder}', '--learning_rate=5e-4', '--min_lr=5e-5',
                                                     '--warmup_iters=20', '--eval_interval=20'], quick=60)
    goal = mean_loss(runs['going on'])
    columns = {'validation loss': last('val_loss'), 'against going on': lambda some: f'{mean_loss(some) - goal:+.4f}',
               "steps to its loss": steps_to('val_loss', goal), 'position part': figures.position_part}
    return f"{table('put in', models, runs, columns)}\n\n{curves(r, 'fine-tuning', runs)}"


def variable_assignment(r):
    """2410.02703 section 2: selective attention solves variable assignment and generalises; standard does less."""
    trained = task_data(r, 'variable_assignment')
    others = {f'{n} variables': task_data(r, 'variable_assignment', variables=n, records=2000, seed=1)
              for n in (2, 6, 12)}
    runs = r.train(ATTENTIONS, 'config/tasks.py', 1000, [f'--dataset={trained}'], quick=250)
    columns = {'steps to 90%': steps_to('accuracy', 0.9), 'accuracy': last('accuracy', '{:.1%}'),
               **figures.right_in({'records of 3 right': trained, **others})}
    return f"""Trained on records of 3 variables, six questions in each. Accuracy is that of single answers; columns on
the right are of other numbers of variables, and there all six answers of a record must be right.

{table('attention', ATTENTIONS, runs, columns)}

{curves(r, '3 variables, as trained', runs, 'accuracy', 'accuracy of the answers')}"""


def passkey(r):
    """2411.12892 section 5: passkey retrieval, 56.9% with standard attention and 74.4% with SSA (theirs, of a
    pre-trained model)."""
    depths = {f'depth {d:g}': task_data(r, 'passkey', depth=d, records=2000, seed=1) for d in (0.0, 0.5, 1.0)}
    return answers(r, 'passkey', {**ATTENTIONS, 'SSA, learning rate x 10': '--ssa=qv --ssa_lr=10'}, depths)


def denoising(r):
    """Selective copying: the signal among noise. 2411.12892 motivates the temperature of the values by noise, too, but
    compares mean squared errors of averages; this is a task in the same spirit, not their table."""
    return answers(r, 'denoising', ATTENTIONS, {})


def answers(r, task, models, tests):
    trained = task_data(r, task)
    runs = r.train(models, 'config/tasks.py', 600, [f'--dataset={trained}'], quick=200)
    columns = {'steps to 90%': steps_to('accuracy', 0.9), 'accuracy': last('accuracy', '{:.1%}'),
               **figures.right_in({'records right': trained, **tests})}
    return f"""Accuracy is that of single tokens; in the columns after it all of a record must be right.

{table('attention', models, runs, columns)}

{curves(r, task, runs, 'accuracy', 'accuracy of the tokens')}"""


def memory(r):
    """How much tasks need for 0.01 nats over a model's own loss, and what a model does that is trained to see as many
    tokens only. Nothing may be dropped in copying, everything but two tokens in parity; the others lie between."""
    steps = {'variable_assignment': 1000, 'passkey': 600, 'denoising': 600, 'parity': 500, 'copying': 1000}
    parts, file = [], 'budgets_{}_tolerance.json'
    policies = {'by F': 'selective', 'newest': 'oldest', 'random': 'random'}
    for task in list(steps)[:2 if r.cfg.quick else None]:
        folder, models = task_data(r, task), {'standard': '', 'selective': '--selective'}
        runs = r.train(models, 'config/tasks.py', steps[task], [f'--dataset={folder}'], quick=steps[task] // 5)
        jobs = [('standard', 'oldest'), *(('selective', policy) for policy in policies.values())]   # standard has no F
        figures.search(r, [(run, policy, ['--tolerance=0.01'], file.format(policy)) for name, policy in jobs
                           for run in runs[name]], 64 if r.cfg.quick else 256)
        kept = [math.ceil(statistics.mean(point['budgets'])) for run in runs['selective']
                if (point := figures.holds(run, file.format('selective')))]
        if kept:
            window = {f'newest {max(kept)}, trained': f'window={max(kept)} --selective'}
            runs |= r.train(window, 'config/tasks.py', steps[task], [f'--dataset={folder}'], quick=steps[task] // 5)
            models |= window
        columns = {'validation loss': last('val_loss'), 'accuracy': last('accuracy', '{:.1%}')}
        for header, policy in policies.items():
            columns[header] = {name: figures.saving(file.format(policy))(runs[name]) if (name, policy) in jobs else ''
                               for name in models}
        parts.append(f"**{task}**, {data.read_meta(folder)['record_len'] - 1} tokens\n\n"
                     + table('model', models, runs, columns))
    return '\n\n'.join(parts)


# minutes on two cores
CLAIMS = {gate: 40, headline: 120, heads: 15, rules: 30, ssa: 30, finetune: 15, variable_assignment: 20, passkey: 10,
          denoising: 8, memory: 30}
ABOUT_TEXT = gate, headline, heads, rules, ssa, finetune


# ----------------------------------------------------------------------------------------------------------------------


def title(cfg, claim):
    """The name of a claim's section; a text of one's own has its own."""
    return f'{claim.__name__} {cfg.dataset}' if cfg.dataset and claim in ABOUT_TEXT else claim.__name__


def section(page, title, body):
    """The page with the section of this title replaced, or put at the end."""
    begin, end = f'<!-- lab.reproduce {title} -->', f'<!-- end of {title} -->'
    before, found, rest = page.partition(begin)
    if not found:
        return f'{page.rstrip()}\n\n{begin}\n{body}\n{end}\n'
    if end not in rest:
        raise UserError(f"the marker '{end}' is missing: put it back where the section ends")
    return f'{before}{begin}\n{body}\n{end}{rest.partition(end)[2]}'


def read(page):
    try:
        with open(page, encoding='utf-8') as f:
            return f.read()
    except OSError as e:
        raise UserError(f'--to={page}: {e.strerror}') from None


def footer(runner):
    """How the figures of a section were made."""
    cfg = runner.cfg
    asked = {name: getattr(cfg, name) for name in ('dataset', 'steps', 'config', 'windows', 'contexts', 'models', 'device')}
    flags = ''.join(f' --{name}={value}' for name, value in asked.items() if value != getattr(ReproduceConfig(), name))
    seeds = 'one seed' if runner.seeds == 1 else f'the seeds 1 to {runner.seeds}'
    return (f"`python -m lab.reproduce {runner.claim}{' --quick' * cfg.quick}{flags} --seeds={runner.seeds}`: {seeds}. "
            f'{runner.about + " " if runner.about else ""}Runs of one thread each, {platform.machine()}, torch '
            f'{torch.__version__}. A word in FLAGS is a rule: `python -m lab.ablate WORD` then takes the place of '
            '`python train.py`. The runs:\n\n'
            + '\n'.join(f'    {c}' for c in dict.fromkeys(runner.commands)))


def main():
    cfg = settings.parse(ReproduceConfig, positional='claims')
    claims = {claim.__name__: claim for claim in CLAIMS}
    if cfg.list:
        for claim, length in CLAIMS.items():
            print(f'{claim.__name__:20} {length:3} minutes | {" ".join(claim.__doc__.split())}')
        return
    unknown = sorted(set(cfg.claims) - set(claims))
    if unknown or not cfg.claims:
        raise UserError(f"{unknown[0] + ' is no claim' if unknown else 'which claims?'}: {', '.join(claims)}")
    for name, least in ('windows', 2), ('contexts', 32):
        if not all(n.isascii() and n.isdigit() and len(n) < 8 and int(n) >= least for n in getattr(cfg, name).split(',')):
            raise UserError(f'--{name}={getattr(cfg, name)}: numbers of {least} and more, as 64,256')
    signal.signal(signal.SIGTERM, stop)
    plot.import_pyplot()                                        # what can be wrong is known before the work
    runners = {name: Runner(cfg, name, title(cfg, claims[name])) for name in cfg.claims}
    for runner in runners.values():
        if not cfg.quick:
            section(read(cfg.to), runner.title, '')
    for name, runner in runners.items():
        body = f'{claims[name](runner)}\n\n{footer(runner)}'
        if cfg.quick:
            print(body)
        else:
            plot.write(cfg.to, section(read(cfg.to), runner.title, body))


if __name__ == '__main__':
    settings.run(main)
