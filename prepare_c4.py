"""Downloads C4 (the English part of allenai/c4) and turns it into token files that train.py reads.

    python prepare_c4.py                                a small slice: 10 million tokens
    python prepare_c4.py --tokens=2e9                   as many shards as that takes
    python prepare_c4.py --tokens=0 --shards=0:512      half of all; another machine takes 512:1024

Every shard that is downloaded becomes one file, data/c4/train_00000.bin and so on. Each document
ends with <|endoftext|>. Stop it at any moment and run it again: finished shards are kept, the
unfinished one is done again, and the files are the same as those of an uninterrupted run. A file
that holds only the beginning of its shard has a .cut file beside it, and is made again when you ask
for more. Every run makes the validation files that are missing. One shard at a time streams
through, so memory stays small. To use more cores than one run does, start several with different
--shards.
"""

import json
import math
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

from data import (
    file_tokens,
    full_name,
    get_tokenizer,
    known_meta,
    label,
    output_folder,
    summary,
    write_meta,
    write_tokens,
)
from support import files, settings
from support.download import Progress, Server
from support.settings import UserError, option

TRAIN_SHARDS = 1024
NAMES = {
    'train': 'c4-train.{:05d}-of-01024.json.gz',
    'val': 'c4-validation.{:05d}-of-00008.json.gz',
}
SOURCE = 'C4, en (allenai/c4)'
HUB = 'https://huggingface.co/datasets/allenai/c4/resolve/main/en'


@dataclass
class C4Config:
    tokens: int = option(
        10_000_000, 'training tokens, up to the end of a document; 0: all of --shards', high=10**13
    )
    val_tokens: int = option(
        500_000, "validation tokens, likewise; 0: all of C4's validation set", high=10**13
    )
    shards: str = option('0:1024', 'training shards to take from, first:end; a range per machine')
    base_url: str = option(HUB, 'folder of the shards')
    data_dir: str = option('data', 'the data set goes into <data_dir>/<name>')
    name: str = option('c4', "the data set's name")
    tokenizer: str = option('gpt2', "gpt2, gpt2:N (N tokens), bytes, or a Llama's folder")
    processes: int = option(0, 'threads that tokenize; 0: one for each core, at most 16')
    retries: int = option(8, 'failures in a row of one download before giving up')
    backoff: float = option(
        1.0, 'seconds to wait after the first failure; doubles with each, up to 60'
    )
    timeout: float = option(30.0, 'seconds without a byte that count as a failure', low=1e-3)


def prepare(cfg):
    """Download and tokenize what is missing of <data_dir>/<name>.

    Raises UserError if a setting is wrong, the server or the tokenizer is out of reach, a shard is
    damaged, or the folder holds another data set.
    """
    folder = output_folder(cfg.data_dir, cfg.name, r'(train|val)_\d{5}\.bin', SOURCE)
    match = re.fullmatch(r'(\d+):(\d+)', cfg.shards)
    if not match or not int(match[1]) < int(match[2]) <= TRAIN_SHARDS:
        raise UserError(
            f"--shards: '{cfg.shards}' is not first:end with 0 <= first < end <= {TRAIN_SHARDS}"
        )
    shards = range(int(match[1]), int(match[2]))
    tokenizer = full_name(cfg.tokenizer)
    made_with = known_meta(folder).get('tokenizer', tokenizer)
    if made_with != tokenizer:
        raise UserError(
            f"{folder} was made with the tokenizer '{label(made_with)}': choose another --name, "
            'or delete it'
        )
    preparation = Preparation(folder, cfg)
    with files.locked(folder, shared=True):  # others may make other shards
        preparation.make_split('val', range(8), cfg.val_tokens or math.inf)
        preparation.make_split('train', shards, cfg.tokens or math.inf)
        preparation.update_meta(complete=True)
    print(summary(folder))


