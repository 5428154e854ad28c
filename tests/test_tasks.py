"""lab/tasks.py, lab/names.py: what is asked, what counts, and what train.py makes of it."""

import re

import numpy as np
import pytest

import data
import train
from lab import names, tasks
from support import checkpoint as ckpt


@pytest.fixture
def records(run, tmp_path):
    """records(task, *args): its data set and training records as text, without the first token."""

    def records(task, *args):
        run(tasks, task, f'--data_dir={tmp_path}', '--records=200', *args)
        dataset = data.load_dataset(task, root=str(tmp_path))
        tokens = np.fromfile(tmp_path / task / 'train.bin', '<u2').reshape(200, dataset.record_len)
        assert dataset.tokens('val') == 10 * dataset.record_len
        assert (tokens[:, 0] == ord('\n')).all()
        return dataset, [''.join(map(chr, record[1:])) for record in tokens]

    return records


def answers_in(dataset, text):
    return ''.join(text[place - 1] for place in dataset.answers)


def test_variable_assignment(records):
    dataset, texts = records('variable_assignment', '--variables=4')
    stale = 0
    for text in texts:
        values = {}
        expected = ''
        for c in text:
            if ord(c) >= 128:
                letter, value = divmod(ord(c) - 128, 10)
                stale += letter in values
                values[letter] = str(value)
            elif c.isalpha():
                expected += values[ord(c) - ord('a')]
        assert answers_in(dataset, text) == expected
        assert len(expected) == 6 and len(values) <= 4
    assert stale > 200 * 6
    assert records('variable_assignment', '--variables=4', '--seed=1')[1] != texts


def test_passkey(records):
    dataset, texts = records('passkey')
    depths = set()
    for text in texts:
        before, key, _, again = re.split(r' ?[][] ?', text)
        assert re.fullmatch('[0-9]{5}', key) and key == again == answers_in(dataset, text)
        depths.add(len(before.split()))
    assert depths == set(range(11))


@pytest.mark.slow
def test_train(run, tmp_path):
    """Variable assignment is learned, and accuracy is reported."""
    args = ['--variables=1', '--records=2000', f'--data_dir={tmp_path}']
    run(tasks, 'variable_assignment', *args)
    args = [f'--dataset={tmp_path}/variable_assignment', '--block_size=40', '--max_iters=150']
    args += ['--n_layer=2', '--n_embd=64', '--batch_size=32', '--learning_rate=5e-3']
    run(train, 'config/tasks.py', *args, f'--out_dir={tmp_path}', '--device=cpu')
    evaluations = [line for line in ckpt.read_log(tmp_path) if 'accuracy' in line]
    assert evaluations[0]['accuracy'] < 0.5 and evaluations[-1]['accuracy'] > 0.95


@pytest.mark.parametrize(
    'args, words',
    [
        ('nothing', 'is not one of'),
        ('', 'name a task'),
        ('variable_assignment passkey', 'name a task'),
        ('variable_assignment --variables=13', 'variables'),
    ],
)
def test_refusals(args, words, run, tmp_path):
    assert words in run(tasks, *args.split(), f'--data_dir={tmp_path}')
    assert not list(tmp_path.iterdir())


def test_names_of_a_file(tmp_path):
    """Names are drawn anew; keywords, operators and layout are not."""
    (tmp_path / 'x.py').write_text('def f(x):\n    # a comment\n    return x + 1  # x\n')
    found = names.lexemes(tmp_path / 'x.py')
    tokens = names.named(found, np.random.default_rng(1))
    assert tokens != names.named(found, np.random.default_rng(2))
    drawn = {}
    for lexeme, byte in zip(found, tokens):
        if isinstance(lexeme, int):
            assert byte == lexeme < names.FIRST_NAME
        else:
            assert drawn.setdefault(lexeme, byte) == byte >= names.FIRST_NAME
    assert list(drawn) == ['f', 'x', '1'] and len(set(drawn.values())) == 3


def test_many_names():
    """A name in use keeps its byte; the newest 160 have one each."""
    words = []
    for n in range(400):
        words += [f'v{n}', 'x']
    tokens = names.named(words, np.random.default_rng(0))
    assert len(set(tokens[1::2])) == 1
    assert len(set(tokens)) == len(set(tokens[-318:])) == 160


def test_names(tmp_path, monkeypatch, run):
    documents = []
    for name, text in {'a.py': 'x = y\n' * 9, 'c.py': 'x\n'}.items():
        (tmp_path / name).write_text(text)
        documents.append((name, str(tmp_path / name)))
    monkeypatch.setattr(names.prepare_text, 'stdlib_documents', lambda: documents)
    out = run(names, f'--data_dir={tmp_path}')
    sizes = re.search('([0-9]+) train and ([0-9]+) val', out).groups()
    assert sorted(map(int, sizes)) == [5 * 3, 5 * (9 * 4 + 1)]
