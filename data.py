"""Token files, tokenizers and batches: what the prepare scripts write and train.py reads.

A data set is a folder data/<name> with

    train*.bin, val*.bin    uint16 tokens, one file or many, read as one in the order of their names
    meta.json               {"tokenizer", "vocab_size", "source", "complete", "files": {"train.bin": tokens, ...}}

Each document ends with <|endoftext|>, the last token of the vocabulary. A data set of questions and answers consists of
records instead, all of the same number of tokens, and meta.json has two more entries: "record_len" is this number,
"answers" are the places in a record, counted from 0, of the tokens that are learned and scored; the rest is only read.
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

# ----------------------------------------------------------------------------- tokenizers

def vocabulary(name):
    """How many tokens the tokenizer of that name has. Raises UserError for a name that is none."""
    family, _, count = name.partition(':')
    if family == 'gpt2' and re.fullmatch('[1-9][0-9]{2,4}', count) and 257 <= int(count) <= 50257:
        return int(count)
    if name not in ('gpt2', 'bytes'):
        raise UserError(f"tokenizer {name!r} is unknown: it is 'gpt2', 'gpt2:N' with N from 257 to 50257, or 'bytes'")
    return 50257 if name == 'gpt2' else 257


def get_tokenizer(name):
    """The tiktoken.Encoding called 'gpt2' (50,257 tokens), 'gpt2:N' (N) or 'bytes' (256 bytes and <|endoftext|>).

    'gpt2:N' is for small models: the first N - 1 entries of GPT-2's table, then <|endoftext|>. The table lists the
    single bytes and then the merges in the order in which they were learned, so every beginning of it is a vocabulary.
    'bytes' needs no download. tiktoken downloads GPT-2's table once and keeps it, in the folder named by
    TIKTOKEN_CACHE_DIR if that is set. Raises UserError, within 8 seconds, if it is out of reach.
    """
    end = vocabulary(name) - 1  # entries of the table; the last id is <|endoftext|>'s
    if name == 'bytes':
        # The pattern only cuts the text into pieces for tiktoken; without merges every byte is a token.
        return tiktoken.Encoding('bytes', pat_str=r'(?s).{1,64}', special_tokens={END_OF_TEXT: 256},
                                 mergeable_ranks={bytes([i]): i for i in range(256)})
    try:
        gpt2 = within(8, tiktoken.get_encoding, 'gpt2')
    except Exception as e:  # requests, hash and file errors alike: there is no vocabulary
        raise UserError(f'the gpt2 vocabulary could not be downloaded ({type(e).__name__}): check the network, '
                        'or set TIKTOKEN_CACHE_DIR to a folder that has it, or use the tokenizer bytes') from None
    if name == 'gpt2':
        return gpt2
    ranks = {piece: rank for piece, rank in gpt2._mergeable_ranks.items() if rank < end}
    return tiktoken.Encoding(name, pat_str=gpt2._pat_str, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: end})


def encode_prompt(text, tokenizer, bos):
    """The tokens of a prompt, as a list; with bos, <|endoftext|> stands in front, as in the windows of training.

    An empty text becomes <|endoftext|>, because the end of a text is the start of the next.
    """
    ids = tokenizer.encode_ordinary(text)
    return [tokenizer.eot_token, *ids] if bos or not ids else ids


def within(seconds, function, *args):
    """function(*args), or TimeoutError after so many seconds.

    tiktoken downloads without a timeout, and no timeout of requests limits the lookup of a host name. So the call runs
    in a daemon thread, which does not delay the exit if it hangs.
    """
    future = concurrent.futures.Future()

    def call():
        try:
            future.set_result(function(*args))
        except Exception as e:
            future.set_exception(e)

    threading.Thread(target=call, daemon=True).start()
    return future.result(timeout=seconds)

# ----------------------------------------------------------------------------- reading

class Dataset:
    """The tokens of one folder. Fields: name, path, meta (meta.json), vocab_size, tokenizer_name, record_len, answers.

    record_len and answers are None in a data set of plain text.
    """

    def __init__(self, path, name):
        self.path, self.name = path, name
        self.meta = read_meta(path)
        self.vocab_size, self.tokenizer_name = self.meta['vocab_size'], self.meta['tokenizer']
        self.record_len, self.answers = self.meta.get('record_len'), self.meta.get('answers')
        for file in self.meta['files']:
            if not os.path.isfile(os.path.join(path, file)):
                raise UserError(f'{os.path.join(path, file)} is missing, meta.json lists it: prepare it again')
        self._files, self._starts = {}, {}
        for split in 'train', 'val':
            names = sorted(glob.glob(f'{split}*.bin', root_dir=path))
            if not names:
                raise UserError(f'{path} has no {split}*.bin: prepare it again')
            self._files[split] = [self._open(os.path.join(path, name)) for name in names]
            # _starts[split][i] is the place of file i's first token in the split; the last entry is the total
            self._starts[split] = np.cumsum([0] + [len(file) for file in self._files[split]])

    def _open(self, path):
        size, listed = os.path.getsize(path), self.meta['files'].get(os.path.basename(path))
        if size == 0:
            raise UserError(f'{path} is empty: prepare it again')
        if size % 2 or listed not in (None, size // 2):  # None: a file that another machine made
            raise UserError(f'{path} has {size} bytes, meta.json says {listed} tokens of 2 bytes: prepare it again')
        tokens = np.memmap(path, TOKEN, mode='r')
        self._check(np.concatenate([tokens[:4096], tokens[-4096:]]), path)
        return tokens

    def _check(self, tokens, path):
        if tokens.max() >= self.vocab_size:
            raise UserError(f'{path} has token {tokens.max()}, but the vocabulary of meta.json has '
                            f'{self.vocab_size}: it is corrupt or of another tokenizer, prepare it again')

    def fingerprint(self):
        """16 hexadecimal digits of a hash of what the tokens mean, the files' lengths, and samples of the tokens."""
        digest = hashlib.sha256(f'{self.tokenizer_name} {self.vocab_size} {self.record_len} {self.answers}'.encode())
        for file in (file for split in ('train', 'val') for file in self._files[split]):
            digest.update(len(file).to_bytes(8, 'little'))
            for start in np.linspace(0, len(file), 16, dtype=int):
                digest.update(file[start:start + 256].tobytes())
        return digest.hexdigest()[:16]

    def tokens(self, split):
        """How many tokens 'train' or 'val' has."""
        return int(self._starts[split][-1])

    def window(self, block_size):
        """How many tokens a window has: block_size and the last one to predict, or a whole record."""
        if self.record_len and self.record_len > block_size + 1:
            raise UserError(f'{self.path}: its records of {self.record_len} tokens need a block_size of '
                            f'{self.record_len - 1}, not {block_size}')
        return self.record_len or block_size + 1

    def batch(self, split, index, batch_size, block_size, seed=0, bos=False):
        """Batch number index of random windows: (x, y), int64 tensors (batch_size, block_size).

        y is x one token later. With bos, x begins with <|endoftext|>, and a token less is read. In a set of records
        every window is a whole record, without bos; it may be shorter than block_size, and y is -1, which the loss
        ignores, where it is not an answer. A batch depends on the arguments alone, not on earlier batches, so a resumed
        run and each of several processes ask for a batch by its number. Raises UserError if the split is shorter than
        one window, or a record does not fit.
        """
        import torch  # here, so that the prepare scripts and their processes start without it
        bos = bos and not self.record_len
        length, step = self.window(block_size) - bos, self.record_len or 1      # of what is read
        count = (self.tokens(split) - length) // step + 1  # windows to choose from
        if count < 1:
            raise UserError(f'{self.path}: {split} has {self.tokens(split)} tokens, a window needs {length}: '
                            'use a smaller block_size or more text')
        rng = np.random.default_rng([seed % 2**64, int(split == 'val'), index, batch_size, block_size])
        windows = np.stack([self._window(split, start, length)
                            for start in rng.integers(count, size=batch_size) * step])
        self._check(windows, self.path)
        if bos:
            windows = np.pad(windows, ((0, 0), (1, 0)), constant_values=self.vocab_size - 1)
        windows = torch.from_numpy(windows.astype(np.int64))
        x, y = windows[:, :-1].contiguous(), windows[:, 1:].clone()
        if self.record_len:
            y[:, sorted(set(range(length - 1)) - {place - 1 for place in self.answers})] = -1
        return x, y

    def _window(self, split, start, length):
        """length tokens from place start of the split; a window may cross from one file to the next."""
        parts_on_disk, starts = self._files[split], self._starts[split]
        i = int(np.searchsorted(starts, start, side='right')) - 1
        parts = []
        while length > 0:
            part = parts_on_disk[i][start - starts[i]:][:length]
            parts.append(part)
            start, length, i = start + len(part), length - len(part), i + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def load_dataset(name_or_path, root='data'):
    """The Dataset root/<name>, or the folder itself; UserError if it is missing, incomplete or corrupt."""
    path = os.path.join(root, name_or_path)
    if not os.path.isdir(path):
        path = name_or_path
    if not name_or_path or not os.path.isdir(path):
        names = sorted(os.path.basename(os.path.dirname(p)) for p in glob.glob(os.path.join(root, '*', 'meta.json')))
        raise UserError(f"data set '{name_or_path}' is not in {root}/ (there: {', '.join(names) or 'none'}): "
                        'make it with prepare_c4.py, prepare_text.py or lab.tasks')
    return Dataset(path, name_or_path)


