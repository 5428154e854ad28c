"""Token files, tokenizers and batches: what the prepare scripts write and train.py reads.

A data set is a folder data/<name> with

    train*.bin, val*.bin    uint16 tokens, one file or many, read as one in the order of their names
    meta.json               {"tokenizer", "vocab_size", "source",
                            "files": {"train.bin": tokens, ...}}

"tokenizer" is a name, or a whole vocabulary, see support/bpe.py. Each document ends with
<|endoftext|>. A data set of questions and answers consists of records instead, all of the same
number of tokens, and meta.json has two more entries. "record_len" is this number. "answers" are the
places in a record, counted from 0, of the tokens that are learned and scored; the rest is only
read.
"""

import contextlib
import glob
import hashlib
import json
import os
import re

import numpy as np
import tiktoken

from support import bpe, files
from support.bpe import END_OF_TEXT
from support.settings import UserError

TOKEN = np.dtype('<u2')  # uint16, little-endian on every machine

# ---- Tokenizers ----------------------------------------------------------------------------------


def vocabulary(name):
    """How many tokens the tokenizer of that name has. Raises UserError for a name that is none."""
    if name.startswith('{'):
        return bpe.encoding(name).n_vocab
    if name == 'bytes':
        return 257
    if name == 'gpt2':
        return 50257
    match = re.fullmatch('gpt2:([1-9][0-9]{2,4})', name)
    if match and 257 <= int(match[1]) <= 50257:
        return int(match[1])
    raise UserError(
        f"tokenizer {name!r} is unknown: it is 'gpt2', 'gpt2:N' with N from 257 to 50257, "
        "'bytes', or a folder with tokenizer.json"
    )


def get_tokenizer(name):
    """The tiktoken.Encoding 'gpt2' (50,257 tokens), 'gpt2:N' (N) or 'bytes' (256 and the end).

    Or that of a folder with tokenizer.json, or of its text by `full_name`, which needs no folder.

    'gpt2:N' is for small models: the first N - 1 entries of GPT-2's table, then <|endoftext|>. The
    table lists the single bytes and then the merges in the order in which they were learned, so
    every beginning of it is a vocabulary. 'bytes' needs no download. tiktoken downloads GPT-2's
    table once and keeps it, in the folder named by TIKTOKEN_CACHE_DIR if that is set. Raises
    UserError if it is out of reach.
    """
    name = full_name(name)
    if name.startswith('{'):
        return bpe.encoding(name)
    end = vocabulary(name) - 1
    if name == 'bytes':
        # The pattern only cuts text into pieces for tiktoken. Without merges a byte is a token.
        pattern = r'[\s\S]{1,64}'
        ranks = {bytes([i]): i for i in range(end)}
    else:
        try:
            gpt2 = tiktoken.get_encoding('gpt2')
        except Exception as e:  # of requests, of hashes, of files: there is no vocabulary
            raise UserError(
                f'the gpt2 vocabulary could not be downloaded ({type(e).__name__}): check the '
                'network, or set TIKTOKEN_CACHE_DIR to a folder that has it, or use the tokenizer '
                'bytes'
            ) from None
        pattern = gpt2._pat_str
        ranks = {piece: rank for piece, rank in gpt2._mergeable_ranks.items() if rank < end}
    return tiktoken.Encoding(
        name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: end}
    )


def full_name(name):
    """The name of a tokenizer as files keep it: for a folder that of its tokenizer, see bpe."""
    if name not in ('gpt2', 'bytes') and os.path.isdir(name):
        return bpe.read(name)[0]
    return name


def label(name):
    """A short name of a tokenizer, to print. A whole vocabulary becomes a hash."""
    if len(name) < 20:
        return name
    return 'tokenizer.json ' + hashlib.sha256(name.encode()).hexdigest()[:8]


def encode_prompt(text, tokenizer, bos):
    """The tokens of a prompt, as a list. With bos <|endoftext|> is in front, as in training.

    An empty text becomes <|endoftext|>, because the end of a text is the start of the next.
    """
    ids = tokenizer.encode_ordinary(text)
    if bos or not ids:
        ids.insert(0, tokenizer.eot_token)
    return ids


# ---- Reading -------------------------------------------------------------------------------------


