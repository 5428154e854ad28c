"""The numbers of lab/visualize.py. The pages are tested in test_visualize_browser.py."""

import base64
import dataclasses
import json
import math
import re
import zlib

import numpy as np
import pytest
import torch

import data
import model as m
from lab import visualize
from lab.visualize import Reading, page, read, token_texts, vote_codes
from model import KVCache
from support import checkpoint as ckpt
from support.settings import UserError
from test_model import make, naive_gpt, tokens


@pytest.mark.parametrize('T, tau', [(1, 1.0), (2, 0.6), (23, 0.6), (23, 1.0)])
@pytest.mark.parametrize('ssa', ['', 'qv'])
def test_F_votes_and_M(T, tau, ssa):
    gpt = make(selective=True, ssa=ssa)
    idx = tokens(1, T + 1)
    reading = read(gpt, idx[:, :T], memory_tau=tau)
    for l, F in enumerate(naive_gpt(gpt, idx)[1]):  # one token more shows what the last row votes
        F = F[0].detach().numpy()
        np.testing.assert_allclose(reading.F[l], F[:T, :T], atol=1e-9)
        np.testing.assert_allclose(reading.votes[l], np.diff(F, axis=0)[:, :T], atol=1e-9)
        expected = np.arange(T) - np.minimum(F[:T, :T], tau).sum(axis=1) / tau
        np.testing.assert_allclose(reading.M[l], expected, atol=1e-9)
    assert (reading.dropped_at == T).all()


@torch.no_grad()
@pytest.mark.parametrize('policy', m.POLICIES)
def test_what_a_budget_drops(policy):
    """Against generation, token by token: which tokens each layer holds, and at last their F."""
    T = 24
    budgets = [4, 9]
    gpt = make(selective=True, ssa='qv')
    idx = tokens(1, T)
    reading = read(gpt, idx, budgets, policy)
    cache = KVCache(gpt, 1, budgets, policy)
    for i in range(T):
        gpt(idx[:, [i]], cache=cache)
        for l, layer in enumerate(cache.layers):
            held = [j for j in range(i + 1) if reading.dropped_at[l, j] > i]
            assert held == sorted(layer.j[0].tolist())[: i + 1]
    for l, layer in enumerate(cache.layers):
        F = (reading.F[l, -1] + reading.votes[l, -1])[layer.j[0]]
        np.testing.assert_allclose(F, layer.F[0], atol=1e-9)
    gone = np.arange(T)[:, None] >= reading.dropped_at[:, None]
    assert (reading.votes[gone] == 0).all() and reading.votes.max() > 0
    free = read(gpt, idx)
    np.testing.assert_array_equal(reading.M, free.M)  # of the text read without budgets
    assert not np.allclose(reading.temperatures['q'][1], free.temperatures['q'][1])


def test_temperatures():
    """Where the token-aware part is 0, they are known."""
    gpt = make(ssa='qv')
    for l, block in enumerate(gpt.transformer.h):
        attn = block.attn
        attn.ssa['q'].w.weight.data.zero_()
        attn.ssa['v'].w.weight.data.zero_()
        attn.ssa['q'].alpha.data.fill_(l)
    reading = read(gpt, tokens(1, 9))
    for l in range(2):
        expected = 1 + np.log(np.arange(1, 10)) / (1 + math.exp(-l))
        for head in range(2):
            found = reading.temperatures['q'][l, :, head]
            np.testing.assert_allclose(found, expected, atol=1e-9)
    np.testing.assert_array_equal(reading.temperatures['v'], np.ones((2, 9, 2)))
    assert not gpt.transformer.h[0].attn.ssa['q']._forward_hooks
    assert not reading.F.any()


class Signed(m.CausalSelfAttention):
    def vote(self, L0):
        return L0


class Decay(m.CausalSelfAttention):
    def accumulate(self, F, S):
        rows = [F]
        for r in range(S.size(1)):
            rows.append(0.9 * rows[-1] + S[:, r])
        return torch.stack(rows, dim=1)


class Doubled(m.CausalSelfAttention):
    def vote(self, L0):
        return 2 * super().vote(L0)


@pytest.mark.parametrize('rule', [Signed, Decay])
def test_rules_that_the_page_would_draw_wrong(rule, monkeypatch):
    monkeypatch.setattr(m, 'CausalSelfAttention', rule)
    with pytest.raises(UserError, match='sums of votes that are never negative'):
        read(make(selective=True), tokens(1, 23))


def test_rules_that_the_page_can_draw(monkeypatch):
    plain = read(make(selective=True), tokens(1, 23))
    monkeypatch.setattr(m, 'CausalSelfAttention', Doubled)
    gpt = make(selective=True)
    reading = read(gpt, tokens(1, 23))
    np.testing.assert_allclose(reading.F[0], 2 * plain.F[0])
    gpt.transformer.h[0].attn.selects = False
    reading = read(gpt, tokens(1, 23))
    assert not reading.F[0].any() and not reading.votes[0].any() and reading.F[1].any()
    np.testing.assert_array_equal(reading.M[0], np.arange(23))


