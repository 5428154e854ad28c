"""Files: the one way to write them and the one way to read JSON."""

import contextlib
import glob
import json
import os
import secrets
import shutil
import sys

from support.settings import UserError

try:
    import fcntl
except ImportError:  # Windows: two processes may then write to one folder
    fcntl = None

# ---- Writing -------------------------------------------------------------------------------------


@contextlib.contextmanager
def made(folder):
    """Make a folder and the ones above it. If the block fails, those that it made go, if empty.

    Raises UserError where that fails.
    """
    missing = []
    while not os.path.isdir(folder):
        missing.append(folder)
        folder = os.path.dirname(folder) or '.'
    try:
        try:
            for new in reversed(missing):
                os.makedirs(new, exist_ok=True)
        except OSError as e:
            raise UserError(f'cannot make the folder {missing[0]}: {e.strerror}') from None
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
            if fcntl:
                kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
                fcntl.flock(fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise UserError(
                f'{folder} is in use by another process: wait for it, or choose another folder'
            ) from None
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
    part = f'{path}.{secrets.token_hex(4)}.tmp'  # two processes may write the same file
    with made(os.path.dirname(path) or '.'):
        try:
            with open(part, 'xb') as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            with contextlib.suppress(FileNotFoundError):  # another process wrote the same first
                os.replace(part, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(part)
            raise
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
        for stale in glob.glob(glob.escape(path) + '.*.tmp'):  # left by processes that were killed
            shutil.rmtree(stale, ignore_errors=True)
        new = f'{path}.{secrets.token_hex(4)}.tmp'
        old = f'{path}.{secrets.token_hex(4)}.tmp'
        try:
            os.mkdir(new)
            yield new
            os.rename(path, old)
            os.rename(new, path)
        finally:
            shutil.rmtree(new, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


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
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UserError(f'cannot write {path}: {folder} is not a folder that takes files')
    if not os.path.lexists(path):
        return
    beginning = b''
    with contextlib.suppress(OSError):
        if os.path.isfile(path):
            with open(path, 'rb') as f:
                beginning = f.read(4096)
    if sign.encode() not in beginning:
        raise UserError(f'{path} is there and was not written by this script: choose another name')


def write_file(path, content):
    """Write content, which is text or bytes, as `replacing` does; UserError where writing fails."""
    if isinstance(content, str):
        content = content.encode()
    try:
        with replacing(os.fspath(path)) as f:
            f.write(content)
    except OSError as e:
        raise UserError(f'cannot write {path}: {e.strerror or e}') from None


# ---- Reading -------------------------------------------------------------------------------------


def read_text(start, errors='strict'):
    """The text of a setting `start`: text itself, FILE:path, or - for standard input.

    errors: 'replace' makes U+FFFD of what is not UTF-8, 'strict' a UserError.
    """
    path = start.removeprefix('FILE:')
    if start == path and start != '-':
        return start
    try:
        if start == '-':
            return sys.stdin.buffer.read().decode('utf-8', errors)
        if os.path.lexists(path) and not os.path.isfile(path):
            raise UserError(f'--start: {path} is not a file of text')  # a folder, an endless device
        with open(path, 'rb') as f:
            return f.read().decode('utf-8', errors)
    except OSError as e:
        raise UserError(f'--start: {path}: {e.strerror}') from None
    except UnicodeDecodeError:
        raise UserError(f'--start: {path} is not UTF-8 text') from None


def read_json(path, hint, **types):
    """The object in a JSON file, as a dictionary.

    types: of entries that must be there, see `misfit`. Raises UserError where the file is missing,
    unreadable or holds something else; hint, the end of the message, says what to do about it.
    """
    try:
        with open(path, encoding='utf-8') as f:
            found = json.load(f)
    except FileNotFoundError:
        raise UserError(f'{path} is missing: {hint}') from None
    except OSError as e:
        raise UserError(f'cannot read {path} ({e.strerror}): {hint}') from None
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
        options = wanted if isinstance(wanted, tuple) else (wanted,)
        if not any(is_a(found.get(name), option) for option in options):
            return f"'{name}' is missing or of another type"
    return ''


def is_a(value, wanted):
    """Whether a value is of the type, see `misfit`."""
    if wanted is None:
        return value is None
    if isinstance(wanted, list):
        return isinstance(value, list) and all(is_a(item, wanted[0]) for item in value)
    if isinstance(value, bool):
        return wanted is bool
    if wanted is float:
        return isinstance(value, (int, float)) and -1e300 < value < 1e300
    return isinstance(value, wanted)
