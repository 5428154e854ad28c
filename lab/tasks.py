"""Synthetic data sets on which attention can be understood; train.py takes them by name.

    python -m lab.tasks variable_assignment
    python train.py config/selective_small.py --dataset=variable_assignment --out_dir=out/variables

variable_assignment, after 2410.02703: a stream of statements of four characters. `=a3;` assigns, `?a3;` asks for the
value that the variable had last; that digit can be known, all else is drawn at random. Variables are assigned
again and again, so most of what was read is stale; but a value is asked for long after it was assigned, so the newest
tokens are not enough either. The data set knows no records: a window may start in the middle of a statement, and ask
for a variable that it has not seen assigned.
"""
import os
from dataclasses import dataclass, field

import numpy as np

import data
import settings
from settings import UserError


@dataclass
class TaskConfig:
    tasks: list = field(default_factory=list)   # names of the tasks, written without dashes
    data_dir: str = 'data'                      # the data sets go into <data_dir>/<task>
    tokens: int = 4_000_000                     # of training; a fiftieth of it for validation
    variables: int = 10                         # how many there are, a, b, c, ...; at most 26
    asked: float = 0.7                          # fraction of the statements that ask
    seed: int = 0                               # same seed, same data


def variable_assignment(rng, count, cfg):
    """count statements as uint16 tokens (4 * count,) of the bytes tokenizer."""
    names = rng.integers(cfg.variables, size=count)
    asks = rng.random(count) < cfg.asked
    digits = rng.integers(10, size=count)
    values = [None] * cfg.variables
    for n, name in enumerate(names):
        if asks[n] and values[name] is not None:
            digits[n] = values[name]
        else:
            asks[n], values[name] = False, digits[n]
    return np.stack([np.where(asks, ord('?'), ord('=')), ord('a') + names, ord('0') + digits,
                     np.full(count, ord(';'))], axis=1).astype(np.uint16).ravel()


TASKS = {'variable_assignment': variable_assignment}


def main():
    cfg = settings.parse(TaskConfig, positional='tasks')
    if not cfg.tasks or set(cfg.tasks) - set(TASKS):
        raise UserError(f"name a task: {', '.join(TASKS)}")
    if not 1 <= cfg.variables <= 26 or not 0 <= cfg.asked <= 1 or cfg.tokens < 5000:
        raise UserError('variables is 1 to 26, asked 0 to 1, tokens at least 5000')
    for task in cfg.tasks:
        folder, files = os.path.join(cfg.data_dir, task), {}
        for number, (split, tokens) in enumerate((('train', cfg.tokens), ('val', cfg.tokens // 50))):
            with data.TokenFile(os.path.join(folder, f'{split}.bin')) as out:
                out.write(TASKS[task](np.random.default_rng([cfg.seed, number]), tokens // 4, cfg))
            files[f'{split}.bin'] = out.count
        source = f'lab.tasks {task}, {cfg.variables} variables, {cfg.asked:g} asked, seed {cfg.seed}'
        data.write_meta(folder, data.get_tokenizer('bytes'), source, True, files)
        print(f"{folder}: {files['train.bin']:,} train and {files['val.bin']:,} val tokens")


if __name__ == '__main__':
    settings.run(main)
