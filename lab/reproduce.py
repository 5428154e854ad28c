"""The papers' claims at a small scale: train what they compare, with several seeds, and write what came out.

    python -m lab.reproduce --list
    python -m lab.reproduce variable_assignment text        about the times that --list gives
    python -m lab.reproduce variable_assignment --quick     a quarter of the steps, one seed; printed, not written

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

import data
import model as m
import prepare_text
from lab import plot, tasks
from lab.runs import Runner, command, curves, last, spread, table
from support import checkpoint as ckpt, settings
from support.settings import UserError


@dataclass
class ReproduceConfig:
    claims: list = field(default_factory=list)  # names of the claims, written without dashes
    list: bool = False                  # print the claims and how long each takes
    quick: bool = False                 # a smaller version of each, in minutes
    seeds: int = 3                      # runs of each model, with the seeds 1, 2, 3, … [1 to 100]
    workers: int = os.cpu_count()       # runs at a time [1 to 1000]
    out_dir: str = 'out/reproduce'      # folder of the runs
    data_dir: str = 'data'              # where the data sets are, or are made
    to: str = 'RESULTS.md'              # its sections are written here, pictures into results/ beside it


# ----------------------------------------------------------------------------------------------------------------------
# Data, and what is measured after training


def task_data(runner, task, **changed):
    """A synthetic data set, made where it is missing; its folder. changed: what differs from the task's own settings."""
    cfg = tasks.TaskConfig(tasks=[task], name='_'.join([task, *(f'{key}_{value}' for key, value in changed.items())]),
                           data_dir=runner.cfg.data_dir, **changed)
    folder = os.path.join(cfg.data_dir, cfg.name)
    if not os.path.isfile(os.path.join(folder, 'meta.json')):
        tasks.make(task, cfg)
    elif data.read_meta(folder)['source'] != tasks.described(task, cfg):
        raise UserError(f'{folder} was made with other settings: delete it, or give another --data_dir')
    return folder


def stdlib(runner, T):
    """Flags for the offline default, made where it is missing, at a context of T tokens and a size that is quick."""
    folder = os.path.join(runner.cfg.data_dir, 'stdlib')
    if not os.path.isfile(os.path.join(folder, 'meta.json')):
        prepare_text.prepare(prepare_text.TextConfig(data_dir=runner.cfg.data_dir))
    return [f'--dataset={folder}', f'--block_size={T}', '--n_layer=2', '--n_embd=64', '--eval_interval=50', '--eval_iters=25']


def shakespeare(runner):
    """Flags for the characters of Shakespeare; None, with a line that says so, where they were not prepared."""
    folder = os.path.join(runner.cfg.data_dir, 'shakespeare')
    if os.path.isfile(os.path.join(folder, 'meta.json')):
        return [f'--dataset={folder}']
    print(f'{folder} is missing, its part is left out: config/shakespeare_cpu.py says how to make it', file=sys.stderr)


@torch.no_grad()
def records_right(run, folder, batches=8):
    """The fraction of validation records of a data set whose answers are all right."""
    model, _ = ckpt.load_model(run.folder)
    questions, right = data.Dataset(folder, folder), []
    for n in range(batches):
        x, y = questions.batch('val', n, 64, model.config.block_size)
        right.append(((model(x, y)[0].argmax(dim=-1) == y) | (y < 0)).all(dim=1).float().mean().item())
    return statistics.mean(right)


@torch.no_grad()
def entropy(run, batches=4):
    """How spread out attention is: the entropy of a row's probabilities, as a fraction of the largest that it could have,
    mean over rows, heads and layers. 0: one key gets everything; 1: all the same."""
    model, checkpoint = ckpt.load_model(run.folder)
    text, entropies, attention = data.load_dataset(checkpoint['dataset']), [], m.fn.scaled_dot_product_attention

    def recorded(q, k, v, **kwargs):
        T = q.size(2)
        hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
        L = (q @ k.transpose(-2, -1) * q.size(-1)**-0.5).masked_fill(hidden, float('-inf'))
        entropy = -(L.softmax(dim=-1) * L.log_softmax(dim=-1).masked_fill(hidden, 0)).sum(dim=-1)       # (B, H, T)
        entropies.append((entropy[..., 1:] / torch.arange(2, T + 1).log()).mean().item())
        return attention(q, k, v, **kwargs)
    m.fn.scaled_dot_product_attention = recorded
    try:
        for n in range(batches):
            model(text.batch('val', n, 16, model.config.block_size)[0])
    finally:
        m.fn.scaled_dot_product_attention = attention
    return statistics.mean(entropies)


