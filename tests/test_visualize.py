"""Tests of the numbers in lab/visualize.py and lab/plot.py; the pages themselves are tested in test_visualize_browser.py."""
import base64
import dataclasses
import json
import math
import re
import sys
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as fn

import data
from lab import plot, visualize
from lab.visualize import Reading, page, read, token_texts, vote_codes
from model import KVCache
from support import checkpoint as ckpt
from support.settings import UserError
from test_model import make, naive_gpt, tokens


@pytest.mark.parametrize('T', [1, 2, 23])
@pytest.mark.parametrize('ssa', ['', 'qv'])
@pytest.mark.parametrize('tau', [1.0, 0.6])
def test_F_votes_and_M(T, ssa, tau):
    gpt, idx = make(selective=True, ssa=ssa), tokens(1, T + 1)
    reading = read(gpt, idx[:, :T], memory_tau=tau)
    for l, F in enumerate(naive_gpt(gpt, idx)[1]):          # one token more shows what the last row votes
        F = F[0].detach()
        np.testing.assert_allclose(reading.F[l], F[:T, :T], atol=1e-9)
        np.testing.assert_allclose(reading.votes[l], (F[1:] - F[:-1])[:, :T], atol=1e-9)
        expected = [i - sum(min(f, tau) / tau for f in F[i].tolist()) for i in range(T)]
        np.testing.assert_allclose(reading.M[l], expected, atol=1e-9)
    assert (reading.dropped_at == T).all()


@pytest.mark.parametrize('policy', ['selective', 'oldest', 'random'])
def test_what_a_budget_drops(policy):
    """Against generation, token by token: which tokens each layer holds after each step, and their F."""
    gpt, idx, T, budgets = make(selective=True, ssa='qv'), tokens(1, 24), 24, [4, 9]
    reading, free = read(gpt, idx, budgets, policy), read(gpt, idx)
    cache, expected = KVCache(gpt, 1, budgets, policy), np.full((2, T), T)
    for i in range(T):
        gpt(idx[:, [i]], cache=cache)
        for l, layer in enumerate(cache.layers):
            held = layer.j[0].tolist()
            for j in range(i):
                if j not in held:
                    expected[l, j] = min(expected[l, j], i)
    np.testing.assert_array_equal(reading.dropped_at, expected)
    assert [(row < T).sum() for row in reading.dropped_at] == [T - 4, T - 9]
    F_end = reading.F[:, -1] + reading.votes[:, -1]
    for l, layer in enumerate(cache.layers):
        for j, F in zip(layer.j[0].tolist(), layer.F[0].tolist()):
            assert F_end[l, j] == pytest.approx(F, abs=1e-9)
    gone = np.arange(T)[None, :, None] >= reading.dropped_at[:, None]
    assert (reading.votes[gone] == 0).all() and reading.votes.max() > 0
    np.testing.assert_array_equal(reading.M, free.M)        # M alone is that of the text read without budgets
    assert not np.allclose(reading.temperatures['q'][1], free.temperatures['q'][1])


@pytest.mark.parametrize('selective', [False, True])
def test_temperatures(selective):
    gpt, idx = make(selective=selective, ssa='qkv'), tokens(1, 9)
    inputs = []
    for block in gpt.transformer.h:
        block.ln_1.register_forward_hook(lambda _, __, z: inputs.append(z[0].detach()))
    reading = read(gpt, idx)
    p, C = {name: t.detach() for name, t in gpt.named_parameters()}, gpt.config.n_embd
    for l in range(gpt.config.n_layer):
        for n, name in enumerate('qkv'):
            a = f'transformer.h.{l}.attn.'
            activations = inputs[l] @ p[a + 'c_attn.weight'][n * C:(n + 1) * C].T
            tau = 1 + torch.tanh(fn.gelu(activations) @ p[a + f'ssa.{name}.w.weight'].T)
            if name == 'q':
                tau = tau + torch.sigmoid(p[a + 'ssa.q.alpha']) * torch.log(torch.arange(1, 10.0).double())[:, None]
            np.testing.assert_allclose(reading.temperatures[name][l], tau, atol=1e-9)
    assert len(gpt.transformer.h[0].attn.ssa['q']._forward_hooks) == 0
    assert selective or (reading.F == 0).all()


