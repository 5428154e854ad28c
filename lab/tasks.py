"""Synthetic tasks on which attention can be understood: data sets of questions, which train.py takes by name.

    python -m lab.tasks variable_assignment
    python train.py config/tasks.py --selective --out_dir=out/variables
    python -m lab.tasks variable_assignment --variables=8 --name=variable_assignment_8      # to test on

Each record is a line of text with a question at its end, or several on the way. The loss and the accuracy that train.py
reports look at the answers alone. All records of a data set are equally long, and the answers are at the same places;
a token is a byte. What the records of each task look like is in its docstring below.
"""
import dataclasses
import os
import re
import string
from dataclasses import dataclass, field

import numpy as np

import data
from support import files, settings
from support.settings import UserError


@dataclass
class TaskConfig:
    tasks: list = field(default_factory=list)   # names of the tasks, written without dashes
    data_dir: str = 'data'                      # the data sets go into <data_dir>/<task>
    name: str = ''                              # another name than the task's, for a single task
    records: int = 100_000                      # of training; a twentieth of it for validation [20 to 1e8]
    length: int = 0                             # of a record: statements, bits, words; 0: the task's own [0 to 10_000]
    variables: int = 3                          # variable_assignment: in each record, of the letters a to l [1 to 12]
    every: int = 4                              # variable_assignment: statements between questions [1 to 10_000]
    depth: float = -1.0                         # passkey: the key's place, 0 first, 1 last; -1: anywhere [-1 to 1]
    letters: int = 8                            # denoising: how many of the letters are to be kept [1 to 10_000]
    seed: int = 0                               # same seed, same data [0 to 2**31]


def variable_assignment(rng, cfg):
    """2410.02703 section 2: the last value that a variable was given. `c=3; a=7; c=1; c?` asks, `1` is the answer; and on.

    A record draws its variables from the letters a to l and gives them values again and again; every value but the last
    is stale. A statement is a single token, the byte 128 + 10 * letter + value, so that the task is to know what is
    stale, not which value stands beside which letter; a question is the letter.
    """
    letters = rng.choice(12, cfg.variables, replace=False)
    values, pieces, text = {}, [], ''
    for n, (letter, value) in enumerate(zip(rng.choice(letters, cfg.length), rng.integers(10, size=cfg.length)), start=1):
        values[letter] = value
        text += chr(128 + 10 * letter + value)
        if n % cfg.every == 0:
            asked = rng.choice(list(values))
            pieces, text = pieces + [text + chr(ord('a') + asked), str(values[asked])], ''
    return pieces


def readable(text):
    """A record as people write it: the statements are spelt out."""
    if text.isascii():
        return text
    text = re.sub('([a-l])([0-9])', r'\1? \2; ', text)
    return re.sub('[\x80-\xf7]', lambda c: f'{chr(ord("a") + (ord(c[0]) - 128) // 10)}={(ord(c[0]) - 128) % 10}; ', text)


def parity(rng, cfg):
    """Whether the ones so far are even (a) or odd (b), asked after each bit: `1b1a0a1b`.

    The bit and the answer before it are all that one needs: everything else may be forgotten.
    """
    bits = rng.integers(2, size=cfg.length)
    return [piece for bit, ones in zip(bits, bits.cumsum()) for piece in (str(bit), 'ab'[ones % 2])]


def copying(rng, cfg):
    """`qhwk|` asks, `qhwk` is the answer: nothing may be forgotten before it is copied."""
    text = ''.join(rng.choice(list(string.ascii_lowercase), cfg.length))
    return [text + '|', text]


def denoising(rng, cfg):
    """`xQwmHfK|` asks, `QHK` is the answer: keep the signal, ignore the noise; known as selective copying.

    2411.12892 motivates the temperature of the values by noise, too, but compares mean squared errors of averages
    (vanilla, value-selective, plain, Bayes-optimal). This is a task in the same spirit, not their table.
    """
    text = rng.choice(list(string.ascii_lowercase), cfg.length)
    places = np.sort(rng.choice(cfg.length, cfg.letters, replace=False))
    text[places] = rng.choice(list(string.ascii_uppercase), cfg.letters)
    return [''.join(text) + '|', ''.join(text[places])]


