"""data.py and prepare_text.py: tokenizers, data sets, batches, and text turned into token files."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import data
import prepare_text
from conftest import ROOT
from support.settings import UserError

GPT2 = os.environ.get('TIKTOKEN_CACHE_DIR') or os.path.join(ROOT, '../shared/data/tiktoken_cache')


@pytest.fixture
def make(tmp_path):
    """make(train, val): a data set by hand, of lists of tokens; others: more files of training."""

    def make(train, val, name='x', others=(), **records):
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        files = {'train.bin': train, 'val.bin': val, **dict(others)}
        for file, tokens in files.items():
            np.asarray(tokens, '<u2').tofile(folder / file)
        data.write_meta(folder, data.get_tokenizer('bytes'), 'test', True, **records)
        return data.load_dataset(name, tmp_path)

    return make


@pytest.fixture
def text_set(tmp_path):
    """text_set(*paths, **settings): what prepare_text makes of them; its folder."""

    def text_set(*paths, tokenizer='bytes', name='set', ext=''):
        paths = [str(path) for path in paths]
        cfg = prepare_text.TextConfig(paths, name, tokenizer, ext, str(tmp_path / 'data'))
        return tmp_path / 'data' / prepare_text.prepare(cfg)

    return text_set


def tokens_of(folder, name):
    return np.fromfile(folder / name, '<u2').tolist()


# ---- Tokenizers ----------------------------------------------------------------------------------

HOSTILE = [
    '',
    'a',
    'Hello world, the cat sat on the mat',
    '\x00\r\n\t é漢😀',
    ' ' * 3000 + 'x',
    '<|endoftext|>',
    ' <|endoftext|>\n<|endoftext|>',
    '\n' * 999,
    "it's I'LL 'tis",
    'e\u0301\u200d\ufeff\u202e',
    '١٢٣ ½ Ⅷ',
    'x' * 3000,
    ''.join(map(chr, range(1, 0x300))),
    ''.join(map(chr, np.random.default_rng(0).integers(1, 0xD800, 5000))),
]


@pytest.fixture
def gpt2_table(monkeypatch):
    """GPT-2's table from the folder that has it."""
    if not os.path.isdir(GPT2):
        pytest.skip('needs the gpt2 vocabulary on disk')
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', GPT2)


@pytest.mark.parametrize('text', HOSTILE)
def test_bytes_tokenizer_is_lossless(text):
    tokenizer = data.get_tokenizer('bytes')
    assert tokenizer.encode_ordinary(text) == list(text.encode())
    assert tokenizer.decode_bytes(tokenizer.encode_ordinary(text)) == text.encode()
    assert (tokenizer.eot_token, tokenizer.n_vocab, tokenizer.name) == (256, 257, 'bytes')


def test_bytes_tokenizer_is_fast():
    text = 'def f(x): return x\n' * 100_000
    start = time.process_time()
    data.get_tokenizer('bytes').encode_ordinary(text)
    assert len(text) / (time.process_time() - start) > 2e6  # characters a second


@pytest.mark.parametrize('count', [257, 300, 4096, 50256, 50257])
def test_beginnings_of_gpt2s_table(gpt2_table, count):
    tokenizer = data.get_tokenizer(f'gpt2:{count}')
    whole = data.get_tokenizer('gpt2')
    assert (tokenizer.name, tokenizer.n_vocab) == (f'gpt2:{count}', count)
    assert tokenizer.eot_token == count - 1
    assert tokenizer.decode_bytes([count - 1]) == b'<|endoftext|>'
    for text in HOSTILE:
        ids = tokenizer.encode_ordinary(text)
        pieces = [tokenizer.decode_single_token_bytes(n) for n in ids]  # as sample.py prints them
        assert b''.join(pieces) == tokenizer.decode_bytes(ids) == text.encode()
        assert max(ids, default=0) < count - 1
        assert pieces == [whole.decode_single_token_bytes(n) for n in ids]
        if count == 257:
            assert len(ids) == len(text.encode())  # bytes, no merges
        if count == 50257:
            assert ids == whole.encode_ordinary(text)


def test_gpt2(gpt2_table):
    tokenizer = data.get_tokenizer('gpt2')
    assert (tokenizer.n_vocab, tokenizer.eot_token) == (50257, 50256)
    assert tokenizer.encode_ordinary('Hello world') == [15496, 995]


