"""Synthetic tasks on which attention can be understood: questions, which train.py takes by name.

    python -m lab.tasks variable_assignment
    python train.py config/tasks.py --selective --out_dir=out/variables
    python -m lab.tasks variable_assignment --variables=8 --name=variable_assignment_8  # to test on

Each record is a line of text with a question at its end, or several on the way. The loss and the
accuracy that train.py reports look at the answers alone. All records of a data set are equally
long, and the answers are at the same places; a token is a byte. What the records of each task look
like is in its docstring below.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np

import data
from support import settings
from support.settings import UserError, option


# A task is a function of a random generator and the settings. It returns the pieces of a record:
# what is read and what is asked, in turns.


def variable_assignment(rng, cfg):
    """2410.02703 section 2: the last value that a variable was given.

    `c=3; a=7; c=1; c?` asks, `1` is the answer; and on. A record draws its variables from the
    letters a to l and gives them values again and again; every value but the last is stale. A
    statement is a single token, the byte 128 + 10 * letter + value, so that the task is to know
    what is stale, not which value stands beside which letter; a question is the letter.
    """
    variables = rng.choice(12, cfg.variables, replace=False)
    letters = rng.choice(variables, cfg.length)
    digits = rng.integers(10, size=cfg.length)
    values = {}
    pieces = []
    text = ''
    for n in range(cfg.length):
        values[letters[n]] = digits[n]
        text += chr(128 + 10 * letters[n] + digits[n])
        if (n + 1) % cfg.every == 0:
            asked = rng.choice(list(values))
            pieces += [text + chr(ord('a') + asked), str(values[asked])]
            text = ''
    return pieces


# Words of at most 5 letters.
FILLER = (
    'the grass is green and sky blue sun warm here we go there back again over hill river stone'
)


def passkey(rng, cfg):
    """Five digits, as theirs, hidden in filler, after 2411.12892 section 5.

    `the sky [40712] is blue [` asks, `40712` is the answer.
    """
    words = list(rng.choice(FILLER.split(), cfg.length))
    key = f'{rng.integers(100_000):05}'
    depth = cfg.depth
    if depth < 0:
        depth = rng.random()
    words.insert(round(depth * cfg.length), f'[{key}]')
    return [' '.join(words).rjust(6 * cfg.length + 7) + ' [', key]


# What makes a record, and --length where it is not given.
TASKS = {'variable_assignment': (variable_assignment, 24), 'passkey': (passkey, 10)}


@dataclass
class TaskConfig:
    tasks: list = option([], 'which to make, written without dashes', choices=tuple(TASKS))
    data_dir: str = option('data', 'the data sets go into <data_dir>/<task>')
    name: str = option('', "another name than the task's, for a single task")
    records: int = option(
        100_000, 'of training; a twentieth of it for validation', low=20, high=10**8
    )
    length: int = option(0, "of a record: statements or words; 0: the task's own")
    variables: int = option(
        3, 'variable_assignment: in each record, of the letters a to l', low=1, high=12
    )
    every: int = option(4, 'variable_assignment: statements between questions', low=1)
    depth: float = option(
        -1.0, "passkey: the key's place, 0 first, 1 last; -1: anywhere", low=-1, high=1
    )
    seed: int = option(0, 'same seed, same data')


DESCRIPTION = (
    'lab.tasks {task}, length {length}, records {records}, seed {seed}, variables {variables}, '
    'every {every}, depth {depth}'
)


def described(task, cfg):
    """What meta.json says of a data set: the task and the settings."""
    return DESCRIPTION.format(task=task, **vars(cfg))


def make(task, cfg):
    """Write the data set of one task."""
    pieces_of, length = TASKS[task]
    source = described(task, cfg)
    cfg = dataclasses.replace(cfg, length=cfg.length or length)
    folder = data.output_folder(cfg.data_dir, cfg.name or task, source='lab.tasks')
    answers = []
    length = 1  # a token in front, as the first can never be masked
    for n, piece in enumerate(pieces_of(np.random.default_rng(0), cfg)):
        if n % 2:
            answers += range(length, length + len(piece))
        length += len(piece)
    if not answers:
        raise UserError(f'every is {cfg.every}: from 1 to length, which is {cfg.length}')
    tokenizer = data.get_tokenizer('bytes')
    shape = {'record_len': length, 'answers': answers}
    with data.new_dataset(folder, tokenizer, source, **shape) as (train, val):
        for number, out, records in [(0, train, cfg.records), (1, val, cfg.records // 20)]:
            rng = np.random.default_rng([cfg.seed, number])
            for _ in range(records):
                text = ''.join(pieces_of(rng, cfg))
                data.write_tokens(out, list(f'\n{text}'.encode('latin-1')))
    print(data.summary(folder))


def main():
    cfg = settings.parse(TaskConfig, positional='tasks')
    if not cfg.tasks:
        raise UserError(f'name a task: {", ".join(TASKS)}')
    if cfg.name and len(cfg.tasks) > 1:
        raise UserError('--name is for one data set: name one task')
    for task in cfg.tasks:
        make(task, cfg)


if __name__ == '__main__':
    settings.run(main)
