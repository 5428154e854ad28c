"""train.py, sample.py and their settings, on a data set of a few thousand bytes."""

import io
import json
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import model
import prune
import sample
import train
from conftest import ROOT
from support import checkpoint as ckpt
from support import settings
from support.settings import UserError

SMALL = (
    '--block_size=16 --n_layer=2 --n_head=2 --n_embd=16 --batch_size=4 --device=cpu '
    '--gradient_accumulation_steps=2 --eval_interval=10 --eval_iters=2 --log_interval=1 '
    '--warmup_iters=2 --learning_rate=1e-2'
).split()
TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'train.py']


def start(*args, cwd=ROOT, **more):
    """A script in a process of its own."""
    streams = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return subprocess.Popen([sys.executable, *args], cwd=cwd, text=True, **{**streams, **more})


def wait_for(process, beginning):
    """Read what a process prints up to the line that begins so."""
    for line in process.stdout:
        if line.startswith(beginning):
            return


def log(out_dir):
    """{(figure, step): value} of the training and validation losses of a run."""
    found = {}
    for line in ckpt.read_log(out_dir):
        for name in {'loss', 'val_loss'} & set(line):
            assert (name, line['iter']) not in found, 'the loss of a step was logged twice'
            found[name, line['iter']] = line[name]
    return found


def assert_same_run(a, b):
    """Losses and weights are equal to the last bit."""
    assert log(a) == log(b)
    a, b = ckpt.load(a)['model'], ckpt.load(b)['model']
    torch.testing.assert_close(a, b, rtol=0, atol=0)


# ---- Resuming ------------------------------------------------------------------------------------

HARD = ['--selective', '--ssa=qv', '--dropout=0.1']


def test_resume(dataset, tmp_path, run):
    """Losses and weights are those of a run that was not stopped; bos is as it began."""
    args = [dataset, *SMALL, *HARD, '--lr_decay_iters=20', '--max_iters=20']
    whole, parts = f'--out_dir={tmp_path / "whole"}', f'--out_dir={tmp_path / "parts"}'
    run(train, *args, '--bos=False', whole)
    run(train, *args, '--bos=False', parts, '--max_iters=10')
    run(train, *args, parts, '--init_from=resume')
    assert_same_run(tmp_path / 'whole', tmp_path / 'parts')
    out = run(train, *args, parts, '--init_from=resume', '--qk_norm')  # there is nothing left to do
    assert 'has it: qk_norm=False' in out and 'step 20/20' in out
    assert_same_run(tmp_path / 'whole', tmp_path / 'parts')


@pytest.mark.slow
@pytest.mark.parametrize('how, code, least', [(signal.SIGKILL, -9, 20), (signal.SIGTERM, 130, 24)])
def test_a_process_that_is_stopped_resumes(how, code, least, dataset, tmp_path, run):
    args = [dataset, *SMALL, *HARD, '--max_iters=100', '--eval_interval=20']
    stopped = start('train.py', *args, f'--out_dir={tmp_path / "stopped"}')
    wait_for(stopped, 'step 23/')
    stopped.send_signal(how)
    stopped.communicate(timeout=60)
    assert stopped.returncode == code
    assert ckpt.load(tmp_path / 'stopped')['iter_num'] >= least
    run(train, *args, f'--out_dir={tmp_path / "stopped"}', '--init_from=resume')
    run(train, *args, f'--out_dir={tmp_path / "whole"}')
    assert_same_run(tmp_path / 'whole', tmp_path / 'stopped')


def test_moments_go_by_names(dataset, tmp_path, run):
    """A resumed run may have other groups."""
    run(train, dataset, *SMALL, '--ssa=qv', f'--out_dir={tmp_path}', '--max_iters=3')
    before = ckpt.load(tmp_path)
    gpt = ckpt.build(before)
    optimizers = gpt.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu', ssa_lr=50.0)
    ckpt.load_optimizers(optimizers, None, gpt, before)
    found = ckpt.optimizer_state(optimizers, gpt)
    torch.testing.assert_close(found, before['optimizer'], rtol=0, atol=0)


def test_states_that_do_not_fit(dataset, tmp_path, run):
    args = [dataset, *SMALL, f'--out_dir={tmp_path}']
    run(train, *args, '--max_iters=1')
    assert 'has a checkpoint: resume it' in run(train, *args)
    saved = ckpt.load(tmp_path)
    for optimizer in {'Muon': {}}, {'state': {}, 'param_groups': []}:
        ckpt.save(tmp_path, {**saved, 'optimizer': optimizer})
        resumed = run(train, *args, '--max_iters=2', '--init_from=resume')
        assert "no state of 'AdamW'" in resumed


