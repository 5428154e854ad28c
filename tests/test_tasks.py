"""lab/tasks.py, and data sets of records: what is asked, what counts, and what train.py makes of it."""
import json
import re

import numpy as np
import pytest
import torch

import data
import prune
import sample
import train
from lab import names, tasks
from support import settings


def records(run, tmp_path, task, *args):
    """The data set of a task and its training records as text, latin-1, without the token in front."""
    run(tasks, task, f'--data_dir={tmp_path}', '--records=200', *args)
    dataset = data.load_dataset(task, root=str(tmp_path))
    tokens = np.fromfile(tmp_path / task / 'train.bin', dtype='<u2').reshape(200, dataset.record_len)
    assert dataset.tokens('val') == 10 * dataset.record_len
    assert (tokens[:, 0] == ord('\n')).all()
    return dataset, [bytes(record.astype(np.uint8)).decode('latin-1')[1:] for record in tokens]


def test_variable_assignment(run, tmp_path):
    dataset, texts = records(run, tmp_path, 'variable_assignment', '--variables=4', '--length=12', '--every=3')
    stale = 0
    for text in texts:
        values, answers, seen = {}, [], {}
        for place, c in enumerate(text, start=1):
            if ord(c) >= 128:
                letter, value = divmod(ord(c) - 128, 10)
                stale += chr(97 + letter) in values
                values[chr(97 + letter)] = str(value)
            elif c.isdigit():
                assert values[text[place - 2]] == c
                answers.append(place)
        assert answers == dataset.answers and len(answers) == 4 and len(values) <= 4
    assert stale > 200 * 6
    assert tasks.readable(texts[0][:5]).count('=') == 3 and re.fullmatch(r'([a-l]=\d; ){3}[a-l]\? \d; ', tasks.readable(texts[0][:5]))


def test_parity(run, tmp_path):
    dataset, texts = records(run, tmp_path, 'parity', '--length=9')
    assert dataset.answers == list(range(2, 19, 2))
    for text in texts:
        for n in range(9):
            assert text[2 * n + 1] == 'ab'[text[:2 * n + 1].count('1') % 2]


def test_copying(run, tmp_path):
    dataset, texts = records(run, tmp_path, 'copying', '--length=5')
    assert all(re.fullmatch(r'([a-z]{5})\|\1', text) for text in texts)
    assert dataset.answers == [7, 8, 9, 10, 11] and dataset.record_len == 12


def test_denoising(run, tmp_path):
    dataset, texts = records(run, tmp_path, 'denoising', '--length=10', '--letters=3')
    for text in texts:
        read, answer = text.split('|')
        assert re.sub('[a-z]', '', read) == answer and len(answer) == 3 and len(read) == 10
    assert dataset.answers == [12, 13, 14]


@pytest.mark.parametrize('depth, low, high', [(-1, 0, 1), (0, 0, 0), (1, 1, 1), (0.5, 0.5, 0.5)])
def test_passkey(run, tmp_path, depth, low, high):
    dataset, texts = records(run, tmp_path, 'passkey', '--length=8', f'--depth={depth}')
    depths = []
    for text in texts:
        before, key, after, answer = re.fullmatch(r' *((?:[a-z]+ )*)\[(\d{5})\]((?: [a-z]+)*) \[(\d{5})', text).groups()
        assert key == answer and len(before.split()) + len(after.split()) == 8
        depths.append(len(before.split()) / 8)
    assert (min(depths), max(depths)) == (low, high) and [text[-5:] for text in texts] == [
        ''.join(text[place - 1] for place in dataset.answers) for text in texts]


def test_same_seed_same_data(run, tmp_path):
    first = records(run, tmp_path, 'copying')[1]
    assert records(run, tmp_path, 'copying')[1] == first != records(run, tmp_path, 'copying', '--seed=1')[1]


def test_batch_of_records(run, tmp_path):
    dataset, texts = records(run, tmp_path, 'denoising', '--length=10', '--letters=3')
    x, y = dataset.batch('train', 0, 64, block_size=40)
    assert x.shape == y.shape == (64, 14) and x.dtype == y.dtype == torch.int64
    assert (y >= 0).sum(dim=0).tolist() == [0] * 11 + [64] * 3
    for record, target in zip(x.tolist(), y.tolist()):
        assert bytes(record[1:] + target[-1:]).decode() in texts
        assert target[11:13] == record[12:14]
    assert dataset.window(14) == 15
    with pytest.raises(settings.UserError, match='block_size of 14'):
        dataset.batch('train', 0, 1, block_size=13)


