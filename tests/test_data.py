"""data.py and prepare_text.py: tokenizers, data sets, batches, and text turned into token files."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import prepare_text
from conftest import ROOT
from support.settings import UserError

GPT2 = os.environ.get('TIKTOKEN_CACHE_DIR') or os.path.join(ROOT, '../shared/data/tiktoken_cache')


def write(path, tokens):
    np.asarray(tokens, '<u2').tofile(path)


@pytest.fixture
def make(tmp_path):
    """make(train, val): the data set x, by hand, of lists of tokens."""

    def make(train, val, **records):
        folder = tmp_path / 'x'
        folder.mkdir()
        write(folder / 'train.bin', train)
        write(folder / 'val.bin', val)
        data.write_meta(folder, data.get_tokenizer('bytes'), 'test', **records)
        return data.load_dataset('x', tmp_path)

    return make


@pytest.fixture
def prepare(run, tmp_path, monkeypatch):
    """prepare(*args): what prepare_text.py says; it makes data/set in tmp_path."""
    monkeypatch.chdir(tmp_path)
    return lambda *args: run(prepare_text, '--tokenizer=bytes', '--name=set', *args)


def documents(split):
    """The texts of a split of data/set, each of which must be ended."""
    tokens = np.fromfile(f'data/set/{split}.bin', '<u2').tolist()
    *texts, rest = data.get_tokenizer('bytes').decode(tokens).split(data.END_OF_TEXT)
    assert rest == ''
    return texts


# ---- Tokenizers ----------------------------------------------------------------------------------

HOSTILE = [
    '',
    'Hello world, the cat sat on the mat',
    '\x00\r\n\t é漢😀',
    ' ' * 3000 + 'x',
    ' <|endoftext|>\n<|endoftext|>',
    "it's I'LL 'tis",
    'e\u0301\u200d\ufeff\u202e ١٢٣ ½ Ⅷ',
    ''.join(map(chr, range(1, 0x300))),
]


@pytest.mark.parametrize('name', ['bytes', 'gpt2:257', 'gpt2:4096', 'gpt2:50257', 'gpt2'])
def test_tokenizers_are_lossless(name, monkeypatch):
    """Text never gives the end of text. Beginnings of GPT-2's table have its very pieces."""
    if name != 'bytes' and not os.path.isdir(GPT2):
        pytest.skip('needs the gpt2 vocabulary on disk')
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', GPT2)
    tokenizer = data.get_tokenizer(name)
    end = data.vocabulary(name) - 1
    assert (tokenizer.name, tokenizer.n_vocab, tokenizer.eot_token) == (name, end + 1, end)
    assert tokenizer.decode([end]) == '<|endoftext|>'
    for text in HOSTILE:
        ids = tokenizer.encode_ordinary(text)
        pieces = [tokenizer.decode_single_token_bytes(n) for n in ids]  # as sample.py prints them
        assert b''.join(pieces) == tokenizer.decode_bytes(ids) == text.encode()
        assert max(ids, default=0) < end
        if end == 256:
            assert len(ids) == len(text.encode())  # no merges
        else:
            gpt2 = data.get_tokenizer('gpt2')
            assert pieces == [gpt2.decode_single_token_bytes(n) for n in ids]
            assert end < 50256 or ids == gpt2.encode_ordinary(text)


@pytest.mark.parametrize(
    'name',
    ['', 'gpt2:', 'gpt2:256', 'gpt2:50258', 'gpt2:2e3', 'gpt2:0300']
    + ['gpt2:³³³', 'gpt2:300\n', 'bytes:300', 'gpt3:300'],
)
def test_unknown_tokenizer(name):
    with pytest.raises(UserError, match='is unknown'):
        data.get_tokenizer(name)


def test_gpt2_without_network_is_one_line(monkeypatch):
    def refused(name):
        raise ConnectionError('long\nstory')

    monkeypatch.setattr(data.tiktoken, 'get_encoding', refused)
    with pytest.raises(UserError, match='vocabulary could not be downloaded .ConnectionError.: '):
        data.get_tokenizer('gpt2')


@pytest.mark.parametrize('bos', [False, True])
def test_prompts(bos):
    tokenizer = data.get_tokenizer('bytes')
    assert data.encode_prompt('ab', tokenizer, bos) == [256] * bos + [97, 98]
    assert data.encode_prompt('', tokenizer, bos) == [256]


