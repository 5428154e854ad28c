"""What several test files share: a small data set, and a way to run a script."""

import glob
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import pytest

_hub = tempfile.TemporaryDirectory()  # for transformers and datasets; kept as long as this process
os.environ.update(HF_HOME=_hub.name, HF_HUB_OFFLINE='1')
# the tests' tensors are tiny: threads would wait for each other, no more
os.environ.setdefault('OMP_NUM_THREADS', '1')
import torch

import prepare_text
from support import settings

if not torch.cuda.is_available():
    # Triton reads it when it is imported, which any later test may do
    os.environ.setdefault('TRITON_INTERPRET', '1')

# Started in the background or under nohup, a shell leaves these ignored, and processes inherit
# that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def wait_until(condition, seconds=60):
    """Return once condition() holds; a failure if it never does."""
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, f'waited {seconds} seconds in vain'
        time.sleep(0.005)


@pytest.fixture(scope='module', autouse=True)
def signals():
    """Scripts that run in this process catch signals; afterwards all is as it was."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers):
        signal.signal(number, handler)


@pytest.fixture(scope='session')
def lines(tmp_path_factory):
    """The folder of a data set of a few thousand bytes."""
    folder = tmp_path_factory.mktemp('data')
    text = folder / 'lines.txt'
    text.write_text(''.join(f'line {n}: {n * n}\n' for n in range(900)))
    cfg = prepare_text.TextConfig([str(text)], tokenizer='bytes', data_dir=str(folder))
    prepare_text.prepare(cfg)
    return folder / 'lines'


@pytest.fixture
def dataset(lines):
    return f'--dataset={lines}'


@pytest.fixture
def run(monkeypatch, capfd):
    """run(train, *args): the script's main() in this process; returns what it printed, or the
    UserError's text."""

    def run(script, *args):
        monkeypatch.setattr(sys, 'argv', [script.__name__ + '.py', *args])
        try:
            script.main()
        except settings.UserError as e:
            assert '\n' not in str(e)
            return str(e)
        return ''.join(capfd.readouterr())

    return run


@pytest.fixture
def tree(tmp_path):
    """A copy of the code: tree(file, old, new) edits it, tree.run(*args) runs Python in it.

    tree.fail(*args) is the single line with which a command ends that must fail.
    """
    copy = tmp_path / 'copy'
    for name in 'kernels', 'support', 'config', 'lab':
        shutil.copytree(f'{ROOT}/{name}', copy / name)
    for file in glob.glob(f'{ROOT}/*.py'):
        shutil.copy(file, copy)

    def edit(file, old, new):
        text = (copy / file).read_text()
        assert text.count(old) == 1, f'{file} has {old!r} {text.count(old)} times'
        (copy / file).write_text(text.replace(old, new))

    def command(*args):
        env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(copy)}
        return subprocess.run(
            [sys.executable, *args], cwd=copy, env=env, capture_output=True, text=True, timeout=300
        )

    def run(*args):
        result = command(*args)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def fail(*args):
        result = command(*args)
        assert result.returncode == 1 and result.stderr.count('\n') == 1, result.stderr
        return result.stderr.strip()

    edit.run = run
    edit.fail = fail
    edit.path = copy
    return edit
