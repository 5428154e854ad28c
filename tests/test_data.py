"""data.py and prepare_text.py: tokenizers, data sets, batches, and text turned into token files."""
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import data
import prepare_text
from support.settings import UserError

GPT2 = os.environ.get('TIKTOKEN_CACHE_DIR') or os.path.join(ROOT, '../shared/data/tiktoken_cache')


def make(folder, files, vocab_size=257, **changes):
    """A data set by hand: files maps names to lists of tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, tokens in files.items():
        np.asarray(tokens, '<u2').tofile(folder / name)
    meta = {'tokenizer': 'bytes', 'vocab_size': vocab_size, 'source': 'test', 'complete': True,
            'files': {name: len(tokens) for name, tokens in files.items()}}
    (folder / 'meta.json').write_text(json.dumps(meta | changes))
    return data.load_dataset(folder.name, folder.parent)


def tokens_of(folder, name):
    return np.fromfile(folder / name, '<u2').tolist()


def text_set(tmp_path, *paths, **settings):
    """prepare_text on paths; the folder that it made."""
    settings = {'tokenizer': 'bytes', 'name': 'set', 'data_dir': str(tmp_path / 'data')} | settings
    return tmp_path / 'data' / prepare_text.prepare(prepare_text.TextConfig([str(p) for p in paths], **settings))

# ----------------------------------------------------------------------------- tokenizers

def test_bytes_tokenizer_is_lossless():
    tokenizer = data.get_tokenizer('bytes')
    rng = np.random.default_rng(0)
    for text in ['', 'a', '\x00\r\n\t é漢😀', ' ' * 5000, '<|endoftext|>', '\n' * 999,
                 ''.join(map(chr, rng.integers(1, 0xd800, 20_000)))]:
        assert tokenizer.encode_ordinary(text) == list(text.encode())
        assert tokenizer.decode_bytes(tokenizer.encode_ordinary(text)) == text.encode()
    assert (tokenizer.eot_token, tokenizer.n_vocab, tokenizer.name) == (256, 257, 'bytes')


def test_bytes_tokenizer_is_fast():
    text, start = 'def f(x): return x\n' * 200_000, time.time()
    data.get_tokenizer('bytes').encode_ordinary(text)
    assert len(text) / (time.time() - start) > 2e6  # characters a second


@pytest.mark.skipif(not os.path.isdir(GPT2), reason='needs the gpt2 vocabulary on disk')
def test_gpt2_tokenizer():
    code = ('import data; t = data.get_tokenizer("gpt2"); '
            'print(t.n_vocab, t.eot_token, t.encode_ordinary("Hello world"))')
    out = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=os.environ | {'TIKTOKEN_CACHE_DIR': GPT2},
                         capture_output=True, text=True)
    assert out.stdout == '50257 50256 [15496, 995]\n', out.stderr


def test_gpt2_without_network_is_one_line(monkeypatch):
    def refused(name):
        raise ConnectionError('long\nstory')
    monkeypatch.setattr(data.tiktoken, 'get_encoding', refused)
    with pytest.raises(UserError, match='^the gpt2 vocabulary could not be downloaded .ConnectionError.: [^\n]*$'):
        data.get_tokenizer('gpt2')


def test_gpt2_download_that_hangs_is_given_up(monkeypatch):
    real, asked = data.within, []
    monkeypatch.setattr(data, 'within', lambda seconds, *args: (asked.append(seconds), real(0.1, *args))[1])
    monkeypatch.setattr(data.tiktoken, 'get_encoding', lambda name: time.sleep(5))
    start = time.time()
    with pytest.raises(UserError, match='could not be downloaded'):
        data.get_tokenizer('gpt2')
    assert time.time() - start < 2 and asked[0] < 10


HOSTILE = ['', 'a', 'Hello world', '\x00\r\n\t é漢😀', ' ' * 3000 + 'x', '<|endoftext|>', ' <|endoftext|>\n<|endoftext|>', '\n' * 999,
           "it's I'LL 'tis", 'e\u0301\u200d\ufeff\u202e', '١٢٣ ½ Ⅷ', 'x' * 3000, ''.join(map(chr, range(1, 0x300)))]


@pytest.fixture
def gpt2_table(monkeypatch):
    """GPT-2's table read anew from the folder that has it."""
    if not os.path.isdir(GPT2):
        pytest.skip('needs the gpt2 vocabulary on disk')
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', GPT2)


