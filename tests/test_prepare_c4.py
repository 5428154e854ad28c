"""prepare_c4.py and support/download.py against a real server, which misbehaves when told to."""

import gzip
import http.server
import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

import data
import prepare_c4
from conftest import wait_until
from support import settings
from support.settings import UserError
from test_train import start


def make_documents(seed, count):
    rng = random.Random(seed)
    return [''.join(rng.choices('abcdefg é漢\n"\\', k=rng.randrange(1, 400))) for _ in range(count)]


def gz(texts):
    """A shard of these documents. It has two gzip members, which is legal."""
    content = ''.join(
        json.dumps({'text': text}, ensure_ascii=False) + '\n' for text in texts
    ).encode()
    return gzip.compress(content[:99], 1) + gzip.compress(content[99:], 1)


def bin_of(texts):
    """The token file of these documents: a byte is a token, 256 ends each."""
    characters = [text.encode().decode('latin-1') + '\u0100' for text in texts]
    return ''.join(characters).encode('utf-16-le')


TRAIN = [make_documents(i, 400) for i in range(4)]
VAL = [make_documents(100 + i, 20) for i in range(8)]
NAMES = [prepare_c4.NAMES['train'].format(number) for number in range(4)]
NAME = NAMES[0]
FILES = dict(zip(NAMES, map(gz, TRAIN)))
for number, texts in enumerate(VAL):
    FILES[prepare_c4.NAMES['val'].format(number)] = gz(texts)


