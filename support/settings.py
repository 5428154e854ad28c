"""Settings of every script here: a dataclass gives their names, types, defaults and help.

    @dataclass
    class SampleConfig:
        start: str = option('', 'what --help prints')
        top_k: int = option(200, 'only the k most likely tokens; 0: all')
        policy: str = option('selective', 'eviction policy', choices=POLICIES)

    cfg = settings.parse(SampleConfig)      # in: python sample.py config/file.py --top_k=20

Config files are Python and may import one another. Later arguments win over earlier ones.
"""

import dataclasses
import difflib
import inspect
import os
import re
import reprlib
import runpy
import sys
import types

NAMES = {
    bool: 'True or False',
    int: 'a whole number',
    float: 'a number',
    str: 'text',
    list: 'a list of text',
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

    These are UserError, files that cannot be read or written, and too little memory. Ctrl-C ends
    with exit code 130.
    """
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        fail('interrupted', 130)
    except BrokenPipeError:  # the reader has gone, as in `| head`
        os._exit(141)  # as a shell reports it, without a last try to write
    except (UserError, OSError) as e:
        fail(e)
    except (MemoryError, RuntimeError) as e:
        if not re.search('MemoryError|out of memory|allocate memory', repr(e)):
            raise
        fail('not enough memory: use a smaller model, batch_size or block_size')


def fail(text, code=1):
    """End the process with one line on stderr."""
    print(f'{os.path.basename(sys.argv[0])}: {one_line(text)}', file=sys.stderr)
    sys.exit(code)


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
    if argv is None:
        argv = sys.argv[1:]
    if '--help' in argv or '-h' in argv:
        print(help_text(cls))
        sys.exit(0)
    values = {}
    for arg in argv:
        if arg.startswith('--'):
            key, equals, text = arg[2:].partition('=')
            if not equals:
                if not isinstance(getattr(cls, key, True), bool):
                    raise UserError(f'--{key}: it needs a value, --{key}=…')
                text = 'True'
            values[key] = checked(cls, key, text, f'--{key}')
        elif positional:
            words = values.get(positional, []) + [arg]
            values[positional] = checked(cls, positional, words, positional)
        else:
            values.update(run_config(arg, cls))
    return cls(**values)


def help_text(cls):
    """The script's docstring, then every setting with its default and meaning."""
    lines = [inspect.getdoc(sys.modules[cls.__module__]), '']
    for field in dataclasses.fields(cls):
        setting = f'--{field.name}={getattr(cls, field.name, "")}'
        line = f'  {setting:<38} {field.metadata["help"]}'
        if len(field.metadata) > 1:
            line += f' [{valid(field.metadata)}]'
        lines.append(line)
    return '\n'.join(lines)


def valid(limits):
    """The values that a field with limits may have, in words."""
    if 'choices' in limits:
        return f'one of {", ".join(map(repr, limits["choices"]))}'
    return f'in the range {limits.get("low", 0)} to {limits.get("high", 10**9):,}'


def checked(cls, key, value, where):
    """A valid value for the field `key` of cls; it may be text from the command line."""
    fields = cls.__dataclass_fields__
    if key not in fields:
        near = difflib.get_close_matches(key, fields, 1, cutoff=0)
        raise UserError(
            f'{where}: unknown setting; did you mean {near[0]!r}? --help lists them all'
        )
    return fitting(fields[key].type, fields[key].metadata, value, where)


def numbers(text, where, **limits):
    """Whole numbers within limits, see `option`, from text with commas between them."""
    return [fitting(int, limits, word, where) for word in text.split(',')]


def fitting(kind, limits, value, where):
    """value as one of a kind, within limits; it may be text. UserError if it is none."""
    shown = reprlib.repr(value)
    fits = True
    try:
        if kind is bool:
            value = TRUTH[str(value).lower()]
        elif kind in (int, float):
            number = float(value)  # 1e6 is a way to write a whole number
            value = kind(number)
            if value != number:
                raise ValueError
            fits = limits.get('low', 0) <= value <= limits.get('high', 10**9)
        elif type(value) is not kind:
            raise ValueError
    except (ValueError, TypeError, KeyError, OverflowError):
        raise UserError(f'{where}: {shown} is not {NAMES[kind]}') from None
    if 'choices' in limits:
        words = value if kind is list else [value]
        fits = set(words) <= set(limits['choices'])
    if not fits:
        raise UserError(f'{where}: {shown} is not {valid(limits)}')
    return value


def run_config(path, cls):
    """The settings that a config file assigns: its public names, without modules and functions."""
    if not os.path.isfile(path):
        raise UserError(f"config file '{path}' does not exist (settings are written --key=value)")
    try:
        names = runpy.run_path(path)
    except (Exception, SystemExit) as e:
        raise UserError(f'{path}: {type(e).__name__}: {e}') from None
    found = {}
    for name, value in names.items():
        if not (name.startswith('_') or callable(value) or isinstance(value, types.ModuleType)):
            found[name] = checked(cls, name, value, f'{path}: {name}')
    return found
