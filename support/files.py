"""Files: the one way to write them and the one way to read JSON."""

import contextlib
import fcntl
import glob
import json
import os
import secrets
import shutil
import sys

from support.settings import UserError

# ---- Writing -------------------------------------------------------------------------------------


@contextlib.contextmanager
def made(folder):
    """Make a folder and the ones above it. If the block fails, those that it made go, if empty."""
    missing = []
    above = os.path.abspath(folder)
    while not os.path.isdir(above):
        missing.append(above)
        above = os.path.dirname(above)
    try:
        for new in reversed(missing):
            os.makedirs(new, exist_ok=True)
        yield
    except BaseException:
        for new in missing:
            with contextlib.suppress(OSError):
                os.rmdir(new)
        raise


@contextlib.contextmanager
def locked(folder, shared=False):
    """Make a folder and keep it to this process while the block runs, or to all that share it.

    The lock is on the folder itself. It leaves no file behind, and ends with its process, even if
    that is killed. Raises UserError if another process has it.
    """
    with made(folder):
        fd = os.open(folder, os.O_RDONLY)
        try:
            try:
                kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
                fcntl.flock(fd, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f'{folder} is in use by another process: wait for it') from None
            except OSError:  # some network file systems have no locks
                pass
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
    part = f'{path}.{secrets.token_hex(4)}.tmp'  # two processes may write the same file
    with made(os.path.dirname(path)):
        try:
            with open(part, 'xb') as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            with contextlib.suppress(FileNotFoundError):  # another process wrote the same first
                os.replace(part, path)
        finally:
            with contextlib.suppress(OSError):
                os.remove(part)
    for stale in glob.glob(glob.escape(path) + '.*.tmp'):  # left by processes that were killed
        with contextlib.suppress(OSError):
            os.remove(stale)


@contextlib.contextmanager
def replacing_folder(path):
    """A folder to fill. It takes the place of the one at path when the block ends without an error.

        with replacing_folder('data/x') as folder:
            ...

    One process at a time fills it, see `locked`. On an error the old one stays as it was.
    """
    path = os.path.realpath(path)  # a link stays a link
    with locked(path):
        new = f'{path}.{secrets.token_hex(4)}.tmp'
        try:
            os.mkdir(new)
            yield new
            os.rename(path, f'{new}.tmp')
            os.rename(new, path)
        finally:
            # the old one, or the new one, and what processes left that were killed
            for stale in glob.glob(glob.escape(path) + '.*.tmp'):
                shutil.rmtree(stale, ignore_errors=True)


def check_output(path, ending, sign):
    """Raise UserError unless a script may write the file.

    It must have the ending and a folder that takes it. A file that it would replace must be of the
    same kind, with `sign` in its first lines.
    """
    if not path.endswith(ending):
        raise UserError(f'{path} is not a file name for this: it ends in {ending}')
    folder = os.path.dirname(os.path.abspath(path))
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    if not os.access(f'{folder}/.', os.W_OK):  # the dot: a file does not do
        raise UserError(f'cannot write {path}: {folder} is not a folder that takes files')
    if os.path.lexists(path):
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

    What is not UTF-8 becomes U+FFFD. Raises UserError where there is no such file.
    """
    if start == '-':
        return sys.stdin.buffer.read().decode('utf-8', 'replace')
    path = start.removeprefix('FILE:')
    if start == path:
        return start
    if not os.path.isfile(path):
        raise UserError(f'--start: {path} is not a file')
    with open(path, 'rb') as f:
        return f.read().decode('utf-8', 'replace')


def read_json(path, hint, **types):
    """The object in a JSON file, as a dictionary.

    types: of entries that must be there, see `misfit`. Raises UserError where the file is missing,
    unreadable or holds something else; hint, the end of the message, says what to do about it.
    """
    try:
        with open(path, encoding='utf-8') as f:
            found = json.load(f)
    except OSError as e:
        raise UserError(f'{path} is missing or cannot be read ({e.strerror}): {hint}') from None
    except (ValueError, RecursionError):
        raise UserError(f'{path} is damaged (it is not JSON): {hint}') from None
    if problem := misfit(found, types):
        raise UserError(f'{path} is damaged ({problem}): {hint}')
    return found


def misfit(found, types):
    """What is wrong with an object whose entries should be of these types, '' if it fits.

    types: {name: type}. [int] is a list of ints, (int, None) an int or null, or no entry at all.
    A float may be a whole number, but not nan or inf.
    """
    if not isinstance(found, dict):
        return 'it is not an object'
    for name, wanted in types.items():
        if not is_a(found.get(name), wanted):
            return f"'{name}' is missing or of another type"
    return ''


def is_a(value, wanted):
    """Whether a value is of the type, see `misfit`."""
    if isinstance(wanted, tuple):
        return value is None or is_a(value, wanted[0])
    if isinstance(wanted, list):
        return isinstance(value, list) and all(is_a(item, wanted[0]) for item in value)
    if isinstance(value, bool):
        return wanted is bool
    if wanted is float:
        return isinstance(value, (int, float)) and -1e300 < value < 1e300
    return isinstance(value, wanted)
