"""prepare_c4.py against a real HTTP server on 127.0.0.1, which serves small gzip shards and misbehaves when told to."""
import email.utils
import gzip
import http.server
import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import requests
import urllib3

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import data
import prepare_c4
from conftest import wait_until
from support import download
from support.settings import UserError


def documents(seed, count):
    rng = random.Random(seed)
    return [''.join(rng.choices('abcdefg é漢\n"\\', k=rng.randrange(1, 400))) for _ in range(count)]


def gz(texts):
    lines = ''.join(json.dumps({'text': t, 'url': 'x'}, ensure_ascii=False) + '\n' for t in texts).encode()
    half = len(lines) // 2  # two gzip members, which is legal
    return gzip.compress(lines[:half], 1) + gzip.compress(lines[half:], 1)


def bin_of(texts):
    return b''.join(bytes(b for byte in t.encode() for b in (byte, 0)) + b'\x00\x01' for t in texts)  # 256 ends each


TRAIN = [documents(i, 400) for i in range(4)]
VAL = [documents(100 + i, 20) for i in range(8)]
FILES = {prepare_c4.shard_file(split, i): gz(texts)
         for split, shards in (('train', TRAIN), ('val', VAL)) for i, texts in enumerate(shards)}


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.files. server.faults[name] is a list of functions, one for each request to come, that may
    change the answer: a dict of status, headers, body (bytes), send (how many of them before the line drops)."""

    def do_GET(self):
        server, name = self.server, self.path.split('/')[-1]
        server.requests.append((name, self.headers.get('Range')))
        body, begin = server.files.get(name), 0
        if body is None:
            return self.send_error(404)
        answer = {'status': 200, 'headers': {'Content-Length': len(body)}, 'body': body, 'send': None}
        if self.headers.get('Range') and server.ranges:
            begin = int(self.headers['Range'][6:-1])
            answer |= {'status': 206, 'body': body[begin:], 'headers': {
                'Content-Length': len(body) - begin, 'Content-Range': f'bytes {begin}-{len(body) - 1}/{len(body)}'}}
        if server.faults.get(name):
            server.faults[name].pop(0)(answer)
        self.send_response(answer['status'])
        for key, value in answer['headers'].items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == 'HEAD':
            return
        body = answer['body'][:answer['send']]
        for i in range(0, len(body), 4096):
            time.sleep(server.delay)
            self.wfile.write(body[i:i + 4096])
            server.sent += len(body[i:i + 4096])
        self.close_connection = True

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request, address):
        pass  # clients hang up here all the time


@pytest.fixture(scope='session')
def workers():
    """One tokenizing process for all tests here, because starting one takes longer than a test."""
    made = prepare_c4.Workers(prepare_c4.C4Config(tokenizer='bytes', processes=1))
    close, made.close = made.close, lambda: None
    yield made
    close()


@pytest.fixture
def server(workers, monkeypatch):
    real = prepare_c4.Workers
    monkeypatch.setattr(prepare_c4, 'Workers', lambda cfg: workers if cfg.tokenizer == 'bytes' else real(cfg))
    with Server(('127.0.0.1', 0), Handler) as s:
        s.files = dict(FILES)
        s.faults, s.requests, s.ranges, s.delay, s.sent = {}, [], True, 0, 0
        s.url = f'http://127.0.0.1:{s.server_port}/en'
        threading.Thread(target=s.serve_forever, args=(0.01,), daemon=True).start()
        yield s
        s.shutdown()


def settings_of(server, tmp_path, **changes):
    return dict(base_url=server.url, data_dir=str(tmp_path), tokenizer='bytes', tokens=0, val_tokens=10, shards='0:1',
                processes=1, backoff=0.01, timeout=5) | changes


def prepare(server, tmp_path, **changes):
    prepare_c4.prepare(prepare_c4.C4Config(**settings_of(server, tmp_path, **changes)))
    return contents(tmp_path / 'c4')


def start(server, tmp_path, **changes):
    """The same as a process of its own."""
    arguments = [f'--{k}={v}' for k, v in settings_of(server, tmp_path, **changes).items()]
    return subprocess.Popen([sys.executable, 'prepare_c4.py', *arguments], cwd=ROOT, text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def contents(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def fault(**changes):
    return lambda answer: answer.update(changes)


NAME = prepare_c4.shard_file('train', 0)

# ----------------------------------------------------------------------------- what comes out

def test_whole_shards(server, tmp_path):
    made = prepare(server, tmp_path, shards='0:3', val_tokens=0)
    assert sorted(made) == sorted(['meta.json', *(f'train_{i:05d}.bin' for i in range(3)),
                                   *(f'val_{i:05d}.bin' for i in range(8))])
    for i in range(3):
        assert made[f'train_{i:05d}.bin'] == bin_of(TRAIN[i])
    for i in range(8):
        assert made[f'val_{i:05d}.bin'] == bin_of(VAL[i])
    meta = json.loads(made['meta.json'])
    assert meta == {'tokenizer': 'bytes', 'vocab_size': 257, 'source': 'C4, en (allenai/c4)', 'complete': True,
                    'files': {f: len(made[f]) // 2 for f in sorted(made) if f != 'meta.json'}}
    assert data.load_dataset('c4', tmp_path).tokens('train') == sum(len(bin_of(TRAIN[i])) // 2 for i in range(3))
    before = len(server.requests)
    assert prepare(server, tmp_path, shards='0:3', val_tokens=0) == made
    assert len(server.requests) == before  # nothing left to ask for


def test_slice_ends_at_the_document_that_reaches_it(server, tmp_path):
    sizes = [len(bin_of([t])) // 2 for t in TRAIN[0]]
    for count in 1, 7:
        for less in 0, 1:  # exactly at the end of a document, and one token before it
            made = prepare(server, tmp_path / f'{count}{less}', tokens=sum(sizes[:count]) - less)
            assert made['train_00000.bin'] == bin_of(TRAIN[0][:count])
            assert 'train_00000.bin.cut' in made


def test_slice_over_several_shards(server, tmp_path):
    first = len(bin_of(TRAIN[1])) // 2
    made = prepare(server, tmp_path, tokens=first + 100, shards='1:4')
    assert made['train_00001.bin'] == bin_of(TRAIN[1]) and 'train_00001.bin.cut' not in made
    assert 200 <= len(made['train_00002.bin']) < len(bin_of(TRAIN[2])) and 'train_00003.bin' not in made


def test_slice_reads_only_what_it_needs(server, tmp_path):
    server.files[NAME] = gz([random.Random(i).randbytes(1000).hex() for i in range(5000)])  # 5 MB in, 10 MB of text
    server.delay = 1e-4
    prepare(server, tmp_path, tokens=100_000)
    assert server.sent < len(server.files[NAME]) / 3


def test_a_slice_can_grow(server, tmp_path):
    whole = prepare(server, tmp_path / 'whole', shards='0:2')
    prepare(server, tmp_path / 'grown', tokens=1000)
    assert prepare(server, tmp_path / 'grown', tokens=500)['train_00000.bin.cut'] == b''  # less: what is there is enough
    more = prepare(server, tmp_path / 'grown', tokens=5000)
    assert len(more['train_00000.bin']) >= 10_000
    assert prepare(server, tmp_path / 'grown', shards='0:2') == whole


def test_processes_with_ranges_make_what_one_makes(server, tmp_path):
    one = prepare(server, tmp_path / 'one', shards='0:4')
    server.delay = 0.002
    running = [start(server, tmp_path / 'many', shards=s) for s in ('0:2', '2:3', '3:4')]
    for process in running:
        assert process.wait(timeout=100) == 0, process.stderr.read()
    assert contents(tmp_path / 'many' / 'c4') == one


def test_meta_is_right_whoever_writes_last(tmp_path, monkeypatch):
    """Another process finishes a shard and writes meta.json while this one is about to write its own."""
    real, tokenizer = prepare_c4.write_meta, data.get_tokenizer('bytes')
    (tmp_path / 'train_00000.bin').write_bytes(b'aa')

    def late(*args):
        if not (tmp_path / 'train_00001.bin').exists():
            (tmp_path / 'train_00001.bin').write_bytes(b'bbbb')
            prepare_c4.update_meta(tmp_path, tokenizer)
        real(*args)
    monkeypatch.setattr(prepare_c4, 'write_meta', late)
    prepare_c4.update_meta(tmp_path, tokenizer)
    assert data.read_meta(tmp_path)['files'] == {'train_00000.bin': 1, 'train_00001.bin': 2}


@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGINT])
def test_stopped_and_run_again(server, tmp_path, how):
    whole = prepare(server, tmp_path / 'whole', shards='0:3')
    server.delay, stopped = 0.02, 0
    while stopped < 2:
        process = start(server, tmp_path / 'again', shards='0:3')
        folder = tmp_path / 'again' / 'c4'
        wait_until(lambda: (folder / f'train_{stopped:05d}.bin').exists()
                   and list(folder.glob(f'train_{stopped + 1:05d}*.tmp')), seconds=30)
        if how == signal.SIGINT:
            os.killpg(process.pid, how)  # as a terminal does: to all its processes
        else:
            process.kill()
        out, err = process.communicate(timeout=60)
        assert process.returncode == (-9 if how == signal.SIGKILL else 130)
        assert how == signal.SIGKILL or err == 'prepare_c4.py: interrupted\n'
        assert (folder / f'train_{stopped:05d}.bin').exists() and not (folder / f'train_{stopped + 1:05d}.bin').exists()
        stopped += 1
    server.delay, before = 0, len(server.requests)
    assert prepare(server, tmp_path / 'again', shards='0:3') == whole
    assert [name for name, _ in server.requests[before:]] == [prepare_c4.shard_file('train', 2)]


def test_connections_have_no_lock_in_python(server, tmp_path, monkeypatch):
    """Which Ctrl-C could leave taken."""
    made, real = [], urllib3.HTTPConnectionPool.__init__

    def init(pool, *args, **more):
        made.append(pool)
        real(pool, *args, **more)
    monkeypatch.setattr(urllib3.HTTPConnectionPool, '__init__', init)
    assert good(prepare(server, tmp_path))
    assert made and all(isinstance(pool.pool, queue.SimpleQueue) for pool in made)
    assert issubclass(urllib3.HTTPSConnectionPool.QueueCls, queue.SimpleQueue)


def test_no_process_outlives_a_killed_parent(server, tmp_path):
    server.files[NAME] = gz(TRAIN[0] * 20)
    server.delay = 0.01
    process = start(server, tmp_path, processes=2)
    wait_until(lambda: list(tmp_path.glob('c4/train*.tmp')))
    children = subprocess.run(['ps', '-o', 'pid=', '--ppid', str(process.pid)], capture_output=True, text=True).stdout.split()
    assert children
    process.kill()
    process.wait()
    for pid in children:
        wait_until(lambda: not os.path.exists(f'/proc/{pid}'), seconds=5)

# ----------------------------------------------------------------------------- a server that misbehaves

def good(made):
    return made['train_00000.bin'] == bin_of(TRAIN[0])


@pytest.mark.parametrize('status', [500, 503, 429])
def test_busy_server_is_tried_again(server, tmp_path, status, capsys):
    server.faults[NAME] = [fault(status=status, body=b'')] * 3
    assert good(prepare(server, tmp_path))
    assert capsys.readouterr().err.count(f'{NAME}: HTTP {status} at byte 0 of ?, trying again in') == 3


@pytest.mark.parametrize('form', ['seconds', 'date'])
def test_retry_after_is_respected(server, tmp_path, form):
    value = '1' if form == 'seconds' else email.utils.formatdate(time.time() + 2, usegmt=True)
    times = []

    def busy(answer):
        times.append(time.time())
        answer.update(status=429, headers={'Retry-After': value, 'Content-Length': 0}, body=b'')
    server.faults[NAME] = [busy, lambda answer: times.append(time.time())]
    assert good(prepare(server, tmp_path))
    assert times[1] - times[0] >= (1 if form == 'seconds' else 0.5)


def test_retry_after_forms():
    assert download.retry_after('120') == 120
    assert 55 < download.retry_after(email.utils.formatdate(time.time() + 60, usegmt=True)) <= 60
    for text in '', 'soon', '-5', email.utils.formatdate(0, usegmt=True):
        assert download.retry_after(text) == 0


@pytest.mark.parametrize('ranges', [True, False])
def test_cut_connection_is_continued(server, tmp_path, ranges):
    server.ranges = ranges
    size = len(server.files[NAME])
    server.faults[NAME] = [fault(send=size // 3), fault(send=size // 3 if ranges else size // 2)]
    assert good(prepare(server, tmp_path, retries=1))  # 1: progress in between starts the count anew
    asked = [r for name, r in server.requests if name == NAME]
    assert asked == [None, f'bytes={size // 3}-', f'bytes={size // 3 * 2 if ranges else size // 2}-']


def test_short_body_is_noticed_by_its_length(server, tmp_path, monkeypatch):
    """Also where urllib3 does not count, as its first version."""
    real = requests.Session.get

    def get(*args, **more):
        answer = real(*args, **more)
        answer.raw.enforce_content_length = False
        return answer
    monkeypatch.setattr(requests.Session, 'get', get)
    server.faults[NAME] = [fault(send=5000)]
    assert good(prepare(server, tmp_path))


def test_connection_that_stalls_is_continued(server, tmp_path):
    def stall(answer):
        time.sleep(1)
    server.faults[NAME] = [stall]
    assert good(prepare(server, tmp_path, timeout=0.3))
    assert [name for name, _ in server.requests].count(NAME) == 2


def test_body_without_length(server, tmp_path):
    server.faults[NAME] = [fault(headers={})]
    assert good(prepare(server, tmp_path))


def headers(**changes):
    return lambda answer: answer['headers'].update({k.replace('_', '-'): v for k, v in changes.items()})


@pytest.mark.parametrize('faults, message', [
    ([fault(status=404)], f'{NAME}: HTTP 404'),
    ([fault(status=403)], f'{NAME}: HTTP 403'),
    ([fault(status=503, body=b'')] * 9, f'{NAME}: HTTP 503 at byte 0 of ., 3 times in a row: run it again later'),
    ([fault(send=5000)] + [fault(send=0)] * 9, f'{NAME}: .* at byte 5,000 of [0-9,]+, 3 times in a row'),
    ([headers(Content_Length=10**6)] + [fault(status=416, body=b'')] * 3, f'{NAME}: HTTP 416'),
    ([headers(Content_Length=10**6), lambda a: None], f'{NAME}: 1000000 bytes before, now [0-9]+: it changed'),
    ([headers(Content_Length=5000)], f'{NAME}: gzip ends in the middle, after line [0-9]+'),
    ([fault(send=5000), headers(Content_Range='bytes 4000-9999/10000')], f'{NAME}: asked for bytes from 5000'),
    ([fault(send=5000), headers(Content_Range='nonsense')], f'{NAME}: asked for bytes from 5000'),
    ([fault(headers={}, send=5000)], f'{NAME}: gzip ends in the middle'),
])
def test_hopeless_answers_are_one_line(server, tmp_path, faults, message):
    server.faults[NAME] = faults
    with pytest.raises(UserError, match=f'{message}[^\n]*$'):
        prepare(server, tmp_path, retries=2)
    assert [f for f in contents(tmp_path / 'c4') if f.startswith('train')] == []


LINES = b''.join(json.dumps({'text': t}).encode() + b'\n' for t in TRAIN[0][:100])


@pytest.mark.parametrize('body, message', [
    (b'this is not gzip', 'bad gzip after line 0'),
    (gzip.compress(LINES, mtime=0)[:-8] + bytes(8), 'bad gzip after line [0-9]+'),  # a wrong checksum
    (gzip.compress(LINES, mtime=0)[:-9], 'gzip ends in the middle'),
    (gzip.compress(LINES + b'{"text": "half\n' + LINES, mtime=0), 'line 101: no JSON'),
    (gzip.compress(LINES + b'{"texts": "x"}\n', mtime=0), 'line 101: no JSON with a "text"'),
    (gzip.compress(LINES + b'{"text": 5}', mtime=0), 'line 101: no JSON with a "text"'),
    (gzip.compress(LINES + b'[]\n', mtime=0), 'line 101: no JSON with a "text"'),
    (gzip.compress(LINES + b'{"text": "\xff"}\n', mtime=0), 'line 101: no JSON with a "text"'),
    (gzip.compress(LINES * 60 + b'garbage\n' + LINES * 60, mtime=0), 'line 6001: no JSON'),
    (gzip.compress(b'', mtime=0), 'has no documents'),
    (b'', 'has no documents'),
])
def test_damaged_shards_are_named(server, tmp_path, body, message):
    server.files[NAME] = body
    with pytest.raises(UserError, match=f'{NAME}.*{message}[^\n]*$'):
        prepare(server, tmp_path)
    assert [f for f in contents(tmp_path / 'c4') if f.startswith('train')] == []


def test_no_server_is_one_line_at_once(server, tmp_path):
    server.shutdown()
    server.server_close()
    began = time.time()
    process = start(server, tmp_path, backoff=60)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and out == '' and time.time() - began < 8
    assert err.startswith('prepare_c4.py: http://127.0.0.1') and err.count('\n') == 1 and 'check the network' in err
    assert os.listdir(tmp_path) == []

# ----------------------------------------------------------------------------- settings

@pytest.mark.parametrize('changes, message', [
    ({'shards': '3'}, '--shards'), ({'shards': '3:3'}, '--shards'), ({'shards': '0:1025'}, '--shards'),
    ({'name': ''}, '--name'), ({'tokenizer': 'gpt3'}, "'gpt3' is unknown"),
])
def test_bad_settings(server, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        prepare(server, tmp_path, **changes)
    assert os.listdir(tmp_path) == [] and server.requests == []


def test_other_data_in_the_folder_is_refused(server, tmp_path):
    prepare(server, tmp_path)
    with pytest.raises(UserError, match="made with the tokenizer 'bytes'"):
        prepare(server, tmp_path, tokenizer='gpt2')
    (tmp_path / 'c4' / 'train.bin').write_bytes(b'ab')
    with pytest.raises(UserError, match='has train.bin, which is not of such a data set'):
        prepare(server, tmp_path)
