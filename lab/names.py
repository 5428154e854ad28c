"""A language in which names come back: Python's own code, with the names of each file drawn anew.

    python -m lab.names
    python train.py config/claims.py --dataset=names --selective --out_dir=out/names

In real text, names and terms that return make long context worth something, but a small model learns that late: first it
learns what follows what, for which the newest tokens are enough. Here names are most of what there is to learn. Each token
of the standard library's sources, without comments, becomes one byte. Keywords and operators have fixed ones; a name, string
or number gets one of 160 bytes at random when its file first has it, and keeps it until the file has 160 newer ones. So all
that one can know of a name comes from the text before it, and each copy of a file is another text.
"""
import io
import keyword
import os
import token
import tokenize
from dataclasses import dataclass

import numpy as np

import data
import prepare_text
from support import files, settings
from support.settings import UserError

FIRST_NAME = 96         # names are the bytes from here on, everything else lies below


@dataclass
class NamesConfig:
    data_dir: str = 'data'          # the data set goes into <data_dir>/<name>
    name: str = 'names'             # data set's name
    copies: int = 5                 # of each file, with other names [1 to 1000]
    seed: int = 0                   # same seed, same data [0 to 2**31]


LAYOUT = [token.NEWLINE, token.INDENT, token.DEDENT]
FIXED = {word: n for n, word in enumerate([*keyword.kwlist, 'self', *token.EXACT_TOKEN_TYPES], start=len(LAYOUT))}


def lexemes(source):
    """The tokens of Python source: a number below FIRST_NAME, or the text of a name, a number or a string."""
    found = []
    for kind, text, *_ in tokenize.generate_tokens(io.StringIO(source).readline):
        if kind in LAYOUT:
            found.append(LAYOUT.index(kind))
        elif text in FIXED:
            found.append(FIXED[text])
        elif kind in (token.NAME, token.NUMBER, token.STRING):
            found.append(text)
    return found


def named(found, rng):
    """uint8 tokens of the lexemes of a file, with names drawn by rng. With all bytes in use, the one unseen for longest goes."""
    byte_of, free = {}, list(rng.permutation(np.arange(FIRST_NAME, 256)))
    tokens = []
    for text in found:
        if isinstance(text, str):
            byte = byte_of.pop(text, None)
            if byte is None:
                byte = free.pop() if free else byte_of.pop(next(iter(byte_of)))
            byte_of[text] = byte                                # at the end: the newest
            text = byte
        tokens.append(text)
    return np.array(tokens, np.uint8)


def prepare(cfg):
    """Write <data_dir>/<name>: train.bin, val.bin and meta.json. Returns the folder."""
    tokenizer = data.get_tokenizer('bytes')
    folder = data.output_folder(cfg.data_dir, cfg.name, r'(train|val)\.bin')
    before = data.known_meta(folder)
    if before and not before['source'].startswith('lab.names'):
        raise UserError(f"{folder} is another data set ({before['source']}): choose another --name")
    documents, _ = prepare_text.stdlib_documents()
    with files.replacing_folder(folder) as new:
        train, val = (data.TokenFile(os.path.join(new, f'{split}.bin')) for split in ('train', 'val'))
        with train, val:
            for number, (file, _, _, is_val) in enumerate(prepare_text.split_documents(documents, 'stdlib')):
                try:
                    with tokenize.open(file) as f:
                        found = lexemes(f.read())
                except (SyntaxError, tokenize.TokenError, UnicodeDecodeError):
                    continue
                for copy in range(cfg.copies):
                    rng = np.random.default_rng([cfg.seed % 2**64, number, copy])
                    (val if is_val else train).write([*named(found, rng), tokenizer.eot_token])
        data.write_meta(new, tokenizer, f'lab.names, {cfg.copies} copies, seed {cfg.seed}', True,
                        {'train.bin': train.count, 'val.bin': val.count})
    print(f'{folder}: {train.count:,} train and {val.count:,} val tokens')
    return folder


if __name__ == '__main__':
    settings.run(lambda: prepare(settings.parse(NamesConfig)))
