"""Whatever a user gives a script, in a setting or a file that it reads: it works, or says in one
line why not.

The scripts and their settings are found in the sources, so that a new setting is tested the day it
is added.
"""

import contextlib
import dataclasses
import importlib
import io
import json
import math
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from support import settings

ROOT = Path(__file__).parent.parent
SOURCES = {
    '.'.join(path.relative_to(ROOT).with_suffix('').parts): path.read_text()
    for folder in ('.', 'lab', 'support')
    for path in sorted((ROOT / folder).glob('*.py'))
}
PARSE = re.compile(r'^ .*\bsettings\.parse\((\w*(?:Config|Settings))\b', re.M)
# {module of a script: the class of its settings}
SCRIPTS = {
    module: getattr(importlib.import_module(module), PARSE.search(text)[1])
    for module, text in SOURCES.items()
    if PARSE.search(text) and module != 'support.settings'
}
LIMIT = 20  # seconds that one case may take

NUMBERS = [
    'nan',
    'inf',
    '-inf',
    '1e999',
    '1e30',
    '1e20',
    '-1',
    '-1e-9',
    '5' * 5000,
    '²',
    '٣',
    '0x10',
    '1.5e',
    '',
    ' ',
    'one',
    'None',
    '[]',
    '1,2',
    '--1',
    '1e-400',
]
TEXTS = [
    '',
    '.',
    '..',
    '../x',
    'a/b',
    '/dev/null',
    '/dev/null/x',
    '/proc/self/x',
    'x' * 300,
    'x/' * 3000,
    ' ',
    '-',
    '*',
    ',',
    '[x]',
    '$HOME',
    '\\',
    'é…\u202e',
    '²',
    '1e999',
    '-1',
    'nan',
    'None',
    'FILE:',
    'FILE:.',
    'FILE:/dev/zero',
    'http://[',
    'a\nb',
    '\x00',
    '\x1b[2J',
    '\udcff',
    'meta',
    'cuda:999',
    'folder',
    'file',
    'loop',
]
VALUES = [
    None,
    [],
    {},
    (),
    int,
    b'x',
    10**400,
    math.nan,
    -math.inf,
    True,
    1j,
    object(),
    lambda: 1,
    ['x', 1],
    {1: 2},
]


def outcome(module, args):
    """Run a script in this process as from the command line: exit code, standard error."""
    err, out = io.TextIOWrapper(io.BytesIO()), io.TextIOWrapper(io.BytesIO())
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    argv, stdin, threads = sys.argv, sys.stdin, torch.get_num_threads()
    sys.argv, sys.stdin = (
        [module.split('.')[-1] + '.py', *map(str, args)],
        io.TextIOWrapper(io.BytesIO()),
    )

    def late(*_):
        raise AssertionError(f'{module} {args} took more than {LIMIT} s')

    signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT)
    code = 0
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
            settings.run(importlib.import_module(module).main)
    except SystemExit as e:
        code = e.code or 0
    finally:
        signal.alarm(0)
        sys.argv, sys.stdin = argv, stdin
        torch.set_num_threads(threads)
        for number, handler in before.items():
            signal.signal(number, handler)
    err.seek(0)
    return code, err.read()


def files_in(folder):
    """{path: what it is and when it was written} of everything below a folder."""
    return {
        str(path.relative_to(folder)): (
            path.lstat().st_mode,
            path.lstat().st_size,
            path.lstat().st_mtime_ns,
        )
        if not path.is_dir() or path.is_symlink()
        else 'folder'
        for path in folder.rglob('*')
    }


def fault(module, args, folder):
    """What is wrong with how a script ends; None if it succeeds, or fails in one line and leaves
    all as it was."""
    before = files_in(folder)
    try:
        code, err = outcome(module, args)
    except Exception as e:
        return f'{module} {args}: {type(e).__name__}: {str(e)[:200]}'
    if code == 0:
        return None
    lines = [
        line
        for line in err.splitlines()
        if 'trying again' not in line and 'is left out' not in line
    ]
    if (
        code != 1
        or len(lines) != 1
        or not lines[0].startswith(module.split('.')[-1])
        or not lines[0].isprintable()
    ):
        return f'{module} {args}: exit code {code}, {err[:300]!r}'
    after = files_in(folder)
    changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    return f'{module} {args}: changed {changed[:5]}; {err}' if changed else None


