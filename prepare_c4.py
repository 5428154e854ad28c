"""Downloads C4 (the English part of allenai/c4) and turns it into token files that train.py reads.

    python prepare_c4.py                                    a small slice: 10 million tokens of the first shard
    python prepare_c4.py --tokens=2e9                       as many shards as that takes
    python prepare_c4.py --tokens=0 --shards=0:512          half of all shards; another machine takes 512:1024

Every shard that is downloaded becomes one file, data/c4/train_00000.bin and so on; each document ends with
<|endoftext|>. Stop it at any moment and run it again: finished shards are kept, the unfinished one is done
again, and the files are the same as those of an uninterrupted run. A file that holds only the beginning of its
shard has a .cut file beside it, and is made again when you ask for more. Every run makes the validation files
that are missing. One shard at a time streams through, so memory stays small.
"""
import collections
import concurrent.futures
import contextlib
import json
import math
import multiprocessing
import os
import re
import signal
import threading
import zlib
from dataclasses import dataclass

import numpy as np

from data import TokenFile, get_tokenizer, known_meta, output_folder, write_meta
from support import files, settings
from support.download import Progress, Server
from support.settings import UserError

TRAIN_SHARDS, VAL_SHARDS = 1024, 8
SOURCE = 'C4, en (allenai/c4)'
BLOCK, LONGEST_LINE = 1 << 20, 1 << 25  # bytes of text that are unpacked at a time; C4's longest line has a few MB
BATCH_BYTES = 1 << 18  # text that a process tokenizes at a time; small, so that a slice reads little too much


@dataclass
class C4Config:
    # how much
    tokens: int = 10_000_000        # training tokens, up to the end of a document; 0 = all of --shards [0 to 1e13]
    val_tokens: int = 500_000       # validation tokens, likewise; 0 = all of C4's validation set [0 to 1e13]
    shards: str = '0:1024'          # training shards to take from, first:end; give each machine a range of its own
    # where
    base_url: str = 'https://huggingface.co/datasets/allenai/c4/resolve/main/en'  # folder of the shards
    data_dir: str = 'data'          # the data set goes into <data_dir>/<name>
    name: str = 'c4'                # the data set's name
    # how
    tokenizer: str = 'gpt2'         # gpt2, gpt2:N (N tokens, for small models) or bytes
    processes: int = 0              # processes that tokenize; 0 = one per core, at most 16 [0 to 1000]
    retries: int = 8                # failures in a row of one download before giving up [0 to 1000]
    backoff: float = 1.0            # seconds to wait after the first failure; doubles with each, up to 60 [0 to 3600]
    timeout: float = 30.0           # seconds without a byte that count as a failure [above 0 to 3600]


def prepare(cfg):
    """Download and tokenize what is missing of <data_dir>/<name>. Returns the name.

    Raises UserError if a setting is wrong, the server or the tokenizer is out of reach, a shard is damaged,
    the disk is full, or the folder holds another data set.
    """
    folder = output_folder(cfg.data_dir, cfg.name, r'(train|val)_\d{5}\.bin')
    shards = parse_range(cfg.shards)
    made_with = known_meta(folder).get('tokenizer', cfg.tokenizer)
    if made_with != cfg.tokenizer:
        raise UserError(f"{folder} was made with the tokenizer '{made_with}': choose another --name, or delete it")
    server = Server(cfg.base_url, cfg.retries, cfg.backoff, cfg.timeout)
    with files.locked(folder, shared=True):         # several processes may fill it, each with other shards
        meta = fill(folder, cfg, shards, server)
    train, val = (sum(n for file, n in meta['files'].items() if file.startswith(split)) for split in ('train', 'val'))
    print(f'{folder}: {train:,} train and {val:,} val tokens ({cfg.tokenizer})')
    return cfg.name


def fill(folder, cfg, shards, server):
    """Make the files that are missing; returns what meta.json then holds."""
    workers = Workers(cfg)
    try:
        make_split(folder, 'val', range(VAL_SHARDS), cfg.val_tokens or math.inf, server, workers)
        make_split(folder, 'train', shards, cfg.tokens or math.inf, server, workers)
        return update_meta(folder, workers.tokenizer, complete=True)
    except OSError as e:
        raise UserError(f'{e.filename or folder}: {e.strerror}') from None
    except concurrent.futures.BrokenExecutor:
        raise UserError('a tokenizing process died, perhaps for lack of memory: try fewer --processes') from None
    finally:
        workers.close()


def parse_range(text):
    """range(first, end) from 'first:end'."""
    match = re.fullmatch(r'(\d+):(\d+)', text)
    if not match or not int(match[1]) < int(match[2]) <= TRAIN_SHARDS:
        raise UserError(f"--shards: '{text}' is not first:end with 0 <= first < end <= {TRAIN_SHARDS}")
    return range(int(match[1]), int(match[2]))


def shard_file(split, number):
    """The name of a shard on the server."""
    return (f'c4-train.{number:05d}-of-{TRAIN_SHARDS:05d}.json.gz' if split == 'train' else
            f'c4-validation.{number:05d}-of-{VAL_SHARDS:05d}.json.gz')

# ----------------------------------------------------------------------------- files

