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


@pytest.mark.parametrize('T, tau, flags', [(2, 0.6, {}), (23, 1.0, dict(voter=3, n_kv_head=1))])
def test_F_votes_and_M(T, tau, flags):
    gpt = make(selective=True, ssa='qv', **flags)
    idx = tokens(1, T + 1)
    reading = read(gpt, idx[:, :T], memory_tau=tau)
    # one token more shows what the last row votes
    F = torch.cat(naive_gpt(gpt, idx)[1]).detach().numpy()[..., :T]
    np.testing.assert_allclose(reading.F, F[:, :T], atol=1e-9)
    np.testing.assert_allclose(reading.votes, np.diff(F, axis=1), atol=1e-9)
    M = np.arange(T) - np.minimum(F[:, :T], tau).sum(axis=2) / tau
    np.testing.assert_allclose(reading.M, M, atol=1e-9)
    assert (reading.dropped_at == T).all()


@torch.no_grad()
@pytest.mark.parametrize('policy', ['selective', 'oldest', 'random', 'streaming:2', 'knorm'])
def test_what_a_budget_drops(policy):
    """Against generation, token by token: which tokens each layer holds, and at last their F."""
    T = 24
    budgets = [4, 9]
    gpt = make(selective=True, ssa='qv', voter=3, n_kv_head=1)
    idx = tokens(1, T)
    reading = read(gpt, idx, budgets, policy)
    cache = m.KVCache(gpt, 1, budgets, policy)
    for i in range(T):
        gpt(idx[:, [i]], cache=cache)
        for dropped_at, layer in zip(reading.dropped_at, cache.layers):
            held = np.flatnonzero(dropped_at[: i + 1] > i)
            assert held.tolist() == sorted(layer.j[0, : layer.n].tolist())
    F = reading.F[:, -1] + reading.votes[:, -1]
    for l, layer in enumerate(cache.layers):
        np.testing.assert_allclose(F[l, layer.j[0]], layer.F[0], atol=1e-9)
    free = read(gpt, idx)
    np.testing.assert_array_equal(reading.M, free.M)  # of the text read without budgets
    assert not np.allclose(reading.temperatures['q'], free.temperatures['q'])


def test_temperatures():
    """Where the token-aware part is 0, they are known."""
    gpt = make(ssa='qv')
    for block in gpt.transformer.h:
        for name in 'qv':
            block.attn.ssa[name].w.weight.data.zero_()
    gpt.transformer.h[1].attn.ssa['q'].alpha.data.fill_(0)
    reading = read(gpt, tokens(1, 9))
    expected = 1 + np.log(np.arange(1, 10)) / 2
    for head in range(2):
        np.testing.assert_allclose(reading.temperatures['q'][1, :, head], expected, atol=1e-9)
    np.testing.assert_array_equal(reading.temperatures['v'], np.ones((2, 9, 2)))
    assert not reading.F.any()


@pytest.mark.parametrize('slope, decay', [(-1, 1), (1, 0.9)])
def test_rules_that_the_page_cannot_draw(slope, decay, monkeypatch):
    def accumulate(self, F, S):
        rows = [F]
        for r in range(S.size(1)):
            rows.append(decay * rows[-1] + slope * S[:, r])
        return torch.stack(rows, dim=1)

    monkeypatch.setattr(m.CausalSelfAttention, 'accumulate', accumulate)
    with pytest.raises(UserError, match='votes that are never negative'):
        read(make(selective=True), tokens(1, 23))


def test_a_layer_without_votes():
    gpt = make(selective=True)
    gpt.transformer.h[0].attn.selects = False
    reading = read(gpt, tokens(1, 23))
    assert not reading.F[0].any() and not reading.votes[0].any() and reading.F[1].any()
    np.testing.assert_array_equal(reading.M[0], np.arange(23))


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
        ([97, 256, 300], ['a', '<|endoftext|>', '·']),
    ],
)
def test_token_texts(ids, texts):
    assert token_texts(list(ids), data.get_tokenizer('bytes')) == texts


# ---- The page ------------------------------------------------------------------------------------


def content_of(html):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    return json.loads(found[1])


def unpacked(text):
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), '<f4')


def test_the_page_holds_the_numbers():
    T = 23
    gpt = make(selective=True, ssa='qv')
    reading = read(gpt, tokens(1, T), [4, 9])
    content = content_of(page(reading, ['x'] * T, 'title', gpt.config, [4, 9]))
    i, j = np.tril_indices(T, -1)
    votes = np.zeros((2, T, T))
    votes[:, i, j] = unpacked(content['votes']).reshape(2, -1)
    np.testing.assert_allclose(votes, reading.votes, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(content['M'], reading.M)
    for name, taus in reading.temperatures.items():
        stored = unpacked(content['temperatures'][name]).reshape(taus.shape)
        np.testing.assert_allclose(stored, taus, rtol=1e-3)
    assert content['dropped'] == reading.dropped_at.tolist() and content['budgets'] == [4, 9]
    gone = (reading.F >= 1) | (np.arange(T)[:, None] >= reading.dropped_at[:, None])
    seen = np.arange(T)[:, None] < np.array(content['forgotten'])[:, None]
    np.testing.assert_array_equal(seen, ~gone)


def test_hostile_text_stays_data():
    hostile = ['</script>', '<!--', '<script>x</script>', '"', "'", '&', '\u2028', '"DATA"', 'é']
    gpt = make(selective=True)
    reading = read(gpt, tokens(1, 9))
    html = page(reading, hostile, '</title>', gpt.config)
    assert content_of(html)['tokens'] == hostile and content_of(html)['title'] == '</title>'
    assert html.count('<') == page(reading, ['x'] * 9, '', gpt.config).count('<')
    names = {'http://www.w3.org/1999/xhtml', 'http://www.w3.org/2000/svg'}  # no addresses
    assert set(re.findall(r'https?://[^\'"]*', html)) == names


def test_size():
    """Numbers that compress badly: 512 tokens of 12 layers."""
    votes = np.random.default_rng(0).normal(-0.5, 4, (12, 512 * 511 // 2))
    assert len(visualize.packed(np.maximum(0, votes))) < 5e6


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
    run(visualize, f'--out_dir={tmp_path}', '--start=' + 'ab' * 60, '--cut', '--budgets=7')
    content = content_of((tmp_path / 'visualize.html').read_text())
    assert content['tokens'] == ['a', 'b'] * 24 and content['budgets'] == [7, 7]


@pytest.mark.parametrize(
    'config, args, words',
    [
        ({}, '--start=abc', 'standard attention'),
        ({'ssa': 'qv'}, '--start=abc --budgets=4', 'no F to prune by'),
        ({'selective': True}, '', '--start has 1 token'),
        ({'selective': True}, '--start=' + 'a' * 49, '49 tokens, the page takes 2 to 48'),
        ({'selective': True}, '--start=FILE:nowhere', 'nowhere'),
        ({'selective': True}, '--start=abc --budgets=1', 'budget of 1'),
        ({'selective': True}, '--start=abc --budgets=4 --policy=tova', 'needs attention weights'),
        ({'selective': True}, '--start=abc --to=/dev/null/x.html', 'cannot write'),
    ],
)
def test_one_clear_line(tmp_path, run, config, args, words):
    save(tmp_path, **config)
    assert words in run(visualize, f'--out_dir={tmp_path}', *args.split())
    assert not (tmp_path / 'visualize.html').exists()
