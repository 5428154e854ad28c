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
import sys
from pathlib import Path
from unittest import mock

import pytest

from support import download, settings

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

NUMBERS = (
    'nan inf -inf 1e999 1e30 1e20 -1 -1e-9 ² ٣ 0x10 1.5e one None [] 1,2 --1 1e-400'.split()
    + ['', ' ', '5' * 5000]
)
TEXTS = (
    '. .. ../x a/b /dev/null /dev/null/x /proc/self/x - * , [x] $HOME \\ é…\u202e ² 1e999 -1 nan '
    'None FILE: FILE:. http://[ meta cuda:999 folder file loop'.split(' ')
    + ['', ' ', 'x' * 300, f'{"x" * 200}/' * 30]
)
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
    'a\x00\nb',
]


def outcome(module, args):
    """Run a script in this process as from the command line: exit code, standard error."""
    err = io.TextIOWrapper(io.BytesIO())
    out = io.TextIOWrapper(io.BytesIO())
    code = 0
    with (
        mock.patch('sys.argv', [module.split('.')[-1] + '.py', *args]),
        contextlib.redirect_stderr(err),
        contextlib.redirect_stdout(out),
    ):
        try:
            settings.run(importlib.import_module(module).main)
        except SystemExit as e:
            code = e.code
    err.seek(0)
    return code, err.read()


def files_in(folder):
    """{path: when it was written} of every file below a folder."""
    return {path: path.lstat().st_mtime_ns for path in folder.rglob('*') if not path.is_dir()}


def check(module, args, folder):
    """The script succeeds, or fails in one line and leaves all as it was."""
    before = files_in(folder)
    code, err = outcome(module, args)
    if code:
        lines = [line for line in err.splitlines() if not re.search('trying again|left out', line)]
        assert code == 1 and len(lines) == 1, err
        assert lines[0].startswith(module.split('.')[-1]) and lines[0].isprintable(), err
        assert files_in(folder) == before
    shutil.rmtree('out/b', ignore_errors=True)


def test_scripts_are_found():
    assert {'train', 'sample', 'prune', 'prepare_text', 'prepare_c4', 'lab.tasks'} <= set(SCRIPTS)
    scripts = {module for module, text in SOURCES.items() if 'settings.run(' in text}
    assert scripts - set(SCRIPTS) == {'lab.ablate'}


@pytest.mark.parametrize('module', SCRIPTS)
def test_settings_have_a_range_and_keep_it(module):
    """From the command line and from a config file; a value that is accepted is of its type,
    finite and in the range."""
    cls = SCRIPTS[module]
    for f in dataclasses.fields(cls):
        limits = f.metadata
        assert limits['help'], f'{f.name} is not explained'
        default = getattr(cls(), f.name)
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
                assert str(value) not in ('nan', 'inf', '²', '1e20', '1e30')


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    """A folder with one of everything that scripts read."""
    folder = tmp_path_factory.mktemp('world') / 'a' / 'b' / 'c'
    folder.mkdir(parents=True)
    (folder / 'text.txt').write_text(''.join(f'line {n}: {n * n}\n' for n in range(900)))
    (folder / 'config.py').write_text('n_layer = 2\n')
    with contextlib.chdir(folder):
        for module, args in MAKE:
            assert outcome(module, args.split())[0] == 0
    return folder


