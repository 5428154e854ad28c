"""Turn local text into token files that train.py reads.

    python prepare_text.py                                      the offline default, data/stdlib
    python prepare_text.py notes/ book.txt --name=mine          all of a folder, and one more file
    python prepare_text.py src/ --ext=.py,.md --tokenizer=bytes
    python prepare_text.py notes/ --tokenizer=out/smollm2       that of a Hugging Face folder

A document is a file, and ends with <|endoftext|>. Files that cannot be read as UTF-8 text are
skipped and counted, hidden ones left out. About 1 document in 30 is for validation, chosen by a
hash of its path inside the folder named, so the same files give the same split on every machine. A
single file is cut at a line: its last thirtieth is for validation. Without an argument the text is
the .py sources of Python's own standard library (without its tests), in bytes.
"""

import hashlib
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from data import get_tokenizer, known_meta, new_dataset, output_folder, summary, write_tokens
from support import settings
from support.download import Progress
from support.settings import UserError, option

VAL_ONE_IN = 30
BLOCK = 1 << 20  # bytes of a file that are in memory at a time
NOT_STDLIB = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test'}


@dataclass
class TextConfig:
    paths: list = option([], 'files and folders, written without dashes')
    name: str = option('', "data set's name; '': that of the first path, 'stdlib' without paths")
    tokenizer: str = option(
        '', "gpt2, gpt2:N (N tokens), bytes, or a Llama's folder; '': gpt2, bytes without paths"
    )
    ext: str = option('', "only files in folders with these endings, as .py,.md; '': all")
    data_dir: str = option('data', 'the data set goes into <data_dir>/<name>')


def prepare(cfg):
    """Write <data_dir>/<name>: train.bin, val.bin and meta.json.

    A data set of that name made from text before is replaced, once the new one is whole. Raises
    UserError for a path that is missing, text that is empty or too short to split, a bad name, or a
    folder that holds anything else.
    """
    if cfg.paths:
        found = list_documents(cfg.paths, tuple(cfg.ext.strip(',').split(',')))
        source = ', '.join(cfg.paths)
        name = cfg.name or Path(cfg.paths[0]).resolve().stem
        tokenizer = cfg.tokenizer or 'gpt2'
    else:
        found = stdlib_documents()
        source = f'standard library of Python {sysconfig.get_python_version()}'
        name = cfg.name or 'stdlib'
        tokenizer = cfg.tokenizer or 'bytes'
    tokenizer = get_tokenizer(tokenizer)
    folder = output_folder(cfg.data_dir, name)
    documents = [document for document in found if is_text(document[1])]
    pieces = split_documents(documents, source)
    done = 0
    progress = Progress()
    with new_dataset(folder, tokenizer, source) as (train, val):
        for n, (file, begin, end, is_val) in enumerate(pieces):
            progress.show(f'{n:,} of {len(pieces):,} files', done)
            out = val if is_val else train
            for text in read_blocks(file, begin, end):
                write_tokens(out, tokenizer.encode_ordinary(text))
            write_tokens(out, [tokenizer.eot_token])
            done += end - begin
    text = f'{summary(folder)} from {len(documents):,} file(s)'
    skipped = len(found) - len(documents)
    if skipped:
        text += f', {skipped:,} skipped that cannot be read as text'
    print(text)


def provide(name):
    """Prepare the data set 'stdlib', which needs no network, where it is missing."""
    if name == 'stdlib' and not known_meta('data/stdlib'):
        prepare(TextConfig())


def list_documents(paths, endings):
    """[(path relative to the folder named, file)], sorted, without hidden and empty files."""
    found = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"'{path}' does not exist")
        if path.is_file():
            found.append((path.name, path))
        for file in path.rglob('*'):
            key = file.relative_to(path).as_posix()
            hidden = '/.' in f'/{key}'
            if key.endswith(endings) and not hidden and file.is_file():
                found.append((key, file))
    return [(key, file) for key, file in sorted(found) if file.stat().st_size]


def stdlib_documents():
    """The standard library's own modules, without the tests, which are half of it."""
    found = list_documents([sysconfig.get_path('stdlib')], '.py')
    return [d for d in found if not NOT_STDLIB.intersection(d[0].split('/'))]


def split_documents(documents, source):
    """[(file, first byte, end, is for validation)]. Both splits get something."""
    if not documents:
        raise UserError(
            f'{source}: no text there: files are empty, not UTF-8 or of other endings than --ext'
        )
    if len(documents) == 1:
        return cut_at_a_line(documents[0][1], source)
    hashes = [hash_of(key) for key, _ in documents]
    chosen = [number % VAL_ONE_IN == 0 for number in hashes]
    if len(set(chosen)) == 1:  # few documents: the one with the lowest hash
        chosen = [False] * len(hashes)
        chosen[hashes.index(min(hashes))] = True
    return [
        (file, 0, os.path.getsize(file), is_val) for (_, file), is_val in zip(documents, chosen)
    ]


def hash_of(key):
    """A number that is the same on every machine."""
    return int(hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()[:16], 16)


def cut_at_a_line(file, source):
    """The same of a single file: its last thirtieth, from a line's start, is for validation."""
    size = os.path.getsize(file)
    with open(file, 'rb') as f:
        f.seek(size - size // VAL_ONE_IN)
        f.readline()
        cut = f.tell()
    if cut == size:
        raise UserError(f'{source}: no line ends in its last thirtieth, which is for validation')
    return [(file, 0, cut, False), (file, cut, size, True)]


def read_blocks(path, begin, end):
    """The bytes from begin to end as text, in blocks of whole lines, whatever the file's size."""
    with open(path, 'rb') as f:
        f.seek(begin)
        while block := b''.join(f.readlines(BLOCK))[: end - begin]:
            begin += len(block)
            yield block.decode()


def is_text(path):
    """Whether the whole file is UTF-8 without zero bytes, which only binary files have."""
    try:
        return not any('\0' in block for block in read_blocks(path, 0, os.path.getsize(path)))
    except (OSError, UnicodeDecodeError):
        return False


def main():
    prepare(settings.parse(TextConfig, positional='paths'))


if __name__ == '__main__':
    settings.run(main)