def test_float16_keeps_its_scale(dataset, tmp_path, run):
    args = [dataset, *SMALL, f'--out_dir={tmp_path}', '--dtype=float16']
    run(train, *args, '--max_iters=2')
    scaler = ckpt.load(tmp_path)['scaler']
    assert scaler['_growth_tracker'] == 2
    run(train, *args, '--max_iters=3', '--init_from=resume')
    assert ckpt.load(tmp_path)['scaler'] == {**scaler, '_growth_tracker': 3}


# ---- Several processes ---------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_train_as_one(dataset, tmp_path, run):
    args = [dataset, *SMALL, '--max_iters=10', '--selective', '--memory_loss=0.1']
    args += ['--gradient_accumulation_steps=4', '--eval_iters=3']
    run(train, *args, f'--out_dir={tmp_path / "one"}')
    two = start(*TORCHRUN, *args, f'--out_dir={tmp_path / "two"}')
    out, _ = two.communicate(timeout=200)
    assert two.returncode == 0, out
    torch.testing.assert_close(log(tmp_path / 'one'), log(tmp_path / 'two'), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_signal_to_all_waits_for_the_save(dataset, tmp_path, tree):
    """The second process does not end before the first has saved; torchrun would end that, too."""
    tree('train.py', 'ckpt.save(', 'time.sleep(iter_num and 4); ckpt.save(')
    args = ['train.py', dataset, *SMALL, '--max_iters=1_000_000', '--eval_interval=1_000_000']
    args.append(f'--out_dir={tmp_path / "x"}')
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = server.getsockname()[1]
    env = {**os.environ, 'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}
    both = []
    for rank in '0', '1':
        both.append(start(*args, cwd=tree.path, env={**env, 'RANK': rank}))
    wait_for(both[0], 'step 12/')
    for process in both:
        process.terminate()
    assert both[1].wait(timeout=60) == 130
    assert ckpt.load(tmp_path / 'x')['iter_num'] >= 13
    assert both[0].wait(timeout=60) == 130 and 'nothing is lost' in both[0].stdout.read()


# ---- Losses that are not finite ------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run(dataset, tmp_path, run):
    wild = ['--learning_rate=1000', '--weight_decay=1000']
    out = run(train, dataset, *SMALL, *wild, '--max_iters=30', f'--out_dir={tmp_path}')
    assert 'loss is not finite; what was saved before is kept' in out
    assert ckpt.load(tmp_path)['iter_num'] == 0
    with pytest.raises(UserError, match='w is not finite; .*ckpt.pt stays'):
        ckpt.save(tmp_path, {'model': {'w': torch.tensor([1.0, math.nan])}})
    assert ckpt.load(tmp_path)['iter_num'] == 0


# ---- Learning and reading ------------------------------------------------------------------------


@pytest.fixture(scope='module')
def trained(lines, tmp_path_factory):
    """The folder of a model that has learned what digits follow."""
    out_dir = tmp_path_factory.mktemp('trained')
    args = [f'--dataset={lines}', *SMALL, '--selective', '--max_iters=150', '--eval_interval=50']
    process = start('train.py', *args, f'--out_dir={out_dir}')
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 0 and '| memory ' in out, out
    return out_dir


def text(out):
    """The first text of what sample.py prints."""
    return out.split('-' * 40)[0]


def test_learning_and_sampling(trained, tmp_path, run, monkeypatch):
    """The text comes from the command line, a file and standard input."""
    losses = log(trained)
    assert losses['val_loss', 150] < 2.5 < 5 < losses['val_loss', 0]
    args = [f'--out_dir={trained}', '--max_new_tokens=30', '--device=cpu', '--start=line 1']
    greedy = run(sample, *args, '--temperature=0')
    assert greedy.startswith('line 1') and 'tokens/s; KV cache' in greedy
    (tmp_path / 'prompt.txt').write_text('line 1')
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(b'line 1')))
    for prompt in f'FILE:{tmp_path / "prompt.txt"}', '-':
        assert text(run(sample, *args, '--temperature=0', f'--start={prompt}')) == text(greedy)
    assert text(run(sample, *args, '--seed=2')) == text(run(sample, *args, '--seed=2'))
    three = run(sample, *args, '--temperature=0', '--num_samples=3')
    assert three.startswith((text(greedy) + '-' * 40 + '\n') * 3)
    out = run(sample, *args, '--budgets=4,8', '--num_samples=2')
    first, second, memory = out.split('-' * 40 + '\n')
    assert first.startswith('line 1') and first != second and '2.7x less' in memory


