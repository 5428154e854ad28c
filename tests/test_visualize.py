"""The numbers of lab/visualize.py. The pages are tested in test_visualize_browser.py."""

import base64
import dataclasses
import json
import re
import zlib

import numpy as np
import pytest
import torch

import data
import model as m
from lab import visualize
from lab.visualize import page, read, token_texts
from support import checkpoint as ckpt
from support.settings import UserError
from test_model import make, naive_gpt, tokens


@pytest.mark.parametrize('T, flags', [(2, {}), (23, dict(voter=3, n_kv_head=1))])
def test_F_and_votes(T, flags):
    gpt = make(selective=True, ssa='qv', **flags)
    idx = tokens(1, T + 1)
    reading = read(gpt, idx[:, :T])
    # one token more shows what the last row votes
    F = torch.cat(naive_gpt(gpt, idx)[1]).detach().numpy()[..., :T]
    np.testing.assert_allclose(reading.F, F[:, :T], atol=1e-9)
    np.testing.assert_allclose(reading.votes, np.diff(F, axis=1), atol=1e-9)
    M = np.arange(T) - np.minimum(F[:, :T], 1).sum(axis=2)
    content = content_of(page(reading, ['x'] * T, 'title'))
    np.testing.assert_allclose(content['M'], M, atol=1e-9)
    assert (reading.dropped_at == T).all()


@torch.no_grad()
def test_what_a_budget_drops():
    """Against generation, token by token: which tokens each layer holds, and at last their F."""
    T = 24
    budgets = [4, 9]
    gpt = make(selective=True, ssa='qv', voter=3, n_kv_head=1)
    idx = tokens(1, T)
    reading = read(gpt, idx, budgets)
    M = content_of(page(reading, ['x'] * T, 'title'))['M']
    cache = m.KVCache(gpt, 1, budgets)
    for i in range(T):
        gpt(idx[:, [i]], cache=cache)
        for l, layer in enumerate(cache.layers):
            held = np.flatnonzero(reading.dropped_at[l, : i + 1] > i)
            assert held.tolist() == sorted(layer.j[0, : layer.n].tolist())
            left = 1 - np.minimum(reading.F[l, i, held], 1)
            assert M[l][i] == pytest.approx(left.sum() - 1)  # without the token itself
    F = reading.F[:, -1] + reading.votes[:, -1]
    for l, layer in enumerate(cache.layers):
        np.testing.assert_allclose(F[l, layer.j[0]], layer.F[0], atol=1e-9)


def test_rules_that_the_page_cannot_draw(monkeypatch):
    monkeypatch.setattr(m.CausalSelfAttention, 'vote', lambda self, L0: -L0.relu())
    with pytest.raises(UserError, match='votes that are never negative'):
        read(make(selective=True), tokens(1, 23))


@pytest.mark.parametrize(
    'ids, texts',
    [
        ('aé ש'.encode(), ['a', '·', 'é', ' ', '·', 'ש']),
        (b'\n\t<', ['\n', '\t', '<']),
        (b'\xffa', ['\\xff', 'a']),
        (b'\xc3(', ['·', '\\xc3(']),
        (b'a\xe2\x82', ['a', '·', '\\xe2\\x82']),
        (b'\x1b\x00\r', ['\\x1b', '\\x00', '\\r']),
        ('\u202e'.encode(), ['·', '·', '\\u202e']),
        ([97, 256], ['a', '<|endoftext|>']),
    ],
)
def test_token_texts(ids, texts):
    assert token_texts(list(ids), data.get_tokenizer('bytes')) == texts


# ---- The page ------------------------------------------------------------------------------------


def content_of(html):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    return json.loads(found[1])


def test_the_page_holds_the_numbers():
    T = 23
    reading = read(make(selective=True), tokens(1, T), [4, 9])
    content = content_of(page(reading, ['x'] * T, 'title', [4, 9]))
    i, j = np.tril_indices(T, -1)
    numbers = np.frombuffer(zlib.decompress(base64.b64decode(content['votes'])), '<f4')
    expected = reading.votes[:, i, j].flatten()
    np.testing.assert_allclose(numbers, expected, rtol=1e-3, atol=1e-6)
    assert content['budgets'] == [4, 9]
    assert content['dropped'] == reading.dropped_at.tolist()
    for l in range(2):
        masked = (reading.F[l] < 1).sum(axis=0)  # F grows, so the last rows are those
        seen = np.minimum(masked, reading.dropped_at[l])
        assert content['forgotten'][l] == seen.tolist()


def test_hostile_text_stays_data():
    hostile = ['</script>', '<!--', '"', '&', '\u2028', '"DATA"']
    reading = read(make(selective=True), tokens(1, 6))
    html = page(reading, hostile, '</title>')
    assert content_of(html)['tokens'] == hostile and content_of(html)['title'] == '</title>'
    assert html.count('<') == page(reading, ['x'] * 6, '').count('<')
    names = {'http://www.w3.org/1999/xhtml', 'http://www.w3.org/2000/svg'}  # no addresses
    assert set(re.findall(r'https?://[^\'"]*', html)) == names


# ---- The command ---------------------------------------------------------------------------------


def save(folder, **config):
    gpt = make(dtype=torch.float32, vocab_size=257, block_size=48, **config)
    args = dataclasses.asdict(gpt.config)
    ckpt.save(folder, {'model': gpt.state_dict(), 'model_args': args, 'tokenizer': 'bytes'})
    return gpt


def test_command(tmp_path, run):
    gpt = save(tmp_path, selective=True, ssa='qv')
    found = {'budgets': [5, 9], 'checkpoint': ckpt.fingerprint(gpt), 'policy': 'selective'}
    (tmp_path / 'budgets.json').write_text(json.dumps(found))
    (tmp_path / 'text').write_bytes(b'def f(\x1b[2Jself)\xff\n')
    run(visualize, f'--out_dir={tmp_path}', f'--start=FILE:{tmp_path}/text')
    content = content_of((tmp_path / 'visualize.html').read_text())
    assert ''.join(content['tokens']) == 'def f(\\x1b[2Jself)··\ufffd\n'
    assert content['budgets'] == [5, 9]
    command = visualize, f'--out_dir={tmp_path}', '--budgets=7', '--start=' + 'ab' * 60
    assert 'has 48 of 120 tokens' in run(*command)
    content = content_of((tmp_path / 'visualize.html').read_text())
    assert content['tokens'] == ['a', 'b'] * 24 and content['budgets'] == [7, 7]


@pytest.mark.parametrize(
    'config, args, words',
    [
        ({'ssa': 'qv'}, '--start=abc', 'has no votes to show'),
        ({'selective': True}, '--start=', '--start is a single token'),
        ({'selective': True}, '--start=abc --budgets=1', '--budgets'),
    ],
)
def test_one_clear_line(tmp_path, run, config, args, words):
    save(tmp_path, **config)
    assert words in run(visualize, f'--out_dir={tmp_path}', *args.split())
    assert not (tmp_path / 'visualize.html').exists()
