"""What no setting causes: readers that go, closed terminals, full disks, flipped bits, two runs at once, servers that lie."""
import json
import os
import signal
import subprocess
import sys
import threading
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch

import data
import prepare_text
import train
from lab import evaluate, export_hf, plot_cost
from support import checkpoint as ckpt, download, files
from support.settings import UserError

ROOT = Path(__file__).parent.parent
SMALL = ['--block_size=16', '--n_layer=1', '--n_head=2', '--n_embd=16', '--batch_size=4', '--device=cpu',
         '--gradient_accumulation_steps=1', '--eval_interval=10', '--eval_iters=1', '--log_interval=1']


def start(*args, **more):
    """A script in a process of its own."""
    streams = {'stdin': subprocess.DEVNULL, 'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE}
    return subprocess.Popen([sys.executable, *args], cwd=ROOT, text=True, **streams,
                            **{'env': {**os.environ, 'OMP_NUM_THREADS': '1'}, **more})


def last_step(out_dir):
    return [line['iter'] for line in ckpt.read_log(out_dir) if 'loss' in line][-1]


def test_a_reader_that_goes_does_not_stop_a_training(dataset, tmp_path):
    process = start('train.py', dataset, *SMALL, '--max_iters=60', f'--out_dir={tmp_path}')
    process.stdout.close()
    assert process.wait(timeout=100) == 0 and process.stderr.read() == '' and last_step(tmp_path) == 59


@pytest.mark.parametrize('number', [signal.SIGHUP, signal.SIGINT])
def test_a_closed_terminal_saves(dataset, tmp_path, number):
    """SIGHUP is what it sends; and Ctrl-C ends `tee`, too, before the training can print what it does."""
    process = start('train.py', dataset, *SMALL, '--max_iters=100_000', f'--out_dir={tmp_path}',
                    env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONIOENCODING': 'ascii'})
    for line in process.stdout:
        if line.startswith('step 12/'):
            break
    process.stdout.close()
    process.send_signal(number)
    assert process.wait(timeout=60) == 130 and process.stderr.read() == ''
    assert ckpt.load(tmp_path)['iter_num'] == last_step(tmp_path) + 1 > 12


def test_nohup_is_left_alone(dataset, tmp_path):
    process = start('train.py', dataset, *SMALL, '--max_iters=300', f'--out_dir={tmp_path}',
                    preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.stdout.readline()
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=100)
    assert process.returncode == 0 and last_step(tmp_path) == 299


def test_a_full_disk_keeps_the_old_checkpoint(dataset, tmp_path, run, monkeypatch):
    args = [dataset, *SMALL, f'--out_dir={tmp_path}']
    run(train, *args, '--max_iters=10')
    before = (tmp_path / 'ckpt.pt').read_bytes()

    def full(fd):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    assert 'No space left' in run(train, *args, '--max_iters=20', '--init_from=resume')
    assert (tmp_path / 'ckpt.pt').read_bytes() == before and sorted(os.listdir(tmp_path)) == ['ckpt.pt', 'log.jsonl']


def test_flipped_bits_are_noticed(dataset, tmp_path, run):
    """Or make no difference: the zip file has bytes that nothing reads."""
    run(train, dataset, *SMALL, '--max_iters=1', f'--out_dir={tmp_path}')
    whole, path = (tmp_path / 'ckpt.pt').read_bytes(), tmp_path / 'ckpt.pt'
    right, noticed = ckpt.load(tmp_path), 0
    for place in range(7, len(whole), len(whole) // 150):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1:])
        try:
            found = ckpt.load(tmp_path)
            assert all(torch.equal(found['model'][name], x) for name, x in right['model'].items())
            assert found['config'] == right['config']
        except UserError as e:
            noticed += '\n' not in str(e)
    assert noticed > 100


def test_one_process_at_a_time(dataset, tmp_path, run):
    """The second says who has the folder, and a process that was killed keeps nobody out."""
    args = [dataset, *SMALL, '--max_iters=1', f'--out_dir={tmp_path / "x"}']
    code = ('import time; from support import files\n'
            f'with files.locked({str(tmp_path / "x")!r}): print("has it", flush=True); time.sleep(99)')
    holder = start('-c', code)
    holder.stdout.readline()
    out = run(train, *args)
    assert 'is in use by' in out and (str(holder.pid) in out or not os.path.exists('/proc/locks'))
    assert os.listdir(tmp_path / 'x') == []
    with pytest.raises(UserError, match='in use'), files.locked(tmp_path / 'x', shared=True):
        pass
    holder.kill()
    holder.wait()
    assert 'done in' in run(train, *args)
    with files.locked(tmp_path / 'x', shared=True), files.locked(tmp_path / 'x', shared=True):
        pass


def test_a_resumed_run_stays_the_same_run(dataset, tmp_path, run):
    args = [dataset, *SMALL, f'--out_dir={tmp_path / "out"}', '--init_from=resume', '--max_iters=8']
    run(train, *args[:-2], '--max_iters=4')
    for setting in '--seed=5', '--batch_size=2', '--learning_rate=0.1', '--min_lr=0.1', '--grad_clip=0':
        out = run(train, *args, setting)
        assert f'another run by {setting[2:].split("=")[0]}=' in out and 'resume_changed' in out
    (tmp_path / 'other.txt').write_text('other text\n' * 900)
    prepare_text.prepare(prepare_text.TextConfig(paths=[str(tmp_path / 'other.txt')], tokenizer='bytes',
                                                 data_dir=str(tmp_path)))
    assert 'is not what' in run(train, *args, f'--dataset={tmp_path / "other"}')
    assert 'resumed with max_iters=8 (was 4), eval_iters=2 (was 1)' in run(train, *args, '--eval_iters=2')
    out = run(train, *args, '--max_iters=9', '--seed=5', f'--dataset={tmp_path / "other"}', '--resume_changed')
    assert 'seed=5 (was 1337)' in out and 'done in' in out
    lines = [json.loads(line) for line in open(tmp_path / 'out/log.jsonl')]
    assert [(line['from'], line['config']['seed']) for line in lines if 'config' in line] == \
        [(0, 1337), (4, 1337), (8, 5)]
    assert [line['iter'] for line in lines if 'loss' in line] == list(range(9))


def test_data_that_cannot_be_meant(lines, dataset, tmp_path, run):
    meta = data.read_meta(lines)
    copy = tmp_path / 'copy'
    os.mkdir(copy)
    for name in 'train.bin', 'val.bin':
        (copy / name).write_bytes((lines / name).read_bytes())
    args = [f'--dataset={copy}', *SMALL, '--max_iters=1', f'--out_dir={tmp_path / "out"}']
    (copy / 'meta.json').write_text(json.dumps({**meta, 'tokenizer': 'klingon'}))
    assert 'klingon' in run(train, *args) and not (tmp_path / 'out').exists()
    (copy / 'meta.json').write_text(json.dumps({**meta, 'complete': False}))
    assert 'is not complete' in run(train, *args)


def test_too_large_for_the_machine(dataset, tmp_path, run):
    args = [dataset, *SMALL, f'--out_dir={tmp_path / "x"}']
    assert 'GB of memory' in run(train, *args, '--n_layer=1000', '--n_embd=65536')
    assert not (tmp_path / 'x').exists()


def test_an_error_of_several_processes_is_one_line(tmp_path):
    process = start('-m', 'support.launch', '--nproc_per_node=2', 'train.py', '--dataset=nowhere', '--device=cpu',
                    f'--out_dir={tmp_path / "x"}')
    out, err = process.communicate(timeout=100)
    assert process.returncode == 1 and out == '' and len(err.splitlines()) == 1 and "'nowhere'" in err, err


def test_own_output_is_no_text(tmp_path, monkeypatch):
    """prepare_text.py twice over the folder that its data set lies in; a file with two names counts once."""
    monkeypatch.chdir(tmp_path)
    for n in range(9):
        (tmp_path / f'{n}.txt').write_text(f'text {n}\n' * 9)
    cfg = prepare_text.TextConfig(paths=['.', './.', '0.txt'], name='x', tokenizer='bytes')
    prepare_text.prepare(cfg)
    first = data.load_dataset('x')
    assert first.tokens('train') + first.tokens('val') == 9 * (9 * 7 + 1)
    prepare_text.prepare(cfg)
    assert data.load_dataset('x').fingerprint() == first.fingerprint()


@pytest.fixture
def liar():
    """liar(status, headers, body): the URL of a server that answers so."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers, body = answer
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == 'GET':
                for part in body:
                    self.wfile.write(part)
        do_HEAD = do_GET

        def log_message(self, *_):
            pass
    server = HTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def serve(*new):
        nonlocal answer
        answer = new
        return f'http://127.0.0.1:{server.server_port}'
    answer = None
    yield serve
    server.shutdown()


@pytest.mark.parametrize('status, headers, words', [
    (429, {'Retry-After': '9' * 30}, 'busy for'), (503, {'Retry-After': '86400'}, 'busy for 1,440 minutes'),
    (206, {'Content-Range': 'bytes ²-1/9'}, 'asked for bytes')])
def test_headers_that_lie(liar, status, headers, words):
    server = download.Server(liar(status, headers, []), retries=1, backoff=0.0, timeout=2)
    with pytest.raises(UserError, match=words):
        list(server.read('x', got=1 if status == 206 else 0))


@pytest.mark.parametrize('size', ['x', '²', '9' * 5000])
def test_a_length_that_is_none(liar, size):
    """What comes counts; whether it is whole is then for the caller to see."""
    assert b''.join(download.Server(liar(200, {'Content-Length': size}, [b'abc']), retries=0).read('x')) == b'abc'


@pytest.mark.parametrize('size', ['x', '²', '9' * 5000, '-1'])
def test_sizes_that_are_none(liar, size, tmp_path):
    with pytest.raises(UserError):
        download.download(liar(200, {'X-Linked-Size': size}, []) + '/x', str(tmp_path / 'x'))
    assert not (tmp_path / 'x').exists()


@pytest.mark.parametrize('script, args', [
    (plot_cost, ['--selective=bench.json', '--memory_loss=bench.json', '--to=own/README.md']),
    (plot_cost, ['--selective=bench.json', '--memory_loss=bench.json', '--to=own/x.png']),
    (export_hf, ['--out_dir=run', '--folder=own']),
    (evaluate, ['--out_dir=run', '--json=own/x.json', '--tasks=passkey', '--device=cpu'])])
def test_files_of_others_are_left_alone(script, args, dataset, tmp_path, run, monkeypatch):
    """A script replaces what it wrote itself, nothing else."""
    monkeypatch.chdir(tmp_path)
    run(train, dataset, *SMALL, '--max_iters=1', '--out_dir=run')
    rows = [dict(part='attention', case=case, T=T, value=1.0) for case in ('standard', 'selective') for T in (64, 128)]
    Path('bench.json').write_text(json.dumps({'rows': rows}))
    mine = dict.fromkeys(['README.md', 'x.png', 'x.json'], 'mine')
    Path('own').mkdir()
    for name, text in mine.items():
        Path('own', name).write_text(text)
    assert 'choose another' in run(script, *args) or 'is not a file name for this' in run(script, *args)
    assert {path.name: path.read_text() for path in Path('own').iterdir()} == mine