@pytest.mark.parametrize('meta', [dict(record_len=1), dict(answers=[]), dict(answers=[0]), dict(answers=[12]), dict(record_len='x')])
def test_meta_that_is_no_records(run, tmp_path, meta):
    records(run, tmp_path, 'copying', '--length=5')
    path = tmp_path / 'copying' / 'meta.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **meta}))
    with pytest.raises(settings.UserError, match='damaged'):
        data.load_dataset('copying', root=str(tmp_path))


def test_train_prune_and_sample(run, tmp_path):
    """Parity is learned, accuracy is reported, and a layer then needs to remember next to nothing."""
    records(run, tmp_path, 'parity', '--length=6')
    out = run(train, 'config/tasks.py', f'--dataset={tmp_path}/parity', f'--out_dir={tmp_path}/out', '--block_size=12',
              '--max_iters=150', '--eval_interval=75', '--selective', '--device=cpu', '--n_embd=32')
    logged = [json.loads(line) for line in open(tmp_path / 'out/log.jsonl')]
    accuracies = [line['accuracy'] for line in logged if 'accuracy' in line]
    assert len(accuracies) == 3 and accuracies[0] < 0.7 and accuracies[-1] > 0.95
    assert f'accuracy {accuracies[-1]:.1%}' in out
    out = run(prune, f'--out_dir={tmp_path}/out', '--tolerance=0.1', '--device=cpu')
    found = json.load(open(tmp_path / 'out/budgets.json'))
    assert found['block_size'] == 12 and found['curve'][-1]['saving'] > 2
    text = run(sample, f'--out_dir={tmp_path}/out', '--start=1', '--max_new_tokens=1', '--temperature=0', '--device=cpu')
    assert text.splitlines()[0][:2] in ('1a', '1b')


@pytest.mark.parametrize('args, words', [
    (['nothing'], 'name a task'), ([], 'name a task'), (['variable_assignment', '--variables=13'], 'variables'),
    (['parity', 'copying', '--name=x'], 'one task'), (['passkey', '--depth=2'], 'depth'), (['copying', '--records=3'], 'records'),
    (['denoising', '--letters=99'], 'letters'), (['variable_assignment', '--every=0'], 'every'),
    (['variable_assignment', '--length=3'], 'every')])
def test_refusals(args, words, run, tmp_path):
    assert re.search(words, run(tasks, *args, f'--data_dir={tmp_path}'))
    assert not list(tmp_path.iterdir())


def test_names(tmp_path, monkeypatch):
    """Names are drawn anew for each file and copy; keywords, operators and layout are not."""
    (tmp_path / 'a.py').write_text('def f(x):\n    # a comment\n    return x + 1  # x\n')
    (tmp_path / 'broken.py').write_text('def (((\n')
    (tmp_path / 'b.py').write_text(''.join(f'v{n} = v{n - 1}\n' for n in range(1, 400)))
    files = [(str(tmp_path / name), name) for name in ('a.py', 'b.py', 'broken.py')]
    monkeypatch.setattr(names.prepare_text, 'stdlib_documents', lambda: (files, 0))
    cfg = names.NamesConfig(data_dir=str(tmp_path), copies=3)
    names.prepare(cfg)
    dataset = data.load_dataset('names', root=str(tmp_path))
    assert dataset.vocab_size == 257 and dataset.tokens('train') > 0
    first = names.lexemes('def f(x):\n    # a comment\n    return x + 1  # x\n')
    assert [word for word in first if isinstance(word, str)] == ['f', 'x', 'x', '1']
    a, b = (names.named(first, np.random.default_rng(seed)) for seed in (1, 2))
    fixed = np.array([not isinstance(word, str) for word in first])
    assert (a[fixed] == b[fixed]).all() and (a[fixed] < names.FIRST_NAME).all() and (a[~fixed] >= names.FIRST_NAME).all()
    f, x, again, one = a[~fixed].tolist()
    assert x == again and len({f, x, one}) == 3 and a.tolist() != b.tolist()
    many = names.named([f'v{n}' for n in range(400) for _ in 'ab'], np.random.default_rng(0))
    assert (many[0::2] == many[1::2]).all() and len(set(many.tolist())) == 160
    assert len(set(many[-320:].tolist())) == 160                # the newest 160 names have one each
    whole = (tmp_path / 'names/train.bin').read_bytes()
    names.prepare(cfg)
    assert (tmp_path / 'names/train.bin').read_bytes() == whole