@pytest.mark.parametrize(
    'wrong, words',
    [
        ('--budgets=1', 'a budget of 1'),
        ('--budgets=3,4,5', '3 budgets'),
        ('--budgets=17', '17'),
        ('--budgets=nowhere.json', 'nowhere.json'),
        ('--out_dir=nowhere', 'nowhere/ckpt.pt does not exist'),
    ],
)
def test_samples_that_cannot_be(trained, run, wrong, words):
    assert words in run(sample, f'--out_dir={trained}', '--device=cpu', wrong)


@pytest.mark.parametrize('bos', [True, False])
def test_bos(bos, dataset, tmp_path, run, monkeypatch):
    """<|endoftext|> stands in front of what a model reads exactly if it was trained so."""
    seen = []
    forward = model.GPT.forward

    def spy(gpt, idx, *args, **more):
        if gpt.config.vocab_size == 257:  # not an example of kernels/
            seen.append(idx[:, 0])
        return forward(gpt, idx, *args, **more)

    monkeypatch.setattr(model.GPT, 'forward', spy)
    out_dir = f'--out_dir={tmp_path}'
    run(train, dataset, *SMALL, '--max_iters=1', f'--bos={bos}', out_dir)
    run(train, dataset, *SMALL, '--eval_only', out_dir)
    run(prune, '--tolerance=1', '--windows=4', '--device=cpu', '--policy=oldest', out_dir)
    run(sample, '--start=li', '--max_new_tokens=1', '--device=cpu', out_dir)
    assert len(seen) > 6 and all((first == 256).all() == bos for first in seen)


def test_eval_only(trained, run):
    """It prints what the run logged at its end, with the checkpoint's model, and writes nothing."""
    args = [*SMALL, '--eval_only', f'--out_dir={trained}']
    before = {path: path.read_bytes() for path in trained.iterdir()}
    logged = ckpt.read_log(trained)[-1]
    line = f'step 150 | val_loss {logged["val_loss"]:.5g} | memory {logged["memory"]:.5g}'
    assert f'{line} | live {logged["live"]:.5g}' in run(train, *args)
    out = run(train, *args, '--rope', '--n_layer=5', '--init_from=resume', '--kernel=none')
    assert 'as the checkpoint has it: n_layer=2' in out and 'has it: rope=False' in out
    assert line in out and 'live' not in out
    assert {path: path.read_bytes() for path in trained.iterdir()} == before


@pytest.mark.slow
def test_the_first_command_needs_no_network(tmp_path, tree):
    """train.py prepares Python's standard library where missing, and opens no connection."""
    (tree.path / 'sitecustomize.py').write_text(
        'import socket\n\ndef refuse(*_):\n    raise SystemExit("a connection")\n'
        'socket.socket.connect = socket.getaddrinfo = refuse\n'
    )
    args = ['config/selective_small.py', *SMALL, '--max_iters=1', f'--out_dir={tmp_path / "out"}']
    out = tree.run('train.py', *args)
    assert 'data stdlib (' in out and 'step 1/1' in out
    assert os.listdir(tree.path / 'data') == ['stdlib']
    assert 5e6 < data.load_dataset('stdlib', tree.path / 'data').tokens('train') < 40e6


# ---- Files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'foreign', [{'weights': 1}, [], {'model': {}, 'model_args': 1, 'tokenizer': 'bytes'}]
)
def test_foreign_checkpoints(foreign, tmp_path, run):
    torch.save(foreign, tmp_path / 'ckpt.pt')
    assert 'not a checkpoint' in run(sample, f'--out_dir={tmp_path}')


def test_checkpoints_of_the_first_version_are_read(trained, tmp_path, run):
    checkpoint = ckpt.load(trained)
    args = {**checkpoint['model_args'], 'kernel': 'rows'}
    del args['rope'], args['gelu']
    ckpt.save(tmp_path, {'model': checkpoint['model'], 'model_args': args, 'tokenizer': 'bytes'})
    assert 'KV cache' in run(sample, '--max_new_tokens=2', '--device=cpu', f'--out_dir={tmp_path}')