def read_meta(path):
    """The meta.json of a data set's folder; UserError if it is missing or not one of the prepare scripts."""
    file, hint = os.path.join(path, 'meta.json'), 'prepare the data set again'
    meta = files.read_json(file, {'tokenizer': str, 'vocab_size': range(1, 2**16 + 1), 'source': str, 'complete': bool,
                                  'files': {str: int}, 'record_len?': range(2, 2**31), 'answers?': [int]}, hint)
    length, answers = meta.get('record_len'), meta.get('answers')
    if (length is None) != (answers is None) or answers is not None and not (
            answers and 0 < min(answers) <= max(answers) < length):
        raise UserError(f'{file} is damaged (record_len and answers do not fit): {hint}')
    if meta['vocab_size'] != vocabulary(meta['tokenizer']):
        raise UserError(f"{file} is damaged ({meta['tokenizer']} has not {meta['vocab_size']} tokens): {hint}")
    return meta


def known_meta(path):
    """The meta.json of a data set's folder; {} where it is missing or damaged: then the data set can be made again."""
    try:
        return read_meta(path)
    except UserError:
        return {}

# ----------------------------------------------------------------------------- writing

def output_folder(root, name, pattern=r'(train|val)\.bin', records=False):
    """root/<name>, the folder for a prepare script's .bin files, whose names match pattern (a regular expression).

    Raises UserError for a name that no folder can have, and for a folder that holds anything but such a data set:
    training would read its files, too, and a script that replaces the folder would delete them.
    """
    if name in ('', '.', '..') or os.path.basename(name) != name or len(name.encode()) > 200:
        raise UserError(f"--name: '{name}' cannot name a folder in {root}/")
    folder = os.path.join(root, name)
    if not os.path.lexists(folder):
        return folder
    try:
        for file in sorted(os.listdir(folder)):
            if not re.fullmatch(pattern + r'(\.cut)?(\.\w+\.tmp)?|meta\.json(\.\w+\.tmp)?', file) or \
                    not os.path.isfile(os.path.join(folder, file)):
                raise UserError(f'{folder} has {file}, which is not of such a data set: choose another --name')
    except OSError as e:
        raise UserError(f'{folder} cannot be used ({e.strerror}): choose another --name') from None
    meta = known_meta(folder)
    if meta and records != ('record_len' in meta):
        raise UserError(f'{folder} is a data set of another kind ({meta["source"]}): choose another --name')
    return folder


class TokenFile:
    """Writes one .bin file, which gets its name when the block ends without an error (see files.replacing).

        with TokenFile('data/x/train.bin') as out:
            out.write(array)

    out.count is the number of tokens.
    """

    def __init__(self, path):
        self.path, self.count = path, 0

    def __enter__(self):
        self._stack = contextlib.ExitStack()
        self._file = self._stack.enter_context(files.replacing(self.path))
        return self

    def write(self, tokens):
        self._file.write(np.asarray(tokens, TOKEN).tobytes())
        self.count += len(tokens)

    def __exit__(self, *error):
        return self._stack.__exit__(*error)


def write_meta(path, tokenizer, source, complete, counts, **records):
    """Write meta.json of the data set's folder; tokenizer is an Encoding, counts maps files to their tokens.

    records: record_len and answers, where the data set has them.
    """
    meta = {'tokenizer': tokenizer.name, 'vocab_size': tokenizer.n_vocab, 'source': source, 'complete': complete,
            'files': dict(sorted(counts.items())), **records}
    files.write_file(os.path.join(path, 'meta.json'), json.dumps(meta, indent=1))
