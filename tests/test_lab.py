"""lab/bench.py: that it measures what it says. How long anything takes is not tested."""
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as fn

import model as m
import prepare_text
import train
from lab import bench, names, trained
from support import checkpoint as ckpt, files, settings


@pytest.fixture
def run(monkeypatch):
    def run(script, *args):
        monkeypatch.setattr(sys, 'argv', [script.__name__, *args])
        script.main()
    return run


def test_bench_compares_the_same_thing():
    """What bench.py sets beside ours computes what ours computes; x-transformers, too, where it is installed."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 40, 8, dtype=torch.float64).unbind()
    for name, attend in list(bench.attentions(q).items())[1:]:
        torch.testing.assert_close(attend(q, k, v).double(), m.selective_attention(q, k, v, torch.relu)[0], atol=1e-5, rtol=1e-5)


def test_bench_table(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, 'peak_memory', lambda case: 1)
    monkeypatch.setitem(bench.SHAPES, 'small', dict(n_layer=1, n_head=2, n_embd=8, vocab_size=11))
    run(bench, '--what=attention,step,decode,prefill,generate,profile', '--shapes=small', '--lengths=64,80', '--tokens=80',
        '--rounds=1', '--device=cpu', f'--to={tmp_path / "bench.json"}')
    rows = json.loads((tmp_path / 'bench.json').read_text())['rows']
    assert {row['part'] for row in rows} == {'attention', 'step', 'decode1', 'decode32', 'prefill', 'generate1', 'generate32',
                                             'profile'}
    assert {row['T'] for row in rows} == {64, 80, 'growth'}
    assert all(np.isfinite(row['value']) for row in rows)
    sizes = {row['case']: row['value'] for row in rows if row['part'] == 'decode1' and row['T'] == 80 and row['unit'] == 'MiB'}
    assert sizes['full cache, its size'] == 40 * sizes['budgets of 2, its size']
    assert 'growth' in capsys.readouterr().out


def test_bench_of_trained_runs(run, tmp_path, lines):
    for T in 80, 160:
        run(train, f'--dataset={lines}', f'--out_dir={tmp_path / str(T)}', '--n_layer=2', '--n_head=2', '--n_embd=8',
            f'--block_size={T}', '--selective', '--rope', '--memory_loss=0.1', '--batch_size=2', '--device=cpu',
            '--gradient_accumulation_steps=1', '--max_iters=1', '--eval_iters=1')
        checkpoint = ckpt.load(tmp_path / str(T))
        checkpoint['model']['transformer.h.0.attn.c_attn.weight'].mul_(100 if T == 160 else 0)      # the first layer masks
        ckpt.save(tmp_path / str(T), checkpoint)
    with pytest.raises(settings.UserError, match='give their folders with --out_dir'):
        run(bench, '--what=forget')
    run(bench, f'--out_dir={tmp_path / "80"},{tmp_path / "160"}', '--tokens=160', '--rounds=1', '--device=cpu',
        '--what=attention,step,memory,forget', f'--to={tmp_path / "bench.json"}')
    rows = json.loads((tmp_path / 'bench.json').read_text())['rows']
    live = {row['T']: row['live'] for row in rows if row['part'] == 'attention' and row['T'] != 'growth'}
    assert live[80] == 1 and live[160] < 0.99
    cases = {(row['part'], row['T'], row['case']) for row in rows}
    assert {(part, T, case) for part in ('attention', 'step', 'memory') for T in (80, 160, 'growth')
            for case in ('standard', 'selective')} <= cases
    assert ('layer', 80, 'selective, layer 1, live 100%') in cases
    left = {row['T']: row['value'] for row in rows if row['case'] == 'layer 0, queries as seen'}
    assert left[80] == 80 and left[160] < 159


def test_what_a_cache_needs_no_more():
    """What no query can see: the attention of the worst later rows is the same without it, whatever the strength."""
    T, D, counts = 400, 4, []
    torch.manual_seed(0)
    layer = m.GPT(m.GPTConfig(n_layer=1, n_head=2, n_embd=2 * D, vocab_size=9, selective=True, qk_norm=True)).transformer.h[0].attn
    q, k = torch.randn(2, 2, 2, T, D)
    for strength in torch.linspace(0.2, 4, 60):
        layer.q_norm.weight.data.fill_(strength)
        layer.k_norm.weight.data.fill_(strength)
        longest = D**0.5 * strength
        q, k = layer.q_norm(q), layer.k_norm(k)
        k[:, :, 0] = -k[:, :, 1]                                # who looks for token 1 looks away from token 0
        needed = trained.still_needed(layer, q, k)
        assert set(needed) == {'queries as seen', 'any query'}
        dead = ~needed['any query']
        votes = (q[:, 0] @ k[:, 0].transpose(1, 2) / D**0.5).relu().tril(-1)
        votes[:, :, 0] = 0
        # later rows as long as can be, each looking for one token, with the least logits of themselves and the one before
        L = fn.normalize(k, dim=3) * longest @ k.transpose(2, 3) / D**0.5 - votes.sum(dim=1)[:, None, None]
        P = fn.pad(L, (0, 2), value=-(longest**2 / D**0.5).item()).double().softmax(dim=3)[..., :T]
        assert (P * dead[:, None, None]).sum(dim=3).max() < 1e-7
        counts.append(dead.sum().item())
    assert counts[0] == 0 and counts[-1] > 0


def test_a_bound_for_any_query_needs_qk_norm():
    layer = m.GPT(m.GPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=9, selective=True)).transformer.h[0].attn
    assert set(trained.still_needed(layer, torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 4))) == {'queries as seen'}


def test_bench_memory_of_a_process(tmp_path):
    assert bench.peak_memory(['selective', 'small', 64, 64, 'cpu']) > 2**20
    cached, whole = (bench.peak_memory(['generate', 'small', 512, 16, 'cpu', how]) for how in (8, 'no cache'))
    assert whole > cached


def test_filled_cache_is_what_a_batch_would_read():
    gpt = bench.m.GPT(bench.m.GPTConfig(block_size=24, vocab_size=11, n_layer=2, n_head=2, n_embd=8, selective=True)).eval()
    text = torch.randint(11, (20,))
    cache, expected = bench.filled(gpt, 3, 5, text), bench.m.KVCache(gpt, 3, 5)
    m.prefill(gpt, text.expand(3, -1), expected)
    for a, b in zip(cache.layers, expected.layers):
        torch.testing.assert_close((a.k, a.F, a.j), (b.k, b.F, b.j))
    assert cache.position == expected.position == 20


@pytest.mark.parametrize('script, args, words', [
    (bench, ['--what=nothing'], 'the parts are'), (bench, ['--shapes=huge'], '--shapes'), (bench, ['--lengths=1,x'], '--lengths'),
    (bench, ['--out_dir=out/x', '--what=decode'], 'of trained models it is'), (bench, ['--rounds=900'], 'decode needs')])
def test_refusals(script, args, words, run):
    with pytest.raises(settings.UserError, match=words):
        run(script, *args)


# ----------------------------------------------------------------------------------------------------------------------
# files.write_file


def test_names_replaces_only_names(tmp_path, run):
    (tmp_path / 'text').write_text('one\ntwo\n' * 99)
    run(prepare_text, f'{tmp_path}/text', '--tokenizer=bytes', f'--data_dir={tmp_path}/data')
    before = (tmp_path / 'data/text/train.bin').read_bytes()
    with pytest.raises(settings.UserError, match='is another data set'):
        names.prepare(names.NamesConfig(data_dir=f'{tmp_path}/data', name='text'))
    assert (tmp_path / 'data/text/train.bin').read_bytes() == before


def test_write_file(tmp_path):
    path = tmp_path / 'new' / 'file.json'
    for content in ('{"ö": 1}', b'bytes'):
        files.write_file(path, content)
        assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    with pytest.raises(settings.UserError, match='cannot write .*new'):
        files.write_file(path.parent, 'x')
    assert [p.name for p in path.parent.iterdir()] == ['file.json'] and len(list(tmp_path.iterdir())) == 1