SMALL = (
    '--block_size=16 --n_layer=2 --n_head=2 --n_embd=16 --batch_size=2 --device=cpu --selective '
    '--gradient_accumulation_steps=1 --eval_iters=1 --max_iters=2 --dataset=lines --kernel=none'
)
TEXT = 'text.txt --name=lines --tokenizer=bytes'
PRUNE = '--out_dir=out/a --tolerance=100 --windows=1 --device=cpu --bite=14'
MAKE = [('prepare_text', TEXT), ('train', f'{SMALL} --out_dir=out/a'), ('prune', PRUNE)]
# of each script a command that is quick; its settings are replaced by horrors, one after the other
COMMANDS = {
    'train': f'{SMALL} --out_dir=out/b',
    'sample': '--out_dir=out/a --max_new_tokens=2 --device=cpu',
    'prune': PRUNE,
    'prepare_text': TEXT,
    'prepare_c4': '--base_url=http://127.0.0.1:9/x --tokenizer=bytes',
    'lab.tasks': 'passkey --records=20',
    'lab.plot': 'out/a',
    'lab.visualize': '--out_dir=out/a --start=line1',
    'lab.bench': '--what=decode --shapes=small --lengths=64 --tokens=64 --rounds=1 --device=cpu',
    'lab.reproduce': '--list',
    'lab.export_hf': '--out_dir=out/a',
}


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    """The world, copied to a folder that is then the current one."""
    monkeypatch.setattr(os, 'fsync', int)  # does nothing, as a busy disk takes its time
    monkeypatch.setattr(download, 'WAITS', ())
    copy = tmp_path / 'a' / 'b' / 'c'
    shutil.copytree(world, copy)
    (copy / 'folder').mkdir()
    (copy / 'file').write_text('a file')
    os.symlink('loop', copy / 'loop')
    with contextlib.chdir(copy):
        yield copy


@pytest.mark.parametrize('module', COMMANDS)
def test_texts(module, here):
    """Every setting that is text, and arguments without dashes, with every horror."""
    command = COMMANDS[module].split()
    for field in dataclasses.fields(SCRIPTS[module]):
        for horror in TEXTS:
            if field.type is str:
                check(module, [*command, f'--{field.name}={horror}'], here.parents[2])
            elif field.type is list:
                options = [arg for arg in command if arg.startswith('--')]
                check(module, [*options, horror], here.parents[2])


DAMAGES = [b'', b'null', b'[]', b'{}', b'1', b'"x"', b'[' * 100_000, b'{"a":' * 100_000]
DAMAGES += [b'\xff\xfe\x00', b'\0' * 5000, b'x' * 5000, b'{"iter": 1e999}', b'PK\x03\x04']
READERS = [
    ('sample', COMMANDS['sample']),
    ('train', f'config.py {SMALL} --out_dir=out/b'),
    ('train', f'{SMALL} --out_dir=out/a --init_from=resume --max_iters=3'),
    ('prune', COMMANDS['prune']),
    ('lab.visualize', COMMANDS['lab.visualize']),
    ('prepare_text', COMMANDS['prepare_text']),
    ('sample', COMMANDS['sample'] + ' --start=FILE:text.txt'),
]


def damages(path, whole):
    """What may be there instead of a file: other bytes, a link (a text), a folder or nothing."""
    yield from [*DAMAGES, whole[: len(whole) // 2], whole[:-1], whole + b'x', whole[::-1]]
    yield from [path.name, 'nowhere', True, None]
    if path.suffix == '.json':
        entries = json.loads(whole)
        for key, value in entries.items():
            for wrong in None, 'x', [value], -1:
                yield json.dumps({**entries, key: wrong}).encode()


opened = set()  # the files that are opened


def note(event, args):
    if event == 'open':
        opened.add(os.path.abspath(str(args[0])))


sys.addaudithook(note)


def test_damaged_files(here):
    """Every file that a script opens, with every damage. A log is read as it is."""
    wholes = {}
    for path in Path.cwd().rglob('*'):
        if path.is_file() and path.suffix != '.jsonl':
            wholes[path] = path.read_bytes()
    cases = set()
    for module, command in READERS:
        args = command.split()
        opened.clear()
        assert outcome(module, args)[0] == 0
        for path in [path for path in wholes if str(path) in opened]:
            for damage in damages(path, wholes[path]):
                if (module, path, damage) in cases:
                    continue
                cases.add((module, path, damage))
                for other, whole in wholes.items():  # a script may have changed it
                    other.write_bytes(whole)
                path.unlink()
                if damage is True:
                    path.mkdir()
                elif isinstance(damage, str):
                    path.symlink_to(damage)
                elif damage is not None:
                    path.write_bytes(damage)
                check(module, args, here.parents[2])
                shutil.rmtree(path, ignore_errors=True)
                path.unlink(missing_ok=True)
                path.write_bytes(wholes[path])
    assert len(cases) > 500
