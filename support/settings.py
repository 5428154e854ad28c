"""Settings, for every script here: a dataclass names, types, defaults and explains them, once.

    @dataclass
    class SampleConfig:
        start: str = option('', 'what --help prints')
        top_k: int = option(200, 'only the k most likely tokens; 0: all')
        policy: str = option('selective', 'what is dropped at the budget', choices=POLICIES)

    cfg = settings.parse(SampleConfig)      # in: python sample.py config/file.py --top_k=20

Config files are Python and may import one another. Later arguments win over earlier ones. Numbers
are finite, and text has no control characters but tabs and line ends.
"""

import dataclasses
import difflib
import inspect
import math
import os
import reprlib
import runpy
import signal
import sys
import types

NAMES = {
    bool: 'True or False',
    int: 'a whole number',
    float: 'a number',
    str: 'text',
    list: 'a list',
}
TRUTH = {'true': True, '1': True, 'false': False, '0': False}


class UserError(Exception):
    """An error that the user can fix, as one line: what is wrong, where, and what to do."""

    def __init__(self, text):
        super().__init__(one_line(text))


def option(default, help, **limits):
    """A dataclass field with its meaning and, as limits, the values that are valid.

    low, high: the least and the largest number, 0 and 1e9 if nothing is said. choices: all values
    that are valid.
    """
    metadata = {'help': help, **limits}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


# ---- How a script ends ---------------------------------------------------------------------------


def run(main):
    """Call main() and end the process. An error that the user can fix is one line and exit code 1.

    Such are a UserError, files that cannot be read or written, and too little memory. Ctrl-C ends
    with exit code 130.
    """
    for stream in sys.stdout, sys.stderr:
        stream.reconfigure(errors='backslashreplace')  # a terminal may lack '…'
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        fail('interrupted', 130)
    except BrokenPipeError:  # the reader has gone, as in `| head`: a shell reports 141 for that
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor complain at the end
        sys.exit(128 + signal.SIGPIPE)
    except UserError as e:
        fail(str(e))
    except OSError as e:
        fail(f'{e.filename or "input or output"}: {e.strerror or e}')
    except (MemoryError, RuntimeError) as e:
        if 'by peer' in str(e):  # what torch's gloo says of it, in each process that is left
            fail('another process of this run has ended')
        if not is_out_of_memory(e):
            raise
        fail('not enough memory: use a smaller model, batch_size or block_size')


def fail(text, code=1):
    """End the process with one line on stderr."""
    print(f'{os.path.basename(sys.argv[0])}: {one_line(text)}', file=sys.stderr)
    sys.exit(code)


def is_out_of_memory(error):
    """Whether an exception, of torch or Python, says so."""
    text = str(error)
    if isinstance(error, MemoryError):
        return True
    return 'out of memory' in text or "can't allocate memory" in text


def one_line(text, length=600):
    """Text as one line that a terminal can show."""
    return ''.join(filter(str.isprintable, ' '.join(str(text).split())))[:length]


# ---- Reading them --------------------------------------------------------------------------------


def parse(cls, argv=None, positional=None):
    """An instance of the dataclass cls, from config files and --key=value arguments in their order.

    `--flag` alone means `--flag=True`. positional names a list field that takes every argument
    without dashes; without it such an argument is a config file. Prints help and exits for --help
    or -h. Raises UserError for an unknown key (with the nearest one), an invalid value, or a config
    file that cannot be run.
    """
    argv = sys.argv[1:] if argv is None else argv
    if '--help' in argv or '-h' in argv:
        print(help_text(cls))
        sys.exit(0)
    values = {}
    for arg in argv:
        if arg.startswith('--'):
            key, equals, text = arg[2:].partition('=')
            key = key.replace('-', '_')
            if not equals:
                if not isinstance(getattr(cls, key, True), bool):
                    raise UserError(f'--{key}: it needs a value, --{key}=…')
                text = 'True'
            values[key] = checked(cls, key, text, f'--{key}')
        elif positional is not None:
            words = values.get(positional, []) + [arg]
            values[positional] = checked(cls, positional, words, positional)
        else:
            for key, value in run_config(arg, cls).items():
                values[key] = checked(cls, key, value, f'{arg}: {key}')
    return cls(**values)


def help_text(cls):
    """The script's docstring, then every setting with its default and meaning."""
    lines = [inspect.cleandoc(sys.modules[cls.__module__].__doc__ or ''), '']
    for field in dataclasses.fields(cls):
        setting = f'--{field.name}={getattr(cls, field.name, "")}'
        line = f'  {setting:<38} {field.metadata["help"]}'
        if valid := described(field.metadata):
            line += f' [{valid}]'
        lines.append(line)
    return '\n'.join(lines)


def described(limits):
    """The limits of an option in words, '' where it has none."""
    if 'choices' in limits:
        return ', '.join(map(repr, limits['choices']))
    if 'low' in limits or 'high' in limits:
        return f'{limits.get("low", 0)} to {limits.get("high", 10**9):,}'
    return ''


def check(cls, values, where):
    """values, {name: value}, as valid values of the dataclass cls; UserError for an invalid one."""
    found = {}
    for name, value in values.items():
        found[name] = checked(cls, name, value, f'{where}: {name}')
    return found


def checked(cls, key, value, where):
    """A valid value for the field `key` of cls; it may be text from the command line."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if key not in fields:
        near = difflib.get_close_matches(key, fields, 1)
        hint = f"did you mean '{near[0]}'?" if near else '--help lists them all'
        raise UserError(f'{where}: unknown setting; {hint}')
    field = fields[key]
    try:
        value = typed(field.type, value)
    except (ValueError, KeyError, OverflowError, TypeError):
        raise UserError(f'{where}: {reprlib.repr(value)} is not {NAMES[field.type]}') from None
    for item in value if isinstance(value, list) else [value]:
        if problem := misfit(item, field.metadata):
            raise UserError(f'{where}: {problem}')
    return value


def typed(want, value):
    """value as that type; it may be text. Raises ValueError and others if it is of another type."""
    if want is bool and isinstance(value, str):
        return TRUTH[value.lower()]
    if want in (int, float):
        if isinstance(value, bool):
            raise ValueError
        if isinstance(value, str) and not value.isascii():
            raise ValueError  # '²' and '٣' are digits, too
        number = float(value)
        if want is float:
            return number
        if number != int(number):  # 1_000 and 1e6 are ways to write a whole number
            raise ValueError
        return int(number)
    if type(value) is not want:
        raise ValueError
    if want is list and not all(isinstance(item, str) for item in value):
        raise ValueError
    return value


def misfit(value, limits):
    """What is wrong with a value of the right type, in a few words; '' if it is valid."""
    if isinstance(value, float) and not math.isfinite(value):
        return f'{value} is not a finite number'
    if isinstance(value, str) and not all(c.isprintable() or c in '\t\r\n' for c in value):
        return f'{reprlib.repr(value)} has characters that are no text'
    if 'choices' in limits and value not in limits['choices']:
        return f'{reprlib.repr(value)} is not one of {described(limits)}'
    if type(value) in (int, float):
        low = limits.get('low', 0)
        high = limits.get('high', 10**9)
        if not low <= value <= high:
            return f'{reprlib.repr(value)} is not in the range {low} to {high:,}'
    return ''


def run_config(path, cls):
    """The settings that a config file assigns: its public names, without modules and functions."""
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
    found = {}
    for name, value in names.items():
        if name.startswith('_') or isinstance(value, types.ModuleType):
            continue
        if hasattr(cls, name) or not callable(value):
            found[name] = value
    return found