def test_scripts_are_found():
    assert {'train', 'sample', 'prune', 'prepare_text', 'prepare_c4', 'lab.tasks'} <= set(SCRIPTS)
    assert {module for module, text in SOURCES.items() if 'settings.run(' in text} - set(
        SCRIPTS
    ) <= {'lab.ablate'}


@pytest.mark.parametrize('module', SCRIPTS)
def test_settings_have_a_range_and_keep_it(module):
    """From the command line and from a config file; a value that is accepted is of its type,
    finite and in the range."""
    cls = SCRIPTS[module]
    for f in dataclasses.fields(cls):
        limits = f.metadata
        assert limits['help'], f'{f.name} is not explained'
        default = f.default_factory() if f.type is list else f.default
        assert settings.checked(cls, f.name, default, f.name) == default
        for value in NUMBERS + TEXTS + VALUES:
            try:
                got = settings.checked(cls, f.name, value, f'--{f.name}')
            except settings.UserError as e:
                assert '\n' not in str(e) and len(str(e)) < 1000
                continue
            assert type(got) is f.type
            if f.type in (int, float):
                assert limits.get('low', 0) <= got <= limits.get('high', 1e9)
                assert str(value) not in ('nan', 'inf', '²', '٣', '1e20', '1e30')


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    """A folder with one of everything that scripts read."""
    folder = tmp_path_factory.mktemp('world') / 'a' / 'b' / 'c'
    folder.mkdir(parents=True)
    (folder / 'text.txt').write_text(''.join(f'line {n}: {n * n}\n' for n in range(900)))
    (folder / 'config.py').write_text('n_layer = 2\n')
    with contextlib.chdir(folder):
        for module, args in MAKE:
            code, err = outcome(module, args)
            assert code == 0, err
    return folder


SMALL = [
    '--block_size=16',
    '--n_layer=2',
    '--n_head=2',
    '--n_embd=16',
    '--batch_size=2',
    '--device=cpu',
    '--selective',
    '--gradient_accumulation_steps=1',
    '--eval_iters=1',
    '--max_iters=2',
    '--dataset=lines',
    '--kernel=none',
]
MAKE = [
    ('prepare_text', ['text.txt', '--name=lines', '--tokenizer=bytes']),
    ('train', [*SMALL, '--out_dir=out/a']),
    (
        'prune',
        ['--out_dir=out/a', '--tolerance=100', '--windows=2', '--batch_size=2', '--device=cpu'],
    ),
]
NOWHERE = '--base_url=http://127.0.0.1:9/x'
# of each script a command that is quick; its settings are replaced by horrors, one after the other
COMMANDS = {
    'train': [*SMALL, '--out_dir=out/b'],
    'sample': ['--out_dir=out/a', '--max_new_tokens=2', '--device=cpu'],
    'prune': [
        '--out_dir=out/a',
        '--tolerance=100',
        '--windows=1',
        '--device=cpu',
        '--search=plain',
        '--bite=14',
    ],
    'prepare_text': ['text.txt', '--name=lines', '--tokenizer=bytes'],
    'prepare_c4': [NOWHERE, '--tokenizer=bytes', '--retries=0', '--processes=1'],
    'lab.tasks': ['parity', '--records=20', '--length=4'],
    'lab.plot': ['out/a'],
    'lab.visualize': ['--out_dir=out/a', '--start=line 1', '--device=cpu'],
    'lab.bench': [
        '--what=decode',
        '--shapes=small',
        '--lengths=64',
        '--tokens=64',
        '--rounds=1',
        '--device=cpu',
    ],
    'lab.reproduce': ['--list'],
    'lab.export_hf': ['--out_dir=out/a'],
}


@pytest.fixture
def here(world, tmp_path):
    """The world, copied to a folder that is then the current one."""
    copy = tmp_path / 'a' / 'b' / 'c'
    shutil.copytree(world, copy)
    (copy / 'folder').mkdir()
    (copy / 'file').write_text('a file')
    os.symlink('loop', copy / 'loop')
    with contextlib.chdir(copy):
        yield copy


