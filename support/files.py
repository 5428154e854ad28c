"""Files: the one way to write them and the one way to read JSON."""

import contextlib
import fcntl
import glob
import json
import os
import shutil
import sys

from support.settings import UserError

# ---- Writing -------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(folder, shared=False):
    """Make a folder and keep it to this process while the block runs, or to all that share it.

    The lock is on the folder itself. It leaves no file behind, and ends with its process, even if
    that is killed. Raises UserError if another process has it.
    """
    os.makedirs(folder, exist_ok=True)
    fd = os.open(folder, os.O_RDONLY)
    try:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f'{folder} is in use by another process: wait for it') from None
    except OSError:  # some network file systems have no locks
        pass
    try:
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def replacing(path):
    """A binary file to write. It gets its name when the block ends without an error, whole.

        with replacing('out/x/ckpt.pt') as f:
            f.write(b'...')

    Makes the folder. On an error it removes what it made. Raises OSError where writing fails.
    """
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    part = f'{path}.{os.getpid()}.tmp'  # two processes may write the same file
    try:
        with open(part, 'wb') as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        with contextlib.suppress(FileNotFoundError):  # another process wrote the same first
            os.replace(part, path)
    finally:
        # this one after an error, and what processes left that were killed
        for stale in glob.glob(glob.escape(path) + '.*.tmp'):
            with contextlib.suppress(FileNotFoundError):
                os.remove(stale)


@contextlib.contextmanager
def replacing_folder(path):
    """A folder to fill. It takes the place of the one at path when the block ends without an error.

        with replacing_folder('data/x') as folder:
            ...

    One process at a time fills it, see `locked`. On an error the old one stays as it was.
    """
    path = os.path.realpath(path)  # a link stays a link
    new = f'{path}.new.tmp'
    old = f'{path}.old.tmp'
    with locked(path):
        shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
        os.mkdir(new)
        try:
            yield new
            shutil.rmtree(old, ignore_errors=True)
            os.rename(path, old)
            os.rename(new, path)
        finally:
            if not os.path.isdir(path):  # stopped between the two
                os.rename(old, path)
            shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def check_output(path, ending, sign):
    """Raise UserError unless a script may write the file.

    It must have the ending. A file that it would replace must be of the same kind, with `sign` in
    its first lines.
    """
    if not path.endswith(ending):
        raise UserError(f'{path} is not a file name for this: it ends in {ending}')
    if os.path.exists(path):
        with open(path, 'rb') as f:
            if sign.encode() not in f.read(4096):
                raise UserError(f'{path} was not written by this script: choose another name')


def write_file(path, content):
    """Write content, which is text or bytes, as `replacing` does; UserError where writing fails."""
    if isinstance(content, str):
        content = content.encode()
    try:
        with replacing(str(path)) as f:
            f.write(content)
    except OSError as e:
        raise UserError(f'cannot write {path}: {e.strerror or e}') from None


# ---- Reading -------------------------------------------------------------------------------------


def read_text(start):
    """The text of a setting `start`: text itself, FILE:path, or - for standard input.

    What is not UTF-8 becomes U+FFFD. Raises OSError where there is no such file.
    """
    path = start.removeprefix('FILE:')
    if start == '-':
        content = sys.stdin.buffer.read()
    elif start == path:
        return start
    else:
        with open(path, 'rb') as f:
            content = f.read()
    return content.decode('utf-8', 'replace')


def read_json(path, hint, **types):
    """The object in a JSON file, as a dictionary.

    types: of entries that must be there; one that is int | None may be missing. Raises UserError
    where the file is missing, unreadable or holds something else; hint, the end of the message,
    says what to do about it.
    """
    try:
        with open(path, encoding='utf-8') as f:
            found = json.load(f)
    except OSError as e:
        raise UserError(f'{path} is missing or cannot be read ({e.strerror}): {hint}') from None
    except (ValueError, RecursionError):
        raise UserError(f'{path} is damaged (it is not JSON): {hint}') from None
    if not isinstance(found, dict):
        raise UserError(f'{path} is damaged (it is not an object): {hint}')
    for name, wanted in types.items():
        if not isinstance(found.get(name), wanted):
            raise UserError(f"{path} is damaged ('{name}' is missing or of another type): {hint}")
    return found
