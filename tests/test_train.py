"""train.py, sample.py and settings.py, on a data set of a few thousand bytes."""
import io
import json
import os
import signal
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
from support import checkpoint as ckpt, settings

ROOT = Path(__file__).parent.parent
SMALL = ['--block_size=16', '--n_layer=2', '--n_head=2', '--n_embd=16', '--batch_size=4', '--device=cpu',
         '--gradient_accumulation_steps=2', '--eval_interval=10', '--eval_iters=2', '--log_interval=1',
         '--warmup_iters=2', '--learning_rate=1e-2']


def start(*args):
    """A script in a process of its own."""
    return subprocess.Popen([sys.executable, *args], cwd=ROOT, text=True, stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, 'OMP_NUM_THREADS': '1'})


def log(out_dir):
    """{step: loss} and {step: validation loss} of a run."""
    lines = [json.loads(line) for line in open(out_dir / 'log.jsonl')]
    assert 'config' in lines[0]
    for kind in ('loss', 'val_loss'):
        steps = [line['iter'] for line in lines[1:] if kind in line]
        assert len(steps) == len(set(steps)), f'the {kind} of a step was logged twice'
    return ({line['iter']: line['loss'] for line in lines[1:] if 'loss' in line},
            {line['iter']: line['val_loss'] for line in lines[1:] if 'val_loss' in line})


@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGTERM])
def test_resume_is_exact(how, dataset, tmp_path, run):
    """Losses and weights of a run that was stopped, in any way, are those of one that was not, to the last bit."""
    args = [dataset, *SMALL, '--max_iters=150', '--selective', '--ssa=qv', '--dropout=0.1']
    stopped = start('train.py', *args, f'--out_dir={tmp_path / "stopped"}')
    for line in stopped.stdout:
        if line.startswith('step 23/'):
            stopped.send_signal(how)
            break
    out = stopped.stdout.read()
    assert stopped.wait(timeout=60) == (-9 if how == signal.SIGKILL else 130), out
    first = ckpt.load(tmp_path / 'stopped')['iter_num']
    assert first % 10 == 0 and first >= 20 if how == signal.SIGKILL else first >= 24 and 'init_from=resume' in out
    assert first < 150
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                # the order of additions depends on it
    run(train, *args, f'--out_dir={tmp_path / "stopped"}', '--init_from=resume')
    run(train, *args, f'--out_dir={tmp_path / "whole"}')
    torch.set_num_threads(threads)
    assert log(tmp_path / 'whole') == log(tmp_path / 'stopped')
    a, b = (ckpt.load(tmp_path / name) for name in ('whole', 'stopped'))
    assert a['iter_num'] == 150 and all(torch.equal(a['model'][name], b['model'][name]) for name in a['model'])


