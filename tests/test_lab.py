"""lab/bench.py: that it measures what it says. How long anything takes is not tested.

Also lab/names.py, and support/files.py's way to write a file.
"""

import json
import math

import pytest
import torch

import model as m
import prepare_text
import train
from lab import bench, measure, names
from support import checkpoint as ckpt, files, settings

TINY = {'n_layer': 2, 'n_head': 2, 'n_embd': 8, 'vocab_size': 11}


@pytest.fixture
def rows(run, tmp_path, monkeypatch):
    """rows(*args): the table that lab.bench writes, as {(part, T, case): row}."""
    monkeypatch.setitem(measure.SHAPES, 'small', TINY)

    def rows(*args):
        path = tmp_path / 'bench.json'
        output = run(bench, '--rounds=1', '--device=cpu', f'--to={path}', *args)
        assert path.exists(), output
        table = json.loads(path.read_text())['rows']
        return {(row['part'], row['T'], row['case']): row for row in table}

    return rows


@pytest.fixture
def trained(run, dataset, tmp_path):
    """A run whose layer 1 masks much."""
    out_dir = tmp_path / 'run'
    sizes = '--n_layer=2', '--n_head=2', '--n_embd=8', '--block_size=160', '--batch_size=2'
    steps = '--max_iters=1', '--eval_iters=1', '--gradient_accumulation_steps=1'
    method = '--selective', '--rope', '--qk_norm', '--memory_loss=0.1'
    run(train, dataset, f'--out_dir={out_dir}', '--device=cpu', *sizes, *steps, *method)
    checkpoint = ckpt.load(out_dir)
    checkpoint['model']['transformer.h.1.attn.q_norm.weight'].mul_(4)
    ckpt.save(out_dir, checkpoint)
    return f'--out_dir={out_dir}'


def test_forms_of_attention_are_the_same():
    subject = measure.Subject(bench.BenchConfig(tokens=80, device='cpu'), 'small', 40)
    layer = subject.layers[0]
    layer.c_attn.weight.data *= 5  # so that much is masked
    qkv = subject.queries_keys_values()[0]

    def outputs():
        return [
            bench.forward_backward(f, qkv, layer, None)() for f in bench.forms(layer, 40).values()
        ]

    standard, *forms = outputs()
    assert len(forms) == 3 and not torch.allclose(standard, forms[0], rtol=0.1)
    for y in forms[1:]:
        torch.testing.assert_close(y, forms[0])
    layer.selects = False
    for y in outputs():
        torch.testing.assert_close(y, standard)


@pytest.mark.parametrize('case', bench.MODELS)
def test_only_selective_models_vote(case, monkeypatch):
    monkeypatch.setitem(measure.SHAPES, 'small', TINY)
    step = bench.training_step(case, bench.BenchConfig(tokens=80, device='cpu'), 'small', 40)
    monkeypatch.setattr(m.CausalSelfAttention, 'vote', None)
    if 'selective' not in case:
        return step()
    with pytest.raises(TypeError):
        step()


def test_the_default_number_of_threads_and_one(run, tmp_path, monkeypatch):
    counts = []
    monkeypatch.setitem(measure.SHAPES, 'small', TINY)
    monkeypatch.setattr(torch, 'set_num_threads', counts.append)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: (counts or [3])[-1])
    path = tmp_path / 'bench.json'
    sizes = '--shapes=small', '--lengths=64', '--tokens=64', '--rounds=1', '--device=cpu'
    output = run(bench, '--what=attention', *sizes, f'--to={path}')
    assert 'The weights are random and mask little.' in output and 'small, random' in output
    found = json.loads(path.read_text())
    for table, threads in ('rows', 3), ('one_thread', 1):
        assert {row['threads'] for row in found[table]} == {threads}
    assert counts == [3, 1, 3]


@pytest.mark.slow
def test_random_weights(rows):
    found = rows('--shapes=small', '--lengths=64,128', '--tokens=128')
    names = 'layer 0', 'forward', 'attention', 'step', 'decode1', 'cache1', 'decode32', 'cache32'
    expected = {(name, T) for name in names for T in (64, 128)}
    assert {key[:2] for key in found} == expected | {('generate1', 128), ('generate32', 128)}
    assert all(0 < row['value'] < math.inf for row in found.values())
    assert found['cache32', 128, 'budgets of 4']['ratio'] == 4 / 128


def test_trained_weights_and_a_layer_without_votes(rows, trained, monkeypatch):
    """Each layer keeps its number, and one without votes has standard attention."""
    build = ckpt.build

    def build_without_votes(*args):
        gpt = build(*args)
        gpt.transformer.h[0].attn.selects = False
        return gpt

    monkeypatch.setattr(ckpt, 'build', build_without_votes)
    found = rows(trained, '--what=attention,step')
    live = [found[f'layer {l}', 160, 'live']['value'] for l in range(2)]
    assert live[0] == 100 > live[1] + 1
    layers = [found[f'layer {l}', 160, 'selective']['value'] for l in range(2)]
    assert found['attention', 160, 'selective']['value'] == pytest.approx(sum(layers))
    assert ('step', 160, 'selective') in found


@pytest.mark.parametrize(
    'arg, words',
    [
        ('--what=nothing', "'nothing' is not one of attention, step"),
        ('--shapes=huge', "'huge' is not one of small, 124m"),
        ('--lengths=256,63', '--lengths: 63 is not in the range 64 to 1,048,576'),
        ('--rounds=900', '--rounds'),
        ('--out_dir=nowhere', 'nowhere'),
        ('--to=mine.txt', 'mine.txt'),
    ],
)
def test_refusals(arg, words, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in run(bench, arg)
    assert not list(tmp_path.iterdir())


# ---- lab/names.py and support/files.py -----------------------------------------------------------


def test_names_replaces_only_names(tmp_path, run):
    (tmp_path / 'text').write_text('one\ntwo\n' * 99)
    run(prepare_text, f'{tmp_path}/text', '--tokenizer=bytes', f'--data_dir={tmp_path}/data')
    before = (tmp_path / 'data/text/train.bin').read_bytes()
    assert 'is another data set' in run(names, f'--data_dir={tmp_path}/data', '--name=text')
    assert (tmp_path / 'data/text/train.bin').read_bytes() == before


@pytest.mark.parametrize('content', ['{"ö": 1}', b'bytes'])
def test_write_file(tmp_path, content):
    path = tmp_path / 'new' / 'file.json'
    files.write_file(path, content)
    assert path.read_bytes() in (content, '{"ö": 1}'.encode())
    with pytest.raises(settings.UserError, match='cannot write .*new'):
        files.write_file(path.parent, 'x')
    assert list(tmp_path.rglob('*')) == [path.parent, path]