@pytest.mark.parametrize('module', [module for module in SCRIPTS if module in COMMANDS])
def test_texts(module, here):
    """Every setting that is text, and arguments without dashes, with every horror that its
    declaration accepts."""
    cls, command, faults = SCRIPTS[module], COMMANDS[module], []
    for f in (f for f in dataclasses.fields(cls) if f.type in (str, list)):
        for horror in TEXTS:
            with contextlib.suppress(settings.UserError):
                value = settings.checked(
                    cls, f.name, [horror] if f.type is list else horror, f.name
                )
                if value == f.default or '\n' in horror:
                    continue
                args = [arg for arg in command if arg.startswith('--') or f.type is str]
                args.append(horror if f.type is list else f'--{f.name}={horror}')
                faults.append(fault(module, args, here.parents[2]))
                shutil.rmtree('out/b', ignore_errors=True)
    assert not any(faults), [text for text in faults if text]


def as_json(change):
    """A damage of JSON: change(value) for the value of each entry, one at a time; the damaged
    texts."""

    def damages(data):
        for line in (
            data.decode().splitlines() if data[:1] == b'{' and b'\n{' in data else [data.decode()]
        ):
            value = json.loads(line)
            for key in value if isinstance(value, dict) else ():
                yield json.dumps({**value, key: change(value[key])}).encode()

    return damages


DAMAGES = [
    b'',
    b'null',
    b'[]',
    b'{}',
    b'1',
    b'"x"',
    b'[' * 100_000,
    b'{"a":' * 100_000,
    b'\xff\xfe\x00',
    b'\0' * 5000,
    b'x' * 5000,
    b'{"iter": 1e999}',
    b'PK\x03\x04',
    lambda data: data[: len(data) // 2],
    lambda data: data[:-1],
    lambda data: data + b'x',
    lambda data: data[::-1],
    'missing',
    'folder',
    'loop',
    'dangling',
]
READERS = [
    ('sample', COMMANDS['sample']),
    ('train', ['config.py', *SMALL, '--out_dir=out/b']),
    ('train', [*SMALL, '--out_dir=out/a', '--init_from=resume', '--max_iters=3']),
    ('prune', COMMANDS['prune']),
    ('lab.plot', COMMANDS['lab.plot']),
    ('lab.visualize', COMMANDS['lab.visualize']),
    ('prepare_text', COMMANDS['prepare_text']),
    ('sample', [*COMMANDS['sample'], '--start=FILE:text.txt']),
]


opened = None  # the paths that are opened, while a set
sys.addaudithook(
    lambda event, args: (
        opened.add(os.path.abspath(os.fspath(args[0])))
        if event == 'open' and opened is not None and isinstance(args[0], (str, bytes, os.PathLike))
        else None
    )
)


def files_read(module, args):
    """The files below the current folder that a command opens."""
    global opened
    opened = set()
    code, err = outcome(module, args)
    assert code == 0, err
    found, opened = {os.path.relpath(os.fsdecode(path)) for path in opened}, None
    shutil.rmtree('out/b', ignore_errors=True)
    return {path for path in found if not path.startswith('..')}


def test_damaged_files(here):
    """Every file that a script opens, with every damage."""
    faults, seen = [], set()
    wholes = {
        path: path.read_bytes()
        for path in here.rglob('*')
        if path.is_file() and not path.is_symlink()
    }
    for module, args in READERS:
        read = {path for path in files_read(module, args) if (module, path) not in seen}
        seen |= {(module, path) for path in read}
        for path, whole in wholes.items():  # what the command has written is as it was again
            path.write_bytes(whole)
        for path in (path for path in wholes if str(path.relative_to(here)) in read):
            whole = wholes[path]
            damages = list(DAMAGES)
            if path.suffix in ('.json', '.jsonl'):
                for change in lambda v: None, lambda v: 'x', lambda v: [v], lambda v: -1:
                    damages += as_json(change)(whole)
            for damage in damages:
                remove(path)
                if damage == 'folder':
                    path.mkdir()
                elif damage in ('loop', 'dangling'):
                    os.symlink(path.name if damage == 'loop' else 'nowhere', path)
                elif damage != 'missing':
                    path.write_bytes(damage(whole) if callable(damage) else damage)
                faults.append(fault(module, args, here.parents[2]))
                shutil.rmtree('out/b', ignore_errors=True)
            remove(path)
            path.write_bytes(whole)
    assert len(faults) > 500 and not any(faults), [text for text in faults if text]


def remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()
