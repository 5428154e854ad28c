"""Token files, tokenizers and batches: what the prepare scripts write and train.py reads.

A data set is a folder data/<name> with

    train*.bin, val*.bin    uint16 tokens, one file or many, read as one in the order of their names
    meta.json               {"tokenizer", "vocab_size", "source", "complete",
                            "files": {"train.bin": tokens, ...}}

Each document ends with <|endoftext|>, the last token of the vocabulary. A data set of questions and
answers consists of records instead, all of the same number of tokens, and meta.json has two more
entries. "record_len" is this number. "answers" are the places in a record, counted from 0, of the
tokens that are learned and scored; the rest is only read.
"""

import concurrent.futures
import contextlib
import glob
import hashlib
import json
import os
import re
import threading

import numpy as np
import tiktoken

from support import files
from support.settings import UserError

END_OF_TEXT = '<|endoftext|>'
TOKEN = np.dtype('<u2')  # uint16, little-endian on every machine

# ---- Tokenizers ----------------------------------------------------------------------------------


def vocabulary(name):
    """How many tokens the tokenizer of that name has. Raises UserError for a name that is none."""
    if name == 'bytes':
        return 257
    if name == 'gpt2':
        return 50257
    match = re.fullmatch('gpt2:([1-9][0-9]{2,4})', name)
    if match and 257 <= int(match[1]) <= 50257:
        return int(match[1])
    raise UserError(
        f"tokenizer {name!r} is unknown: it is 'gpt2', 'gpt2:N' with N from 257 to 50257, "
        "or 'bytes'"
    )


def get_tokenizer(name):
    """The tiktoken.Encoding 'gpt2' (50,257 tokens), 'gpt2:N' (N) or 'bytes' (256 and the end).

    'gpt2:N' is for small models: the first N - 1 entries of GPT-2's table, then <|endoftext|>. The
    table lists the single bytes and then the merges in the order in which they were learned, so
    every beginning of it is a vocabulary. 'bytes' needs no download. tiktoken downloads GPT-2's
    table once and keeps it, in the folder named by TIKTOKEN_CACHE_DIR if that is set. Raises
    UserError, within 8 seconds, if it is out of reach.
    """
    end = vocabulary(name) - 1
    if name == 'bytes':
        # The pattern only cuts text into pieces for tiktoken. Without merges a byte is a token.
        pattern = r'(?s).{1,64}'
        ranks = {bytes([i]): i for i in range(end)}
    else:
        try:
            gpt2 = within(8, tiktoken.get_encoding, 'gpt2')
        except Exception as e:  # of requests, of hashes, of files: there is no vocabulary
            raise UserError(
                f'the gpt2 vocabulary could not be downloaded ({type(e).__name__}): check the '
                'network, or set TIKTOKEN_CACHE_DIR to a folder that has it, or use the tokenizer '
                'bytes'
            ) from None
        if name == 'gpt2':
            return gpt2
        pattern = gpt2._pat_str
        ranks = {piece: rank for piece, rank in gpt2._mergeable_ranks.items() if rank < end}
    special = {END_OF_TEXT: end}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def encode_prompt(text, tokenizer, bos):
    """The tokens of a prompt, as a list. With bos <|endoftext|> is in front, as in training.

    An empty text becomes <|endoftext|>, because the end of a text is the start of the next.
    """
    ids = tokenizer.encode_ordinary(text)
    if bos or not ids:
        ids.insert(0, tokenizer.eot_token)
    return ids


def within(seconds, function, *args):
    """function(*args), or TimeoutError after so many seconds.

    tiktoken downloads without a timeout, and no timeout of requests limits the lookup of a host
    name. So the call runs in a daemon thread, which does not delay the exit if it hangs.
    """
    future = concurrent.futures.Future()

    def call():
        try:
            future.set_result(function(*args))
        except Exception as e:
            future.set_exception(e)

    threading.Thread(target=call, daemon=True).start()
    return future.result(timeout=seconds)


# ---- Reading -------------------------------------------------------------------------------------