# ---- Data sets and batches -----------------------------------------------------------------------


def test_batch_is_windows_of_the_text(make):
    dataset = make(range(100), range(200, 250))
    assert (dataset.vocab_size, dataset.tokenizer_name) == (257, 'bytes')
    assert (dataset.tokens('train'), dataset.tokens('val')) == (100, 50)
    x, y = dataset.batch('val', 3, 5, 8)
    assert x.dtype == y.dtype == torch.int64
    assert torch.equal(y, x + 1)  # the tokens count up, so the next is one more
    assert torch.equal(x - x[:, :1], torch.arange(8).expand(5, 8))
    assert x.min() >= 200


def test_batch_depends_on_its_arguments_only(make):
    dataset = make(range(250), range(250))
    first, _ = dataset.batch('train', 7, 4, 16, seed=1)
    for other in [('train', 8, 4, 16, 1), ('train', 7, 4, 16, 2), ('val', 7, 4, 16, 1)]:
        assert not torch.equal(first, dataset.batch(*other)[0])
    assert torch.equal(first, dataset.batch('train', 7, 4, 16, seed=1)[0])
    # The same on every machine, in every version.
    assert first[:, 0].tolist() == [162, 103, 194, 103]


@pytest.mark.parametrize('bos', [False, True])
def test_every_window_can_come(make, bos):
    """With bos a window begins with the end of a text, and a token less is read."""
    dataset = make(range(6), [1, 2, 3])
    targets = torch.cat([dataset.batch('train', i, 4, 3, bos=bos)[1] for i in range(50)])
    assert set(targets[:, 0].tolist()) == set(range(1 - bos, 4))
    x, y = dataset.batch('val', 0, 2, 2 + bos, bos=bos)  # exactly one window
    assert x.tolist() == [[256] * bos + [1, 2]] * 2
    assert torch.equal(x[:, 1:], y[:, :-1])
    with pytest.raises(UserError, match='val has 3 tokens, a window needs 4: .*block_size'):
        dataset.batch('val', 0, 2, 3 + bos, bos=bos)


@pytest.mark.parametrize('bos', [False, True])
def test_records_are_windows(make, bos):
    dataset = make([1, 2, 3, 4] * 9, [1, 2, 3, 4], record_len=4, answers=[1, 3])
    x, y = dataset.batch('train', 0, 9, 8, bos=bos)  # which makes no difference
    assert (x.tolist(), y.tolist()) == ([[1, 2, 3]] * 9, [[2, -1, 4]] * 9)
    assert dataset.window(3) == dataset.window(8) == 4
    with pytest.raises(UserError, match='block_size of 3'):
        dataset.batch('train', 0, 1, 2)


def test_many_files_are_one(make, tmp_path):
    """Another machine may have made some of them, so meta.json does not list them."""
    make(range(100), range(9))
    write(tmp_path / 'x' / 'train_2.bin', range(101, 200))
    write(tmp_path / 'x' / 'train_1.bin', [100])
    dataset = data.load_dataset('x', tmp_path)
    assert dataset.tokens('train') == 200
    for block_size in 3, 120, 198:
        x, _ = dataset.batch('train', 0, 50, block_size)
        assert torch.equal(x - x[:, :1], torch.arange(block_size).expand(50, -1))


@pytest.mark.parametrize(
    'file, content, words',
    [
        ('meta.json', b'', 'meta.json is damaged'),
        ('meta.json', b'{"record_len": "x"}', 'meta.json is damaged'),
        ('train.bin', b'', 'train.bin has lost some of 90 tokens'),
        ('train.bin', b'ab', 'train.bin has lost some of 90 tokens'),
        ('train.bin', b'\xff' * 180, 'has tokens that its tokenizer lacks'),
    ],
)
def test_damage_is_named(make, tmp_path, file, content, words):
    make(range(90), range(9))
    (tmp_path / 'x' / file).write_bytes(content)
    with pytest.raises(UserError, match=f'{words}.*prepare'):
        data.load_dataset('x', tmp_path).batch('train', 0, 4, 8)


@pytest.mark.parametrize('name', ['other', ''])
def test_missing_set_lists_what_is_there(make, tmp_path, name):
    make(range(9), range(9))
    with pytest.raises(UserError, match=f"'{name}' is not in .*there: x"):
        data.load_dataset(name, tmp_path)