def test_text_never_gives_the_end_of_text(gpt2_table, tmp_path, text_set):
    (tmp_path / 'text.txt').write_text('Many words, <|endoftext|> 漢字.\n' * 60)
    folder = text_set(tmp_path / 'text.txt', tokenizer='gpt2:1024')
    dataset = data.load_dataset(str(folder))
    assert (dataset.tokenizer_name, dataset.vocab_size) == ('gpt2:1024', 1024)
    for name in 'train.bin', 'val.bin':
        assert tokens_of(folder, name).count(1023) == 1


@pytest.mark.parametrize(
    'name',
    ['gpt3', '', 'gpt2:', 'gpt2:256', 'gpt2:50258', 'gpt2:-300', 'gpt2:2e3', 'gpt2:0300']
    + ['gpt2:³³³', 'gpt2:300\n', 'gpt2 :300', 'bytes:300', 'gpt3:300'],
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


def test_prompts():
    tokenizer = data.get_tokenizer('bytes')
    assert data.encode_prompt('ab', tokenizer, bos=False) == [97, 98]
    assert data.encode_prompt('ab', tokenizer, bos=True) == [256, 97, 98]
    assert data.encode_prompt('', tokenizer, bos=False) == [256]
    assert data.encode_prompt('', tokenizer, bos=True) == [256]


# ---- Data sets and batches -----------------------------------------------------------------------


def test_batch_is_windows_of_the_text(make):
    dataset = make(range(100), range(200, 250))
    assert (dataset.name, dataset.vocab_size, dataset.tokenizer_name) == ('x', 257, 'bytes')
    assert (dataset.tokens('train'), dataset.tokens('val')) == (100, 50)
    x, y = dataset.batch('val', 3, 5, 8)
    assert x.shape == y.shape == (5, 8)
    assert x.dtype == y.dtype == torch.int64
    assert x.is_contiguous() and y.is_contiguous()
    assert torch.equal(y, x + 1)  # the tokens count up, so the next is one more
    assert x.min() >= 200
    assert torch.equal(x - x[:, :1], torch.arange(8).expand(5, 8))


def test_batch_depends_on_its_arguments_only(make):
    dataset = make(range(250), range(250))
    first, _ = dataset.batch('train', 7, 4, 16, seed=1)
    dataset.batch('train', 8, 4, 16)
    again, _ = data.load_dataset(dataset.path).batch('train', 7, 4, 16, seed=1)
    assert torch.equal(first, again)
    for other in [('train', 8, 4, 16, 1), ('train', 7, 4, 16, 2), ('val', 7, 4, 16, 1)]:
        assert not torch.equal(first, dataset.batch(*other)[0])
    # The same on every machine, in every version.
    assert first[:, 0].tolist() == [162, 103, 194, 103]
    assert dataset.fingerprint() == '3b4b21fab317f380'


@pytest.mark.parametrize('bos', [False, True])
def test_every_window_can_come(make, bos):
    """With bos a window begins with the end of a text, and a token less is read."""
    dataset = make(range(6), [1, 2, 3])
    targets = [dataset.batch('train', i, 4, 3, bos=bos)[1] for i in range(50)]
    assert set(torch.cat(targets)[:, 0].tolist()) == ({0, 1, 2, 3} if bos else {1, 2, 3})
    x, y = dataset.batch('val', 0, 2, 2 + bos, bos=bos)  # exactly one window
    assert x.tolist() == [[256, 1, 2] if bos else [1, 2]] * 2
    assert torch.equal(x[:, 1:], y[:, :-1]) and x.is_contiguous()
    with pytest.raises(UserError, match='val has 3 tokens, a window needs 4: .*block_size'):
        dataset.batch('val', 0, 2, 3 + bos, bos=bos)


def test_records_are_windows(make):
    dataset = make([1, 2, 3, 4] * 9, [1, 2, 3, 4], record_len=4, answers=[1, 3])
    for bos in False, True:  # makes no difference
        x, y = dataset.batch('train', 0, 9, 8, bos=bos)
        assert (x.tolist(), y.tolist()) == ([[1, 2, 3]] * 9, [[2, -1, 4]] * 9)
    assert dataset.window(3) == dataset.window(8) == 4
    with pytest.raises(UserError, match='block_size of 3'):
        dataset.batch('train', 0, 1, 2)


def test_many_files_are_one(make):
    one = make(range(200), range(9), name='one')
    others = {'train_2.bin': range(101, 200), 'train_1.bin': [100]}
    many = make(range(100), range(9), 'many', others)
    for i in range(20):
        for block_size in 3, 120, 198:
            expected = one.batch('train', i, 4, block_size)[1]
            assert torch.equal(expected, many.batch('train', i, 4, block_size)[1])


def test_files_of_other_machines_are_read_too(make, tmp_path):
    dataset = make(range(10), range(9))
    np.arange(5, dtype='<u2').tofile(tmp_path / 'x/train_00007.bin')
    more = data.load_dataset('x', tmp_path)
    assert more.tokens('train') == dataset.tokens('train') + 5
    assert more.fingerprint() != dataset.fingerprint()


@pytest.mark.parametrize(
    'file, content, message',
    [
        ('meta.json', None, 'meta.json is missing'),
        ('meta.json', b'{', 'meta.json is damaged'),
        ('meta.json', b'{"tokenizer": "bytes"}', 'meta.json is damaged'),
        ('meta.json', b'[]', 'meta.json is damaged'),
        ('train.bin', None, 'train.bin has 0 bytes'),
        ('train.bin', b'', 'train.bin has 0 bytes'),
        ('train.bin', b'abc', 'train.bin has 3 bytes'),
        ('train.bin', b'ab', 'train.bin has 2 bytes, and should have 90 tokens'),
        ('train.bin', b'\xff' * 180, 'has token 65535'),
    ],
)
def test_damage_is_named(make, tmp_path, file, content, message):
    make(range(90), range(9))
    path = tmp_path / 'x' / file
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f'{message}.*prepare'):
        data.load_dataset('x', tmp_path).batch('train', 0, 4, 8)