class Preparation:
    """Makes the token files of a folder, one after the other, from the shards on a server."""

    def __init__(self, folder, cfg):
        self.folder = folder
        self.server = Server(cfg.base_url, cfg.retries, cfg.backoff, cfg.timeout)
        self.tokenizer = get_tokenizer(cfg.tokenizer)
        # threads are enough, as the tokenizer works outside of Python's lock
        self.threads = cfg.processes or min(os.cpu_count(), 16)

    def make_split(self, split, numbers, wanted):
        """Make the token files of one split, shard by shard, until they hold the tokens wanted."""
        for number in numbers:
            if wanted <= 0:
                return
            path = Path(f'{self.folder}/{split}_{number:05d}.bin')
            cut = Path(f'{path}.cut')
            if path.exists():
                there = path.stat().st_size // 2
                if there >= wanted or not cut.exists():
                    wanted -= there
                    continue
            wanted -= self.make_shard(path, cut, NAMES[split].format(number), wanted)

    def make_shard(self, path, cut, name, wanted):
        """Write one token file, up to the document that reaches the tokens wanted.

        cut: a file that says that there is more in the shard. Returns the tokens written.
        """
        count = 0
        with files.replacing(path) as f, Progress() as progress:
            for tokens in self.tokenize(name):
                write_tokens(f, tokens)
                count += len(tokens)
                progress.show(
                    f'{path.name}: {count:,} tokens, ', self.server.received, count / wanted
                )
                if count >= wanted:
                    break
            if count == 0:
                raise UserError(f'{name} has no documents: check --base_url')
            # Before the file gets its name: the folder's tokenizer is on record, and a part never
            # passes for the whole.
            self.update_meta()
            if count >= wanted:
                cut.touch()
        if count < wanted:
            cut.unlink(missing_ok=True)
        return count

    def tokenize(self, name):
        """The tokens of a shard's documents, a list each, in their order."""
        for first, lines in read_lines(name, self.server):
            texts = []
            for number, line in enumerate(lines, first):
                try:
                    text = json.loads(line)['text']
                except (ValueError, KeyError, TypeError, RecursionError):
                    text = None
                if not isinstance(text, str):
                    raise UserError(
                        f'{name}, line {number}: no JSON with a "text", the server has a damaged '
                        'file'
                    )
                texts.append(text)
            for tokens in self.tokenizer.encode_ordinary_batch(texts, num_threads=self.threads):
                tokens.append(self.tokenizer.eot_token)
                yield tokens

    def update_meta(self, complete=False):
        """Write meta.json for the files that are there.

        complete: once any run has done all that it was asked. Processes that share the folder write
        it in any order: each looks again after writing, and whoever writes last has seen the files
        of all.
        """
        while True:
            meta = known_meta(self.folder)
            complete = complete or meta.get('complete', False)
            if meta.get('files') == file_tokens(self.folder) and meta['complete'] == complete:
                return
            write_meta(self.folder, self.tokenizer, SOURCE, complete)


def read_lines(name, server):
    """The lines of a gzip file on the server, unpacked as they arrive.

    Yields some lines at a time, with the number of the first of them.
    """
    gunzip = None
    rest = b''
    number = 1
    try:
        for chunk in server.read(name):
            while chunk:
                gunzip = gunzip or zlib.decompressobj(wbits=31)  # 31: gzip
                rest += gunzip.decompress(chunk)
                chunk = gunzip.unused_data
                if gunzip.eof:  # a gzip file may have several members, one after the other
                    gunzip = None
            *lines, rest = rest.split(b'\n')
            yield number, lines
            number += len(lines)
    except zlib.error as e:
        raise UserError(
            f'{name}: bad gzip after line {number - 1} ({e}): the server has a damaged file'
        ) from None
    if gunzip:
        raise UserError(
            f'{name}: gzip ends in the middle, after line {number - 1}: '
            'the server has a damaged file'
        )
    if rest:
        yield number, [rest]


def main():
    prepare(settings.parse(C4Config))


if __name__ == '__main__':
    settings.run(main)