# ---- prepare_text --------------------------------------------------------------------------------


def test_folder(prepare, tmp_path):
    """Each file is a document, in a split by its path inside the folder; some are skipped."""
    texts = {f'd{i % 3}/{i}.txt': f'text {i} é\r\n' * (i + 1) for i in range(60)}
    others = {'d0/x.md': 'no', '.git/y.txt': 'no', 'd0/.y.txt': 'no', 'd0/zero.txt': 'a\0'}
    for name, text in (texts | others).items():
        path = tmp_path / 'in' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    (tmp_path / 'in/d0/z.txt').write_bytes(b'\xff\xfe' * 9)
    said = prepare('in', '--ext=.txt')
    assert '60 file(s), 2 skipped that cannot be read as text' in said
    val = documents('val')
    assert sorted(documents('train') + val) == sorted(texts.values())
    assert 1 <= len(val) <= 8
    os.rename('in', 'elsewhere')
    prepare('elsewhere', '--ext=.txt')
    assert documents('val') == val
    assert sorted(os.listdir('data/set')) == ['meta.json', 'train.bin', 'val.bin']


def test_the_old_data_stay_until_the_new_are_in_place(prepare, monkeypatch):
    Path('in').write_text('one\n' * 100)
    prepare('in')
    old = documents('train')
    Path('in').write_text('two\n' * 100)
    rename = os.rename

    def broken(source, target):
        if source.endswith('.new.tmp'):
            raise OSError('broken')
        rename(source, target)

    monkeypatch.setattr(os, 'rename', broken)
    with pytest.raises(OSError, match='broken'):
        prepare('in')
    assert documents('train') == old and os.listdir('data') == ['set']


@pytest.mark.parametrize('names', [['0.txt', '1.txt'], ['a/x.txt', 'b/x.txt'], ['0', '9', '10']])
def test_few_documents_fill_both_splits(prepare, tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('text')
    prepare(*names)
    assert documents('val') == ['text']
    assert len(documents('train')) == len(names) - 1


@pytest.mark.parametrize(
    'text',
    ['\na' * 40, 'one line é\n' * 300, 'x' * 999 + '\nshort\n']
    + ['long lines 漢' * 40_000 + '\n' + 'é\n' * 800_000],
)
def test_one_file_is_cut_at_a_line(prepare, tmp_path, text):
    (tmp_path / 'a.txt').write_bytes(text.encode())
    prepare('a.txt')
    [train] = documents('train')
    [val] = documents('val')
    assert train + val == text and train.endswith('\n')
    if text.startswith('one'):
        assert 0.02 < len(val) / len(train) < 0.05


@pytest.mark.parametrize(
    'content, arg, words',
    [
        (b'', '', 'a.txt: no text there'),
        (b'\xff\n' * 99, '', 'not UTF-8'),
        (b'one line\n', '', 'no line ends in its last thirtieth'),
        (b'a\nb\n', 'nowhere', "'nowhere' does not exist"),
        (b'a\nb\n', '--name=..', '--name'),
        (b'a\nb\n', '--tokenizer=gpt3', 'is unknown'),
    ],
)
def test_bad_input_leaves_nothing(prepare, tmp_path, content, arg, words):
    (tmp_path / 'a.txt').write_bytes(content)
    assert words in prepare('a.txt', *arg.split())
    assert not os.path.exists('data/set')


def test_other_data_sets_are_left_alone(prepare, make, tmp_path):
    (tmp_path / 'a.txt').write_text('a\nb\n')
    make(range(9), range(9))
    with pytest.raises(UserError, match='is another data set .test.: choose another --name'):
        data.output_folder('.', 'x', source='lab.tasks')
    write('x/train_00000.bin', [1])
    said = prepare('a.txt', '--name=x', '--data_dir=.')
    assert 'train_00000.bin, which is not of such a data set' in said


def test_command_line(prepare, tmp_path):
    (tmp_path / 'a.txt').write_text('fine\n' * 60)
    expected = 'data/a: 296 train and 6 val tokens (bytes) from 1 file(s)\n'
    assert prepare('a.txt', '--name=') == expected


def test_scripts_start_without_torch():
    code = 'import sys, prepare_c4, prepare_text; sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0