@pytest.mark.parametrize(
    'entries',
    [
        {'record_len': 1},
        {'record_len': 'x'},
        {'answers': []},
        {'answers': None},
        {'answers': [0]},
        {'answers': [3]},
        {'tokenizer': 'klingon'},
    ],
)
def test_meta_that_does_not_fit(make, tmp_path, entries):
    make([1, 2, 3], [1, 2, 3], record_len=3, answers=[2])
    path = tmp_path / 'x' / 'meta.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    with pytest.raises(UserError, match='damaged|klingon'):
        data.load_dataset('x', tmp_path)


def test_missing_set_lists_what_is_there(make, tmp_path):
    make(range(9), range(9), name='mine')
    for name in 'other', '':
        with pytest.raises(UserError, match=f"'{name}' is not in .*there: mine"):
            data.load_dataset(name, tmp_path)


# ---- prepare_text --------------------------------------------------------------------------------


def test_folder(tmp_path, text_set):
    texts = {f'd{i % 3}/{i}.txt': f'text {i} é\r\n' * (i + 1) for i in range(60)}
    others = {'d0/x.md': 'not asked for', '.git/y.txt': 'hidden', 'd0/.y.txt': 'hidden'}
    for name, text in (texts | others).items():
        (tmp_path / 'in' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'in' / name).write_bytes(text.encode())
    folder = text_set(tmp_path / 'in', ext='.txt')
    documents = []
    for split in 'train', 'val':
        raw = ''.join(map(chr, tokens_of(folder, f'{split}.bin')))
        *parts, rest = raw.split('\u0100')  # token 256
        assert rest == ''
        documents += [part.encode('latin-1').decode() for part in parts]
    assert sorted(documents) == sorted(texts.values())
    assert 1 <= len(parts) <= 8
    before = tokens_of(folder, 'val.bin')
    assert data.load_dataset('set', tmp_path / 'data').tokens('val') == len(before)

    os.rename(tmp_path / 'in', tmp_path / 'elsewhere')  # the split is by the path inside the folder
    folder = text_set(tmp_path / 'elsewhere', ext='.txt')
    assert tokens_of(folder, 'val.bin') == before
    assert sorted(os.listdir(folder)) == ['meta.json', 'train.bin', 'val.bin']


@pytest.mark.parametrize('names', [['0.txt', '1.txt'], ['a/x.txt', 'b/x.txt'], ['0', '9', '10']])
def test_few_documents_fill_both_splits(tmp_path, text_set, names):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('text')
    folder = text_set(*(tmp_path / name for name in names))
    assert len(tokens_of(folder, 'val.bin')) == 5
    assert len(tokens_of(folder, 'train.bin')) == 5 * (len(names) - 1)