@pytest.mark.parametrize('eval_iters', [1, 3])
def test_two_processes_train_as_one(dataset, tmp_path, run, eval_iters):
    """With a single batch of validation the second process has none of it."""
    args = [dataset, *SMALL, '--max_iters=10', '--selective', '--memory_loss=0.1', '--gradient_accumulation_steps=4',
            f'--eval_iters={eval_iters}']
    run(train, *args, f'--out_dir={tmp_path / "one"}')
    two = start('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'train.py', *args,
                f'--out_dir={tmp_path / "two"}')
    out, _ = two.communicate(timeout=200)
    assert two.returncode == 0, out
    for one, two in zip(log(tmp_path / 'one'), log(tmp_path / 'two')):
        assert one.keys() == two.keys() and one
        torch.testing.assert_close(list(one.values()), list(two.values()), rtol=1e-4, atol=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run(dataset, tmp_path, run):
    out = run(train, dataset, *SMALL, '--max_iters=30', f'--out_dir={tmp_path}', '--learning_rate=1000',
              '--weight_decay=1000')
    assert 'is not finite' in out and 'ckpt.pt has step 0' in out
    assert all(p.isfinite().all() for p in ckpt.load(tmp_path)['model'].values())


def test_learning_and_sampling(dataset, tmp_path, run, monkeypatch):
    """The model learns what digits follow; the text comes from the command line, a file and standard input."""
    out = run(train, dataset, *SMALL, '--max_iters=150', f'--out_dir={tmp_path}', '--selective')
    assert '| memory ' in out
    losses, val = log(tmp_path)
    assert val[0] > 5 and val[150] < 2.5 and losses[149] < 2.5
    args = [f'--out_dir={tmp_path}', '--max_new_tokens=30', '--device=cpu']
    greedy = run(sample, *args, '--start=line 1', '--temperature=0')
    assert greedy.startswith('line 1') and 'tokens/s; KV cache' in greedy
    (tmp_path / 'prompt.txt').write_text('line 1')
    from_file = run(sample, *args, f'--start=FILE:{tmp_path / "prompt.txt"}', '--temperature=0')
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(b'line 1')))
    from_stdin = run(sample, *args, '--start=-', '--temperature=0')
    assert greedy.split('---')[0] == from_file.split('---')[0] == from_stdin.split('---')[0]
    same = [run(sample, *args, '--seed=2').split('---')[0] for _ in range(2)]
    assert same[0] == same[1]
    out = run(sample, *args, "--start=line 1", "--budgets=4,8", "--num_samples=2")
    assert '2.7x less' in out and out.count('line 1') >= 2
    for wrong, words in [('--budgets=1', 'a budget of 1'), ('--budgets=3,4,5', '3 budgets'), ('--budgets=17', '17'),
                         ('--budgets=nowhere.json', 'nowhere.json'), ('--start=FILE:nowhere', 'nowhere'),
                         ('--out_dir=nowhere', 'nowhere/ckpt.pt does not exist'), ('--top_k=-1', 'top_k')]:
        assert words in run(sample, *args, wrong)


@pytest.mark.parametrize('flags', [[], ['--rope', '--budgets']])
def test_texts_of_one_batch(dataset, tmp_path, run, flags):
    """num_samples texts are N texts after one prompt; greedy ones are that of a single run."""
    run(train, dataset, *SMALL, '--max_iters=60', f'--out_dir={tmp_path}', '--selective', *flags[:1])
    args = [f'--out_dir={tmp_path}', '--max_new_tokens=40', '--device=cpu', '--start=line 1']
    args += [flag + '=4' for flag in flags[1:]]
    one = run(sample, *args, '--temperature=0').split('-' * 40)
    three = run(sample, *args, '--temperature=0', '--num_samples=3').split('-' * 40)
    assert len(three) == 4 and [text.strip() for text in three[:3]] == [one[0].strip()] * 3
    texts = run(sample, *args, '--num_samples=3').split('-' * 40)[:3]
    assert len(set(texts)) == 3 and all(text.strip().startswith('line 1') for text in texts)


def test_bos(dataset, tmp_path, run, monkeypatch):
    """<|endoftext|> stands in front of what a model reads exactly if it was trained so."""
    seen, batches = [], []
    read, batch = sample.stream, data.Dataset.batch
    monkeypatch.setattr(sample, 'stream', lambda model, idx, *args, **more: (seen.append(idx[0].tolist()),
                                                                              read(model, idx, *args, **more))[1])
    monkeypatch.setattr(data.Dataset, 'batch',
                        lambda *args, **more: (batches.append(batch(*args, **more)), batches[-1])[1])
    for bos in True, False:
        out_dir = tmp_path / str(bos)
        run(train, dataset, *SMALL, '--max_iters=1', f'--out_dir={out_dir}', f'--bos={bos}', '--selective')
        assert ckpt.starts_with_bos(ckpt.load(out_dir)) == bos
        assert batches and all((x[:, 0] == 256).all() == bos for x, _ in batches)
        batches.clear()
        run(prune, f'--out_dir={out_dir}', '--tolerance=1', '--windows=4', '--device=cpu')
        assert batches and all((x[:, 0] == 256).all() == bos for x, _ in batches)
        batches.clear()
        out = run(sample, f'--out_dir={out_dir}', '--start=li', '--max_new_tokens=2', '--device=cpu')
        assert seen.pop() == [256] * bos + list(b'li') and out.startswith('li')


