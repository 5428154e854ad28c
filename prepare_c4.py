"""Downloads C4 (the English part of allenai/c4) and turns it into token files that train.py reads.

    python prepare_c4.py                                a small slice: 10 million tokens
    python prepare_c4.py --tokens=2e9                   as many shards as that takes
    python prepare_c4.py --tokens=0 --shards=0:512      half of all; another machine takes 512:1024

Every shard that is downloaded becomes one file, data/c4/train_00000.bin and so on. Each document
ends with <|endoftext|>. Stop it at any moment and run it again: files that are there are kept, and
the unfinished one is done again. A slice ends inside a shard, so its last file holds only
part of it. That file stays as it is when you ask for more later, unless you delete it. One shard at
a time streams through, so memory stays small. To use more cores than one run does, start several
with different --shards.
"""

import gzip
import itertools
import json
import math
import re
import zlib
from dataclasses import dataclass

from data import (
    file_tokens,
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
    tokenizer = get_tokenizer(cfg.tokenizer)
    made_with = known_meta(folder).get('tokenizer', tokenizer.name)
    if made_with != tokenizer.name:
        raise UserError(
            f"{folder} was made with the tokenizer '{label(made_with)}': choose another --name, "
            'or delete it'
        )
    with files.locked(folder, shared=True):  # others may make other shards
        for split, numbers, wanted in [
            ('val', range(8), cfg.val_tokens or math.inf),
            ('train', shards, cfg.tokens or math.inf),
        ]:
            for number in numbers:
                file = f'{split}_{number:05d}.bin'
                if wanted > 0 and file not in file_tokens(folder):
                    url = f'{cfg.base_url.rstrip("/")}/{NAMES[split].format(number)}'
                    make_shard(f'{folder}/{file}', RemoteFile(url), tokenizer, wanted)
                    write_meta(folder, tokenizer, SOURCE)
                wanted -= file_tokens(folder).get(file, 0)
    print(summary(folder))


def make_shard(path, shard, tokenizer, wanted):
    """Write one token file, up to the document that reaches the tokens wanted."""
    count = 0
    progress = Progress()
    texts = documents(shard)
    with files.replacing(path) as f:
        while count < wanted and (batch := list(itertools.islice(texts, 200))):
            for ids in tokenizer.encode_ordinary_batch(batch):  # in several threads
                write_tokens(f, [*ids, tokenizer.eot_token])
                count += len(ids) + 1
                if count >= wanted:
                    break
            progress.show(f'{path}: {count:,} tokens', shard.received)


def documents(shard):
    """The texts of a shard, a gzip file with a JSON object in each line, as they arrive."""
    number = 0
    try:
        for line in gzip.open(shard):
            yield json.loads(line)['text']
            number += 1
        if number == 0:
            raise ValueError('no lines')
    except (gzip.BadGzipFile, zlib.error, EOFError, ValueError, KeyError) as e:
        raise UserError(
            f'{shard.url} is damaged after line {number} ({e}): the server has a bad copy'
        ) from None


def main():
    prepare(settings.parse(C4Config))


if __name__ == '__main__':
    settings.run(main)