def test_token_texts():
    bytes_ = data.get_tokenizer('bytes')
    texts = lambda raw: token_texts(list(raw), bytes_)
    assert texts('aé שa'.encode()) == ['a', '·', 'é', ' ', '·', 'ש', 'a']
    assert texts(b'a\n\t<') == ['a', '\n', '\t', '<']
    assert texts(b'\xffa') == ['\\xff', 'a'] and texts(b'\xc3(') == ['·', '\\xc3('] and texts(b'a\xe2\x82') == ['a', '·', '\\xe2\\x82']
    assert texts(b'\x1b\x00\r') == ['\\x1b', '\\x00', '\\r']
    assert ''.join(texts('\u202e\u200b'.encode())) == '··\\u202e··\\u200b'
    assert token_texts([97, 256, 300], bytes_) == ['a', '<|endoftext|>', '·']


def content_of(html):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])


def unpacked(text, dtype):
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype)


def some_reading(L, T, H, seed=0):
    g = np.random.default_rng(seed)
    votes = np.tril(np.maximum(0, g.normal(-0.5, 4, (L, T, T))), -1)
    votes[:, :, 0] = 0
    F = votes.cumsum(axis=1) - votes
    return Reading(F=F, votes=votes, dropped_at=np.full((L, T), T), M=g.random((L, T)) * T,
                   temperatures={name: 1 + np.tanh(g.normal(0, 1, (L, T, H))) for name in 'qv'})


def test_the_page_holds_the_numbers():
    gpt, idx, T = make(selective=True, ssa='qv'), tokens(1, 23), 23
    reading = read(gpt, idx, [4, 9])
    content = content_of(page(reading, ['x'] * T, 'title', 'facts', gpt.config, [4, 9]))
    for l in range(2):
        codes, votes = unpacked(content['votes'][l], np.uint8).astype(float), np.zeros((T, T))
        votes[np.tril_indices(T, -1)] = np.where(codes, content['leastVote'] * np.exp((codes - 1) * content['step']), 0)
        np.testing.assert_allclose(votes, reading.votes[l], rtol=math.expm1(content['step'] / 2) + 1e-6, atol=content['leastVote'])
        kept = np.arange(T)[:, None] < reading.dropped_at[l]
        F = votes.cumsum(axis=0) - votes
        np.testing.assert_allclose(F[kept], reading.F[l][kept], rtol=math.expm1(content['step'] / 2) + 1e-6, atol=T * content['leastVote'])
        np.testing.assert_allclose(content['M'][l], reading.M[l], atol=0.006)
        for name in 'qv':
            taus = unpacked(content['temperatures'][name][l], '<u2').reshape(T, 2) / content['tauSteps']
            np.testing.assert_allclose(taus, reading.temperatures[name][l], atol=1.1e-4)
    visible = (reading.F < 1) & (np.arange(T)[:, None] < reading.dropped_at[:, None])
    assert content['forgotten'] == [[next((i for i in range(T) if not visible[l, i, j]), T) for j in range(T)] for l in range(2)]
    assert content['dropped'] == reading.dropped_at.tolist() and content['budgets'] == [4, 9]


def test_vote_codes_of_extremes():
    for votes in np.zeros((2, 3)), np.array([1e-5, 1e-4, 1e4]), np.array([3e-5]):
        codes, step = vote_codes(votes)
        assert ((codes > 0) == (votes >= 1e-4)).all() and step > 0
    assert vote_codes(np.array([1e-4, 50.0]))[0].tolist() == [1, 255] and vote_codes(np.array([1e-4, 50.0]))[1] / 2 < 0.03


def test_hostile_text_stays_data():
    config = make(selective=True).config
    hostile = ['</script>', '<!--', '<script>alert(1)</script>', '"', "'", '&', '\u2028', '"DATA"', 'é']
    html = page(some_reading(2, 9, 2), hostile, '</title>', '<b>', config)
    template = page(some_reading(2, 9, 2), ['x'] * 9, '', '', config)
    assert content_of(html)['tokens'] == hostile and content_of(html)['title'] == '</title>'
    assert html.count('<') == template.count('<')
    assert set(re.findall(r'https?://[^\'"]*', html)) == {'http://www.w3.org/1999/xhtml', 'http://www.w3.org/2000/svg'}     # names only


def test_size():
    """512 tokens of a model of GPT-2's small shape with both methods, and votes that compress badly."""
    config = make(selective=True, ssa='qv', n_layer=12, n_head=12, n_embd=12).config
    assert len(page(some_reading(12, 512, 12), ['word'] * 512, '', '', config).encode()) < 2e6


