"""The papers' claims at a small scale: train what they compare, with several seeds, and write what came out.

    python -m lab.reproduce --list
    python -m lab.reproduce variable_assignment text        about the times that --list gives
    python -m lab.reproduce variable_assignment --quick     an eighth of the steps, one seed; printed, not written

Runs are python train.py, or python -m lab.ablate, in processes of one thread each. What is done already is not done
again, and a run that was stopped goes on. A claim writes its section of RESULTS.md, between two markers, and a picture
into results/; what stands around the markers is left as it is.
"""
import json
import os
import platform
import statistics
import sys
from dataclasses import dataclass, field

import torch

import checkpoint as ckpt
import data
import model as m
import prepare_text
import settings
from lab import plot, tasks
from lab.runs import Runner, command, curves, minutes, spread, table
from settings import UserError


@dataclass
class ReproduceConfig:
    claims: list = field(default_factory=list)  # names of the claims, written without dashes
    list: bool = False                  # print the claims and how long each takes
    quick: bool = False                 # a smaller version of each in at most three minutes
    seeds: int = 3                      # runs of each model, with the seeds 1, 2, 3, …
    workers: int = os.cpu_count()       # runs at a time
    out_dir: str = 'out/reproduce'      # folder of the runs
    data_dir: str = 'data'              # where the data sets are, or are made
    to: str = 'RESULTS.md'              # its sections are written here, pictures into results/ beside it


# ----------------------------------------------------------------------------------------------------------------------
# The claims


def dataset(runner, task, **settings):
    """A synthetic data set, made where it is missing; its folder. settings: what differs from the task's own."""
    name = '_'.join([task, *(f'{key}_{value}' for key, value in settings.items())])
    folder = os.path.join(runner.cfg.data_dir, name)
    if not os.path.isfile(os.path.join(folder, 'meta.json')):
        tasks.make(task, tasks.TaskConfig(tasks=[task], name=name, data_dir=runner.cfg.data_dir, **settings))
    return folder


def stdlib(runner, T):
    """Flags for the offline default, made where it is missing, at a context of T tokens."""
    folder = os.path.join(runner.cfg.data_dir, 'stdlib')
    if not os.path.isfile(os.path.join(folder, 'meta.json')):
        prepare_text.prepare(prepare_text.Settings(data_dir=runner.cfg.data_dir))
    return [f'--dataset={folder}', f'--block_size={T}', '--eval_interval=100', '--eval_iters=25']


def shakespeare(runner):
    """Flags for the characters of Shakespeare; None, with a line that says so, where they were not prepared."""
    folder = os.path.join(runner.cfg.data_dir, 'shakespeare')
    if os.path.isdir(folder):
        return [f'--dataset={folder}']
    print(f'{folder} is missing, its part is left out: config/shakespeare_cpu.py says how to make it', file=sys.stderr)


@torch.no_grad()
def accuracy(run, folder, batches=8):
    """The fraction of validation records of a data set whose answers are all right."""
    model, _ = ckpt.load_model(run.folder)
    questions, right = data.Dataset(folder, folder), []
    for n in range(batches):
        x, y = questions.batch('val', n, 64, model.config.block_size)
        right.append(((model(x, y)[0].argmax(dim=-1) == y) | (y < 0)).all(dim=1).float().mean().item())
    return statistics.mean(right)


ATTENTIONS = {'standard': '', 'selective': '--selective', 'SSA': '--ssa=qv', 'selective + SSA': '--selective --ssa=qv'}


def variable_assignment(r):
    """2410.02703 section 2: selective attention solves variable assignment and generalises; standard does not."""
    trained = dataset(r, 'variable_assignment')
    others = {f'{n} variables': dataset(r, 'variable_assignment', variables=n, records=2000, seed=1) for n in (2, 6, 12)}
    runs = r.train(ATTENTIONS, 'config/tasks.py', 1500, [f'--dataset={trained}'])
    picture = curves(r, {'3 variables, as trained': runs}, 'accuracy', 'accuracy of the answers')
    rows = [[name, ATTENTIONS[name] and f'`{ATTENTIONS[name]}`',
             spread([run.first(lambda _, right: right > 0.9) for run in of], '{:.0f}'),
             spread([run.accuracy[-1] for run in of], '{:.1%}'),
             *(spread([accuracy(run, folder) for run in of], '{:.1%}') for folder in others.values()), minutes(of)]
            for name, of in runs.items()]
    return f"""Trained on records of 3 variables; the columns on the right are of other numbers of variables, all answers of a record
right.

{table(['attention', 'FLAGS', 'step of 90%', 'accuracy', *others, 'minutes'], rows)}

{picture}"""


