"""Token files, tokenizers and batches: what the prepare scripts write and train.py reads.

A data set is a folder data/<name> with

    train*.bin, val*.bin    uint16 tokens, one file or many, read as one in the order of their names
    meta.json               {"tokenizer", "vocab_size", "source", "complete", "files": {"train.bin": tokens, ...}}

Each document ends with <|endoftext|>. A data set of questions and answers is made of records instead, all of the same
number of tokens, and meta.json has two more entries: "record_len" is this number, "answers" are the places in a record,
counted from 0, of the tokens that are learned and scored; the rest is only read.
"""
import concurrent.futures
import contextlib
import glob
import json
import os
import re
import secrets
import sys
import threading
import time

import numpy as np
import tiktoken

from support.settings import UserError, write_file

END_OF_TEXT = '<|endoftext|>'
TOKEN = np.dtype('<u2')  # uint16, little-endian on every machine

# ----------------------------------------------------------------------------- tokenizers

def get_tokenizer(name):
    """The tiktoken.Encoding called 'gpt2' (50,257 tokens), 'gpt2:N' (N tokens) or 'bytes' (256 bytes and <|endoftext|>).

    'gpt2:N' is for small models: the first N - 1 entries of GPT-2's table, then <|endoftext|>. The table lists the single
    bytes and then the merges in the order in which they were learned, so every beginning of it is a vocabulary.
    'bytes' needs no download. tiktoken downloads GPT-2's table once and keeps it, in the folder named by
    TIKTOKEN_CACHE_DIR if that is set. Raises UserError, within 8 seconds, if it is out of reach.
    """
    if name == 'bytes':
        # The pattern only cuts the text into pieces for tiktoken; without merges every byte is a token.
        return tiktoken.Encoding('bytes', pat_str=r'(?s).{1,64}', special_tokens={END_OF_TEXT: 256},
                                 mergeable_ranks={bytes([i]): i for i in range(256)})
    family, _, count = name.partition(':')
    if name != 'gpt2' and not (family == 'gpt2' and re.fullmatch('[1-9][0-9]{2,4}', count) and 257 <= int(count) <= 50257):
        raise UserError(f"tokenizer {name!r} is unknown: it is 'gpt2', 'gpt2:N' with N from 257 to 50257, or 'bytes'")
    try:
        gpt2 = within(8, tiktoken.get_encoding, 'gpt2')
    except Exception as e:  # requests, hash and file errors alike: there is no vocabulary
        raise UserError(f'the gpt2 vocabulary could not be downloaded ({type(e).__name__}): check the network, '
                        'or set TIKTOKEN_CACHE_DIR to a folder that has it, or use the tokenizer bytes') from None
    if not count:
        return gpt2
    end = int(count) - 1  # entries; the last id is <|endoftext|>'s
    ranks = {piece: rank for piece, rank in gpt2._mergeable_ranks.items() if rank < end}
    return tiktoken.Encoding(name, pat_str=gpt2._pat_str, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: end})


def within(seconds, function, *args):
    """function(*args), or TimeoutError after so many seconds.

    tiktoken downloads without a timeout, and looking up a host name can hang longer than any timeout that
    requests knows. The call runs in a daemon thread; one that hangs is left behind and does not hold up the exit.
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

    record_len is None in a data set of plain text.
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
            files = self._files[split] = [self._open(os.path.join(path, name)) for name in names]
            # starts[i] is the place of file i's first token in the split; the last entry is the total
            self._starts[split] = np.cumsum([0] + [len(file) for file in files])

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

    def tokens(self, split):
        """How many tokens 'train' or 'val' has."""
        return int(self._starts[split][-1])

    def window(self, block_size):
        """How many tokens a window of a batch has: block_size and the one to predict last, or a whole record."""
        if self.record_len and self.record_len > block_size + 1:
            raise UserError(f'{self.path}: its records of {self.record_len} tokens need a block_size of '
                            f'{self.record_len - 1}, not {block_size}')
        return self.record_len or block_size + 1

    def batch(self, split, index, batch_size, block_size, seed=0):
        """Batch number index of random windows: (x, y), int64 tensors (batch_size, block_size).

        y is x one token later; it is -1, which the loss ignores, at what is not an answer in a data set of records,
        whose windows are whole records and may be shorter than block_size. The batch depends only on the arguments,
        not on the batches before it, so that a resumed run, or each of several processes, names the batch it
        wants by its number. Raises UserError if the split is shorter than one window, or a record does not fit.
        """
        import torch  # here, so that the prepare scripts and their processes start without it
        length, step = self.window(block_size), self.record_len or 1
        count = (self.tokens(split) - length) // step + 1  # windows that there are
        if count < 1:
            raise UserError(f'{self.path}: {split} has {self.tokens(split)} tokens, a window needs {length}: '
                            'use a smaller block_size or more text')
        rng = np.random.default_rng([seed % 2**64, int(split == 'val'), index, batch_size, block_size])
        windows = np.stack([self._window(split, start, length)
                            for start in rng.integers(count, size=batch_size) * step])
        self._check(windows, self.path)
        windows = torch.from_numpy(windows.astype(np.int64))
        x, y = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
        if self.record_len:
            y[:, sorted(set(range(length - 1)) - {place - 1 for place in self.answers})] = -1
        return x, y

    def _window(self, split, start, length):
        """length tokens from place start of the split; a window may cross from one file to the next."""
        files, starts = self._files[split], self._starts[split]
        i = int(np.searchsorted(starts, start, side='right')) - 1
        parts = []
        while length > 0:
            part = files[i][start - starts[i]:][:length]
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
    """The meta.json of a data set's folder; UserError if it is missing or not what the prepare scripts write."""
    file = os.path.join(path, 'meta.json')
    try:
        with open(file, encoding='utf-8') as f:
            meta = json.load(f)
        kinds = {'tokenizer': str, 'vocab_size': int, 'source': str, 'complete': bool, 'files': dict}
        if not all(isinstance(meta[key], kind) for key, kind in kinds.items()):
            raise ValueError
        if 'record_len' in meta and not (meta['record_len'] > 1 and meta['answers'] and
                                         all(0 < place < meta['record_len'] for place in meta['answers'])):
            raise ValueError
        return meta
    except FileNotFoundError:
        raise UserError(f'{file} is missing: the data set was not finished, prepare it again') from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f'{file} is corrupt: prepare the data set again') from None