WORDS = 'the grass is green and sky blue sun warm here we go there back again over hill river stone'.split()


def passkey(rng, cfg):
    """Five digits, as theirs, hidden in filler, after 2411.12892 section 5: `the sky [40712] is blue [` asks, `40712` is
    the answer."""
    words = list(rng.choice(WORDS, cfg.length))
    key = f'{rng.integers(100_000):05}'
    words.insert(round((rng.random() if cfg.depth < 0 else cfg.depth) * cfg.length), f'[{key}]')
    return [' '.join(words).rjust(6 * cfg.length + 7) + ' [', key]      # words have 5 letters at most


# name: what makes a record, --length where it is not given
TASKS = {'variable_assignment': (variable_assignment, 24), 'parity': (parity, 32), 'copying': (copying, 24),
         'denoising': (denoising, 48), 'passkey': (passkey, 10)}


def check(cfg):
    """Raises UserError for what no data set can be made of."""
    if not cfg.tasks or set(cfg.tasks) - set(TASKS):
        raise UserError(f"name a task: {', '.join(TASKS)}")
    if cfg.name and len(cfg.tasks) > 1:
        raise UserError('--name is for one data set: name one task')
    for task in cfg.tasks:
        length = cfg.length or TASKS[task][1]
        if task == 'variable_assignment' and not 1 <= cfg.every <= length:
            raise UserError(f'every is {cfg.every}: from 1 to length, which is {length}')
        if task == 'denoising' and not 1 <= cfg.letters <= length:
            raise UserError(f'letters is {cfg.letters}: from 1 to length, which is {length}')


def described(task, cfg):
    """What meta.json says of a data set: the task and its settings."""
    length, values = cfg.length or TASKS[task][1], dataclasses.asdict(cfg)
    names = ['records', 'seed', *{'variable_assignment': ['variables', 'every'], 'denoising': ['letters'],
                                  'passkey': ['depth']}.get(task, [])]
    return f'lab.tasks {task}, length {length}, ' + ', '.join(f'{name} {values[name]}' for name in names)


def make(task, cfg):
    """Write the data set of one task; returns its folder."""
    question, length = TASKS[task]
    source = described(task, cfg)
    cfg = dataclasses.replace(cfg, length=cfg.length or length)
    tokenizer = data.get_tokenizer('bytes')
    folder, counts = data.output_folder(cfg.data_dir, cfg.name or task, records=True), {}
    with files.replacing_folder(folder) as new:
        for number, (split, records) in enumerate((('train', cfg.records), ('val', cfg.records // 20))):
            rng = np.random.default_rng([cfg.seed % 2**64, number])
            with data.TokenFile(os.path.join(new, f'{split}.bin')) as out:
                for _ in range(records):
                    # a token in front, as the first can never be masked; then what is read and what is asked, in turns
                    pieces = ['\n', ''] + question(rng, cfg)
                    out.write(np.frombuffer(''.join(pieces).encode('latin-1'), np.uint8))
            counts[f'{split}.bin'] = out.count
        ends = np.cumsum([len(piece) for piece in pieces]).tolist()
        answers = [place for a, b in zip(ends[0::2], ends[1::2]) for place in range(a, b)]
        data.write_meta(new, tokenizer, source, True, counts, record_len=ends[-1], answers=answers)
    print(f'{folder}: {cfg.records:,} records of {ends[-1]} tokens to train, {len(answers)} of each an answer; one of them:')
    print(readable(''.join(pieces).strip()))
    return folder


def main():
    cfg = settings.parse(TaskConfig, positional='tasks')
    check(cfg)
    for task in cfg.tasks:
        make(task, cfg)


if __name__ == '__main__':
    settings.run(main)