class Dataset:
    """The tokens of one folder.

    Fields: path, meta (meta.json), vocab_size, tokenizer_name, record_len, answers. The last
    two are None in a data set of plain text.
    """

    def __init__(self, path):
        self.path = path
        self.meta = read_meta(path)
        self.tokenizer_name = self.meta['tokenizer']
        self.vocab_size = vocabulary(self.tokenizer_name)
        self.end = self.vocab_size - 1  # <|endoftext|>
        if self.tokenizer_name.startswith('{'):
            self.end = get_tokenizer(self.tokenizer_name).eot_token
        self.record_len = self.meta.get('record_len')
        self.answers = self.meta.get('answers')
        self.files = {'train': [], 'val': []}
        counts = file_tokens(path)  # others may have added files
        for file, count in self.meta['files'].items():
            if counts.get(file) != count:
                raise UserError(f'{path}/{file} has lost some of {count} tokens: prepare it again')
        for file, count in counts.items():
            for split, arrays in self.files.items():
                if file.startswith(split):
                    arrays.append(np.memmap(f'{path}/{file}', TOKEN, mode='r', shape=count))

    def tokens(self, split):
        """How many tokens 'train' or 'val' has."""
        return sum(map(len, self.files[split]))

    def window(self, block_size):
        """How many tokens a window has: block_size and the last one to predict, or a record."""
        if not self.record_len:
            return block_size + 1
        if self.record_len > block_size + 1:
            raise UserError(f'{self.path}: its records need a block_size of {self.record_len - 1}')
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
        key = [seed, int(split == 'val'), index, batch_size, block_size]
        starts = np.random.default_rng(key).integers(count, size=batch_size) * step
        windows = np.stack([self._window(split, start, length) for start in starts])
        if windows.max() >= self.vocab_size:
            raise UserError(f'{self.path} has tokens that its tokenizer lacks: prepare it again')
        if bos:
            windows = np.insert(windows, 0, self.end, axis=1)
        windows = torch.from_numpy(windows.astype(np.int64))
        x = windows[:, :-1].contiguous()
        y = windows[:, 1:]
        if self.record_len:
            y[:, ~np.isin(range(1, length), self.answers)] = -1
        return x, y

    def _window(self, split, start, length):
        """length tokens from place start of the split. They may be in several files."""
        parts = []
        for tokens in self.files[split]:
            if -length <= start < len(tokens):
                parts.append(tokens[max(start, 0) : start + length])
            start -= len(tokens)
        return np.concatenate(parts)


def load_dataset(name_or_path, root='data', tokenizer=None):
    """The Dataset root/<name>, or the folder itself.

    tokenizer: the name of the tokenizer that it must have. UserError if it is missing or damaged.
    """
    for path in (f'{root}/{name_or_path}', name_or_path):
        if name_or_path and os.path.isdir(path):
            dataset = Dataset(path)
            if tokenizer not in (None, dataset.tokenizer_name):
                raise UserError(
                    f'data set {path} has the tokenizer {label(dataset.tokenizer_name)}, '
                    f'the model {label(tokenizer)}'
                )
            return dataset
    found = ', '.join(sorted(glob.glob('*/', root_dir=root)))
    raise UserError(
        f"data set '{name_or_path}' is not in {root}/ (there: {found}): "
        'make it with prepare_c4.py, prepare_text.py or lab.tasks'
    )


def read_meta(path):
    """The meta.json of a data set's folder. Raises UserError if it is missing or damaged."""
    return files.read_json(
        f'{path}/meta.json',
        'prepare the data set again',
        tokenizer=str,
        vocab_size=int,
        source=str,
        files=dict,
        record_len=int | None,
        answers=list | None,
    )


def file_tokens(path):
    """How many tokens each .bin file of a data set's folder has."""
    return {
        name: os.path.getsize(f'{path}/{name}') // 2
        for name in sorted(glob.glob('*.bin', root_dir=path))
    }


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
    if not re.fullmatch(r'[^./\\][^/\\]*', name):
        raise UserError(f"--name: '{name}' cannot name a folder in {root}/")
    folder = f'{root}/{name}'
    for file in glob.glob('*', root_dir=folder, include_hidden=True):
        if not re.fullmatch(rf'({pattern}|meta\.json)(\.cut)?(\.\w+\.tmp)?', file):
            raise UserError(
                f'{folder} has {file}, which is not of such a data set: choose another --name'
            )
    found = known_meta(folder).get('source', source)
    if not found.startswith(source):
        raise UserError(f'{folder} is another data set ({found}): choose another --name')
    return folder


@contextlib.contextmanager
def new_dataset(folder, tokenizer, source, **records):
    """The files train.bin and val.bin to write tokens to. They take the place of the old data set.

    See files.replacing_folder; for the rest, see write_meta.
    """
    with files.replacing_folder(folder) as new:
        with open(f'{new}/train.bin', 'wb') as train, open(f'{new}/val.bin', 'wb') as val:
            yield train, val
        write_meta(new, tokenizer, source, **records)


def write_tokens(file, tokens):
    """Append tokens to a file that is open for writing. UserError for one above 65,535."""
    try:
        file.write(np.asarray(tokens, TOKEN).tobytes())
    except OverflowError:
        raise UserError('the tokenizer has more than 65,536 tokens: a data set cannot') from None


def write_meta(folder, tokenizer, source, **records):
    """Write meta.json for the files that are in the folder.

    tokenizer: an Encoding. records: record_len and answers, where the data set has them.
    """
    meta = {
        'tokenizer': tokenizer.name,
        'vocab_size': tokenizer.n_vocab,
        'source': source,
        'files': file_tokens(folder),
        **records,
    }
    files.write_file(f'{folder}/meta.json', json.dumps(meta, indent=1))


def summary(folder):
    """How many tokens a data set has, in words."""
    dataset = Dataset(folder)
    return (
        f'{folder}: {dataset.tokens("train"):,} train and {dataset.tokens("val"):,} val tokens '
        f'({label(dataset.tokenizer_name)})'
    )
