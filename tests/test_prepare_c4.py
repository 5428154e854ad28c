"""prepare_c4.py and support/download.py against a real server, which misbehaves when told to."""

import gzip
import http.server
import json
import random
import signal
import threading
import time
from pathlib import Path

import pytest

import data
import prepare_c4
from conftest import wait_until
from support import download, settings
from support.settings import UserError
from test_train import start


def make_documents(seed, count):
    rng = random.Random(seed)
    return [''.join(rng.choices('abcdefg é漢\n"\\', k=rng.randrange(1, 400))) for _ in range(count)]


def gz(texts):
    """A shard of these documents. It has two gzip members, which is legal."""
    content = ''.join(json.dumps({'text': text}, ensure_ascii=False) + '\n' for text in texts)
    content = content.encode()
    return gzip.compress(content[:99], 1) + gzip.compress(content[99:], 1)


def bin_of(texts):
    """The token file of these documents: a byte is a token, 256 ends each."""
    characters = [text.encode().decode('latin-1') + '\u0100' for text in texts]
    return ''.join(characters).encode('utf-16-le')


TRAIN = [make_documents(i, 400) for i in range(3)]
VAL = [make_documents(100 + i, 20) for i in range(8)]
NAMES = [prepare_c4.NAMES['train'].format(number) for number in range(3)]
NAME = NAMES[0]
FILES = dict(zip(NAMES, map(gz, TRAIN)))
for number, texts in enumerate(VAL):
    FILES[prepare_c4.NAMES['val'].format(number)] = gz(texts)
FIRST = bin_of(TRAIN[0])

