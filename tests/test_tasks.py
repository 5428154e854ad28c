"""lab/tasks.py, lab/names.py: what is asked, what counts, and what train.py makes of it."""

import json
import re

import numpy as np
import pytest

import data
import prune
import sample
import train
from lab import names, tasks


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
    settings = ['--variables=4', '--length=12', '--every=3']
    dataset, texts = records('variable_assignment', *settings)
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
        assert len(expected) == 4 and len(values) <= 4
    assert stale > 200 * 6
    spelt = tasks.readable(texts[0][:5])
    assert re.fullmatch(r'([a-l]=\d; ){3}[a-l]\? \d; ', spelt)


def test_parity(records):
    dataset, texts = records('parity', '--length=9')
    assert dataset.answers == list(range(2, 19, 2))
    for text in texts:
        for n in range(0, 18, 2):
            assert text[n + 1] == 'ab'[text[: n + 1].count('1') % 2]


def test_copying(records):
    dataset, texts = records('copying', '--length=5')
    assert all(re.fullmatch(r'([a-z]{5})\|\1', text) for text in texts)
    assert (dataset.answers, dataset.record_len) == ([7, 8, 9, 10, 11], 12)


def test_denoising(records):
    dataset, texts = records('denoising', '--length=10', '--letters=3')
    for text in texts:
        read, answer = text.split('|')
        assert re.sub('[a-z]', '', read) == answer == answers_in(dataset, text)
        assert (len(read), len(answer)) == (10, 3)


@pytest.mark.parametrize('depth, low, high', [(-1, 0, 1), (0, 0, 0), (1, 1, 1), (0.5, 0.5, 0.5)])
def test_passkey(records, depth, low, high):
    dataset, texts = records('passkey', '--length=8', f'--depth={depth}')
    depths = []
    for text in texts:
        match = re.fullmatch(r' *((?:[a-z]+ )*)\[(\d{5})\]((?: [a-z]+)*) \[(\d{5})', text)
        before, key, after, answer = match.groups()
        assert key == answer == answers_in(dataset, text)
        assert len(before.split()) + len(after.split()) == 8
        depths.append(len(before.split()) / 8)
    assert (min(depths), max(depths)) == (low, high)


def test_same_seed_same_data(records):
    _, first = records('copying')
    assert records('copying')[1] == first
    assert records('copying', '--seed=1')[1] != first


@pytest.mark.slow
def test_train_prune_and_sample(records, run, tmp_path):
    """Parity is learned, accuracy is reported, and a layer then needs to remember little."""
    records('parity', '--length=6')
    where = [f'--out_dir={tmp_path}/out', '--device=cpu']
    settings = ['--block_size=12', '--max_iters=150', '--eval_interval=75', '--n_embd=32']
    settings += ['--selective', f'--dataset={tmp_path}/parity']
    out = run(train, 'config/tasks.py', *settings, *where)
    logged = [json.loads(line) for line in open(tmp_path / 'out/log.jsonl')]
    accuracies = [line['accuracy'] for line in logged if 'accuracy' in line]
    assert len(accuracies) == 3 and accuracies[0] < 0.7 and accuracies[-1] > 0.95
    assert f'accuracy {accuracies[-1]:.1%}' in out
    run(prune, '--tolerance=0.1', *where)
    found = json.load(open(tmp_path / 'out/budgets.json'))
    assert found['block_size'] == 12 and found['curve'][-1]['saving'] > 2
    text = run(sample, '--start=1', '--max_new_tokens=1', '--temperature=0', *where)
    assert text.splitlines()[0][:2] in ('1a', '1b')


@pytest.mark.parametrize(
    'args, words',
    [
        ('nothing', 'name a task'),
        ('', 'name a task'),
        ('parity copying --name=x', 'one task'),
        ('variable_assignment --variables=13', 'variables'),
        ('variable_assignment --every=0', 'every'),
        ('variable_assignment --length=3', 'every is 4: from 1 to length, which is 3'),
        ('denoising --letters=99', 'letters is 99: from 1 to length, which is 48'),
        ('passkey --depth=2', 'depth'),
        ('copying --records=3', 'records'),
    ],
)
def test_refusals(args, words, run, tmp_path):
    assert words in run(tasks, *args.split(), f'--data_dir={tmp_path}')
    assert not list(tmp_path.iterdir())


def test_names_of_a_file():
    """Names are drawn anew; keywords, operators and layout are not."""
    found = names.lexemes('def f(x):\n    # a comment\n    return x + 1  # x\n')
    fixed = np.array([isinstance(word, int) for word in found])
    assert [word for word in found if isinstance(word, str)] == ['f', 'x', 'x', '1']
    a = names.named(found, np.random.default_rng(1))
    b = names.named(found, np.random.default_rng(2))
    assert (a[fixed] == b[fixed]).all() and a.tolist() != b.tolist()
    assert max(a[fixed]) < names.FIRST_NAME <= min(a[~fixed])
    f, x, again, one = a[~fixed].tolist()
    assert x == again and len({f, x, one}) == 3


def test_many_names():
    """A name in use keeps its byte; the newest 160 have one each."""
    words = []
    for n in range(400):
        words += [f'v{n}', 'x']
    tokens = names.named(words, np.random.default_rng(0))
    assert len(set(tokens[1::2])) == 1
    assert len(set(tokens)) == len(set(tokens[-318:])) == 160


def test_names(tmp_path, monkeypatch, run):
    files = {'a.py': 'x = y\n' * 9, 'broken.py': 'def (((\n', 'c.py': 'x\n'}
    files['indent.py'] = 'if x:\n        x\n    x\n'
    documents = []
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        documents.append((name, str(tmp_path / name)))
    monkeypatch.setattr(names.prepare_text, 'stdlib_documents', lambda: (documents, 0))
    run(names, f'--data_dir={tmp_path}', '--copies=3')
    dataset = data.load_dataset('names', root=str(tmp_path))
    sizes = [dataset.tokens('train'), dataset.tokens('val')]
    assert sorted(sizes) == [3 * 3, 3 * (9 * 4 + 1)]
    first = dataset.fingerprint()
    run(names, f'--data_dir={tmp_path}', '--copies=3')
    assert data.load_dataset('names', root=str(tmp_path)).fingerprint() == first
