"""Settings, for every script here: a dataclass names, types, defaults and explains them, once.

    @dataclass
    class SampleConfig:
        # sampling                          <- a comment on a line of its own is a heading in --help
        start: str = ''                     # what it means, in one line: this is what --help prints
        top_k: int = 200                    # only the k most likely tokens; 0: all [0 to 100_000]
        policy: str = 'selective'           # what is dropped at the budget ['selective', 'oldest', 'random']

    cfg = settings.parse(SampleConfig)      # in: python sample.py config/file.py --top_k=20

Config files are Python and may import one another; later arguments win over earlier ones. The brackets that end a
comment are read, too: they say which values are valid, and any other is refused.

    [1 to 1000]                 a number from 1 to 1000; also [above 0 to 1] and [0 to below 1]; powers like 2**31
    ['', 'base']                one of these
    [list of 1 to 1000]         any number of them, even none, with commas between; also [list of 'a', 'b']

Numbers are finite, and text has no control characters but tabs and line ends.
"""
import ast
import dataclasses
import difflib
import functools
import inspect
import math
import os
import re
import runpy
import signal
import sys
import types

NAMES = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'text', list: 'a list'}


class UserError(Exception):
    """An error that the user can fix. Its text is one line: what is wrong, where, and what to do."""

    def __init__(self, text):
        super().__init__(one_line(text))


# ---- How a script ends -----------------------------------------------------------------------------------------------


def run(main):
    """Call main() and end the process: an error that the user can fix as one line on stderr and exit code 1.

    Such are a UserError, files that cannot be read or written, and too little memory. Ctrl-C ends with exit code 130.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:           # support/__init__.py has set that
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in sys.stdout, sys.stderr:
        stream.reconfigure(errors='backslashreplace')               # a terminal may lack '…'
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        fail('interrupted', 130)
    except BrokenPipeError:         # the reader has gone, as in `| head`: 141 is what a shell reports for that
        discard_output()
        sys.exit(141)
    except UserError as e:
        fail(str(e))
    except OSError as e:
        fail(f'{e.filename or "input or output"}: {e.strerror or e}')
    except (MemoryError, RuntimeError) as e:
        if 'by peer' in str(e):         # what torch's gloo says of it, in each that is left
            fail('another process of this run has ended')
        if not is_out_of_memory(e):
            raise
        fail('not enough memory: use a smaller model, batch_size or block_size')


def fail(text, code=1):
    """End the process with one line on stderr. Of the processes of torchrun the first one speaks."""
    if os.environ.get('RANK', '0') in ('0', '') or not os.environ.get('TORCHELASTIC_RUN_ID'):
        print(f'{os.path.basename(sys.argv[0])}: {one_line(text)}', file=sys.stderr)
    sys.exit(code)


def is_out_of_memory(error):
    """Whether an exception, of torch or Python, says so."""
    text = str(error)
    return isinstance(error, MemoryError) or 'out of memory' in text or "can't allocate memory" in text


def one_line(text, length=600):
    """Text as one line that a terminal can show."""
    text = ''.join(c if c.isprintable() else f'\\x{ord(c):02x}' for c in ' '.join(str(text).split()))
    return text if len(text) <= length else text[:length] + '…'


def say(*words):
    """print, for work that continues if nobody reads it: tee may have gone, or the disk with the output be full."""
    try:
        print(*words, flush=True)
    except OSError:
        discard_output()


def discard_output():
    """From now on what is printed goes nowhere; otherwise the interpreter complains about it when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ---- Reading them ----------------------------------------------------------------------------------------------------


def parse(cls, argv=None, positional=None):
    """An instance of the dataclass cls, from config files and --key=value arguments, in their order.

    `--flag` alone means `--flag=True`. positional names a list field that takes every argument without
    dashes; without it such an argument is a config file. Prints help and exits for --help or -h.
    Raises UserError for an unknown key (with the nearest one), an invalid value, or a file that cannot be run.
    """
    argv = sys.argv[1:] if argv is None else argv
    if any(a in ('--help', '-h') for a in argv):
        print(help_text(cls))
        sys.exit(0)
    values = {}
    for arg in argv:
        if arg.startswith('--'):
            key, eq, text = arg[2:].partition('=')
            key = key.replace('-', '_')
            if not eq and not isinstance(getattr(cls, key, True), bool):
                raise UserError(f'--{key}: it needs a value, --{key}=…')
            values[key] = checked(cls, key, text if eq else 'True', f'--{key}')
        elif positional is not None:
            values[positional] = checked(cls, positional, values.get(positional, []) + [arg], positional)
        else:
            for key, value in _run_config(arg, cls).items():
                values[key] = checked(cls, key, value, f'{arg}: {key}')
    return cls(**values)


def help_text(cls):
    """The script's docstring, then every setting with its default and meaning."""
    lines = [inspect.cleandoc(sys.modules[cls.__module__].__doc__ or '')]
    for heading, name, meaning, valid in declared(cls):
        if heading is not None:
            lines += ['', heading]
        value = getattr(cls, name, '')
        lines.append(f'  --{name + "=" + str(value):<36} {meaning}' + (f' [{valid}]' if valid else ''))
    return '\n'.join(lines)


