"""prepare_c4.py and support/download.py against a real server, which misbehaves when told to."""

import gzip
import http.server
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

import data
import prepare_c4
from conftest import ROOT, wait_until
from support.settings import UserError


def documents(seed, count):
    rng = random.Random(seed)
    return [''.join(rng.choices('abcdefg é漢\n"\\', k=rng.randrange(1, 400))) for _ in range(count)]


def gz(texts):
    """A shard of these documents. It has two gzip members, which is legal."""
    lines = [json.dumps({'text': text, 'url': 'x'}, ensure_ascii=False) + '\n' for text in texts]
    content = ''.join(lines).encode()
    half = len(content) // 2
    return gzip.compress(content[:half], 1) + gzip.compress(content[half:], 1)


def bin_of(texts):
    """The token file of these documents: a byte is a token, 256 ends each."""
    return b''.join(text.encode('utf-16-le') for text in as_characters(texts))


def as_characters(texts):
    return [text.encode().decode('latin-1') + '\u0100' for text in texts]


TRAIN = [documents(i, 400) for i in range(4)]
VAL = [documents(100 + i, 20) for i in range(8)]
NAME = prepare_c4.NAMES['train'].format(0)
FILES = {}
for number, texts in enumerate(TRAIN):
    FILES[prepare_c4.NAMES['train'].format(number)] = gz(texts)
