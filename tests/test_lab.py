"""lab/bench.py: that it measures what it says. How long anything takes is not tested.

Also lab/names.py, and support/files.py's way to write a file.
"""

import json
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as fn

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
    """A run in which layer 1 masks much, and layer 2 nothing."""
    out_dir = tmp_path / 'run'
    sizes = '--n_layer=3', '--n_head=2', '--n_embd=8', '--block_size=160', '--batch_size=2'
    steps = '--max_iters=1', '--eval_iters=1', '--gradient_accumulation_steps=1'
    method = '--selective', '--rope', '--qk_norm', '--memory_loss=0.1'
    run(train, dataset, f'--out_dir={out_dir}', '--device=cpu', *sizes, *steps, *method)
    checkpoint = ckpt.load(out_dir)
    for layer, strength in (1, 4.0), (2, 0.1):
        checkpoint['model'][f'transformer.h.{layer}.attn.q_norm.weight'].mul_(strength)
    ckpt.save(out_dir, checkpoint)
    return f'--out_dir={out_dir}'


def test_forms_of_attention_are_the_same():
    subject = measure.Subject(bench.BenchConfig(tokens=80, device='cpu'), 'small', 40)
    subject.layers[0].c_attn.weight.data *= 5  # so that much is masked
    standard, *forms = [once() for once in next(bench.layers(subject)).values()]
    assert len(forms) == 3 and not torch.allclose(standard, forms[0], rtol=0.1)
    for y in forms[1:]:
        torch.testing.assert_close(y, forms[0])
    subject.layers[0].selects = False
    for once in next(bench.layers(subject)).values():
        torch.testing.assert_close(once(), standard)


@pytest.mark.parametrize('case', bench.MODELS)
def test_only_selective_models_vote(case, monkeypatch):
    monkeypatch.setitem(measure.SHAPES, 'small', TINY)
    step = bench.step_case(case, bench.BenchConfig(tokens=80, device='cpu'), 'small', 40)
    monkeypatch.setattr(m.CausalSelfAttention, 'vote', None)
    if 'selective' not in case:
        return step()
    with pytest.raises(TypeError):
        step()


@pytest.mark.slow
def test_random_weights(rows, monkeypatch):
    monkeypatch.setattr(measure, 'peak_memory', lambda make, device: 1.0)
    parts = '--what=attention,step,memory,decode,prefill,generate,profile'
    found = rows(parts, '--shapes=small', '--lengths=64,96', '--tokens=96')
    names = 'attention', 'live', 'step', 'memory', 'decode1', 'decode32', 'prefill'
    lengths = {(name, T) for name in names for T in (64, 96)}
    assert {key[:2] for key in found} == lengths | {('generate1', 96), ('generate32', 96)}
    assert all(0 < row['value'] < math.inf for row in found.values())
    assert found['decode32', 96, 'budgets of 3, its size']['ratio'] == 3 / 96


def test_trained_weights_and_a_layer_without_votes(rows, trained, monkeypatch):
    """Each layer keeps its number, and one without votes has standard attention."""
    build = ckpt.build

    def build_without_votes(*args):
        gpt = build(*args)
        gpt.transformer.h[0].attn.selects = False
        return gpt

    monkeypatch.setattr(ckpt, 'build', build_without_votes)
    found = rows(trained, '--what=attention,step,forget')
    live = [found['live', 160, f'layer {l}']['value'] for l in range(3)]
    assert live[0] == live[2] == 100 > live[1] + 1
    assert ('forget', 160, 'layer 0') not in found
    needed = [found['forget', 160, f'layer {l}']['value'] for l in (1, 2)]
    assert needed[0] < 160 == needed[1]
    layers = [found['layer', 160, f'selective, layer {l}']['value'] for l in range(3)]
    assert found['attention', 160, 'selective']['value'] == pytest.approx(sum(layers))


def test_growth_is_that_of_a_sequence(capfd):
    table = measure.Table()
    for T, B in (64, 4), (128, 2):
        row = {'part': 'step', 'shape': 'run', 'T': T, 'batch': B, 'case': 'standard'}
        table.rows.append({**row, 'value': T})
    table.print_growth(['step'])
    assert capfd.readouterr().out.endswith('T^2.00\n')


def layer_of(**changes):
    return m.CausalSelfAttention(m.GPTConfig(n_head=2, n_embd=8, selective=True, **changes))


def test_what_a_cache_must_keep():
    """The worst later rows give the other tokens no attention, whatever the strength of F."""
    forgotten = []
    torch.manual_seed(0)
    layer = layer_of(qk_norm=True)
    for strength in torch.linspace(0.02, 4, 30):
        layer.q_norm.weight.data.fill_(strength)
        q, k = torch.randn(2, 2, 2, 400, 4)
        q = layer.q_norm(q).detach()
        k = layer.k_norm(k).detach()
        k[:, :, 0] = -k[:, :, 1]  # who looks for token 1 looks away from token 0
        dead = ~bench.still_needed(layer, q, k)
        votes = (q[:, 0] @ k[:, 0].mT / 2).relu().tril(-1)
        votes[:, :, 0] = 0
        # each of the later rows looks for one token, and away from itself and the row before
        L = fn.normalize(k, dim=3) * strength @ k.mT - votes.sum(dim=1)[:, None, None]
        P = fn.pad(L, (0, 2), value=-2 * strength.item()).double().softmax(dim=3)[..., :-2]
        assert (P * dead[:, None, None]).sum(dim=3).max() < 1e-7
        forgotten.append(dead.sum())
    assert forgotten[0] == 0 < forgotten[-1]


def test_nothing_is_forgotten_without_a_bound():
    q, k = torch.randn(2, 1, 2, 9, 4)
    with pytest.raises(settings.UserError, match='only qk_norm'):
        bench.still_needed(layer_of(), q, k)
    layer = layer_of(qk_norm=True)
    layer.vote = torch.neg
    with pytest.raises(settings.UserError, match='F falls'):
        bench.still_needed(layer, q, k)


@pytest.mark.slow
def test_peak_memory_of_a_process():
    allocate = partial(partial, torch.ones, 2**27)  # of 4 bytes
    assert 512 < measure.peak_memory(allocate, 'cpu') < 1024


@pytest.mark.parametrize(
    'arg, words',
    [
        ('--what=nothing', "'nothing' is not one of attention, step"),
        ('--shapes=huge', "'huge' is not one of small, 124m"),
        ('--lengths=256,x', "'x' is not a whole number"),
        ('--lengths=63', 'from 64'),
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
