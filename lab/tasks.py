"""Synthetic question-answering tasks to study attention on, which train.py takes by name.

    python -m lab.tasks variable_assignment
    python train.py config/tasks.py --selective --out_dir=out/variables
    python -m lab.tasks variable_assignment --variables=8 --name=variable_assignment_8  # to test on

Each record is a line of text with a question at its end, or several on the way. The loss and the
accuracy that train.py reports count only the answers. All records of a data set are equally
long, and the answers are at the same places; a token is a byte. What the records of each task look
like is in its docstring below.
"""

from dataclasses import dataclass

import numpy as np

import data
from support import settings
from support.settings import UserError, option


STATEMENTS = 24  # of a record, four for each question
WORDS = 10  # of filler

# A task is a function of a random generator and the number of variables. It returns the text of a
# record and the places in it of the answers.


def variable_assignment(rng, variables):
    """2410.02703 section 2: the last value that a variable was given.

    `c=3; a=7; c=1; c?` asks, `1` is the answer; and on. A record draws its variables from the
    letters a to l and gives them values again and again; every value but the last is stale. A
    statement is a single token, the byte 128 + 10 * letter + value, so that the task is to know
    what is stale, not which value stands beside which letter; a question is the letter.
    """
    letters = rng.choice(rng.choice(12, variables, replace=False), STATEMENTS)
    digits = rng.integers(10, size=STATEMENTS)
    values = {}
    text = ''
    answers = []
    for n, (letter, digit) in enumerate(zip(letters, digits), start=1):
        values[letter] = digit
        text += chr(128 + 10 * letter + digit)
        if n % 4 == 0:
            asked = rng.choice(list(values))
            text += chr(ord('a') + asked)
            answers.append(len(text))
            text += str(values[asked])
    return text, answers


# Words of at most 5 letters.
FILLER = (
    'the grass is green and sky blue sun warm here we go there back again over hill river stone'
)


def passkey(rng, _):
    """Five digits, as theirs, hidden in filler, after 2411.12892 section 5.

    `the sky [40712] is blue [` asks, `40712` is the answer.
    """
    words = list(rng.choice(FILLER.split(), WORDS))
    key = f'{rng.integers(100_000):05}'
    words.insert(round(rng.random() * WORDS), f'[{key}]')
    text = ' '.join(words).rjust(6 * WORDS + 7) + ' [' + key
    return text, range(len(text) - 5, len(text))


TASKS = {'variable_assignment': variable_assignment, 'passkey': passkey}


@dataclass
class TaskConfig:
    task: list = option([], 'which to make, written without dashes', choices=tuple(TASKS))
    data_dir: str = option('data', 'the data set goes into <data_dir>/<name>')
    name: str = option('', "another name than the task's")
    records: int = option(
        100_000, 'training records; a twentieth as many are for validation', low=20, high=10**8
    )
    variables: int = option(
        3, 'variable_assignment: in each record, of the letters a to l', low=1, high=12
    )
    seed: int = option(0, 'same seed, same data')


def make(cfg):
    """Write a data set. Each record has a token in front, as the first can never be masked."""
    [task] = cfg.task
    record = TASKS[task]
    folder = data.output_folder(cfg.data_dir, cfg.name or task, source='lab.tasks')
    text, answers = record(np.random.default_rng(0), cfg.variables)
    shape = {'record_len': len(text) + 1, 'answers': [place + 1 for place in answers]}
    tokenizer = data.get_tokenizer('bytes')
    with data.new_dataset(folder, tokenizer, f'lab.tasks {cfg}', **shape) as (train, val):
        for number, out, records in [(0, train, cfg.records), (1, val, cfg.records // 20)]:
            rng = np.random.default_rng([cfg.seed, number])
            for _ in range(records):
                text, _ = record(rng, cfg.variables)
                data.write_tokens(out, list(f'\n{text}'.encode('latin-1')))
    print(data.summary(folder))


def main():
    cfg = settings.parse(TaskConfig, positional='task')
    if len(cfg.task) != 1:
        raise UserError(f'name a task: {" or ".join(TASKS)}')
    make(cfg)


if __name__ == '__main__':
    settings.run(main)