def text(r):
    """2410.02703 sections 4, 5: selective attention is better at equal parameters, and matches standard attention of
    about twice the heads; nanoGPT's character-level Shakespeare recipe with each."""
    models = {**ATTENTIONS, 'standard, 2x heads': 'double_heads'}
    parts, panels = [], {}
    for name, config, steps, extra in (('shakespeare', 'config/shakespeare_cpu.py', 2000, shakespeare(r)),
                                       ('stdlib', 'config/standard_small.py', 400, stdlib(r, 128))):
        if not extra:
            continue
        runs = panels[name] = r.train(models, config, steps, extra)
        base = statistics.mean(run.val_loss[-1] for run in runs['standard'])
        parts.append(f'**{name}**\n\n' + table(
            ['attention', 'FLAGS', 'validation loss', 'against standard', 'memory requirement', 'minutes'],
            [[name, models[name] and f'`{models[name]}`', spread([run.val_loss[-1] for run in of]),
              f'{statistics.mean(run.val_loss[-1] for run in of) - base:+.4f}',
              spread([run.memory[-1] for run in of], '{:.1%}') if of[0].memory else '', minutes(of)]
             for name, of in runs.items()]))
    return '\n\n'.join([*parts, curves(r, panels)])


@torch.no_grad()
def spikiness(run, batches=4):
    """How spread out attention is: the entropy of a row's probabilities, as a fraction of the largest it could have,
    mean over rows, heads and layers. 0: one key gets everything; 1: all the same."""
    model, checkpoint = ckpt.load_model(run.folder)
    entropies, attention = [], m.fn.scaled_dot_product_attention

    def recorded(q, k, v, **kwargs):
        T = q.size(2)
        L = (q @ k.transpose(-2, -1) * q.size(-1)**-0.5).masked_fill(torch.ones(T, T).triu(1) > 0, float('-inf'))
        H = -(L.softmax(dim=-1) * L.log_softmax(dim=-1).masked_fill(L == float('-inf'), 0)).sum(dim=-1)
        entropies.append((H / torch.arange(1, T + 1).log().clamp(min=1e-9))[..., 1:].mean().item())
        return attention(q, k, v, **kwargs)
    m.fn.scaled_dot_product_attention = recorded
    try:
        for n in range(batches):
            dataset = data.load_dataset(checkpoint['dataset'])
            model(dataset.batch('val', n, 16, model.config.block_size)[0])
    finally:
        m.fn.scaled_dot_product_attention = attention
    return statistics.mean(entropies)


def ssa(r):
    """2411.12892: SSA is better with under 0.5% new parameters, reaches standard's loss in 1.45x fewer steps (theirs,
    second-hand), and its attention is spikier where it must be; their ablation of q, k, v, position and sharing."""
    models = {'standard': '', "qv, the paper's": '--ssa=qv', 'q': '--ssa=q', 'v': '--ssa=v', 'qkv': '--ssa=qkv',
              'qv without position': 'no_position --ssa=qv', 'qv without sharing': '--ssa=qv --ssa_sharing=False'}
    runs = r.train(models, 'config/standard_small.py', 400, stdlib(r, 128))
    goal = statistics.mean(run.val_loss[-1] for run in runs['standard'])
    last = runs['standard'][0].steps[-1]
    rows = [[name, models[name] and f'`{models[name]}`', spread([run.val_loss[-1] for run in of]),
             spread([last / s if (s := run.first(lambda loss, _: loss <= goal)) else None for run in of], '{:.2f}x'),
             spread([spikiness(run) for run in of], '{:.3f}'), minutes(of)] for name, of in runs.items()]
    return f"""{table(['temperatures', 'FLAGS', 'validation loss', "fewer steps to standard's loss", 'entropy', 'minutes'], rows)}

{curves(r, {'stdlib, context 128': runs})}"""


def retrieval(r):
    """2411.12892 section 5: passkey retrieval, 56.9% with standard attention and 74.4% with SSA (theirs, of a pre-trained
    model); and denoising, the setting by which they motivate the temperature of the values."""
    depths = {f'depth {d:g}': dataset(r, 'passkey', depth=d, records=2000, seed=1) for d in (0.0, 0.25, 0.5, 0.75, 1.0)}
    parts, panels = [], {}
    for task, tests in ('passkey', depths), ('denoising', {}):
        trained = dataset(r, task)
        runs = panels[task] = r.train(ATTENTIONS, 'config/tasks.py', 600, [f'--dataset={trained}'])
        rows = [[name, ATTENTIONS[name] and f'`{ATTENTIONS[name]}`',
                 spread([run.first(lambda _, right: right > 0.9) for run in of], '{:.0f}'),
                 *(spread([accuracy(run, folder) for run in of], '{:.1%}') for folder in (trained, *tests.values())),
                 minutes(of)] for name, of in runs.items()]
        parts.append(f'**{task}**\n\n' + table(['attention', 'FLAGS', 'step of 90% of the tokens', 'records right', *tests,
                                                'minutes'], rows))
    return '\n\n'.join([*parts, curves(r, panels, 'accuracy', 'accuracy of the tokens')])