@pytest.mark.parametrize('count', [257, 258, 300, 2048, 4096, 50256, 50257])
def test_beginnings_of_gpt2s_table(gpt2_table, count):
    tokenizer = data.get_tokenizer(f'gpt2:{count}')
    assert (tokenizer.name, tokenizer.n_vocab, tokenizer.eot_token) == (f'gpt2:{count}', count, count - 1)
    assert tokenizer.decode_bytes([count - 1]) == b'<|endoftext|>' and data.get_tokenizer(tokenizer.name).n_vocab == count
    whole = data.get_tokenizer('gpt2')
    rng = np.random.default_rng(count)
    for text in [*HOSTILE, ''.join(map(chr, rng.integers(1, 0xd800, 5000))), 'The cat sat on the mat. ' * 50]:
        ids = tokenizer.encode_ordinary(text)
        assert tokenizer.decode_bytes(ids) == text.encode() and max(ids, default=0) < count - 1
        assert b''.join(map(tokenizer.decode_single_token_bytes, ids)) == text.encode()     # as sample.py prints them
        assert [tokenizer.decode_single_token_bytes(n) for n in ids] == [whole.decode_single_token_bytes(n) for n in ids]
        if count == 257:
            assert len(ids) == len(text.encode())               # bytes, no merges
        if count == 50257:
            assert ids == whole.encode_ordinary(text)
    lengths = [len(data.get_tokenizer(f'gpt2:{n}').encode_ordinary('the selective attention of a reader')) for n in (257, 1024, 8192)]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[1] > lengths[2]


def test_a_data_set_of_few_tokens(gpt2_table, tmp_path):
    (tmp_path / 'text.txt').write_text('Many words, <|endoftext|> 漢字.\n' * 60)
    folder = text_set(tmp_path, tmp_path / 'text.txt', tokenizer='gpt2:1024')
    dataset = data.load_dataset(str(folder))
    assert (dataset.tokenizer_name, dataset.vocab_size) == ('gpt2:1024', 1024)
    tokens = tokens_of(folder, 'train.bin') + tokens_of(folder, 'val.bin')
    assert tokens.count(1023) == 2 and max(tokens) == 1023      # one at the end of each split; text never gives it
    text = data.get_tokenizer('gpt2:1024').decode_bytes(tokens)
    assert text.count('Many words, <|endoftext|> 漢字.\n'.encode()) == 60


@pytest.mark.parametrize('name', ['gpt3', '', 'gpt2:', 'gpt2:256', 'gpt2:50258', 'gpt2:999999', 'gpt2:-300', 'gpt2:2e3', 'gpt2:0300',
                                  'gpt2:³³³', 'gpt2:300\n', 'gpt2 :300', 'bytes:300', 'gpt3:300'])
def test_unknown_tokenizer(name):
    with pytest.raises(UserError, match='is unknown') as e:
        data.get_tokenizer(name)
    assert len(str(e.value).splitlines()) == 1

# ----------------------------------------------------------------------------- data sets and batches

def test_batch_is_windows_of_the_text(tmp_path):
    ds = make(tmp_path / 'x', {'train.bin': range(100), 'val.bin': range(200, 250)})
    assert (ds.name, ds.vocab_size, ds.tokenizer_name, ds.tokens('train'), ds.tokens('val')) == ('x', 257, 'bytes', 100, 50)
    x, y = ds.batch('val', 3, 5, 8)
    assert x.shape == y.shape == (5, 8) and x.dtype == y.dtype == torch.int64
    assert x.is_contiguous() and y.is_contiguous()
    assert torch.equal(y, x + 1) and x.min() >= 200  # the tokens count up, so the next is one more
    assert torch.equal(x - x[:, :1], torch.arange(8).expand(5, 8))


