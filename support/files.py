"""Files: the one way to write them and the one way to read JSON.

What JSON must hold is written as a shape:

    int, float, str, bool, list, dict       a value of that type; float also takes whole numbers, but not nan or inf
    None                                    null
    range(a, b)                             a whole number from a to b - 1
    [shape]                                 a list of such values
    {str: shape}                            an object whose entries are such values, under any names
    {'name': shape, 'other?': shape}        an object with these entries, `other` being optional; there may be more
    (shape, shape)                          one of these
"""
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
except ImportError:     # Windows: two processes may then write to one folder
    fcntl = None

NAMES = {int: 'a whole number', float: 'a number', str: 'text', bool: 'true or false', list: 'a list',
         dict: 'an object', None: 'null'}

# ---- Writing ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def made(folder):
    """Makes a folder, and the ones above it. If the block ends with an error, those that it made go again, if empty.

    Raises UserError where that fails.
    """
    missing = []
    while not os.path.isdir(folder):
        missing.append(folder)
        folder = os.path.dirname(folder) or '.'
    try:
        try:
            if missing:
                os.makedirs(missing[0], exist_ok=True)
        except (OSError, RecursionError) as e:      # the latter for thousands of folders in each other
            raise UserError(f'cannot make the folder {missing[0]}: {getattr(e, "strerror", "too deep")}') from None
        yield
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        raise


@contextlib.contextmanager
def locked(folder, shared=False):
    """Makes a folder and keeps it to this process while the block runs, or to all that share it. UserError if another
    process has it.

    The lock is on the folder itself: it leaves no file behind, and ends with its process, even if that is killed.
    """
    with made(folder), contextlib.ExitStack() as stack:
        fd = os.open(folder, os.O_RDONLY)
        stack.callback(os.close, fd)
        try:
            fcntl and fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f'{folder} is in use by {holder(fd)}: wait for it, or choose another folder') from None
        except OSError:         # some network file systems have no locks
            pass
        yield


def holder(fd):
    """The process that has locked an open file or folder, in words."""
    with contextlib.suppress(OSError, IndexError):          # there is /proc on Linux only
        with open('/proc/locks') as f:
            pid = [line.split()[4] for line in f if line.split()[5].endswith(f':{os.fstat(fd).st_ino}')][0]
        with open(f'/proc/{pid}/cmdline') as f:
            return f"process {pid} ({' '.join(f.read().split(chr(0))[:3]).strip()})"
    return 'another process'


