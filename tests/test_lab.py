"""lab/bench.py: that it measures what it says. How long anything takes is not tested.

Also lab/names.py, and support/files.py's way to write a file.
"""

import math
import re

import pytest
import torch

import model as m
import prepare_text
import train
from lab import bench, names
from support import checkpoint as ckpt, files, settings

TINY = {'n_layer': 2, 'n_head': 2, 'n_embd': 8, 'vocab_size': 11}


@pytest.fixture
def rows(run, monkeypatch):
    """rows(*args): what lab.bench prints, {(part, T, case): (value, threads)}."""
    monkeypatch.setitem(bench.SHAPES, 'small', TINY)

    def rows(*args):
        output = run(bench, '--rounds=1', '--device=cpu', *args)
        line = r'^(\w+) .* T = (\d+) +(\w.*?)  +([\d,.]+) .*x +(\d+) threads$'
        found = re.findall(line, output, re.M)
        assert found, output
        table = {}
        for part, T, case, value, threads in found:
            table[part, int(T), case] = float(value.replace(',', '')), int(threads)
        return table

    return rows


def subject(case='selective'):
    return bench.Subject(bench.BenchConfig(tokens=80, device='cpu'), 'small', 40, case)


def test_forms_of_attention_differ():
    one = subject()
    one.layers[0].c_attn.weight.data *= 5  # so that much is masked
    inputs = one.queries_keys_values()[:1]
    standard, selective = [bench.run_layers(one, inputs, form) for form in bench.FORMS.values()]
    assert not torch.allclose(standard, selective, rtol=0.1)


@pytest.mark.parametrize('case', bench.CASES)
def test_only_selective_models_vote(case, monkeypatch):
    monkeypatch.setitem(bench.SHAPES, 'small', TINY)
    step = bench.training_step(subject(case))
    monkeypatch.setattr(m.CausalSelfAttention, 'vote', None)
    if case != 'selective':
        return step()
    with pytest.raises(TypeError):
        step()


def test_random_weights(rows):
    table = rows('--shapes=small', '--lengths=64,128', '--tokens=128')
    names = 'live', 'forward', 'attention', 'step', 'decode1', 'decode32'
    assert {key[:2] for key in table} == {(name, T) for name in names for T in (64, 128)}
    for value, threads in table.values():
        assert threads == 1 and 0 < value < math.inf


def test_trained_weights(run, dataset, tmp_path, rows):
    """A layer masks much."""
    sizes = '--n_layer=2', '--n_head=2', '--n_embd=8', '--block_size=160', '--batch_size=2'
    steps = '--max_iters=1', '--eval_iters=1', '--gradient_accumulation_steps=1'
    method = '--selective', '--rope', '--qk_norm', '--n_kv_head=1', '--memory_loss=0.1'
    out_dir = f'--out_dir={tmp_path}/run'
    run(train, dataset, out_dir, '--device=cpu', *sizes, *steps, *method)
    checkpoint = ckpt.load(tmp_path / 'run')
    checkpoint['model']['transformer.h.1.attn.q_norm.weight'].mul_(4)
    ckpt.save(tmp_path / 'run', checkpoint)
    table = rows(out_dir, '--what=attention,step')
    assert table['live', 160, 'selective'][0] < 99
    assert ('step', 160, 'selective') in table and ('step', 160, 'SSA') not in table


@pytest.mark.parametrize(
    'arg, words',
    [
        ('--what=nothing', "is not one of 'attention', 'step'"),
        ('--shapes=huge', "is not one of 'small', '124m'"),
        ('--lengths=256,63', 'is not in the range 64 to 1,048,576'),
        ('--out_dir=nowhere', 'nowhere'),
    ],
)
def test_refusals(arg, words, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in run(bench, arg)
    assert not list(tmp_path.rglob('*.*'))


# ---- lab/names.py and support/files.py -----------------------------------------------------------


def test_names_replaces_only_names(tmp_path, run):
    (tmp_path / 'names').write_text('one\ntwo\n' * 99)
    run(prepare_text, f'{tmp_path}/names', '--tokenizer=bytes', f'--data_dir={tmp_path}/data')
    before = (tmp_path / 'data/names/train.bin').read_bytes()
    assert 'is another data set' in run(names, f'--data_dir={tmp_path}/data')
    assert (tmp_path / 'data/names/train.bin').read_bytes() == before


@pytest.mark.parametrize('content', ['{"ö": 1}', b'bytes'])
def test_write_file(tmp_path, content):
    path = tmp_path / 'new' / 'file.json'
    files.write_file(path, content)
    assert path.read_bytes() in (content, '{"ö": 1}'.encode())
    with pytest.raises(settings.UserError, match='cannot write .*new'):
        files.write_file(path.parent, 'x')
    assert list(tmp_path.rglob('*')) == [path.parent, path]