def test_batch_depends_on_its_arguments_only(tmp_path):
    ds = make(tmp_path / 'x', {'train.bin': range(250), 'val.bin': range(250)})
    first = ds.batch('train', 7, 4, 16, seed=1)[0]
    ds.batch('train', 8, 4, 16)
    again = data.load_dataset(str(tmp_path / 'x')).batch('train', 7, 4, 16, seed=1)[0]
    assert torch.equal(first, again)
    for other in ('train', 8, 4, 16, 1), ('train', 7, 4, 16, 2), ('val', 7, 4, 16, 1):
        assert not torch.equal(first, ds.batch(*other)[0])
    ds.batch('train', 0, 1, 4, seed=-1)


def test_every_window_can_come(tmp_path):
    ds = make(tmp_path / 'x', {'train.bin': range(6), 'val.bin': [1, 2, 3]})
    starts = {int(s) for i in range(50) for s in ds.batch('train', i, 4, 3)[0][:, 0]}
    assert starts == {0, 1, 2}
    assert ds.batch('val', 0, 2, 2)[0].tolist() == [[1, 2]] * 2  # exactly one window
    with pytest.raises(UserError, match='val has 3 tokens, a window needs 4: .*block_size'):
        ds.batch('val', 0, 2, 3)


def test_many_files_are_one(tmp_path):
    one = make(tmp_path / 'one', {'train.bin': range(200), 'val.bin': range(9)})
    many = make(tmp_path / 'many', {'train_00002.bin': range(101, 200), 'train_00000.bin': range(100),
                                    'train_00001.bin': [100], 'val.bin': range(9)})
    for i in range(20):
        for block_size in 3, 120, 198:
            assert torch.equal(one.batch('train', i, 4, block_size)[1], many.batch('train', i, 4, block_size)[1])


def test_files_of_other_machines_are_read_too(tmp_path):
    ds = make(tmp_path / 'x', {'train_00000.bin': range(10), 'val.bin': range(9)})
    np.arange(5, dtype='<u2').tofile(tmp_path / 'x' / 'train_00007.bin')
    assert data.load_dataset('x', tmp_path).tokens('train') == ds.tokens('train') + 5


@pytest.mark.parametrize('damage, message', [
    (lambda p: (p / 'meta.json').unlink(), 'meta.json is missing'),
    (lambda p: (p / 'meta.json').write_text('{'), 'meta.json is damaged .it is not JSON'),
    (lambda p: (p / 'meta.json').write_text('{"tokenizer": "bytes"}'), "meta.json is damaged .it has no 'vocab_size'"),
    (lambda p: (p / 'meta.json').write_text('[]'), 'meta.json is damaged .it is not an object'),
    (lambda p: (p / 'train.bin').write_bytes(b''), 'train.bin is empty'),
    (lambda p: (p / 'train.bin').write_bytes(b'abc'), 'train.bin has 3 bytes'),
    (lambda p: (p / 'train.bin').write_bytes(b'ab'), 'train.bin has 2 bytes, meta.json says 90 tokens'),
    (lambda p: (p / 'train.bin').write_bytes(b'\0\0' * 89 + b'\xff\xff'), 'train.bin has token 65535'),
    (lambda p: (p / 'val.bin').unlink(), 'val.bin is missing'),
])
def test_damage_is_named(tmp_path, damage, message):
    make(tmp_path / 'x', {'train.bin': range(90), 'val.bin': range(9)})
    damage(tmp_path / 'x')
    with pytest.raises(UserError, match=f'{message}[^\n]*prepare'):
        data.load_dataset('x', tmp_path)


def test_damage_in_the_middle_is_found_by_the_batch(tmp_path):
    ds = make(tmp_path / 'x', {'train.bin': [0] * 5000 + [300] * 20_000 + [0] * 5000, 'val.bin': range(9)})
    with pytest.raises(UserError, match='has token 300'):
        ds.batch('train', 0, 64, 8)


def test_missing_set_lists_what_is_there(tmp_path):
    make(tmp_path / 'mine', {'train.bin': range(9), 'val.bin': range(9)})
    with pytest.raises(UserError, match="'other' is not in .*there: mine"):
        data.load_dataset('other', tmp_path)
    with pytest.raises(UserError, match='is not in'):
        data.load_dataset('', tmp_path)