@pytest.mark.parametrize(
    'text',
    ['a\nb\n', 'a\nb', '\na' * 40, 'one line é\n' * 300, 'x' * 99 + '\nshort\n', 'x\n' + 'y' * 999]
    + ['long lines 漢' * 40_000 + '\n' + 'é\n' * 800_000],
)
def test_one_file_is_cut_at_a_line(tmp_path, text_set, text):
    (tmp_path / 'a.txt').write_bytes(text.encode())
    folder = text_set(tmp_path / 'a.txt', name='')
    train = tokens_of(folder, 'train.bin')
    val = tokens_of(folder, 'val.bin')
    assert folder.name == 'a'
    assert train[-2:] == [ord('\n'), 256] and val[-1] == 256
    assert bytes(train[:-1]) + bytes(val[:-1]) == text.encode()
    if text.startswith('one'):
        assert 0.02 < len(val) / len(train) < 0.05


def test_files_that_are_not_text_are_skipped(tmp_path, text_set, capsys):
    for i in range(4):
        (tmp_path / f'{i}.txt').write_text('fine')
    (tmp_path / 'z.bin').write_bytes(b'\xff\xfe' * 9)
    (tmp_path / 'zero').write_bytes(b'a\0')
    folder = text_set(*sorted(tmp_path.iterdir()))
    assert '4 file(s), 2 skipped that cannot be read as text' in capsys.readouterr().out
    assert len(tokens_of(folder, 'train.bin') + tokens_of(folder, 'val.bin')) == 4 * 5


@pytest.mark.parametrize(
    'content, settings, message',
    [
        (b'', {}, 'a.txt: no text there'),
        (b'\xff\n' * 99, {}, 'a.txt: no text there: .*not UTF-8'),
        (b'a', {}, 'a.txt: .*it needs two'),
        (b'one line\n', {}, 'a.txt: .*it needs two'),
        (None, {}, "a.txt' does not exist"),
        (b'a\nb\n', {'name': 'a/b'}, '--name'),
        (b'a\nb\n', {'name': '..'}, '--name'),
        (b'a\nb\n', {'tokenizer': 'gpt3'}, 'is unknown'),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, text_set, content, settings, message):
    if content is not None:
        (tmp_path / 'a.txt').write_bytes(content)
    with pytest.raises(UserError, match=message):
        text_set(tmp_path / 'a.txt', **settings)
    assert not (tmp_path / 'data').exists()


def test_a_folder_of_other_things_is_left_alone(tmp_path, text_set, make):
    (tmp_path / 'a.txt').write_text('a\nb\n')
    with pytest.raises(UserError, match='no text there'):
        text_set(tmp_path, ext='.md')
    make(range(9), range(9), 'data/set', {'train_00000.bin': range(9)})
    with pytest.raises(UserError, match='train_00000.bin, which is not of such a data set'):
        text_set(tmp_path / 'a.txt')
    make(range(9), range(9), name='data/theirs')
    with pytest.raises(UserError, match='is another data set .test.: choose another --name'):
        data.output_folder(str(tmp_path / 'data'), 'theirs', source='lab.tasks')


def test_command_line(tmp_path):
    (tmp_path / 'in').mkdir()
    for i in range(3):
        (tmp_path / f'in/{i}.txt').write_text('fine')
    command = [sys.executable, 'prepare_text.py', '--tokenizer=bytes', f'--data_dir={tmp_path}']
    command += ['--name=set', f'{tmp_path}/in']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, '')
    expected = 'set: 10 train and 5 val tokens (bytes) from 3 file(s)\n'
    assert done.stdout == f'{tmp_path}/{expected}'


def test_scripts_start_without_torch():
    code = 'import sys, prepare_c4, prepare_text; sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0


@pytest.mark.slow
def test_standard_library_is_there_in_seconds(tmp_path):
    start = time.time()
    prepare_text.prepare(prepare_text.TextConfig(data_dir=str(tmp_path)))
    dataset = data.load_dataset('stdlib', tmp_path)
    assert time.time() - start < 20
    assert 5e6 < dataset.tokens('train') < 40e6
    assert 0.01 < dataset.tokens('val') / dataset.tokens('train') < 0.06