def constraints(r):
    """2410.02703 section 3: which of the rules matter, and whose votes."""
    models = {'standard': '', 'selective': '--selective', 'token 0 may be masked': 'first_too --selective',
              'a token may mask itself': 'self_too --selective', 'no ReLU': 'no_relu --selective',
              'votes act at once': 'at_once --selective', 'the last head selects': 'last_head --selective',
              'a selector for every two heads': 'groups --selective'}
    runs = r.train(models, 'config/standard_small.py', 400, stdlib(r, 128))
    rows = [[name, models[name] and f'`{models[name]}`', spread([run.val_loss[-1] for run in of]),
             spread([run.memory[-1] for run in of], '{:.1%}') if of[0].memory else '', minutes(of)]
            for name, of in runs.items()]
    return f"""A word in FLAGS is a rule of `python -m lab.ablate`, which then takes train.py's place.

{table(['rule', 'FLAGS', 'validation loss', 'memory requirement', 'minutes'], rows)}

{curves(r, {'stdlib, context 128': runs})}"""


def memory(r):
    """2410.02703 section 7: 16x, 25x, 47x less memory at contexts of 512, 1,024 and 2,048 for the loss of standard
    attention (theirs); here for 0.01 nats over the model's own loss, where it matters what is kept. Parity and copying
    bound it from both sides."""
    models = {'': '--selective', 'memory loss': '--selective --memory_loss=0.1'}
    trained = [(name, T, 'config/tasks.py', steps, [f'--dataset={dataset(r, name)}'], {'': '--selective'})
               for name, T, steps in (('parity', 64, 500), ('variable_assignment', 36, 1500), ('copying', 49, 1000))]
    trained.append(('stdlib', 128, 'config/standard_small.py', 400, stdlib(r, 128), models))
    rows = []
    for name, T, config, steps, extra, models in trained:
        for model, of in r.train(models, config, steps, extra).items():
            rows.append([name, T, model, spread([run.val_loss[-1] for run in of]), minutes(of),
                         *(spread([saving(run, policy) for run in of], '{:.1f}x')
                           for policy in ('selective', 'oldest', 'random'))])
    return table(['data', 'context', '', 'validation loss', 'minutes', 'by F', 'newest', 'random'], rows)


def saving(run, policy):
    """How many times less memory prune.py finds for 0.01 nats."""
    path = os.path.join(run.folder, f'budgets_{policy}.json')
    if not os.path.isfile(path):
        command(['prune.py', f'--out_dir={run.folder}', '--tolerance=0.01', f'--policy={policy}', '--device=cpu',
                 f'--to={os.path.basename(path)}'])
    with open(path, encoding='utf-8') as f:
        return json.load(f)['curve'][-1]['saving']


CLAIMS = {variable_assignment: 10, text: 15, ssa: 10, constraints: 15, memory: 20, retrieval: 20}     # minutes on two cores


def section(text, claim, body):
    """text with the section of the claim replaced, or put at the end."""
    begin, end = f'<!-- lab.reproduce {claim} -->', f'<!-- end of {claim} -->'
    before, found, rest = text.partition(begin)
    if not found:
        return f'{text.rstrip()}\n\n{begin}\n{body}\n{end}\n'
    if end not in rest:
        raise UserError(f"the marker '{end}' is missing: put it back where the section ends")
    return f'{before}{begin}\n{body}\n{end}{rest.partition(end)[2]}'


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
    if cfg.seeds < 1 or cfg.workers < 1:
        raise UserError('seeds and workers are at least 1')
    plot.import_pyplot()                    # before an hour's work, not after it
    for name in cfg.claims:
        runner = Runner(cfg, name)
        body = claims[name](runner)
        machine = f'{platform.machine()}, {cfg.workers} runs at a time of one thread each, torch {torch.__version__}'
        body = f'{body}\n\n`python -m lab.reproduce {name}`: {runner.seeds} seeds (1 to {runner.seeds}), {machine}. The runs:\n\n' + \
            '\n'.join(f'    {c}' for c in runner.commands)
        if cfg.quick:
            print(body)
            continue
        with open(cfg.to, encoding='utf-8') as f:
            whole = section(f.read(), name, body)
        plot.write(cfg.to, whole.encode())


if __name__ == '__main__':
    settings.run(main)