def test_bos_is_token_0_of_every_window(tmp_path):
    """With bos, x = <|endoftext|> t0 ... and y = t0 t1 ...; the last token of a window is predicted all the same."""
    ds = make(tmp_path / 'x', {'train.bin': range(100), 'val.bin': range(9)})
    x, y = ds.batch('train', 3, 5, 8, bos=True)
    assert x.shape == y.shape == (5, 8) and (x[:, 0] == 256).all() and x.is_contiguous()
    assert torch.equal(x[:, 1:], y[:, :-1]) and torch.equal(y - y[:, :1], torch.arange(8).expand(5, 8))
    ds = make(tmp_path / 'y', {'train.bin': range(6), 'val.bin': [1, 2, 3]})
    assert {int(t) for i in range(50) for t in ds.batch('train', i, 4, 3, bos=True)[1][:, 0]} == {0, 1, 2, 3}
    assert ds.batch('val', 0, 2, 3, bos=True)[0].tolist() == [[256, 1, 2]] * 2      # a token less is read
    with pytest.raises(UserError, match='val has 3 tokens, a window needs 4'):
        ds.batch('val', 0, 2, 4, bos=True)


def test_records_get_no_bos(tmp_path):
    ds = make(tmp_path / 'x', {'train.bin': [1, 2, 3] * 9, 'val.bin': [1, 2, 3]}, record_len=3, answers=[2])
    for bos in False, True:
        assert [t.tolist() for t in ds.batch('train', 0, 1, 8, bos=bos)] == [[[1, 2]], [[-1, 3]]]


def test_prompts():
    tokenizer = data.get_tokenizer('bytes')
    assert data.encode_prompt('ab', tokenizer, bos=False) == [97, 98]
    assert data.encode_prompt('ab', tokenizer, bos=True) == [256, 97, 98]
    assert data.encode_prompt('', tokenizer, bos=False) == data.encode_prompt('', tokenizer, bos=True) == [256]

# ----------------------------------------------------------------------------- prepare_text

def test_folder(tmp_path):
    texts = {f'd{i % 3}/{i}.txt': f'text {i} é\r\n' * (i + 1) for i in range(60)}
    for name, text in texts.items():
        (tmp_path / 'in' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'in' / name).write_bytes(text.encode())
    (tmp_path / 'in' / 'd0' / 'x.md').write_text('not asked for')
    (tmp_path / 'in' / '.git').mkdir()
    (tmp_path / 'in' / '.git' / 'y.txt').write_text('hidden')
    folder = text_set(tmp_path, tmp_path / 'in', ext='.txt')
    documents = {}
    for split in 'train', 'val':
        raw = ''.join(chr(t) for t in tokens_of(folder, f'{split}.bin'))
        assert raw.endswith('\u0100')  # token 256
        documents[split] = [d.encode('latin-1').decode() for d in raw.split('\u0100')[:-1]]
    assert sorted(documents['train'] + documents['val']) == sorted(texts.values())
    assert 1 <= len(documents['val']) <= 8
    assert data.load_dataset('set', tmp_path / 'data').tokens('val') == len(tokens_of(folder, 'val.bin'))

    os.rename(tmp_path / 'in', tmp_path / 'elsewhere')  # the split is by the path inside the folder
    before = tokens_of(folder, 'val.bin')
    assert tokens_of(text_set(tmp_path, tmp_path / 'elsewhere', ext='.txt'), 'val.bin') == before
    assert sorted(os.listdir(folder)) == ['meta.json', 'train.bin', 'val.bin']


@pytest.mark.parametrize('count', [2, 3, 5])
def test_few_documents_fill_both_splits(tmp_path, count):
    for i in range(count):
        (tmp_path / f'{i}.txt').write_text(f'document {i}')
    text_set(tmp_path, *(tmp_path / f'{i}.txt' for i in range(count)))
    assert data.load_dataset('set', tmp_path / 'data').tokens('val') == len('document 0') + 1


@pytest.mark.parametrize('text', ['a\nb\n', 'a\nb', '\na' * 40, 'one line é\n' * 300, 'x' * 99 + '\nshort\n',
                                  'x\n' + 'y' * 999, 'long lines 漢' * 40_000 + '\n' + 'é\n' * 1_500_000])