def test_eval_only(dataset, tmp_path, run):
    """It prints what the run logged at its end, takes the model from the checkpoint, and writes nothing."""
    args = [*SMALL, f'--out_dir={tmp_path}']
    run(train, dataset, *args, '--max_iters=20', '--selective', '--rope', '--ssa=qv')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    logged = json.loads((tmp_path / 'log.jsonl').read_text().splitlines()[-1])
    for more in [], ['--selective=False', '--n_layer=5', '--init_from=resume', '--kernel=none']:
        out = run(train, *args, '--eval_only', *more)
        assert f"step 20 | validation loss {logged['val_loss']:.4f} | memory {logged['memory']:.1%}" in out
        assert ('as the checkpoint has it: n_layer=' in out) == bool(more)
        assert (f"| live {logged['live']:.1%}" in out) == ('--kernel=none' not in more)      # what kernels/cpu.py computed
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert 'does not exist' in run(train, dataset, *SMALL, '--eval_only', f'--out_dir={tmp_path / "x"}')
    assert not (tmp_path / 'x').exists()


def as_of_old(checkpoint):
    """A checkpoint in the form of the first version: a kernel in model_args, none of the newer settings."""
    for part in 'model_args', 'config':
        checkpoint[part]['kernel'] = 'rows'
        for name in 'rope', 'qk_norm', 'bos', 'ssa_lr', 'eval_only':
            checkpoint[part].pop(name, None)
    return checkpoint


def test_checkpoints_of_old(dataset, tmp_path, run):
    """They load, sample, and resume as they would have: without BOS, with the same losses and weights."""
    args = [dataset, *SMALL, '--selective', '--ssa=qv', '--bos=False', '--max_iters=20']
    run(train, *args, f'--out_dir={tmp_path / "whole"}')
    old = tmp_path / 'old'
    run(train, *args, f'--out_dir={old}', '--max_iters=10', '--lr_decay_iters=20')
    ckpt.save(old, as_of_old(ckpt.load(old)))
    out = run(train, *args[:-2], '--max_iters=20', f'--out_dir={old}', '--init_from=resume')
    assert 'bos=False: this run began without' in out
    assert log(tmp_path / 'whole') == log(old)
    a, b = (ckpt.load(folder)['model'] for folder in (tmp_path / 'whole', old))
    assert all(torch.equal(a[name], b[name]) for name in a)
    ckpt.save(old, as_of_old(ckpt.load(old)))
    assert 'KV cache' in run(sample, f'--out_dir={old}', '--max_new_tokens=2', '--device=cpu')
    assert 'has rope=False, this run True: resume with --rope=False' in run(
        train, *args, f'--out_dir={old}', '--init_from=resume', '--rope')


def test_ssa_has_its_own_learning_rate(dataset, tmp_path, run, monkeypatch):
    """A multiplier of the schedule; a resumed run may change it, and the moments stay with their parameters."""
    args = [dataset, *SMALL, '--ssa=qv', f'--out_dir={tmp_path}']
    rates, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, 'step', lambda self: (rates.append([g['lr'] for g in self.param_groups]),
                                                                 step(self))[1])
    run(train, *args, '--max_iters=10')
    assert all(len(set(r)) == 1 and len(r) == 2 for r in rates)
    before = ckpt.load(tmp_path)
    rates.clear()
    run(train, *args, '--max_iters=11', '--ssa_lr=50', '--init_from=resume', '--eval_interval=100',
        '--resume_changed')
    assert len(rates) == 1 and rates[0][2] == pytest.approx(50 * rates[0][0]) and rates[0][0] == rates[0][1]
    gpt = ckpt.build(before)
    optimizer = gpt.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu', ssa_lr=50.0)
    ckpt.load_optimizer(optimizer, torch.amp.GradScaler(enabled=False), gpt, before)
    same = gpt.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    same.load_state_dict(before['optimizer'])
    for name, p in gpt.named_parameters():
        assert torch.equal(optimizer.state[p]['exp_avg'], same.state[p]['exp_avg']), name