QUICK = ('--tokenizer=bytes --tokens=0 --val_tokens=10 --shards=0:1').split()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.files.

    server.faults[name] is a list of changes of the answers to the next requests: status, headers,
    send (the bytes after which the line drops), wait (seconds before the answer).
    """

    def do_GET(self):
        server = self.server
        name = self.path.split('/')[-1]
        asked = self.headers.get('Range')
        server.requests.append((name, asked))
        body = server.files[name]
        status = 200
        if asked:
            status = 206
            body = body[int(asked[6:-1]) :]
        headers = {'Content-Length': len(body)}
        answer = {'status': status, 'headers': headers, 'send': len(body), 'wait': 0}
        if server.faults.get(name):
            answer |= server.faults[name].pop(0)
        time.sleep(answer['wait'])
        self.send_response(answer['status'])
        for header in answer['headers'].items():
            self.send_header(*header)
        self.end_headers()
        body = body[: answer['send']]
        for i in range(0, len(body), 4096):
            time.sleep(server.delay)
            self.wfile.write(body[i : i + 4096])
        self.close_connection = True


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of FILES, in threads of this process; scripts run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(download, 'WAITS', (0.01, 0.02))
    monkeypatch.setattr(download, 'TIMEOUT', 1)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        server.handle_error = print  # a client that hangs up is no news
        server.files = dict(FILES)
        server.faults = {}
        server.requests = []
        server.delay = 0
        url = f'--base_url=http://127.0.0.1:{server.server_port}'
        server.arguments = [*QUICK, url, f'--data_dir={tmp_path}']
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def prepare(server):
    """prepare(*args): the files that the script makes."""

    def prepare(*args):
        cfg = settings.parse(prepare_c4.C4Config, [*server.arguments, *args])
        prepare_c4.prepare(cfg)
        return contents(f'{cfg.data_dir}/c4')

    return prepare


def contents(folder):
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


# ---- What comes out ------------------------------------------------------------------------------


def test_whole_shards(server, prepare):
    made = prepare('--shards=0:3', '--val_tokens=0')
    expected = {f'train_{i:05d}.bin': bin_of(TRAIN[i]) for i in range(3)}
    expected |= {f'val_{i:05d}.bin': bin_of(VAL[i]) for i in range(8)}
    assert made == {**expected, 'meta.json': made['meta.json']}
    meta = data.load_dataset('c4').meta
    assert meta['files'].keys() == expected.keys()
    server.requests.clear()
    prepare('--shards=0:3', '--val_tokens=0')
    assert not server.requests  # nothing left to ask for


@pytest.mark.parametrize('less', [0, 1])
def test_slice_ends_at_the_document_that_reaches_it(prepare, less):
    expected = bin_of(TRAIN[0][:7])
    made = prepare(f'--tokens={len(expected) // 2 - less}')
    assert made['train_00000.bin'] == expected


def test_slice_reads_only_what_it_needs(server, prepare):
    body = gz([random.Random(i).randbytes(1000).hex() for i in range(5000)])
    server.files[NAME] = body
    server.faults[NAME] = [{'send': len(body) // 3}]
    assert list(prepare('--tokens=100_000')) and len(server.requests) == 2


def test_a_slice_can_grow(server, prepare):
    """Into the next shard. What is there stays as it is, also if the next one fails."""
    small = prepare('--tokens=1000')
    assert prepare('--tokens=500') == small  # less: what is there is enough
    server.faults[NAMES[1]] = [{'status': 404}]
    with pytest.raises(UserError, match='404 .*check --base_url'):
        prepare('--tokens=2000', '--shards=0:2')
    assert data.load_dataset('c4').tokens('train') == len(small['train_00000.bin']) // 2
    made = prepare('--tokens=2000', '--shards=0:2')
    assert made['train_00000.bin'] == small['train_00000.bin']
    assert bin_of(TRAIN[1]).startswith(made['train_00001.bin'])
    assert data.load_dataset('c4').tokens('train') >= 2000


def test_runs_with_ranges_make_what_one_makes(server, prepare):
    one = prepare('--shards=0:3', '--data_dir=one')
    server.delay = 0.002
    processes = []
    for shards in '0:1', '1:2', '2:3':
        processes.append(start('prepare_c4.py', *server.arguments, f'--shards={shards}'))
    for process in processes:
        assert process.wait(timeout=100) == 0, process.stdout.read()
    several = contents('c4')
    assert several == {**one, 'meta.json': several['meta.json']}


@pytest.mark.parametrize(
    'how, said', [(signal.SIGKILL, ''), (signal.SIGINT, 'prepare_c4.py: interrupted\n')]
)
def test_stopped_and_run_again(server, prepare, tmp_path, how, said):
    whole = prepare('--shards=0:3', '--data_dir=whole')
    server.delay = 0.02
    process = start('prepare_c4.py', *server.arguments, '--shards=0:3')
    wait_until(lambda: list(tmp_path.glob('c4/train_00001*.tmp')))
    process.send_signal(how)
    assert process.communicate(timeout=60)[0] == said
    server.delay = 0
    server.requests.clear()
    assert prepare('--shards=0:3') == whole
    assert [name for name, _ in server.requests] == NAMES[1:3]


# ---- A server that misbehaves --------------------------------------------------------------------

CUT = {'send': 5000}


@pytest.mark.parametrize(
    'faults, requests',
    [
        ([{'status': 429}, {'status': 503}], [None] * 3),
        ([{'wait': 2}], [None] * 2),
        ([{'headers': {}}], [None]),  # the answer ends with the line
        # each piece starts the count of failures anew
        ([CUT] * 3, [None, 'bytes=5000-', 'bytes=10000-', 'bytes=15000-']),
    ],
)
def test_a_server_in_trouble_is_asked_again(server, prepare, capsys, faults, requests):
    server.faults[NAME] = faults
    assert prepare()['train_00000.bin'] == FIRST
    assert [asked for name, asked in server.requests if name == NAME] == requests
    assert capsys.readouterr().err.count('trying again') == len(requests) - 1


WHOLE = gz(TRAIN[0][:100])


@pytest.mark.parametrize(
    'trouble, words',
    [
        ([{'status': 503}] * 3, 'at byte 0: 503 .* 3 failures in a row: run it again'),
        ([CUT] + [{'send': 0}] * 2, 'at byte 5,000: .* 3 failures in a row'),
        ([CUT, {'status': 200}], 'cannot continue'),
        ([{'headers': {'Content-Length': 5000}}], 'damaged after line .* ended before'),
        # a file that is damaged
        (b'', 'no lines'),
        (b'this is not gzip', 'damaged after line 0 .Not a gzip'),
        (WHOLE[:-8] + bytes(8), 'CRC check failed'),
        (WHOLE[:-9], 'ended before'),
        (WHOLE[:300] + b'\xff' * 300, 'Error -3 while decompressing'),
        (WHOLE + gzip.compress(b'{"text": "half\n') + WHOLE, 'after line 100 '),
        (WHOLE + gzip.compress(b'{"x": 5}'), "after line 100 .'text'"),
    ],
)
def test_hopeless_trouble_is_one_line(server, prepare, tmp_path, trouble, words):
    if isinstance(trouble, bytes):
        server.files[NAME] = trouble
    else:
        server.faults[NAME] = trouble
    with pytest.raises(UserError, match=f'{NAME}.*{words}'):
        prepare()
    assert not list(tmp_path.glob('c4/train*'))


def test_what_is_refused(prepare, tmp_path):
    made = prepare()
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other/train.bin').write_bytes(b'ab')
    for setting, words in [
        ('--shards=1:1', 'not first:end'),
        ('--shards=0:1025', 'not first:end'),
        ('--name=other', 'has train.bin, which is not of such a data set'),
    ]:
        with pytest.raises(UserError, match=words):
            prepare(setting)
    assert contents('c4') == made
    (tmp_path / 'c4/meta.json').write_bytes(made['meta.json'].replace(b'bytes', b'gpt2'))
    with pytest.raises(UserError, match="made with the tokenizer 'gpt2'"):
        prepare()