def test_a_log_has_numbers_of_any_name(tmp_path):
    steps = [{'iter': 1, 'bits': 2.5}, {'iter': 2, 'loss': 3}]
    lines = ['{"config": {}}', *map(json.dumps, steps), '{"iter": 4, "lo']
    (tmp_path / 'log.jsonl').write_text('\n'.join(lines))
    assert ckpt.read_log(tmp_path) == steps


# ---- Settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize('path', sorted(Path(ROOT, 'config').glob('*.py')), ids=lambda p: p.stem)
def test_configs(path):
    """Every config can be run; the small ones differ in flags and out_dir only."""
    cfg = settings.parse(train.TrainConfig, [str(path), '--vocab_size=257'])
    train.check(cfg, world=1)
    with torch.device('meta'):
        model.GPT(cfg)
    if path.stem.endswith('_small'):
        base = settings.parse(train.TrainConfig, ['config/base_small.py', '--vocab_size=257'])
        differs = {name for name, value in vars(cfg).items() if value != getattr(base, name)}
        assert differs <= {'selective', 'ssa', 'out_dir'}


def test_a_voter_that_would_not_learn_is_not_resumed(dataset, tmp_path, run):
    args = *SMALL, dataset, f'--out_dir={tmp_path}', '--selective', '--voter=4', '--max_iters=2'
    run(train, *args, '--memory_loss=1')
    said = run(train, *args, '--init_from=resume', '--resume_changed', '--max_iters=3')
    assert 'add --memory_loss=1' in said


@pytest.mark.parametrize(
    'wrong, words',
    [
        ('--selectve=True', "did you mean 'selective'"),
        ('--n_layer=two', "'two' is not a whole number"),
        ('--selective=maybe', 'not True or False'),
        ('nowhere.py', 'nowhere.py'),
        ('--max_iters', 'needs a value'),
        ('--n_head=3', 'n_embd 16 is not divisible by n_head 3'),
        ('--dataset=nowhere', 'nowhere'),
        ('--device=cuda:9', 'cuda:9'),
        ('--dtype=float8', 'float8'),
        ('--init_from=nothing', 'init_from'),
        ('--memory_loss=0.1', 'needs selective=True'),
        ('--voter=4', 'add --memory_loss=1'),
        ('n_layr = 2', "n_layr: unknown setting; did you mean 'n_layer'"),
        ('n_layer = (', 'SyntaxError'),
        ("n_layer = '2x'", 'not a whole number'),
        ('selective = 2', 'not True or False'),
        ('import nowhere', 'nowhere'),
    ],
)
def test_one_line_for_the_user(wrong, words, dataset, tmp_path, run):
    """On the command line, and in a config file."""
    if ' ' in wrong:
        (tmp_path / 'c.py').write_text(wrong)
        wrong = str(tmp_path / 'c.py')
    args = *SMALL, dataset, f'--out_dir={tmp_path / "x"}', '--max_iters=1'
    assert words in run(train, *args, wrong)
    assert not list(tmp_path.glob('x/*'))


def test_work_that_two_processes_cannot_share():
    with pytest.raises(UserError, match='gradient_accumulation_steps: 2 processes'):
        train.check(train.TrainConfig(gradient_accumulation_steps=1), world=2)


def test_settings_that_count(tmp_path):
    code = 'import math\nfrom config.base_small import *\nn_layer = 3\n_private = 1\n'
    (tmp_path / 'c.py').write_text(code)
    args = [str(tmp_path / 'c.py'), '--n_layer=5', '--max_iters=1e4', '--selective']
    cfg = settings.parse(train.TrainConfig, args)
    assert (cfg.n_layer, cfg.n_embd, cfg.max_iters, cfg.selective) == (5, 128, 10000, True)


@pytest.mark.parametrize('script', ['train', 'sample', 'prune'])
def test_threads_wait_without_spinning(script):
    """OpenMP reads its variables once, when torch is imported; by then they must be set."""
    code = Path(ROOT, f'{script}.py').read_text()
    assert 0 < code.index('\nfrom support import') < code.index('\nimport torch')
    assert os.environ['OMP_WAIT_POLICY'] == 'PASSIVE'


def test_schedule():
    cfg = train.TrainConfig(learning_rate=2.0, min_lr=0.2, warmup_iters=10, max_iters=110)
    rates = [train.schedule(cfg, n) for n in range(111)]
    assert (rates[0], rates[10], rates[110]) == (1 / 11, 1.0, 0.1)
    assert rates[60] == pytest.approx(0.55)
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
