"""A language in which names recur: Python's own code, with the names of each file drawn anew.

    python -m lab.names
    python train.py config/claims.py --dataset=names --selective --out_dir=out/names

In real text, names and terms that recur make long context useful, but a small model learns that
late: first it learns local patterns, for which the newest tokens are enough. Here
names are most of what there is to learn. Each token of the standard library's sources, without
comments, becomes one byte. Keywords and operators have fixed ones. A name, string or number gets
one of 160 bytes at random when its file first has it, and keeps it until the file has 160 newer
ones. So all that one can know of a name comes from the text before it, and each copy of a file is
another text.
"""

import keyword
import token
import tokenize
from dataclasses import dataclass

import numpy as np

import data
import prepare_text
from support import settings
from support.settings import option

COPIES = 5  # of each file, with other names
FIRST_NAME = 96  # names are the bytes from here on, everything else lies below
LAYOUT = [token.NEWLINE, token.INDENT, token.DEDENT]
WORDS = [*keyword.kwlist, 'self', *token.EXACT_TOKEN_TYPES]
FIXED = {word: number for number, word in enumerate(WORDS, start=len(LAYOUT))}


@dataclass
class NamesConfig:
    data_dir: str = option('data', 'the data set goes into <data_dir>/names')


def lexemes(path):
    """The tokens of a Python file: the text of a name, number or string, else a number < 96."""
    found = []
    with open(path, 'rb') as file:
        for kind, text, *_ in tokenize.tokenize(file.readline):
            if kind in LAYOUT:
                found.append(LAYOUT.index(kind))
            elif text in FIXED:
                found.append(FIXED[text])
            elif kind in (token.NAME, token.NUMBER, token.STRING):
                found.append(text)
    return found


def named(found, rng):
    """The tokens of the lexemes of a file, a list of bytes, with names drawn by rng.

    When all bytes are in use, the one that was not seen for longest gets another name.
    """
    free = rng.permutation(range(FIRST_NAME, 256))[::-1]
    byte_of = dict(enumerate(free))  # numbers are in the place of names that are to come
    tokens = []
    for lexeme in found:
        byte = lexeme
        if isinstance(lexeme, str):
            oldest = next(iter(byte_of))
            byte = byte_of.pop(lexeme, None) or byte_of.pop(oldest)
            byte_of[lexeme] = byte  # at the end: the newest
        tokens.append(byte)
    return tokens


def main():
    cfg = settings.parse(NamesConfig)
    folder = data.output_folder(cfg.data_dir, 'names', source='lab.names')
    pieces = prepare_text.split_documents(prepare_text.stdlib_documents(), 'stdlib')
    tokenizer = data.get_tokenizer('bytes')
    with data.new_dataset(folder, tokenizer, f'lab.names, {COPIES} copies') as (train, val):
        for number, (file, _, _, is_val) in enumerate(pieces):
            found = lexemes(file)
            out = val if is_val else train
            for copy in range(COPIES):
                rng = np.random.default_rng([0, number, copy])
                data.write_tokens(out, [*named(found, rng), tokenizer.eot_token])
    print(data.summary(folder))


if __name__ == '__main__':
    settings.run(main)