def prune(runner, runs, policies=('selective', 'oldest', 'random')):
    """Have prune.py look for budgets within 0.01 nats of each run's own loss, with each policy, where it has not yet."""
    def search(path, run, policy):
        if not finished(path):
            command(['prune.py', f'--out_dir={run.folder}', '--tolerance=0.01', f'--policy={policy}', '--windows=256',
                     '--device=cpu', f'--to={os.path.basename(path)}'])

    def finished(path):
        if os.path.isfile(path):
            with open(path, encoding='utf-8') as f:
                return json.load(f)['held_out']                 # filled in at the end of a search
    runner.each(search, [(budgets_of(run, policy), run, policy) for run in runs for policy in policies])


def budgets_of(run, policy):
    return os.path.join(run.folder, f'budgets_{policy}.json')


def saving(policy):
    """A column of `table`: how many times less memory the budgets take."""
    def column(runs):
        found = []
        for run in runs:
            with open(budgets_of(run, policy), encoding='utf-8') as f:
                found.append(json.load(f)['curve'][-1]['saving'])
        return spread(found, '{:.1f}x')
    return column


# ----------------------------------------------------------------------------------------------------------------------
# The claims. Each takes a Runner and returns the text of its section

ATTENTIONS = {'standard': '', 'selective': '--selective', 'SSA': '--ssa=qv', 'selective + SSA': '--selective --ssa=qv'}


def right_in(folders):
    """Columns of `table` from {header: folder of a data set}."""
    return {header: lambda runs, folder=folder: spread([records_right(run, folder) for run in runs], '{:.1%}')
            for header, folder in folders.items()}


def steps_to(figure, goal):
    return lambda runs: spread([run.crossing(figure, goal) for run in runs], '{:.0f}')


def variable_assignment(r):
    """2410.02703 section 2: selective attention solves variable assignment and generalises; standard does not."""
    trained = task_data(r, 'variable_assignment')
    others = {f'{n} variables': task_data(r, 'variable_assignment', variables=n, records=2000, seed=1) for n in (2, 6, 12)}
    runs = r.train(ATTENTIONS, 'config/tasks.py', 1500, [f'--dataset={trained}'])
    return f"""Trained on records of 3 variables, six questions in each. Accuracy is that of single answers; the columns on the right are
of other numbers of variables, and there all six answers of a record must be right.

{table('attention', ATTENTIONS, runs, {'steps to 90%': steps_to('accuracy', 0.9), 'accuracy': last('accuracy', '{:.1%}'),
                                       **right_in({'records of 3 right': trained, **others})})}

{curves(r, {'3 variables, as trained': runs}, 'accuracy', 'accuracy of the answers')}"""


def text(r):
    """2410.02703 sections 4, 5: selective attention is better at equal parameters, and matches standard attention of
    about twice the heads; nanoGPT's character-level Shakespeare recipe with each."""
    models = {**ATTENTIONS, 'standard, 2x heads': 'double_heads'}
    parts, panels = [], {}
    for name, config, steps, extra in (('shakespeare', 'config/shakespeare_cpu.py', 2000, shakespeare(r)),
                                       ('stdlib', 'config/base_small.py', 800, stdlib(r, 128))):
        if extra:
            runs = panels[name] = r.train(models, config, steps, extra)
            base = statistics.mean(run.val_loss[-1] for run in runs['standard'])
            columns = {'validation loss': last('val_loss'), 'memory requirement': last('memory', '{:.1%}'),
                       'against standard': lambda runs: f'{statistics.mean(run.val_loss[-1] for run in runs) - base:+.4f}'}
            parts.append(f"**{name}**\n\n{table('attention', models, runs, columns)}")
    return '\n\n'.join([*parts, curves(r, panels)])


def ssa(r):
    """2411.12892: SSA is better with under 0.5% new parameters, reaches standard's loss in 1.45x fewer steps (theirs,
    second-hand), and its attention is spikier where it must be; their ablation of q, k, v, position and sharing."""
    models = {'standard': '', "qv, the paper's": '--ssa=qv', 'q': '--ssa=q', 'v': '--ssa=v', 'qkv': '--ssa=qkv',
              'qv without position': 'no_position --ssa=qv', 'qv without sharing': '--ssa=qv --ssa_sharing=False'}
    runs = r.train(models, 'config/base_small.py', 800, stdlib(r, 128))
    goal = statistics.mean(run.val_loss[-1] for run in runs['standard'])
    columns = {'validation loss': last('val_loss'), "steps to standard's loss": steps_to('val_loss', goal),
               'entropy of attention': lambda runs: spread([entropy(run) for run in runs], '{:.3f}')}
    return f"{table('temperatures', models, runs, columns)}\n\n{curves(r, {'stdlib, context 128': runs})}"