def test_token_texts():
    tokenizer = data.get_tokenizer('bytes')

    def texts(raw):
        return token_texts(list(raw), tokenizer)

    assert texts('aé שa'.encode()) == ['a', '·', 'é', ' ', '·', 'ש', 'a']
    assert texts(b'a\n\t<') == ['a', '\n', '\t', '<']
    assert texts(b'\xffa') == ['\\xff', 'a']
    assert texts(b'\xc3(') == ['·', '\\xc3(']
    assert texts(b'a\xe2\x82') == ['a', '·', '\\xe2\\x82']
    assert texts(b'\x1b\x00\r') == ['\\x1b', '\\x00', '\\r']
    assert ''.join(texts('\u202e\u200b'.encode())) == '··\\u202e··\\u200b'
    assert token_texts([97, 256, 300], tokenizer) == ['a', '<|endoftext|>', '·']


# ---- The page ------------------------------------------------------------------------------------


def content_of(html):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    return json.loads(found[1])


def unpacked(text, dtype):
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype)


def some_reading(L, T, H):
    """A Reading of numbers that compress badly."""
    rng = np.random.default_rng(0)
    votes = np.tril(np.maximum(0, rng.normal(-0.5, 4, (L, T, T))), -1)
    votes[:, :, 0] = 0
    return Reading(
        F=votes.cumsum(axis=1) - votes,
        votes=votes,
        dropped_at=np.full((L, T), T),
        M=rng.random((L, T)) * T,
        temperatures={name: 1 + np.tanh(rng.normal(0, 1, (L, T, H))) for name in 'qv'},
    )


def test_the_page_holds_the_numbers():
    T = 23
    gpt = make(selective=True, ssa='qv')
    reading = read(gpt, tokens(1, T), [4, 9])
    content = content_of(page(reading, ['x'] * T, 'title', 'facts', gpt.config, [4, 9]))
    least = content['leastVote']
    error = math.expm1(content['step'] / 2) + 1e-6
    for l in range(2):
        codes = unpacked(content['votes'][l], np.uint8).astype(float)
        votes = np.zeros((T, T))
        decoded = least * np.exp((codes - 1) * content['step'])
        votes[np.tril_indices(T, -1)] = np.where(codes > 0, decoded, 0)
        np.testing.assert_allclose(votes, reading.votes[l], rtol=error, atol=least)
        np.testing.assert_allclose(content['M'][l], reading.M[l], atol=0.006)
        for name in 'qv':
            steps = unpacked(content['temperatures'][name][l], '<u2').reshape(T, 2)
            taus = steps / content['tauSteps']
            np.testing.assert_allclose(taus, reading.temperatures[name][l], atol=1.1e-4)
        gone = (reading.F[l] >= 1) | (np.arange(T)[:, None] >= reading.dropped_at[l])
        assert content['forgotten'][l] == (T - gone.sum(axis=0)).tolist()
    assert content['dropped'] == reading.dropped_at.tolist() and content['budgets'] == [4, 9]


def test_vote_codes_of_extremes():
    for votes in [0, 0], [1e-5, 1e-4, 1e4], [3e-5]:
        votes = np.array(votes)
        codes, step = vote_codes(votes)
        assert ((codes > 0) == (votes >= 1e-4)).all() and step > 0


def test_hostile_text_stays_data():
    hostile = ['</script>', '<!--', '<script>x</script>', '"', "'", '&', '\u2028', '"DATA"', 'é']
    config = make(selective=True).config
    html = page(some_reading(2, 9, 2), hostile, '</title>', '<b>', config)
    harmless = page(some_reading(2, 9, 2), ['x'] * 9, '', '', config)
    assert content_of(html)['tokens'] == hostile and content_of(html)['title'] == '</title>'
    assert html.count('<') == harmless.count('<')
    names = {'http://www.w3.org/1999/xhtml', 'http://www.w3.org/2000/svg'}  # no addresses
    assert set(re.findall(r'https?://[^\'"]*', html)) == names


def test_size():
    """512 tokens of a model of GPT-2's small shape with both methods."""
    config = make(selective=True, ssa='qv', n_layer=12, n_head=12, n_embd=12).config
    html = page(some_reading(12, 512, 12), ['word'] * 512, '', '', config)
    assert len(html.encode()) < 2e6


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
    assert ''.join(content['tokens']) == 'ab' * 24 and content['budgets'] == [7, 7]


@pytest.mark.parametrize(
    'config, args, words',
    [
        ('', '--start=abc', 'standard attention'),
        ('ssa', '--start=abc --budgets=4', 'no F to prune by'),
        ('selective', '', '--start has 1 token'),
        ('selective', '--start=a', '--start has 1 token'),
        ('selective', '--start=' + 'a' * 49, '49 tokens, the model reads 48'),
        ('selective', '--start=FILE:nowhere', 'nowhere'),
        ('selective', '--start=abc --budgets=1', 'budget of 1'),
        ('selective', '--start=abc --budgets=4,4,4', '3 budgets'),
        ('selective', '--start=abc --memory_tau=0', 'memory_tau'),
        ('selective', '--start=abc --to=/dev/null/x.html', 'cannot write'),
        (None, '--start=abc', 'ckpt.pt does not exist'),
    ],
)
def test_one_clear_line(tmp_path, run, config, args, words):
    if config is not None:
        save(tmp_path, selective=config == 'selective', ssa='qv' if config == 'ssa' else '')
    assert words in run(visualize, f'--out_dir={tmp_path}', *args.split())
    assert not (tmp_path / 'visualize.html').exists()