class Dataset:
    """The tokens of one folder.

    Fields: name, path, meta (meta.json), vocab_size, tokenizer_name, record_len, answers. The last
    two are None in a data set of plain text.
    """

    def __init__(self, path, name):
        self.path = path
        self.name = name
        self.meta = read_meta(path)
        self.tokenizer_name = self.meta['tokenizer']
        self.vocab_size = vocabulary(self.tokenizer_name)
        self.record_len = self.meta.get('record_len')
        self.answers = self.meta.get('answers')
        for file in self.meta['files']:
            if not os.path.isfile(f'{path}/{file}'):
                raise UserError(f'{path}/{file} is missing, meta.json lists it: prepare it again')
        self.files = {'train': self._open('train'), 'val': self._open('val')}

    def _open(self, split):
        """The files of 'train' or 'val' as arrays on the disk."""
        names = sorted(glob.glob(f'{split}*.bin', root_dir=self.path))
        if not names:
            raise UserError(f'{self.path} has no {split}*.bin: prepare it again')
        for name in names:
            size = os.path.getsize(f'{self.path}/{name}')
            listed = self.meta['files'].get(name, size // 2)  # others may have added files
            if size == 0 or size / 2 != listed:
                raise UserError(
                    f'{self.path}/{name} has {size} bytes, and should have {listed} tokens of 2 '
                    'bytes: prepare it again'
                )
        return [np.memmap(f'{self.path}/{name}', TOKEN, mode='r') for name in names]

    def fingerprint(self):
        """16 hexadecimal digits: a hash of what tokens mean, of the files' lengths and samples."""
        meaning = f'{self.tokenizer_name} {self.vocab_size} {self.record_len} {self.answers}'
        digest = hashlib.sha256(meaning.encode())
        for tokens in self.files['train'] + self.files['val']:
            digest.update(len(tokens).to_bytes(8, 'little'))
            for start in np.linspace(0, len(tokens), 16, dtype=int):
                digest.update(tokens[start : start + 256].tobytes())
        return digest.hexdigest()[:16]

    def tokens(self, split):
        """How many tokens 'train' or 'val' has."""
        return sum(map(len, self.files[split]))

    def window(self, block_size):
        """How many tokens a window has: block_size and the last one to predict, or a record."""
        if not self.record_len:
            return block_size + 1
        if self.record_len > block_size + 1:
            raise UserError(
                f'{self.path}: its records of {self.record_len} tokens need a block_size of '
                f'{self.record_len - 1}, not {block_size}'
            )
        return self.record_len

    def batch(self, split, index, batch_size, block_size, seed=0, bos=False):
        """Batch number index of random windows: (x, y), int64 tensors (batch_size, block_size).

        y is x one token later. With bos, x begins with <|endoftext|>, and a token less is read. In
        a set of records every window is a whole record, without bos. It may be shorter than
        block_size, and y is -1, which the loss ignores, where it is not an answer. A batch depends
        on the arguments alone, not on earlier batches, so a resumed run and each of several
        processes ask for a batch by its number. Raises UserError if the split is shorter than one
        window, or a record does not fit.
        """
        import torch  # here, so that the prepare scripts start without it

        length = self.window(block_size)
        step = self.record_len or 1
        bos = bos and not self.record_len
        if bos:
            length -= 1
        count = (self.tokens(split) - length) // step + 1  # windows to choose from
        if count < 1:
            raise UserError(
                f'{self.path}: {split} has {self.tokens(split)} tokens, a window needs {length}: '
                'use a smaller block_size or more text'
            )
        key = [seed % 2**64, int(split == 'val'), index, batch_size, block_size]
        starts = np.random.default_rng(key).integers(count, size=batch_size) * step
        windows = np.stack([self._window(split, start, length) for start in starts])
        if windows.max() >= self.vocab_size:
            raise UserError(
                f'{self.path} has token {windows.max()}, but its tokenizer has {self.vocab_size}: '
                'it is damaged, prepare it again'
            )
        if bos:
            windows = np.pad(windows, ((0, 0), (1, 0)), constant_values=self.vocab_size - 1)
        windows = torch.from_numpy(windows.astype(np.int64))
        x = windows[:, :-1].contiguous()
        y = windows[:, 1:].clone()
        if self.record_len:
            asked = torch.zeros(length, dtype=torch.bool)
            asked[self.answers] = True
            y[:, ~asked[1:]] = -1
        return x, y

    def _window(self, split, start, length):
        """length tokens from place start of the split. They may be in several files."""
        parts = []
        for tokens in self.files[split]:
            if start >= len(tokens):
                start -= len(tokens)
                continue
            parts.append(tokens[start : start + length])
            length -= len(parts[-1])
            if length == 0:
                break
            start = 0
        return np.concatenate(parts)


def load_dataset(name_or_path, root='data'):
    """The Dataset root/<name>, or the folder itself. UserError if it is missing or damaged."""
    for path in (os.path.join(root, name_or_path), name_or_path):
        if name_or_path and os.path.isdir(path):
            return Dataset(path, name_or_path)
    found = sorted(glob.glob('*/meta.json', root_dir=root))
    names = ', '.join(map(os.path.dirname, found)) or 'none'
    raise UserError(
        f"data set '{name_or_path}' is not in {root}/ (there: {names}): "
        'make it with prepare_c4.py, prepare_text.py or lab.tasks'
    )


def read_meta(path):
    """The meta.json of a data set's folder. Raises UserError if it is missing or damaged."""
    file = os.path.join(path, 'meta.json')
    hint = 'prepare the data set again'
    meta = files.read_json(
        file,
        hint,
        tokenizer=str,
        vocab_size=int,
        source=str,
        complete=bool,
        files=dict,
        record_len=(int, None),
        answers=([int], None),
    )
    length = meta.get('record_len')
    if length is not None:
        answers = meta.get('answers') or [0]
        if min(answers) < 1 or max(answers) >= length:
            raise UserError(f'{file} is damaged (record_len and answers do not fit): {hint}')
    return meta


def known_meta(path):
    """The meta.json of a data set's folder, {} where there is none or it is damaged."""
    try:
        return read_meta(path)
    except UserError:
        return {}


# ---- Writing -------------------------------------------------------------------------------------


def output_folder(root, name, pattern=r'(train|val)\.bin', source=''):
    """root/<name>, for a prepare script's .bin files, whose names match pattern.

    Raises UserError for a name that no folder can have, and for a folder that holds anything but
    such a data set, with a source that begins so. Training would read its files, too, and a script
    that replaces the folder would delete them.
    """
    if name in ('', '.', '..') or os.path.basename(name) != name:
        raise UserError(f"--name: '{name}' cannot name a folder in {root}/")
    folder = os.path.join(root, name)
    if not os.path.lexists(folder):
        return folder
    for file in sorted(os.listdir(folder)):
        ours = re.fullmatch(rf'({pattern}|meta\.json)(\.cut)?(\.\w+\.tmp)?', file)
        if not ours or not os.path.isfile(f'{folder}/{file}'):
            raise UserError(
                f'{folder} has {file}, which is not of such a data set: choose another --name'
            )
    found = known_meta(folder).get('source', source)
    if not found.startswith(source):
        raise UserError(f'{folder} is another data set ({found}): choose another --name')
    return folder


class TokenFile:
    """Tokens on their way into a binary file. count is how many were written."""

    def __init__(self, file):
        self.file = file
        self.count = 0

    def write(self, tokens):
        self.file.write(np.asarray(tokens, TOKEN).tobytes())
        self.count += len(tokens)


@contextlib.contextmanager
def token_file(path):
    """A TokenFile, which gets its name when the block ends without an error."""
    with files.replacing(path) as f:
        yield TokenFile(f)


@contextlib.contextmanager
def new_dataset(folder, tokenizer, source, **records):
    """Two TokenFiles, of train.bin and val.bin. The new data set takes the place of the old one.

    See files.replacing_folder; for the rest, see write_meta.
    """
    with files.replacing_folder(folder) as new:
        with token_file(f'{new}/train.bin') as train, token_file(f'{new}/val.bin') as val:
            yield train, val
        counts = {'train.bin': train.count, 'val.bin': val.count}
        write_meta(new, tokenizer, source, True, counts, **records)


def write_meta(path, tokenizer, source, complete, counts, **records):
    """Write meta.json of the data set's folder.

    tokenizer: an Encoding. counts: the tokens of each file. records: record_len and answers, where
    the data set has them.
    """
    meta = {
        'tokenizer': tokenizer.name,
        'vocab_size': tokenizer.n_vocab,
        'source': source,
        'complete': complete,
        'files': dict(sorted(counts.items())),
        **records,
    }
    files.write_file(os.path.join(path, 'meta.json'), json.dumps(meta, indent=1))