for number, texts in enumerate(VAL):
    FILES[prepare_c4.NAMES['val'].format(number)] = gz(texts)


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.files.

    server.faults[name] is a list of functions, one for each request to come, that may change the
    answer: a dict of status, headers, body (bytes), send (how many of them before the line drops).
    """

    def do_GET(self):
        server = self.server
        name = self.path.split('/')[-1]
        asked = self.headers.get('Range')
        server.requests.append((name, asked))
        body = server.files.get(name)
        if body is None:
            return self.send_error(404)
        size = len(body)
        headers = {'Content-Length': size}
        answer = {'status': 200, 'headers': headers, 'body': body, 'send': None}
        if asked and server.ranges:
            begin = int(asked[6:-1])
            answer |= {'status': 206, 'body': body[begin:]}
            headers['Content-Length'] = size - begin
            headers['Content-Range'] = f'bytes {begin}-{size - 1}/{size}'
        if server.faults.get(name):
            server.faults[name].pop(0)(answer)
        self.send_response(answer['status'])
        for key, value in answer['headers'].items():
            self.send_header(key, value)
        self.end_headers()
        body = answer['body'][: answer['send']]
        for i in range(0, len(body), 4096):
            time.sleep(server.delay)
            self.wfile.write(body[i : i + 4096])
            server.sent += len(body[i : i + 4096])
        self.close_connection = True

    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request, address):
        pass  # clients hang up here all the time


def fault(**changes):
    return lambda answer: answer.update(changes)


def headers(**changes):
    changes = {name.replace('_', '-'): value for name, value in changes.items()}
    return lambda answer: answer['headers'].update(changes)


@pytest.fixture
def server():
    with Server(('127.0.0.1', 0), Handler) as s:
        s.files = dict(FILES)
        s.faults = {}
        s.requests = []
        s.ranges = True
        s.delay = s.sent = 0
        s.url = f'http://127.0.0.1:{s.server_port}/en'
        threading.Thread(target=s.serve_forever, args=(0.01,), daemon=True).start()
        yield s
        s.shutdown()


def settings_of(server, folder, **changes):
    settings = {'base_url': server.url, 'data_dir': str(folder), 'tokenizer': 'bytes', 'tokens': 0}
    settings |= {'val_tokens': 10, 'shards': '0:1', 'processes': 1, 'backoff': 0.01, 'timeout': 5}
    return settings | changes


@pytest.fixture
def prepare(server, tmp_path):
    """prepare(**settings): the files that the script makes."""

    def prepare(folder='.', **changes):
        cfg = prepare_c4.C4Config(**settings_of(server, tmp_path / folder, **changes))
        prepare_c4.prepare(cfg)
        return contents(tmp_path / folder / 'c4')

    return prepare


@pytest.fixture
def start(server, tmp_path):
    """start(**settings): the same as a process of its own."""
    running = []

    def start(folder='.', **changes):
        settings = settings_of(server, tmp_path / folder, **changes)
        arguments = [f'--{name}={value}' for name, value in settings.items()]
        command = [sys.executable, 'prepare_c4.py', *arguments]
        pipe = subprocess.PIPE
        running.append(subprocess.Popen(command, cwd=ROOT, text=True, stdout=pipe, stderr=pipe))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def good(made):
    return made['train_00000.bin'] == bin_of(TRAIN[0])


# ---- What comes out ------------------------------------------------------------------------------


def test_whole_shards(server, prepare, tmp_path):
    made = prepare(shards='0:3', val_tokens=0)
    expected = {f'train_{i:05d}.bin': bin_of(TRAIN[i]) for i in range(3)}
    expected |= {f'val_{i:05d}.bin': bin_of(VAL[i]) for i in range(8)}
    meta = json.loads(made['meta.json'])
    assert made == expected | {'meta.json': made['meta.json']}
    assert meta == {
        'tokenizer': 'bytes',
        'vocab_size': 257,
        'source': 'C4, en (allenai/c4)',
        'complete': True,
        'files': {file: len(content) // 2 for file, content in expected.items()},
    }
    assert data.load_dataset('c4', tmp_path).tokens('val') == sum(len(bin_of(v)) // 2 for v in VAL)
    before = len(server.requests)
    assert prepare(shards='0:3', val_tokens=0) == made
    assert len(server.requests) == before  # nothing left to ask for


@pytest.mark.parametrize('count', [1, 7])
@pytest.mark.parametrize('less', [0, 1])
def test_slice_ends_at_the_document_that_reaches_it(prepare, count, less):
    expected = bin_of(TRAIN[0][:count])
    made = prepare(tokens=len(expected) // 2 - less)
    assert made['train_00000.bin'] == expected
    assert 'train_00000.bin.cut' in made


def test_slice_over_several_shards(prepare):
    first = bin_of(TRAIN[1])
    made = prepare(tokens=len(first) // 2 + 100, shards='1:4')
    assert made['train_00001.bin'] == first
    assert 'train_00001.bin.cut' not in made and 'train_00003.bin' not in made
    assert 200 <= len(made['train_00002.bin']) < len(bin_of(TRAIN[2]))


def test_slice_reads_only_what_it_needs(server, prepare):
    server.files[NAME] = gz([random.Random(i).randbytes(1000).hex() for i in range(5000)])
    server.delay = 1e-4
    prepare(tokens=100_000)
    assert server.sent < len(server.files[NAME]) / 3


def test_a_slice_can_grow(prepare):
    whole = prepare('whole', shards='0:2')
    first = prepare('grown', tokens=1000)
    assert prepare('grown', tokens=500) == first  # less: what is there is enough
    assert len(prepare('grown', tokens=5000)['train_00000.bin']) >= 10_000
    assert prepare('grown', shards='0:2') == whole


def test_many_threads_keep_the_order(server, prepare):
    texts = documents(0, 9000)
    server.files[NAME] = gz(texts)
    assert prepare(processes=8)['train_00000.bin'] == bin_of(texts)


def test_runs_with_ranges_make_what_one_makes(server, prepare, start, tmp_path):
    one = prepare('one', shards='0:4')
    server.delay = 0.002
    for process in [start('many', shards=shards) for shards in ('0:2', '2:3', '3:4')]:
        assert process.wait(timeout=100) == 0, process.stderr.read()
    assert contents(tmp_path / 'many/c4') == one


def test_meta_is_right_whoever_writes_last(server, monkeypatch, tmp_path):
    """Another process finishes a shard and writes meta.json while this one is about to."""
    cfg = prepare_c4.C4Config(**settings_of(server, tmp_path))
    preparation = prepare_c4.Preparation(tmp_path, cfg)
    write_file = data.files.write_file
    shard = tmp_path / 'train_00000.bin'

    def late(*args):
        if not shard.exists():
            shard.write_bytes(b'aabb')
            preparation.update_meta()
        write_file(*args)

    monkeypatch.setattr(data.files, 'write_file', late)
    preparation.update_meta()
    assert data.read_meta(tmp_path)['files'] == {'train_00000.bin': 2}


def test_what_was_complete_stays_so(server, prepare, tmp_path):
    prepare()
    del server.files[prepare_c4.NAMES['train'].format(2)]
    with pytest.raises(UserError, match='HTTP 404'):
        prepare(shards='0:3')
    assert data.load_dataset('c4', tmp_path).meta['complete']


@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGINT])
def test_stopped_and_run_again(server, prepare, start, tmp_path, how):
    whole = prepare('whole', shards='0:3')
    server.delay = 0.02
    folder = tmp_path / 'again/c4'
    process = start('again', shards='0:3')
    wait_until(lambda: list(folder.glob('train_00001*.tmp')))
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    if how == signal.SIGINT:
        assert (process.returncode, err) == (130, 'prepare_c4.py: interrupted\n')
        assert not list(folder.glob('*.tmp'))
    assert (folder / 'train_00000.bin').exists() and not (folder / 'train_00001.bin').exists()
    server.delay = 0
    server.requests.clear()
    assert prepare('again', shards='0:3') == whole
    expected = [prepare_c4.NAMES['train'].format(number) for number in (1, 2)]
    assert [name for name, _ in server.requests] == expected


# ---- A server that misbehaves --------------------------------------------------------------------


@pytest.mark.parametrize('status', [500, 503, 429])
def test_busy_server_is_tried_again(server, prepare, status, capsys):
    server.faults[NAME] = [fault(status=status, body=b'')] * 3
    assert good(prepare())
    said = f'{NAME}: HTTP {status} at byte 0, trying again in'
    assert capsys.readouterr().err.count(said) == 3


@pytest.mark.parametrize('value, seconds', [('1', 1), ('soon', 0), ('-5', 0), ('²', 0)])
def test_retry_after_is_respected(server, prepare, value, seconds):
    busy = {'status': 429, 'body': b'', 'headers': {'Content-Length': 0}}
    busy['headers']['Retry-After'] = value.encode().decode('latin-1')
    server.faults[NAME] = [fault(**busy)]
    began = time.time()
    assert good(prepare())
    assert seconds <= time.time() - began < seconds + 2


@pytest.mark.parametrize('ranges', [True, False])
def test_cut_connection_is_continued(server, prepare, ranges):
    server.ranges = ranges
    third = len(server.files[NAME]) // 3
    second = third if ranges else 2 * third  # without ranges it sends the first third again
    server.faults[NAME] = [fault(send=third), fault(send=second)]
    assert good(prepare(retries=1))  # 1: progress in between starts the count anew
    asked = [range for name, range in server.requests if name == NAME]
    assert asked == [None, f'bytes={third}-', f'bytes={2 * third}-']


def test_connection_that_stalls_is_continued(server, prepare):
    server.faults[NAME] = [lambda answer: time.sleep(1)]
    assert good(prepare(timeout=0.3))
    assert [name for name, _ in server.requests].count(NAME) == 2


@pytest.mark.parametrize('length', [None, 'x', '9' * 5000])
def test_body_without_length(server, prepare, length):
    server.faults[NAME] = [fault(headers={'Content-Length': length} if length else {})]
    assert good(prepare())


@pytest.mark.parametrize(
    'faults, message',
    [
        ([fault(status=404)], f'{NAME}: HTTP 404: check --base_url'),
        ([fault(status=403)], f'{NAME}: HTTP 403: check --base_url'),
        ([fault(status=503, body=b'')] * 3, f'{NAME}: HTTP 503 at byte 0, 3 times in a row: run'),
        ([fault(send=5000)] + [fault(send=0)] * 3, f'{NAME}: .* at byte 5,000, 3 times in a row'),
        ([fault(status=503, headers={'Retry-After': '86400'})], 'busy for 1,440 minutes'),
        ([headers(Content_Length=5000)], f'{NAME}: gzip ends in the middle, after line [0-9]+'),
        ([fault(send=5000), fault(status=416)], f'{NAME}: gzip ends in the middle'),
        ([fault(headers={}, send=5000)], f'{NAME}: gzip ends in the middle'),
        (
            [fault(send=5000), headers(Content_Range='bytes 4000-9999/10000')],
            'asked for bytes from',
        ),
        ([fault(send=5000), headers(Content_Range='nonsense')], 'asked for bytes from 5000'),
    ],
)
def test_hopeless_answers_are_one_line(server, prepare, tmp_path, faults, message):
    server.faults[NAME] = faults
    with pytest.raises(UserError, match=message):
        prepare(retries=2)
    assert not list(tmp_path.glob('c4/train*'))


LINES = b''.join(json.dumps({'text': text}).encode() + b'\n' for text in TRAIN[0][:100])


WHOLE = gzip.compress(LINES)


@pytest.mark.parametrize(
    'body, message',
    [
        (b'', 'has no documents'),
        (gzip.compress(b''), 'has no documents'),
        (b'this is not gzip', 'bad gzip after line 0'),
        (WHOLE[:-8] + bytes(8), 'bad gzip after line [0-9]+'),  # a wrong checksum
        (WHOLE[:-9], 'gzip ends in the middle'),
        (WHOLE + gzip.compress(b'{"text": "half\n' + LINES), 'line 101: no JSON with a "text"'),
        (WHOLE + gzip.compress(b'{"texts": "x"}\n'), 'line 101: no JSON with a "text"'),
        (WHOLE + gzip.compress(b'{"text": 5}'), 'line 101: no JSON with a "text"'),
        (WHOLE + gzip.compress(b'[]\n'), 'line 101: no JSON with a "text"'),
        (WHOLE + gzip.compress(b'[' * 100_000), 'line 101: no JSON with a "text"'),
        (WHOLE + gzip.compress(b'{"text": "\xff"}\n'), 'line 101: no JSON with a "text"'),
        (WHOLE * 9 + gzip.compress(b'x\n') + WHOLE, 'line 901: no JSON'),
    ],
)
def test_damaged_shards_are_named(server, prepare, tmp_path, body, message):
    server.files[NAME] = body
    with pytest.raises(UserError, match=f'{NAME}.*{message}'):
        prepare()
    assert not list(tmp_path.glob('c4/train*'))


def test_no_server_is_one_line_at_once(server, start, tmp_path):
    server.shutdown()
    server.server_close()
    began = time.time()
    process = start(backoff=60)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, '') and time.time() - began < 8
    assert err.startswith('prepare_c4.py: http://127.0.0.1') and err.count('\n') == 1
    assert 'check the network' in err
    assert os.listdir(tmp_path) == []


# ---- Settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'shards': '3'}, '--shards'),
        ({'shards': '3:3'}, '--shards'),
        ({'shards': '0:1025'}, '--shards'),
        ({'name': ''}, '--name'),
        ({'tokenizer': 'gpt3'}, "'gpt3' is unknown"),
    ],
)
def test_bad_settings(server, prepare, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        prepare(**changes)
    assert os.listdir(tmp_path) == [] and server.requests == []


def test_other_data_in_the_folder_is_refused(prepare, tmp_path):
    prepare()
    with pytest.raises(UserError, match="made with the tokenizer 'bytes'"):
        prepare(tokenizer='gpt2')
    (tmp_path / 'c4/train.bin').write_bytes(b'ab')
    with pytest.raises(UserError, match='has train.bin, which is not of such a data set'):
        prepare()