def test_the_first_command_needs_no_network(tmp_path, tree):
    """train.py prepares Python's standard library where it is missing, and opens no connection."""
    tree('prepare_text.py', 'documents = [(file, key) for file, key in found if is_text(file)]',
         'found = found[:60]\n        documents = [(file, key) for file, key in found if is_text(file)]')
    (tree.path / 'sitecustomize.py').write_text('import socket\n\ndef refuse(*_):\n    raise SystemExit("a connection")\n'
                                                'socket.socket.connect = socket.getaddrinfo = refuse\n')
    out = tree.run('train.py', 'config/selective_small.py', *SMALL, '--max_iters=1', f'--out_dir={tmp_path / "out"}')
    assert 'data stdlib (' in out and 'step 1/1' in out and 'a connection' not in out
    assert sorted(os.listdir(tree.path / 'data')) == ['stdlib']


def test_damaged_and_foreign_checkpoints(dataset, tmp_path, run):
    args = [dataset, *SMALL, '--max_iters=2', f'--out_dir={tmp_path}']
    run(train, *args)
    assert 'has n_layer=2, this run 3' in run(train, *args, '--init_from=resume', '--n_layer=3', '--max_iters=4')
    assert 'is done' in run(train, *args, '--init_from=resume')
    path = tmp_path / 'ckpt.pt'
    whole = path.read_bytes()
    for damage in (b'', b'hello', whole[:len(whole) // 2]):
        path.write_bytes(damage)
        with pytest.raises(settings.UserError, match='damaged'):
            ckpt.load(tmp_path)
    torch.save({'weights': 1}, path)
    with pytest.raises(settings.UserError, match='not a checkpoint'):
        ckpt.load(tmp_path)


def test_a_kill_while_saving_leaves_the_old_checkpoint(dataset, tmp_path, run, monkeypatch):
    args = [dataset, *SMALL, '--max_iters=1', f'--out_dir={tmp_path}']
    run(train, *args)
    names = sorted(os.listdir(tmp_path))

    def killed(checkpoint, file):
        file.write(b'half of it')
        raise SystemExit
    monkeypatch.setattr(torch, 'save', killed)
    with pytest.raises(SystemExit):
        ckpt.save(tmp_path, {})
    assert ckpt.load(tmp_path)['iter_num'] == 1 and sorted(os.listdir(tmp_path)) == names


@pytest.mark.parametrize('path', sorted((ROOT / 'config').glob('*.py')), ids=lambda path: path.stem)
def test_configs(path):
    """Every config can be run; the small ones differ in flags and out_dir only."""
    cfg = settings.parse(train.TrainConfig, [str(path)])
    train.check(cfg, world=1)
    cfg.vocab_size = cfg.vocab_size or 257
    with torch.device('meta'):
        model.GPT(model.GPTConfig(**{name: getattr(cfg, name) for name in model.GPTConfig.__dataclass_fields__}))
    if path.stem.endswith('_small'):
        base = settings.parse(train.TrainConfig, [str(ROOT / 'config/base_small.py')])
        differs = {name for name, value in vars(cfg).items() if value != getattr(base, name)} - {'vocab_size'}
        assert differs <= {'selective', 'ssa', 'out_dir'}


@pytest.mark.parametrize('args, words', [
    (['--selectve=True'], "did you mean 'selective'"), (['--n_layer=two'], "'two' is not a whole number"),
    (['--selective=maybe'], 'not True or False'), (['--n_layer=1.5'], 'not a whole number'),
    (['nowhere.py'], 'nowhere.py'), (['--max_iters'], 'needs a value'), (['--out_dir'], 'needs a value, --out_dir=')])
def test_wrong_settings(args, words):
    with pytest.raises(settings.UserError, match=words):
        settings.parse(train.TrainConfig, args)


def test_wrong_settings_in_a_file(tmp_path):
    for text, words in [('n_layr = 2', "n_layr: unknown setting; did you mean 'n_layer'"), ('n_layer = (', 'SyntaxError'),
                        ("n_layer = '2x'", 'not a whole number'), ('selective = 1', 'not True or False'),
                        ('import nowhere', 'nowhere')]:
        (tmp_path / 'c.py').write_text(text)
        with pytest.raises(settings.UserError, match=words):
            settings.parse(train.TrainConfig, [str(tmp_path / 'c.py')])


def test_settings_that_count(tmp_path):
    (tmp_path / 'c.py').write_text('import math\nfrom config.base_small import *\nn_layer = 3\n_private = 1\n')
    cfg = settings.parse(train.TrainConfig, [str(tmp_path / 'c.py'), '--n_layer=5', '--max_iters=1e4', '--selective'])
    assert (cfg.n_layer, cfg.n_embd, cfg.max_iters, cfg.selective) == (5, 128, 10000, True)


@pytest.mark.parametrize('wrong, words', [
    ({'init_from': 'nothing'}, 'init_from'), ({'memory_loss': 0.1}, 'memory_loss needs selective'),
    ({'n_embd': 10}, 'n_embd 10 is not divisible'),
    ({'gradient_accumulation_steps': 3}, '3 cannot be shared out among 2 processes')])
def test_impossible_runs(wrong, words):
    with pytest.raises(settings.UserError, match=words):
        train.check(train.TrainConfig(**wrong), world=2)


@pytest.mark.parametrize('script', ['train', 'sample', 'prune'])
def test_threads_wait_without_spinning(script):
    """OpenMP reads OMP_WAIT_POLICY once, when torch is imported; by then it must be set."""
    code = f"""
import builtins, os
real, seen = builtins.__import__, []
def spy(name, *args, **more):
    if name == 'torch':
        seen.append(os.environ.get('OMP_WAIT_POLICY'))
    return real(name, *args, **more)
builtins.__import__ = spy
import {script}
print(seen[0])
"""
    env = {name: value for name, value in os.environ.items() if name != 'OMP_WAIT_POLICY'}
    out = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=env, capture_output=True, text=True).stdout
    assert out == 'PASSIVE\n'


def test_help_lists_every_setting():
    out = settings.help_text(train.TrainConfig)
    for name in train.TrainConfig.__dataclass_fields__:
        line = next(line for line in out.splitlines() if line.startswith(f'  --{name}='))
        assert len(line.split()) > 2, f'{name} is not explained'


def test_one_line_for_the_user(dataset, tmp_path, run):
    args = [*SMALL, f'--out_dir={tmp_path / "x"}']
    for wrong, words in [('--n_head=3', 'n_embd 16 is not divisible by n_head 3'), ('--dataset=nowhere', 'nowhere'),
                         ('--device=cuda:9', 'cuda:9'), ('--dtype=float8', 'float8'), ('--vocab_size=9', 'vocab_size 9')]:
        assert words in run(train, *args, dataset, wrong)
        assert not (tmp_path / 'x').exists()
    process = start('train.py', '--selectve=1')
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and out == "train.py: --selectve: unknown setting; did you mean 'selective'?\n"


def test_schedule():
    cfg = train.TrainConfig(learning_rate=2.0, min_lr=0.2, warmup_iters=10, max_iters=110)
    rates = [train.schedule(cfg, n) for n in range(111)]
    assert rates[0] == 1 / 11 and rates[10] == 1.0 and abs(rates[60] - 0.55) < 1e-9 and rates[110] == 0.1
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