def save(folder, **config):
    gpt = make(dtype=torch.float32, vocab_size=257, block_size=48, **config)
    ckpt.save(folder, {'model': gpt.state_dict(), 'model_args': dataclasses.asdict(gpt.config), 'tokenizer': 'bytes'})
    return gpt


def run(monkeypatch, main, *args):
    monkeypatch.setattr(sys, 'argv', ['x', *map(str, args)])
    main()


def test_command(tmp_path, monkeypatch, capsys):
    pytest.importorskip('matplotlib')
    made_for = ckpt.fingerprint(save(tmp_path, selective=True, ssa='qv'))
    (tmp_path / 'text').write_bytes(b'def f(\x1b[2Jself)\xff\n')
    (tmp_path / 'budgets.json').write_text(json.dumps({'budgets': [5, 9], 'checkpoint': made_for, 'policy': 'selective'}))
    run(monkeypatch, visualize.main, f'--out_dir={tmp_path}', f'--start=FILE:{tmp_path}/text', '--png', '--text')
    names = {'visualize.html', 'visualize_F.png', 'visualize_M.png', 'visualize_tau.png'}
    assert {p.name for p in tmp_path.iterdir()} == names | {'text', 'ckpt.pt', 'budgets.json'}
    assert all((tmp_path / name).read_bytes().startswith(b'\x89PNG') for name in names if name.endswith('png'))
    content = content_of((tmp_path / 'visualize.html').read_text())
    assert ''.join(content['tokens']) == 'def f(\\x1b[2Jself)··\ufffd\n' and content['budgets'] == [5, 9]
    printed = capsys.readouterr().out
    gone = sum(row[j] < 19 for row in [content['dropped'][0]] for j in range(19))
    assert gone == 14 and set(re.findall(r'\x1b\[([\d;]*)(.)', printed)) <= {(code, 'm') for code in ('0', '1', '2', '2;9')}
    struck = re.findall(r'\x1b\[2;9m(.*?)\x1b\[0m', printed.split('layer 1')[0], re.S)
    assert ''.join(struck) == ''.join(t for t, at in zip(content['tokens'], content['dropped'][0]) if at < 19)


def test_dimmed_tells_masked_from_dropped():
    F = np.zeros((1, 4, 4))
    F[0, 3] = [0, 0.9, 1, 5]
    reading = Reading(F, F, np.array([[4, 4, 4, 3]]), np.zeros((1, 4)), {})
    reading.F[0, 3, 3], reading.dropped_at[:] = 0, [[4, 4, 4, 4]]
    assert '\x1b[0mab\x1b[0m\x1b[2mc\x1b[0m\x1b[0md\x1b[0m' in visualize.dimmed(reading, list('abcd'))
    reading.dropped_at[0, 1] = 2
    assert '\x1b[0ma\x1b[0m\x1b[2;9mb\x1b[0m\x1b[2mc\x1b[0m\x1b[0md' in visualize.dimmed(reading, list('abcd'))
    assert 'of 3 earlier tokens the last one sees 1' in visualize.dimmed(reading, list('abcd'))


@pytest.mark.parametrize('config, args, word', [
    (dict(), ['--start=abc'], 'standard attention'),
    (dict(ssa='qv'), ['--start=abc', '--text'], 'nothing is forgotten'),
    (dict(ssa='qv'), ['--start=abc', '--budgets=4'], 'nothing is forgotten'),
    (dict(selective=True), [], '--start has 1 token'),
    (dict(selective=True), ['--start=a'], '--start has 1 token'),
    (dict(selective=True), ['--start=' + 'a' * 49], '49 tokens, the model reads 48'),
    (dict(selective=True), ['--start=FILE:nowhere'], 'nowhere'),
    (dict(selective=True), ['--start=abc', '--budgets=1'], 'budget of 1'),
    (dict(selective=True), ['--start=abc', '--budgets=4,4,4'], '3 budgets'),
    (dict(selective=True), ['--start=abc', '--memory_tau=0'], 'memory_tau'),
    (dict(selective=True), ['--start=abc', '--to=/dev/null/x.html'], 'cannot (write|make)'),
    (None, ['--start=abc'], 'ckpt.pt does not exist')])
