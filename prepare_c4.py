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

import gzip
import itertools
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
from support.download import Progress, RemoteFile
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
        1.0, 'the waits after failures in a row are 0, 2, 4, 8 … times these seconds, up to 120'
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
        self.cfg = cfg
        self.tokenizer = get_tokenizer(cfg.tokenizer)

    def make_split(self, split, numbers, wanted):
        """Make the token files of one split, shard by shard, until they hold the tokens wanted."""
        for number in numbers:
            path = Path(f'{self.folder}/{split}_{number:05d}.bin')
            cut = Path(f'{path}.cut')  # says that there is more in the shard
            there = file_tokens(self.folder).get(path.name, 0)
            if there < wanted and (cut.exists() or not there):
                there = self.make_shard(path, NAMES[split].format(number), wanted)
                if there < wanted:
                    cut.unlink(missing_ok=True)
            wanted -= there
            if wanted <= 0:
                return

    def make_shard(self, path, name, wanted):
        """Write one token file, up to the document that reaches the tokens wanted.

        Returns the tokens written.
        """
        cfg = self.cfg
        url = f'{cfg.base_url.rstrip("/")}/{name}'
        shard = RemoteFile(url, cfg.retries, cfg.backoff, cfg.timeout)
        count = 0
        progress = Progress()
        with files.replacing(path) as f:
            for tokens in self.tokenize(shard):
                write_tokens(f, tokens)
                count += len(tokens)
                progress.show(f'{path.name}: {count:,} tokens', shard.received)
                if count >= wanted:
                    break
            # Before the file gets its name: the folder's tokenizer is on record, and a part never
            # passes for the whole.
            self.update_meta()
            if count >= wanted:
                Path(f'{path}.cut').touch()
        self.update_meta()  # the file may be longer than before
        return count

    def update_meta(self, complete=False):
        """Write meta.json. complete: once any run has done all that it was asked."""
        complete = complete or known_meta(self.folder).get('complete', False)
        write_meta(self.folder, self.tokenizer, SOURCE, complete)

    def tokenize(self, shard):
        """The tokens of a shard's documents, a list each, in their order."""
        # threads are enough, as the tokenizer works outside of Python's lock
        threads = self.cfg.processes or min(os.cpu_count(), 16)
        texts = documents(shard)
        while batch := list(itertools.islice(texts, 200)):
            for tokens in self.tokenizer.encode_ordinary_batch(batch, num_threads=threads):
                tokens.append(self.tokenizer.eot_token)
                yield tokens


def documents(shard):
    """The texts of a shard, a gzip file with a JSON object in each line, as they arrive."""
    number = 0
    try:
        for line in gzip.open(shard):
            found = json.loads(line)
            if files.misfit(found, {'text': str}):
                raise ValueError('no "text"')
            yield found['text']
            number += 1
        if number == 0:
            raise ValueError('no lines')
    except (gzip.BadGzipFile, zlib.error, EOFError, ValueError, RecursionError) as e:
        raise UserError(
            f'{shard.url} is damaged after line {number} ({e}): the server has a bad copy'
        ) from None


def main():
    prepare(settings.parse(C4Config))


if __name__ == '__main__':
    settings.run(main)
