"""What no setting causes: closed terminals, full disks, flipped bits, another process."""

import os
import signal
import subprocess

import pytest
import torch

import prepare_text
import train
from lab import export_hf
from support import checkpoint as ckpt
from support import files, settings
from support.settings import UserError
from test_train import start, wait_for

SMALL = (
    '--block_size=16 --n_layer=1 --n_head=2 --n_embd=16 --batch_size=4 --device=cpu '
    '--gradient_accumulation_steps=1 --eval_interval=10 --eval_iters=1 --log_interval=1'
).split()


def last_step(out_dir):
    return [line['iter'] for line in ckpt.read_log(out_dir) if 'loss' in line][-1]


# ---- Terminals and readers -----------------------------------------------------------------------


@pytest.mark.slow
def test_a_reader_that_goes_does_not_stop_a_training(dataset, tmp_path):
    """Nor does a terminal that closes, under nohup."""

    def nohup():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    args = [dataset, *SMALL, '--max_iters=150', f'--out_dir={tmp_path}']
    process = start('train.py', *args, stderr=subprocess.PIPE, preexec_fn=nohup)
    process.stdout.readline()
    process.stdout.close()
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=200) == 0 and process.stderr.read() == ''
    assert last_step(tmp_path) == 149


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGHUP, signal.SIGINT])
def test_a_closed_terminal_saves(dataset, tmp_path, number):
    """SIGHUP is what it sends; and Ctrl-C ends `tee`, too, before the training can print."""
    args = [dataset, *SMALL, '--max_iters=1_000_000', f'--out_dir={tmp_path}']
    env = {**os.environ, 'PYTHONIOENCODING': 'ascii'}
    process = start('train.py', *args, stderr=subprocess.PIPE, env=env)
    wait_for(process, 'step 12/')
    process.stdout.close()
    process.send_signal(number)
    assert process.wait(timeout=60) == 130 and process.stderr.read() == ''
    assert ckpt.load(tmp_path)['iter_num'] == last_step(tmp_path) + 1 > 12


# ---- Disks ---------------------------------------------------------------------------------------


def test_a_full_disk_keeps_the_old_checkpoint(dataset, tmp_path, run, monkeypatch):
    args = [dataset, *SMALL, f'--out_dir={tmp_path}']
    run(train, *args, '--max_iters=10')
    before = (tmp_path / 'ckpt.pt').read_bytes()

    def full(fd):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    assert 'No space left' in run(train, *args, '--max_iters=20', '--init_from=resume')
    assert (tmp_path / 'ckpt.pt').read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ['ckpt.pt', 'log.jsonl']


def test_flipped_bits_are_noticed(dataset, tmp_path, run):
    """Or make no difference: the zip file has bytes that nothing reads."""
    run(train, dataset, *SMALL, '--max_iters=1', f'--out_dir={tmp_path}')
    path = tmp_path / 'ckpt.pt'
    whole = path.read_bytes()
    right = ckpt.load(tmp_path)['model']
    noticed = 0
    for place in range(7, len(whole), len(whole) // 60):
        flipped = bytearray(whole)
        flipped[place] ^= 4
        path.write_bytes(flipped)
        try:
            found = ckpt.load(tmp_path)['model']
        except UserError:
            noticed += 1
        else:
            torch.testing.assert_close(found, right, rtol=0, atol=0)
    assert noticed > 40


def test_one_process_at_a_time(dataset, tmp_path, run):
    """A process that was killed keeps nobody out."""
    folder = tmp_path / 'x'
    args = [dataset, *SMALL, '--max_iters=1', f'--out_dir={folder}']
    code = """
import sys, time
from support import files
with files.locked(sys.argv[1]):
    print('has it', flush=True)
    time.sleep(99)
"""
    holder = start('-c', code, folder)
    wait_for(holder, 'has it')
    assert 'is in use by' in run(train, *args)
    assert os.listdir(folder) == []
    with pytest.raises(UserError, match='in use'), files.locked(folder, shared=True):
        pass
    holder.kill()
    holder.wait()
    assert 'done' in run(train, *args)
    with files.locked(folder, shared=True), files.locked(folder, shared=True):
        pass


# ---- Runs and data that are not the same ---------------------------------------------------------


def test_a_resumed_run_stays_the_same_run(dataset, tmp_path, run):
    args = [dataset, *SMALL, f'--out_dir={tmp_path}']
    run(train, *args, '--max_iters=4')
    args += ['--init_from=resume', '--max_iters=8']
    for setting in 'seed=5', 'batch_size=2', 'learning_rate=0.1', 'min_lr=0.1', 'grad_clip=0.0':
        out = run(train, *args, f'--{setting}')
        assert f'another run by {setting} (was' in out and 'resume_changed' in out
    text = tmp_path / 'other.txt'
    text.write_text('other text\n' * 900)
    run(prepare_text, str(text), '--tokenizer=bytes', f'--data_dir={tmp_path}')
    other = f'--dataset={tmp_path / "other"}'
    assert 'another run by dataset=' in run(train, *args, other)
    assert 'done' in run(train, *args, '--eval_iters=2')
    assert 'done' in run(train, *args, '--max_iters=9', '--seed=5', other, '--resume_changed')
    log = ckpt.read_lines(tmp_path / 'log.jsonl')
    begun = [(line['from'], line['config']['seed']) for line in log if 'config' in line]
    assert begun == [(0, 1337), (4, 1337), (8, 5)]
    assert [line['iter'] for line in log if 'loss' in line] == list(range(9))


@pytest.mark.parametrize('make', [lambda: torch.empty(2**50), lambda: bytes(2**50)])
def test_too_large_for_the_machine(make, capfd):
    with pytest.raises(SystemExit):
        settings.run(make)
    assert 'not enough memory' in capfd.readouterr().err


def test_files_of_others_are_left_alone(dataset, tmp_path, run):
    """A script replaces what it wrote itself, nothing else."""
    out_dir = f'--out_dir={tmp_path / "run"}'
    run(train, dataset, *SMALL, '--max_iters=1', out_dir)
    own = tmp_path / 'own'
    own.mkdir()
    (own / 'README.md').write_text('mine')
    assert 'choose another' in run(export_hf, out_dir, f'--folder={own}')
    assert os.listdir(own) == ['README.md']
    assert (own / 'README.md').read_text() == 'mine'