def auto_dataset(root='data'):
    """The name of the data set that dataset='auto' stands for: 'c4', or the offline default 'stdlib'.

    C4 if it was prepared; else its small slice is prepared now. Where the network or the gpt2 vocabulary is
    out of reach, which is decided within 10 seconds, says so in one line, and prepares 'stdlib' if that is
    missing. Only one process may call it at a time.
    """
    try:
        if read_meta(os.path.join(root, 'c4'))['complete']:
            return 'c4'
    except UserError:
        pass  # not there, or not finished
    import prepare_c4  # here, because the prepare scripts import this file
    import prepare_text
    try:
        cfg = prepare_c4.Settings(data_dir=root)
        try:
            within(9, prepare_c4.check_reach, cfg)
        except concurrent.futures.TimeoutError:
            raise UserError('no answer within 9 seconds') from None
        print('dataset auto: preparing a small slice of C4')
        prepare_c4.prepare(cfg)
        return 'c4'
    except UserError as e:
        print(f"dataset auto: no C4 ({e}); using 'stdlib' instead, the sources of Python's standard library")
    if not os.path.isfile(os.path.join(root, 'stdlib', 'meta.json')):
        prepare_text.prepare(prepare_text.Settings(data_dir=root))
    return 'stdlib'

# ----------------------------------------------------------------------------- writing

def output_folder(root, name, pattern):
    """root/<name>, into which a prepare script writes .bin files with names like pattern (a regular expression).

    Raises UserError for a name that is not a folder's, or a folder with .bin files of the other script, because
    training would read them all as one data set.
    """
    if name in ('', '.', '..') or os.path.basename(name) != name:
        raise UserError(f"--name: '{name}' cannot name a folder in {root}/")
    folder = os.path.join(root, name)
    for file in sorted(glob.glob('*.bin', root_dir=folder)):
        if not re.fullmatch(pattern, file):
            raise UserError(f'{folder} has {file}, of a data set not made here: choose another --name')
    return folder


class TokenFile:
    """Writes one .bin file, beside and renamed, so that a file under its own name is always whole.

        with TokenFile('data/x/train.bin') as out:
            out.write(array)

    Leaving the block with an exception removes what was written. out.count is the number of tokens.
    """

    def __init__(self, path):
        self.path, self.count = path, 0
        # A name of its own, so that two processes that make the same file do not write into each other's.
        self.temporary = f'{path}.{secrets.token_hex(4)}.tmp'

    def __enter__(self):
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        self.file = open(self.temporary, 'wb')
        return self

    def write(self, tokens):
        self.file.write(np.asarray(tokens, TOKEN).tobytes())
        self.count += len(tokens)

    def __exit__(self, kind, *_):
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        if kind is not None:
            os.remove(self.temporary)
            with contextlib.suppress(OSError):  # the folder too, unless there is something else in it
                os.rmdir(os.path.dirname(self.path))
            return
        with contextlib.suppress(FileNotFoundError):  # another process made the same file first and cleaned up
            os.replace(self.temporary, self.path)
        for stale in glob.glob(glob.escape(self.path) + '.*.tmp'):  # what killed processes left of this file
            with contextlib.suppress(FileNotFoundError):
                os.remove(stale)


def write_meta(path, tokenizer, source, complete, files, **records):
    """Write meta.json of the data set's folder; tokenizer is an Encoding, files maps names to tokens.

    records: record_len and answers, where the data set has them.
    """
    meta = {'tokenizer': tokenizer.name, 'vocab_size': tokenizer.n_vocab, 'source': source, 'complete': complete,
            'files': dict(sorted(files.items())), **records}
    write_file(os.path.join(path, 'meta.json'), json.dumps(meta, indent=1))


class Progress:
    """One line that says how far a script is: redrawn on a terminal, else printed every 10 seconds.

        with Progress() as progress:
            progress.show(...)
    """

    def __init__(self):
        self.first, self.shown, self.tty = None, 0.0, sys.stderr.isatty()

    def show(self, megabytes, tokens, fraction, label=''):
        """megabytes read and tokens written so far (None: not told); fraction of the work done, 0 to 1.

        Speed and time left count from the first call, so what an earlier run did does not flatter them.
        """
        now = time.time()
        if self.first is None:
            self.first, self.shown = (now, megabytes, fraction), now
        if now - self.shown < (0.2 if self.tty else 10):
            return
        self.shown = now
        seconds, read, done = now - self.first[0], megabytes - self.first[1], fraction - self.first[2]
        left = int(seconds * max(0, 1 - fraction) / done) if done > 0 else 0
        count = '' if tokens is None else f'{tokens:,} tokens, '
        line = (f'{label}{megabytes:.1f} MB, {read / seconds:.1f} MB/s, {count}'
                + f'{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left')
        print(line.ljust(78) if self.tty else line, end='\r' if self.tty else '\n', file=sys.stderr, flush=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.tty:  # what is printed next starts on an empty line
            print(' ' * 78, end='\r', file=sys.stderr, flush=True)