def test_one_file_is_cut_at_a_line(tmp_path, text):
    (tmp_path / 'a.txt').write_bytes(text.encode())
    folder = text_set(tmp_path, tmp_path / 'a.txt', name='')
    train, val = tokens_of(folder, 'train.bin'), tokens_of(folder, 'val.bin')
    assert folder.name == 'a' and train[-1] == val[-1] == 256 and train[-2] == ord('\n')
    assert bytes(train[:-1]) + bytes(val[:-1]) == text.encode()
    if text.startswith('one'):
        assert 0.02 < len(val) / len(train) < 0.05


def test_files_of_the_same_name_fill_both_splits(tmp_path):
    for folder in 'a', 'b':
        (tmp_path / folder).mkdir()
        (tmp_path / folder / 'x.txt').write_text('text')
    folder = text_set(tmp_path, tmp_path / 'a' / 'x.txt', tmp_path / 'b' / 'x.txt')
    assert len(tokens_of(folder, 'train.bin')) == len(tokens_of(folder, 'val.bin')) == 5


def test_files_that_are_not_text_are_skipped(tmp_path, capsys):
    for i in range(4):
        (tmp_path / f'{i}.txt').write_text('fine')
    (tmp_path / 'z.bin').write_bytes(b'\xff\xfe' * 9)
    folder = text_set(tmp_path, *sorted(tmp_path.iterdir()))
    assert '4 file(s), 1 not text skipped' in capsys.readouterr().out
    assert len(tokens_of(folder, 'train.bin') + tokens_of(folder, 'val.bin')) == 4 * 5


@pytest.mark.parametrize('content, message', [
    (b'', 'no text there'), (b'a', 'it needs two'), (b'one line\n', 'it needs two'), (b'\xff\n' * 99, 'not UTF-8'),
])
def test_bad_text_is_one_line_and_leaves_nothing(tmp_path, content, message):
    (tmp_path / 'a.txt').write_bytes(content)
    with pytest.raises(UserError, match=f'a.txt: [^\n]*{message}[^\n]*$'):
        text_set(tmp_path, tmp_path / 'a.txt')
    assert not (tmp_path / 'data' / 'set').exists()


def test_bad_arguments(tmp_path):
    (tmp_path / 'a.txt').write_text('a\nb\n')
    with pytest.raises(UserError, match="nowhere' does not exist"):
        text_set(tmp_path, tmp_path / 'nowhere')
    for name in 'a/b', '..', '.':
        with pytest.raises(UserError, match='--name'):
            text_set(tmp_path, tmp_path / 'a.txt', name=name)
    with pytest.raises(UserError, match='no text there'):
        text_set(tmp_path, tmp_path, ext='.md')
    make(tmp_path / 'data' / 'c4', {'train_00000.bin': range(9), 'val_00000.bin': range(9)})
    with pytest.raises(UserError, match='train_00000.bin, which is not of such a data set'):
        text_set(tmp_path, tmp_path / 'a.txt', name='c4')


def test_command_line(tmp_path):
    (tmp_path / 'in').mkdir()
    for i in range(3):
        (tmp_path / 'in' / f'{i}.txt').write_text('fine')
    command = [sys.executable, 'prepare_text.py', '--tokenizer=bytes', f'--data_dir={tmp_path}', '--name=set']
    out = subprocess.run([*command, f'{tmp_path}/in'], cwd=ROOT, capture_output=True, text=True)
    assert (out.returncode, out.stdout, out.stderr) == (
        0, f'{tmp_path}/set: 10 train and 5 val tokens (bytes) from 3 file(s)\n', '')
    out = subprocess.run([*command, 'nowhere'], cwd=ROOT, capture_output=True, text=True)
    assert (out.returncode, out.stderr) == (1, "prepare_text.py: 'nowhere' does not exist\n")


def test_standard_library_is_there_in_seconds(tmp_path):
    start = time.time()
    prepare_text.prepare(prepare_text.TextConfig(data_dir=str(tmp_path)))
    ds = data.load_dataset('stdlib', tmp_path)
    assert time.time() - start < 20
    assert 5e6 < ds.tokens('train') < 40e6 and 0.01 < ds.tokens('val') / ds.tokens('train') < 0.06