@contextlib.contextmanager
def replacing(path):
    """A binary file to write; it gets its name when the block ends without an error, so under its name it is whole.

        with replacing('out/x/ckpt.pt') as f:
            f.write(b'...')

    Makes the folder. On an error it removes what it made. Raises OSError where writing fails.
    """
    part = f'{path}.{secrets.token_hex(4)}.tmp'     # a name of its own: two processes may write the same file
    with made(os.path.dirname(path) or '.'):
        try:
            with open(part, 'xb') as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            with contextlib.suppress(FileNotFoundError):    # another process wrote the same file first and removed this
                os.replace(part, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(part)
            raise
    for stale in glob.glob(glob.escape(path) + '.*.tmp'):       # left by processes that were killed
        with contextlib.suppress(OSError):
            os.remove(stale)


@contextlib.contextmanager
def replacing_folder(path):
    """A folder to fill, which takes the place of the one at path when the block ends without an error.

        with replacing_folder('data/x') as folder:
            ...

    One process at a time fills it: see `locked`. On an error the old one stays as it was.
    """
    path = os.path.realpath(path)           # a link stays a link
    with locked(path):
        for stale in glob.glob(glob.escape(path) + '.*.tmp'):       # left by processes that were killed
            shutil.rmtree(stale, ignore_errors=True)
        new, old = (f'{path}.{secrets.token_hex(4)}.tmp' for _ in range(2))
        try:
            os.mkdir(new)
            yield new
            os.rename(path, old)
            os.rename(new, path)
        finally:
            for folder in new, old:
                shutil.rmtree(folder, ignore_errors=True)


def check_output(path, ending, sign):
    """Raises UserError unless a script may write the file: it has the ending, a folder that takes it, and what it would
    replace is a file of the same kind, which has `sign` in its first lines."""
    if not path.endswith(ending):
        raise UserError(f'{path} is not a file name for this: it ends in {ending}')
    folder = os.path.dirname(os.path.abspath(path))
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UserError(f'cannot write {path}: {folder} is not a folder that takes files')
    if os.path.lexists(path):
        try:
            with open(path, 'rb') as f:
                ours = sign.encode() in f.read(4096) if os.path.isfile(path) else False
        except OSError:
            ours = False
        if not ours:
            raise UserError(f'{path} is there and was not written by this script: choose another name')


def write_file(path, content):
    """Write content, which is text, bytes or a function that writes to a file object, as `replacing` does.

    Raises UserError where writing fails.
    """
    path = os.fspath(path)
    try:
        with replacing(path) as f:
            if callable(content):
                content(f)
            else:
                f.write(content.encode() if isinstance(content, str) else content)
    except OSError as e:
        raise UserError(f'cannot write {path}: {e.strerror or e}') from None


# ---- Reading ---------------------------------------------------------------------------------------------------------


def read_text(start, errors='strict'):
    """The text of a setting `start`: text itself, FILE:path, or - for standard input.

    errors: 'replace' makes U+FFFD of what is not UTF-8, 'strict' a UserError.
    """
    path = start.removeprefix('FILE:')
    if start not in ('-', path) and os.path.lexists(path) and not os.path.isfile(path):
        raise UserError(f'--start: {path} is not a file of text')       # but a folder, or a device without an end
    try:
        if start == '-':
            return sys.stdin.buffer.read().decode('utf-8', errors)
        if start != path:
            with open(path, 'rb') as f:
                return f.read().decode('utf-8', errors)
    except OSError as e:
        raise UserError(f'--start: {path}: {e.strerror}') from None
    except UnicodeDecodeError:
        raise UserError(f'--start: {path} is not UTF-8 text') from None
    return start


def read_json(path, shape, hint):
    """The value in a JSON file, checked against the shape (see above).

    Raises UserError where the file is missing, unreadable or holds something else; hint, the end of the message, says
    what to do about it.
    """
    try:
        with open(path, encoding='utf-8') as f:
            return parse_json(f.read(), shape)
    except FileNotFoundError:
        raise UserError(f'{path} is missing: {hint}') from None
    except OSError as e:
        raise UserError(f'cannot read {path} ({e.strerror}): {hint}') from None
    except ValueError as e:                         # UnicodeDecodeError is one
        problem = 'it is not UTF-8 text' if isinstance(e, UnicodeDecodeError) else e
        raise UserError(f'{path} is damaged ({problem}): {hint}') from None


def parse_json(text, shape):
    """The value of a JSON text, checked against the shape. Raises ValueError, in one line, if it does not fit."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError('it is not JSON') from None
    problem = misfit(value, shape)
    if problem:
        raise ValueError(problem)
    return value


def misfit(value, shape, name='it'):
    """What is wrong with a value that does not fit the shape, in a few words; '' if it fits."""
    if isinstance(shape, tuple):
        problems = [misfit(value, option, name) for option in shape]
        return '' if '' in problems else problems[-1]
    if isinstance(shape, range):
        whole = isinstance(value, int) and not isinstance(value, bool)
        return '' if whole and value in shape else f'{name} is not a whole number from {shape[0]} to {shape[-1]}'
    kind = type(shape) if isinstance(shape, (list, dict)) else shape
    if kind is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300
    elif kind is None:
        fits = value is None
    else:
        fits = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
    if not fits:
        return f'{name} is not {NAMES.get(kind) or kind.__name__}'
    if isinstance(shape, list):
        return next(filter(None, (misfit(item, shape[0], f'{name}[{n}]') for n, item in enumerate(value))), '')
    if isinstance(shape, dict) and str in shape:
        return next(filter(None, (misfit(item, shape[str], f'{name}.{key}') for key, item in value.items())), '')
    if isinstance(shape, dict):
        for key, part in shape.items():
            key, optional = key.removesuffix('?'), key.endswith('?')
            if key not in value and not optional:
                return f"{name} has no '{key}'"
            if key in value and (problem := misfit(value[key], part, key if name == 'it' else f'{name}.{key}')):
                return problem
    return ''