def passkey(r):
    """2411.12892 section 5: passkey retrieval, 56.9% with standard attention and 74.4% with SSA (theirs, of a pre-trained
    model)."""
    depths = {f'depth {d:g}': task_data(r, 'passkey', depth=d, records=2000, seed=1) for d in (0.0, 0.25, 0.5, 0.75, 1.0)}
    return answers(r, 'passkey', depths)


def denoising(r):
    """2411.12892: noise among signal, the setting by which the paper motivates the temperature of the values."""
    return answers(r, 'denoising', {})


def answers(r, task, tests):
    trained = task_data(r, task)
    runs = r.train(ATTENTIONS, 'config/tasks.py', 600, [f'--dataset={trained}'])
    columns = {'steps to 90%': steps_to('accuracy', 0.9), 'accuracy': last('accuracy', '{:.1%}'),
               **right_in({'records right': trained, **tests})}
    return f"""Accuracy is that of single tokens; in the columns after it all of a record must be right.

{table('attention', ATTENTIONS, runs, columns)}

{curves(r, {task: runs}, 'accuracy', 'accuracy of the tokens')}"""


def constraints(r):
    """2410.02703 section 3: which of the rules matter, and whose votes."""
    models = {'standard': '', 'selective': '--selective', 'token 0 may be masked': 'first_too --selective',
              'a token may mask itself': 'self_too --selective', 'no ReLU': 'no_relu --selective',
              'votes act at once': 'at_once --selective', 'the last head selects': 'last_head --selective',
              'a selector for every two heads': 'groups --selective'}
    runs = r.train(models, 'config/base_small.py', 800, stdlib(r, 128))
    columns = {'validation loss': last('val_loss'), 'memory requirement': last('memory', '{:.1%}')}
    return f"{table('rule', models, runs, columns)}\n\n{curves(r, {'stdlib, context 128': runs})}"


def memory(r):
    """2410.02703 section 7: 16x, 25x, 47x less memory at contexts of 512, 1,024 and 2,048 for the loss of standard
    attention (theirs). Here how much tasks need for 0.01 nats over the model's own loss: parity and copying bound it."""
    models = {'selective': '--selective'}
    parts = []
    for task, context, steps in ('parity', 64, 500), ('variable_assignment', 36, 1500), ('copying', 49, 1000):
        runs = r.train(models, 'config/tasks.py', steps, [f'--dataset={task_data(r, task)}'])
        prune(r, sum(runs.values(), []))
        columns = {'validation loss': last('val_loss'), 'by F': saving('selective'), 'newest': saving('oldest'),
                   'random': saving('random')}
        parts.append(f"**{task}**, {context} tokens\n\n{table('model', models, runs, columns)}")
    r.commands.append('python prune.py --out_dir=RUN --tolerance=0.01 --policy=POLICY --windows=256 --device=cpu')
    return '\n\n'.join(parts)


CLAIMS = {variable_assignment: 10, text: 25, ssa: 10, constraints: 12, memory: 8, passkey: 8, denoising: 6}   # minutes on two cores


# ----------------------------------------------------------------------------------------------------------------------


def section(page, claim, body):
    """The page with the section of the claim replaced, or put at the end."""
    begin, end = f'<!-- lab.reproduce {claim} -->', f'<!-- end of {claim} -->'
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
    return (f"`python -m lab.reproduce {runner.claim}{' --quick' * cfg.quick}`: the seeds 1 to {runner.seeds}, "
            f'{cfg.workers} runs at a time of one thread each (OMP_NUM_THREADS=1), {platform.machine()}, torch '
            f'{torch.__version__}. A word in FLAGS is a rule: `python -m lab.ablate WORD` then takes the place of `python '
            'train.py`. The runs:\n\n' + '\n'.join(f'    {c}' for c in dict.fromkeys(runner.commands)))


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
    plot.import_pyplot()                                        # what can be wrong is known before the work
    for name in cfg.claims:
        cfg.quick or section(read(cfg.to), name, '')
    for name in cfg.claims:
        runner = Runner(cfg, name)
        body = f'{claims[name](runner)}\n\n{footer(runner)}'
        if cfg.quick:
            print(body)
        else:
            plot.write(cfg.to, section(read(cfg.to), name, body))


if __name__ == '__main__':
    settings.run(main)