def make_split(folder, split, numbers, wanted, server, workers):
    """Make the token files of one split, shard by shard, until they hold the tokens wanted."""
    have = 0
    with Progress() as progress:
        for i, number in enumerate(numbers):
            if have >= wanted:
                return
            path = os.path.join(folder, f'{split}_{number:05d}.bin')
            there = os.path.getsize(path) // 2 if os.path.exists(path) else 0
            if there and (there >= wanted - have or not os.path.exists(path + '.cut')):
                have += there
                continue

            def show(count):
                fraction = (have + count) / wanted if wanted < math.inf else (i + server.place) / len(numbers)
                progress.show(server.megabytes, have + count, fraction, f'{split} {number}: ')

            have += make_shard(path, shard_file(split, number), wanted - have, server, workers, show)
            update_meta(folder, workers.tokenizer)


def make_shard(path, name, wanted, server, workers, show):
    """Write one token file, up to the document that brings it to the tokens wanted; returns its tokens."""
    cut = False
    with TokenFile(path) as out:
        for tokens in workers.tokenize(name, read_lines(name, server)):
            ends = np.flatnonzero(tokens == workers.tokenizer.eot_token) + 1
            last = np.searchsorted(ends, wanted - out.count)  # the first document that reaches it
            cut = last < len(ends)
            out.write(tokens[:ends[last]] if cut else tokens)
            show(out.count)
            if cut:
                break
        if out.count == 0:
            raise UserError(f'{name} has no documents: check --base_url')
        # Before the file gets its name: the folder's tokenizer is on record, a part never passes for the whole.
        update_meta(os.path.dirname(path), workers.tokenizer)
        if cut:
            open(path + '.cut', 'w').close()
    if not cut:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path + '.cut')
    return out.count


def update_meta(folder, tokenizer, complete=False):
    """Write meta.json for the files that are there; complete once any run has done all that it was asked.

    Processes that share the folder write it in any order: each looks again after writing, and whoever
    writes last has seen the files of all.
    """
    while True:
        old = known_meta(folder)
        files = {file: os.path.getsize(os.path.join(folder, file)) // 2
                 for file in os.listdir(folder) if file.endswith('.bin')}
        if old.get('files') == files and old['complete'] >= complete:
            return old
        write_meta(folder, tokenizer, SOURCE, complete or old.get('complete', False), files)

# ----------------------------------------------------------------------------- tokenizing

class Workers:
    """Processes that tokenize JSON lines."""

    def __init__(self, cfg):
        self.tokenizer = get_tokenizer(cfg.tokenizer)
        self.count = cfg.processes or min(os.cpu_count(), 16)
        self.pool = concurrent.futures.ProcessPoolExecutor(self.count, multiprocessing.get_context('spawn'),
                                                           start_worker, (cfg.tokenizer,))

    def tokenize(self, name, lines):
        """Tokens of the lines, in their order, an array for each batch of lines.

        At most two batches for each process are under way, so that neither memory nor what is read too much
        for a slice grows with the shard. (The pool's own map would read the whole shard first.)
        """
        pending = collections.deque()
        batch, size, first = [], 0, 1
        for line in lines:
            batch.append(line)
            size += len(line)
            if size >= BATCH_BYTES:
                pending.append(self.submit(name, first, batch))
                batch, size, first = [], 0, first + len(batch)
                if len(pending) >= 2 * self.count:
                    yield pending.popleft().result()
        if batch:
            pending.append(self.submit(name, first, batch))
        while pending:
            yield pending.popleft().result()

    def submit(self, *batch):
        """Have encode_lines called in one of the processes; returns the future.

        A process that this starts inherits that Ctrl-C is ignored: it is the parent's to handle.
        """
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return self.pool.submit(encode_lines, *batch)
        finally:
            signal.signal(signal.SIGINT, handler)

    def close(self):
        """End the processes."""
        self.pool.shutdown(cancel_futures=True)


def start_worker(tokenizer_name):
    """Begin a tokenizing process, which ends when its parent is gone, even killed."""
    global worker_tokenizer
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    worker_tokenizer = get_tokenizer(tokenizer_name)


def encode_lines(name, first, lines):
    """The tokens of some JSON lines, as one uint16 array; first is the number of the first line."""
    tokens = []
    for number, line in enumerate(lines, first):
        try:
            tokens += worker_tokenizer.encode_ordinary(json.loads(line)['text'])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f'{name}, line {number}: no JSON with a "text", the server has a damaged file') from None
        tokens.append(worker_tokenizer.eot_token)
    return np.array(tokens, np.uint16)

# ----------------------------------------------------------------------------- downloading

def read_lines(name, server):
    """The lines of a gzip file on the server, decompressed as it arrives."""
    gunzip, rest, count = None, b'', 0
    try:
        for chunk in server.read(name):
            more = True
            while more:
                gunzip = gunzip or zlib.decompressobj(wbits=31)  # 31: gzip
                text = gunzip.decompress(chunk, BLOCK)  # not more at a time, whatever the chunk unpacks to
                chunk = gunzip.unconsumed_tail or gunzip.unused_data
                more = chunk or len(text) == BLOCK
                if gunzip.eof:  # a gzip file may have several members, one after the other
                    gunzip, more = None, chunk
                *lines, rest = (rest + text).split(b'\n')
                count += len(lines)
                yield from lines
                if len(rest) > LONGEST_LINE:
                    raise UserError(f'{name}, line {count + 1} has more than {LONGEST_LINE:,} bytes: '
                                    'the server has a damaged file')
    except zlib.error as e:
        raise UserError(f'{name}: bad gzip after line {count} ({e}): the server has a damaged file') from None
    if gunzip:
        raise UserError(f'{name}: gzip ends in the middle, after line {count}: the server has a damaged file')
    if rest:
        yield rest


def main():
    prepare(settings.parse(C4Config))


if __name__ == '__main__':
    settings.run(main)