@functools.cache
def declared(cls):
    """[(heading or None, name, meaning, what is valid)] of the fields, from the source of cls; own fields first."""
    found, shown = [], set()
    for base in (c for c in cls.__mro__ if dataclasses.is_dataclass(c)):
        heading = ''
        for line in inspect.getsource(base).splitlines():
            if title := re.fullmatch(r'    #\s(.*)', line):
                heading = title[1] + ':'
            field = re.fullmatch(r'    (\w+)\s*:\s*[^=#]+(?:=.*?)?\s+#\s(.*?)(?:\s\[([^\[\]]*)\])?', line)
            if field and field[1] not in shown:
                shown.add(field[1])
                found.append((heading, *field.groups()))
                heading = None
    return found


def check(cls, values, where):
    """values, {name: value}, with the types that the dataclass cls declares. Raises UserError for an invalid one."""
    return {name: checked(cls, name, value, f'{where}: {name}') for name, value in values.items()}


def checked(cls, key, value, where):
    """A valid value for the field `key` of cls; it may be text from the command line."""
    fields = {f.name: f.type for f in dataclasses.fields(cls)}
    if key not in fields:
        near = difflib.get_close_matches(key, fields, 1)
        raise UserError(f'{where}: unknown setting' +
                        (f"; did you mean '{near[0]}'?" if near else '; --help lists them all'))
    try:
        value = _typed(fields[key], value)
    except (ValueError, KeyError, OverflowError, TypeError):
        raise UserError(f'{where}: {_short(value)} is not {NAMES[fields[key]]}') from None
    valid = next((valid for _, name, _, valid in declared(cls) if name == key), None)
    if problem := misfit(value, valid):
        raise UserError(f'{where}: {problem}')
    return value


def misfit(value, valid):
    """What is wrong with a value, in a few words; '' if it is valid. valid: what stands in the brackets, or None."""
    if isinstance(value, list):
        return next(filter(None, (misfit(item, valid) for item in value)), '')
    if isinstance(value, float) and not math.isfinite(value):
        return f'{value} is not a finite number'
    if isinstance(value, str) and not all(c.isprintable() or c in '\t\r\n' for c in value):
        return f'{_short(value)} has characters that are no text'
    if not valid:
        return ''
    if valid.startswith('list of '):
        items = value.split(',') if value else []
        return next(filter(None, (misfit(item, valid.removeprefix('list of ')) for item in items)), '')
    if valid[0] in '\'"':
        return '' if value in ast.literal_eval(f'[{valid}]') else f'{_short(value)} is not one of {valid}'
    low, high = valid.split(' to ')
    above, below = low.startswith('above '), high.startswith('below ')
    low, high = (_number(text.split()[-1]) for text in (low, high))
    if isinstance(value, str):          # of a list
        try:
            value = _typed(float if '.' in valid else int, value)
        except (ValueError, OverflowError):
            return f'{_short(value)} is not a number'
    fits = (low < value if above else low <= value) and (value < high if below else value <= high)
    return '' if fits else f'{_short(value)} is not in the range {valid}'


def _number(text):
    """The number that a range has as text; 2**31 is a power."""
    base, power, exponent = text.partition('**')
    return int(base) ** int(exponent) if power else float(base)


def _typed(want, value):
    """value as that type; it may be text. Raises ValueError and others if it is of another type."""
    if isinstance(value, str) and want in (int, float) and not value.isascii():
        raise ValueError        # '²' and '٣' are digits, too
    if want is bool and isinstance(value, str):
        return {'true': True, '1': True, 'false': False, '0': False}[value.lower()]
    if want is int and isinstance(value, str):  # 1_000 and 1e6 are ways to write a whole number
        return int(value) if re.fullmatch(r'[+-]?[\d_]+', value) else _whole(float(value))
    if want is float and not isinstance(value, bool):
        return float(value)
    if want is int and isinstance(value, float):
        return _whole(value)
    if type(value) is not want or want is list and not all(type(item) is str for item in value):
        raise ValueError
    return value


def _whole(x):
    if x != int(x):
        raise ValueError
    return int(x)


def _short(value):
    """A value as it is written in a message."""
    try:
        text = repr(value)
    except ValueError:          # a whole number of thousands of digits
        text = 'a number of thousands of digits'
    return text if len(text) <= 80 else f'{text[:60]}… ({len(text)} characters)'


def _run_config(path, cls):
    """The settings that a config file assigns: its public names, less what it imported as modules or functions."""
    if not os.path.isfile(path):
        raise UserError(f"config file '{path}' does not exist (settings are written --key=value)")
    # so that `from config.base_small import *` is found
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    try:
        names = runpy.run_path(path)
    except (Exception, SystemExit) as e:
        raise UserError(f'{path}: {type(e).__name__}: {e}') from None
    finally:
        sys.path.pop(0)
    fields = {f.name for f in dataclasses.fields(cls)}
    return {k: v for k, v in names.items() if k in fields
            or not k.startswith('_') and not isinstance(v, types.ModuleType) and not callable(v)}
