"""Settings, for every script here: a dataclass names, types, defaults and explains them, once.

    @dataclass
    class Settings:
        # reading                       <- a comment on a line of its own is a heading in --help
        out_dir: str = 'out'            # what it means, in one line: this is what --help prints

    cfg = settings.parse(Settings)      # in: python script.py config/file.py --out_dir=out/x

Config files are Python and may import one another; later arguments win over earlier ones.
"""
import dataclasses
import difflib
import inspect
import os
import re
import runpy
import sys
import types


class UserError(Exception):
    """An error that the user can fix. Its text is one line: what is wrong, where, and what to do."""


def run(main):
    """Call main() and end the process: a UserError as one line on stderr and exit code 1, Ctrl-C as 130."""
    try:
        main()
    except UserError as e:
        sys.exit(f'{os.path.basename(sys.argv[0])}: {e}')
    except KeyboardInterrupt:
        print('\ninterrupted', file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader has gone, as in `| head`; without this the interpreter prints an error at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parse(cls, argv=None, positional=None):
    """An instance of the dataclass cls, from config files and --key=value arguments, in their order.

    `--flag` alone means `--flag=True`. positional names a list field that takes every argument without
    dashes; without it such an argument is a config file. Prints help and exits for --help or -h.
    Raises UserError for an unknown key (with the nearest one), a wrong type, or a file that cannot be run.
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
            values[key] = _typed(cls, key, text if eq else 'True', f'--{key}')
        elif positional is not None:
            values.setdefault(positional, []).append(arg)
        else:
            for key, value in _run_config(arg).items():
                values[key] = _typed(cls, key, value, f'{arg}: {key}')
    return cls(**values)


def help_text(cls):
    """The script's docstring, then every setting with its default and meaning, read from the source of cls."""
    lines = [inspect.cleandoc(sys.modules[cls.__module__].__doc__ or ''), '']
    shown = set()
    for base in cls.__mro__:  # a subclass's own settings first, then the ones it inherits
        if not dataclasses.is_dataclass(base):
            continue
        for line in inspect.getsource(base).splitlines():
            field = re.match(r'    (\w+)\s*:\s*[^=#]+(?:=.*?)?\s+#\s(.*)$', line)
            heading = re.match(r'    #\s(.*)$', line)
            if field and field[1] not in shown:
                shown.add(field[1])
                value = getattr(cls, field[1], '')
                lines.append(f'  --{field[1] + "=" + str(value):<36} {field[2]}')
            elif heading:
                lines += ['', heading[1] + ':']
    return '\n'.join(lines)


def _run_config(path):
    """The settings that a config file assigns: its public names, less what it imported as modules or functions."""
    if not os.path.isfile(path):
        raise UserError(f"config file '{path}' does not exist (settings are written --key=value)")
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # so that `from config.base_small import *` is found
    try:
        names = runpy.run_path(path)
    except Exception as e:
        raise UserError(f'{path}: {type(e).__name__}: {e}') from None
    finally:
        sys.path.pop(0)
    return {k: v for k, v in names.items()
            if not k.startswith('_') and not isinstance(v, types.ModuleType) and not callable(v)}


def _typed(cls, key, value, where):
    """value as the type that the field `key` of cls is declared with; value may be text from the command line."""
    fields = {f.name: f.type for f in dataclasses.fields(cls)}
    if key not in fields:
        near = difflib.get_close_matches(key, fields, 1)
        hint = f"; did you mean '{near[0]}'?" if near else '; --help lists them all'
        raise UserError(f'{where}: unknown setting{hint}')
    want = fields[key]
    try:
        if want is bool and isinstance(value, str):
            return {'true': True, '1': True, 'false': False, '0': False}[value.lower()]
        if want is int and isinstance(value, str):  # 1_000 and 1e6 are ways to write a whole number
            return int(value) if re.fullmatch(r'[+-]?[\d_]+', value) else _whole(float(value))
        if want is float and not isinstance(value, bool):
            return float(value)
        if want is int and isinstance(value, float):
            return _whole(value)
        if type(value) is not want:
            raise ValueError
        return value
    except (ValueError, KeyError, OverflowError, TypeError):
        name = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'text'}.get(want, want)
        raise UserError(f'{where}: {value!r} is not {name}') from None


def _whole(x):
    if x != int(x):
        raise ValueError
    return int(x)
