"""Turns local text into token files that train.py reads.

    python prepare_text.py                                      the offline default, data/stdlib
    python prepare_text.py notes/ book.txt --name=mine          every file of a folder, and one more
    python prepare_text.py src/ --ext=.py,.md --tokenizer=bytes

A document is a file, and ends with <|endoftext|>. Files that are not UTF-8 text are skipped and counted; so
are those that cannot be read. Data sets in a folder are left out.
About 1 document in 30 is for validation, chosen by a hash of its path inside the folder named, so the same
files give the same split on every machine. A single file is cut at a line: its last thirtieth is for validation.
Without an argument the text is the .py sources of Python's own standard library (without its tests), in bytes.
"""
import hashlib
import os
import sysconfig
from dataclasses import dataclass, field

from data import TokenFile, get_tokenizer, known_meta, output_folder, write_meta
from support import settings
from support.download import Progress
from support.files import replacing_folder
from support.settings import UserError

VAL_ONE_IN = 30


@dataclass
class TextConfig:
    paths: list = field(default_factory=list)  # files and folders, written without dashes
    name: str = ''                  # data set's name; '' = the name of the first path, 'stdlib' without paths
    tokenizer: str = ''             # gpt2, gpt2:N (N tokens, for small models) or bytes; '' = gpt2, bytes without paths
    ext: str = ''                   # only files in folders with these endings, as .py,.md; '' = all
    data_dir: str = 'data'          # the data set goes into <data_dir>/<name>


def prepare(cfg):
    """Write <data_dir>/<name>: train.bin, val.bin and meta.json. Returns the name.

    A data set of that name made from text before is replaced, once the new one is whole. Raises UserError for a path
    that is missing, text that is empty or too short to split, a bad name, or a folder that holds anything else.
    """
    paths, ext = cfg.paths, tuple(e for e in cfg.ext.split(',') if e)
    name = cfg.name or (os.path.splitext(os.path.basename(os.path.abspath(paths[0])))[0] if paths else 'stdlib')
    folder = output_folder(cfg.data_dir, name)
    tokenizer = get_tokenizer(cfg.tokenizer or ('gpt2' if paths else 'bytes'))
    source = ', '.join(paths) or f'standard library of Python {sysconfig.get_python_version()}'
    try:
        found, unreadable = list_documents(paths, ext) if paths else stdlib_documents()
        documents = [(file, key) for file, key in found if is_text(file)]
        pieces = split_documents(documents, source)
        total, done = sum(end - begin for _, begin, end, _ in pieces), 0
        with replacing_folder(folder) as new:
            train, val = (TokenFile(os.path.join(new, f'{split}.bin')) for split in ('train', 'val'))
            with train, val, Progress() as progress:
                for path, begin, end, is_val in pieces:
                    out = val if is_val else train
                    for text in read_blocks(path, begin, end):
                        out.write(tokenizer.encode_ordinary(text))
                    out.write([tokenizer.eot_token])
                    done += end - begin
                    progress.show(done / 1e6, train.count + val.count, done / total)
            write_meta(new, tokenizer, source, True, {'train.bin': train.count, 'val.bin': val.count})
    except OSError as e:
        raise UserError(f'{e.filename or folder}: {e.strerror}') from None
    except UnicodeDecodeError:
        raise UserError(f'{path} changed while it was read: run it again') from None
    skipped = len(found) - len(documents)
    print(f'{folder}: {train.count:,} train and {val.count:,} val tokens ({tokenizer.name}) from '
          f'{len(documents):,} file(s)' + (f', {skipped:,} not text skipped' if skipped else '')
          + (f', {unreadable:,} file(s) and folder(s) not readable skipped' if unreadable else ''))
    return name


def list_documents(paths, ext):
    """[(file, its path relative to the folder named)] in a fixed order; how many files and folders are not readable.

    Without hidden and empty files, and data sets that lie in a folder; a file that has several names counts once.
    """
    found, unreadable = {}, []
    for path in paths:
        if not os.path.exists(path):
            raise UserError(f"'{path}' does not exist")
        if os.path.isdir(path):
            for folder, folders, files in os.walk(path, onerror=unreadable.append):
                folders[:] = [f for f in folders if not f.startswith('.') and not known_meta(os.path.join(folder, f))]
                for file in (os.path.join(folder, f) for f in files if not f.startswith('.')):
                    if not ext or file.endswith(ext):
                        key = os.path.relpath(file, path).replace(os.sep, '/')
                        found.setdefault(os.path.realpath(file), (file, key))
        else:
            found.setdefault(os.path.realpath(path), (path, os.path.basename(path)))
    found = [(file, key) for file, key in found.values() if os.path.isfile(file) and os.path.getsize(file)]
    readable = [(file, key) for file, key in found if os.access(file, os.R_OK)]
    return (sorted(readable, key=lambda document: (document[1], document[0])),
            len(unreadable) + len(found) - len(readable))


def stdlib_documents():
    """The standard library's own modules: not what pip installed beside them, and not the tests (half of it)."""
    outside = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test'}
    found, unreadable = list_documents([sysconfig.get_path('stdlib')], ('.py',))
    return [(file, key) for file, key in found if not outside & set(key.split('/'))], unreadable


def split_documents(documents, source):
    """[(file, first byte, end, is for validation)]; both splits get something."""
    if not documents:
        raise UserError(f'{source}: no text there: files are empty, not UTF-8 or of other endings than --ext')
    sizes = [os.path.getsize(file) for file, _ in documents]
    if len(documents) == 1:
        file = documents[0][0]
        cut = sizes[0] - max(1, sizes[0] // VAL_ONE_IN)
        with open(file, 'rb') as f:
            f.seek(cut)
            after = cut + len(f.readline())  # the end of the line that the cut falls in
            if after == sizes[0]:  # it is the last line: go back to its start
                f.seek(0)
                after = f.read(cut).rfind(b'\n') + 1
        if after == 0:
            raise UserError(f'{source}: one line of text cannot be split into training and validation, it needs two')
        return [(file, 0, after, False), (file, after, sizes[0], True)]
    hashes = [hashlib.sha256(key.encode('utf-8', 'surrogateescape')).digest() for _, key in documents]
    chosen = [int.from_bytes(h[:8], 'big') % VAL_ONE_IN == 0 for h in hashes]
    if not any(chosen) or all(chosen):  # few documents: the one with the lowest hash
        chosen = [i == hashes.index(min(hashes)) for i in range(len(hashes))]
    return [(file, 0, size, is_val) for (file, _), size, is_val in zip(documents, sizes, chosen)]


def read_blocks(path, begin, end):
    """The bytes from begin to end as text, in blocks of whole lines of about 1 MB, whatever the file's size."""
    with open(path, 'rb') as f:
        f.seek(begin)
        while begin < end and (block := f.read(min(1 << 20, end - begin))):
            if begin + len(block) < end:
                block += f.readline()  # up to the end of the line, so that no character is cut
            begin += len(block)
            yield block.decode()


def is_text(path):
    """Whether the whole file is UTF-8 without zero bytes, which only binary files have."""
    try:
        return not any('\0' in block for block in read_blocks(path, 0, os.path.getsize(path)))
    except UnicodeDecodeError:
        return False


def main():
    prepare(settings.parse(TextConfig, positional='paths'))


if __name__ == '__main__':
    settings.run(main)