def test_one_clear_line(tmp_path, monkeypatch, config, args, word):
    if config is not None:
        save(tmp_path, **config)
    with pytest.raises(UserError, match=word) as e:
        run(monkeypatch, visualize.main, f'--out_dir={tmp_path}', *args)
    assert '\n' not in str(e.value) and not (tmp_path / 'visualize.html').exists()


def test_cut(tmp_path, monkeypatch):
    save(tmp_path, ssa='qv')
    run(monkeypatch, visualize.main, f'--out_dir={tmp_path}', '--start=' + 'ab' * 60, '--cut')
    assert ''.join(content_of((tmp_path / 'visualize.html').read_text())['tokens']) == 'ab' * 24


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    save(tmp_path, selective=True)
    with pytest.raises(UserError, match='pip install matplotlib'):
        run(monkeypatch, visualize.main, f'--out_dir={tmp_path}', '--start=abc', '--png')
    run(monkeypatch, visualize.main, f'--out_dir={tmp_path}', '--start=abc')


# ----------------------------------------------------------------------------------------------------------------------
# lab/plot.py

LOG = '''{"config": {"selective": true}}
{"iter": 0, "val_loss": 5.0, "memory": 0.9}
{"iter": 0, "loss": 5.1, "lr": 0.1}
{"iter": 20, "loss": 4.0, "lr": 0.1}
{"iter": 40, "val_loss": 3.5}
{"iter": 60, "lo'''
POINTS = [{'budgets': [a, a], 'memory': 2 * a, 'fraction': a / 16, 'saving': 16 / a, 'val_loss': 3 + 1 / a} for a in (16, 8, 4)]


def test_plot(tmp_path, monkeypatch, capsys):
    pytest.importorskip('matplotlib')
    for name in 'a', 'b_$x':
        (tmp_path / name).mkdir()
        (tmp_path / name / 'log.jsonl').write_text(LOG)
    (tmp_path / 'no_run').mkdir()
    assert plot.read_losses(tmp_path / 'a') == (([0, 20], [5.1, 4.0]), ([0, 40], [5.0, 3.5]))
    to = tmp_path / 'figures'
    run(monkeypatch, plot.main, tmp_path / 'a', tmp_path / 'b_$x', tmp_path / 'no_run', f'--to={to}')
    assert [p.name for p in to.iterdir()] == ['loss.png'] and 'no_run is left out' in capsys.readouterr().err
    for policy in '', '_oldest':
        (tmp_path / 'a' / f'budgets{policy}.json').write_text(json.dumps({'budgets': [4, 4], 'baseline_loss': None, 'curve': POINTS}))
    run(monkeypatch, plot.main, tmp_path / 'a', tmp_path / 'b_$x', f'--to={to}')
    assert sorted(p.name for p in to.iterdir()) == ['loss.png', 'memory.png']
    assert [path.name for path in plot.budget_files(tmp_path / 'a')] == ['budgets.json', 'budgets_oldest.json']
    (tmp_path / 'b_$x' / 'budgets.json').write_text('{"budgets')
    run(monkeypatch, plot.main, tmp_path / 'b_$x', f'--to={to}')
    assert 'budgets.json is left out' in capsys.readouterr().err


def test_plot_draws_the_numbers(tmp_path):
    plt = pytest.importorskip('matplotlib.pyplot')
    lines = plot.plot_loss(plt, {'a': (([0, 20], [5.1, 4.0]), ([0, 40], [5.0, 3.5]))}).axes[0].lines
    assert [line.get_xydata().tolist() for line in lines] == [[[0, 5.1], [20, 4.0]], [[0, 5.0], [40, 3.5]]]
    (tmp_path / 'budgets.json').write_text(json.dumps({'baseline_loss': 3.2, 'curve': POINTS[::-1]}))
    figure = plot.plot_memory(plt, {'a': plot.read_budgets(tmp_path / 'budgets.json')})
    curve, baseline = figure.axes[0].lines
    assert curve.get_xydata().tolist() == [[1, 3 + 1 / 16], [2, 3 + 1 / 8], [4, 3.25]] and baseline.get_ydata()[0] == 3.2


@pytest.mark.parametrize('content', ['', '[]', 'null', '{"config": {}}'])
def test_plot_without_figures(tmp_path, monkeypatch, content):
    (tmp_path / 'log.jsonl').write_text(content)
    with pytest.raises(UserError, match='none of these'):
        run(monkeypatch, plot.main, tmp_path, f'--to={tmp_path}')
    with pytest.raises(UserError, match='which runs'):
        run(monkeypatch, plot.main)