QUICK = (
    '--tokenizer=bytes --tokens=0 --val_tokens=10 --shards=0:1 --processes=1 --backoff=0.01'
).split()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.files.

    server.faults[name] is a list of changes of the answers to the next requests: status, headers,
    body, send (the bytes after which the line drops), wait (seconds before the answer).
    """

    def do_GET(self):
        server = self.server
        name = self.path.split('/')[-1]
        asked = self.headers.get('Range')
        server.requests.append((name, asked))
        status = 200
        headers = {}
        body = server.files[name]
        if asked and server.ranges:
            status = 206
            headers['Content-Range'] = asked.replace('=', ' ')
            body = body[int(asked[6:-1]) :]
        headers['Content-Length'] = len(body)
        answer = {'status': status, 'headers': headers, 'body': body}
        if server.faults.get(name):
            answer |= server.faults[name].pop(0)
        time.sleep(answer.get('wait', 0))
        self.send_response(answer['status'])
        for header in answer['headers'].items():
            self.send_header(*header)
        self.end_headers()
        body = answer['body'][: answer.get('send')]
        for i in range(0, len(body), 4096):
            time.sleep(server.delay)
            self.wfile.write(body[i : i + 4096])
        self.close_connection = True


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of FILES, in threads of this process; scripts run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        server.files = dict(FILES)
        server.faults = {}
        server.requests = []
        server.ranges = True
        server.delay = 0
        server.url = f'http://127.0.0.1:{server.server_port}'
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def arguments(server, *more):
    return [*QUICK, f'--base_url={server.url}', f'--data_dir={os.getcwd()}', *more]


@pytest.fixture
def prepare(server):
    """prepare(*args): the files that the script makes."""

    def prepare(*args):
        cfg = settings.parse(prepare_c4.C4Config, arguments(server, *args))
        prepare_c4.prepare(cfg)
        return contents(f'{cfg.data_dir}/c4')

    return prepare


def contents(folder):
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def good(made):
    return made['train_00000.bin'] == bin_of(TRAIN[0])


# ---- What comes out ------------------------------------------------------------------------------


def test_whole_shards(server, prepare):
    made = prepare('--shards=0:3', '--val_tokens=0')
    expected = {f'train_{i:05d}.bin': bin_of(TRAIN[i]) for i in range(3)}
    expected |= {f'val_{i:05d}.bin': bin_of(VAL[i]) for i in range(8)}
    assert made == {**expected, 'meta.json': made['meta.json']}
    meta = data.load_dataset('c4').meta
    assert meta['complete'] and meta['files'].keys() == expected.keys()
    server.requests.clear()
    prepare('--shards=0:3', '--val_tokens=0')
    assert not server.requests  # nothing left to ask for


@pytest.mark.parametrize('less', [0, 1])
def test_slice_ends_at_the_document_that_reaches_it(prepare, less):
    expected = bin_of(TRAIN[0][:7])
    made = prepare(f'--tokens={len(expected) // 2 - less}')
    assert made['train_00000.bin'] == expected
    assert 'train_00000.bin.cut' in made


def test_slice_over_several_shards(prepare):
    first = bin_of(TRAIN[1])
    made = prepare(f'--tokens={len(first) // 2 + 100}', '--shards=1:4')
    assert made['train_00001.bin'] == first
    assert 'train_00003.bin' not in made
    assert 200 <= len(made['train_00002.bin']) < len(bin_of(TRAIN[2]))


def test_slice_reads_only_what_it_needs(server, prepare):
    body = gz([random.Random(i).randbytes(1000).hex() for i in range(5000)])
    server.files[NAME] = body
    server.faults[NAME] = [{'send': len(body) // 3}]
    prepare('--tokens=100_000', '--retries=0')


def test_a_slice_can_grow(prepare):
    whole = prepare('--shards=0:2', '--data_dir=whole')
    first = prepare('--tokens=1000')
    assert prepare('--tokens=500') == first  # less: what is there is enough
    assert len(prepare('--tokens=5000')['train_00000.bin']) >= 10_000
    assert prepare('--shards=0:2') == whole


def test_many_threads_keep_the_order(server, prepare):
    texts = make_documents(0, 5000)
    server.files[NAME] = gz(texts)
    assert prepare('--processes=2')['train_00000.bin'] == bin_of(texts)


def test_runs_with_ranges_make_what_one_makes(server, prepare):
    one = prepare('--shards=0:4', '--data_dir=one')
    server.delay = 0.002
    processes = []
    for shards in '0:2', '2:3', '3:4':
        processes.append(start('prepare_c4.py', *arguments(server, f'--shards={shards}')))
    for process in processes:
        assert process.wait(timeout=100) == 0, process.stdout.read()
    assert contents('c4') == one


def test_meta_is_right_whoever_writes_last(prepare, monkeypatch):
    """Another run makes its shard and writes meta.json while this one is about to."""
    write_file = data.files.write_file

    def late(path, content):
        if '"complete": true' in content:
            monkeypatch.setattr(data.files, 'write_file', write_file)
            prepare('--shards=1:2')
        write_file(path, content)

    monkeypatch.setattr(data.files, 'write_file', late)
    made = prepare()
    assert len(json.loads(made['meta.json'])['files']) == 3


def test_what_was_complete_stays_so(server, prepare):
    prepare()
    server.faults[NAMES[2]] = [{'status': 404}]
    with pytest.raises(UserError, match=f'{NAMES[2]}: HTTP 404: check --base_url'):
        prepare('--shards=0:3')
    assert data.load_dataset('c4').meta['complete']


@pytest.mark.parametrize(
    'how, said', [(signal.SIGKILL, ''), (signal.SIGINT, 'prepare_c4.py: interrupted\n')]
)
def test_stopped_and_run_again(server, prepare, tmp_path, how, said):
    whole = prepare('--shards=0:3', '--data_dir=whole')
    server.delay = 0.02
    process = start('prepare_c4.py', *arguments(server, '--shards=0:3'))
    wait_until(lambda: list(tmp_path.glob('c4/train_00001*.tmp')))
    process.send_signal(how)
    assert process.communicate(timeout=60)[0] == said
    server.delay = 0
    server.requests.clear()
    assert prepare('--shards=0:3') == whole
    assert [name for name, _ in server.requests] == NAMES[1:3]


# ---- A server that misbehaves --------------------------------------------------------------------


@pytest.mark.parametrize(
    'status, headers, seconds',
    [
        (500, {}, 0),
        (503, {'Retry-After': 'soon'}, 0),
        (429, {'Retry-After': '1'}, 1),
        (429, {'Retry-After': '²'}, 0),
    ],
)
def test_busy_server_is_tried_again(server, prepare, capsys, status, headers, seconds):
    server.faults[NAME] = [{'status': status, 'body': b'', 'headers': headers}]
    began = time.time()
    assert good(prepare())
    assert time.time() - began >= seconds
    assert f'{NAME}: HTTP {status} at byte 0, trying again in' in capsys.readouterr().err


@pytest.mark.parametrize('ranges', [True, False])
def test_cut_connection_is_continued(server, prepare, ranges):
    server.ranges = ranges
    third = len(server.files[NAME]) // 3
    second = third if ranges else 2 * third  # without ranges it sends the first third again
    server.faults[NAME] = [{'send': third}, {'send': second}]
    assert good(prepare('--retries=1'))  # 1: progress in between starts the count anew
    asked = [range for name, range in server.requests if name == NAME]
    assert asked == [None, f'bytes={third}-', f'bytes={2 * third}-']


@pytest.mark.parametrize(
    'fault, requests',
    [
        ({'wait': 1}, 2),
        ({'headers': {}}, 1),
        ({'headers': {'Content-Length': 'x'}}, 1),
        ({'headers': {'Content-Length': '9' * 5000}}, 1),
    ],
)
def test_a_stalled_line_and_a_body_without_length(server, prepare, fault, requests):
    server.faults[NAME] = [fault]
    assert good(prepare('--timeout=0.5'))
    assert [name for name, _ in server.requests].count(NAME) == requests


CUT = {'send': 5000}


@pytest.mark.parametrize(
    'faults, words',
    [
        ([{'status': 503, 'body': b''}] * 3, f'{NAME}: HTTP 503 at byte 0, 3 times in a row: run'),
        ([CUT] + [{'send': 0}] * 3, f'{NAME}: .* at byte 5,000, 3 times in a row'),
        ([{'status': 429, 'headers': {'Retry-After': '9' * 30}}], 'busy for .* minutes'),
        ([{'headers': {'Content-Length': 5000}}], f'{NAME}: gzip ends in the middle, after line'),
        ([CUT, {'status': 416}], f'{NAME}: gzip ends in the middle'),
        ([CUT, {'headers': {'Content-Range': 'bytes 4000-9999/10000'}}], 'asked for bytes from'),
    ],
)
def test_hopeless_answers_are_one_line(server, prepare, tmp_path, faults, words):
    server.faults[NAME] = faults
    with pytest.raises(UserError, match=words):
        prepare('--retries=2')
    assert not list(tmp_path.glob('c4/train*'))


WHOLE = gz(TRAIN[0][:100])


@pytest.mark.parametrize(
    'body, words',
    [
        (gzip.compress(b''), 'has no documents'),
        (b'this is not gzip', 'bad gzip after line 0'),
        (WHOLE[:-8] + bytes(8), 'bad gzip after line [0-9]+'),  # a wrong checksum
        (WHOLE[:-9], 'gzip ends in the middle'),
        (WHOLE + gzip.compress(b'{"text": "half\n') + WHOLE, 'line 101: no JSON with a "text"'),
        (WHOLE + gzip.compress(b'{"texts": "x"}\n'), 'line 101: no JSON with a "text"'),
        (WHOLE + gzip.compress(b'{"text": 5}'), 'line 101: no JSON with a "text"'),
        (WHOLE + gzip.compress(b'[' * 100_000), 'line 101: no JSON with a "text"'),
    ],
)
def test_damaged_shards_are_named(server, prepare, tmp_path, body, words):
    server.files[NAME] = body
    with pytest.raises(UserError, match=f'{NAME}.*{words}'):
        prepare()
    assert not list(tmp_path.glob('c4/train*'))


def test_no_server_is_one_line_at_once(server, prepare):
    server.shutdown()
    server.server_close()
    began = time.time()
    with pytest.raises(UserError, match='cannot be reached .* check the network and --base_url'):
        prepare('--backoff=60')
    assert time.time() - began < 8 and os.listdir() == []


# ---- Settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize('wrong', ['--shards=3:3', '--shards=0:1025', '--name='])
def test_bad_settings(server, prepare, wrong):
    with pytest.raises(UserError, match=wrong.split('=')[0]):
        prepare(wrong)
    assert os.listdir() == [] and server.requests == []


def test_other_data_in_the_folder_is_refused(prepare, tmp_path):
    prepare()
    with pytest.raises(UserError, match="made with the tokenizer 'bytes'"):
        prepare('--tokenizer=gpt2')
    (tmp_path / 'c4/train.bin').write_bytes(b'ab')
    with pytest.raises(UserError, match='has train.bin, which is not of such a data set'):
        prepare()
