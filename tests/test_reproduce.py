"""lab/ablate.py, lab/runs.py and lab/reproduce.py: the rules that are changed, and runs that end in a section of a page."""
import concurrent.futures
import json
import os
import re
import types

import pytest
import torch

import model as m
import prune
import train
from conftest import wait_until
from lab import ablate, figures, reproduce, runs, tasks
from support import settings

TINY = ['--n_layer=1', '--n_head=4', '--n_embd=16', '--block_size=12', '--batch_size=4', '--eval_interval=4', '--eval_iters=1',
        '--gradient_accumulation_steps=1', '--device=cpu']


def naive(rule, q, k, v):
    """The rules of ablate.py in loops over rows and columns."""
    H, T, D = q.shape[1:]
    K = int(rule.partition('=')[2] or 0)
    y = torch.zeros_like(q)
    for b in range(len(q)):
        for h in range(H):
            head = {'groups': h - h % 2, 'last_head': H - 1}.get(rule, 0)
            F = torch.zeros(T, dtype=q.dtype)
            for i in range(T):
                S = torch.zeros(T, dtype=q.dtype)
                for j in range(i + 1):
                    vote = q[b, head, i] @ k[b, head, j] / D**0.5
                    if (j < i or rule == 'self_too') and (j > 0 or rule == 'first_too'):
                        S[j] = vote if rule == 'no_relu' else vote.clamp(min=0)
                    if rule == 'fox':                           # -log of the gate, which is a sigmoid of token 0's logit
                        S[j] = -torch.sigmoid(q[b, head, i] @ k[b, head, 0] / D**0.5 + 4).log() if 0 < j < i else 0
                    if 'alibi' in rule:                         # one more step away from the next row
                        S[j] = (S[j] if rule == 'votes_and_alibi' else 0) + 2**(-8 * (h + 1) / H)
                    if K:                                       # of K tokens, the one that token i + 1 drives out
                        left = S[j] if 'alibi' in rule else 0
                        S[j] = float('inf') if j > 0 and j == i - K + 2 else left
                if rule == 'at_once':
                    F = F + S
                L = q[b, h, i] @ k[b, h, :i + 1].T / D**0.5 - F[:i + 1]
                y[b, h, i] = L.softmax(dim=0) @ v[b, h, :i + 1]
                if rule != 'at_once':
                    F = F + S
    return y


@pytest.fixture
def qkv():
    def qkv(H):
        return torch.randn(3, 2, H, 9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    return qkv


@pytest.mark.parametrize('rule', [*ablate.VOTES, *ablate.LISTINGS, 'alibi', 'alibi=4', 'alibi=9', 'window=2', 'window=4', 'window=9', 'window=30'])
@pytest.mark.parametrize('H', [1, 3, 4])
def test_rules(rule, H, qkv):
    """All are the recurrence F <- F + S; standard attention and windows included."""
    q, k, v = qkv(H)
    with ablate.changed(rule):
        torch.manual_seed(0)
        layer = m.GPT(m.GPTConfig(n_layer=1, n_head=H, n_embd=4 * H, vocab_size=9, selective=True)).transformer.h[0].attn
        y, M = layer.attention(q, k, v, layer.vote, memory_tau=1.0)
        none = layer.attention(q, k, v, layer.vote)
    assert none[1] is None and M.shape == (2, 9)
    torch.testing.assert_close(none[0], y)
    torch.testing.assert_close(y, naive(rule, q, k, v), atol=1e-6, rtol=1e-6)
    published = m.selective_attention(q, k, v, torch.relu, memory_tau=1.0)
    assert torch.allclose(y, published[0]) == (rule == 'as_published' or rule in ('last_head', 'groups') and H == 1)
    if rule == 'as_published':
        torch.testing.assert_close(M, published[1], atol=1e-6, rtol=1e-6, check_dtype=False)


@pytest.mark.parametrize('K', [2, 4, 9, 20])
def test_window_is_a_budget_by_age(K, qkv):
    """window=K sees what a cache of K tokens with policy 'oldest' keeps, so that trained and pruned windows compare."""
    q, k, v = qkv(3)
    cache = m.LayerCache(2, 3, K, 4, 'oldest', 'cpu', torch.float64)
    y, M = ablate.newest(K, False, q, k, v, None, memory_tau=1.0)
    torch.testing.assert_close(y, cache.attend(q, k, v, torch.arange(9), None))
    assert M[0].tolist() == [min(i, K - 1) for i in range(9)]


def test_what_is_changed_is_put_back():
    before = m.selective_attention, m.Temperature, m.CausalSelfAttention, m.CausalSelfAttention.vote
    for rule in ('no_relu', 'groups', 'window=3', 'ssmax', 'double_heads'):
        with pytest.raises(ZeroDivisionError), ablate.changed(rule):
            assert before != (m.selective_attention, m.Temperature, m.CausalSelfAttention, m.CausalSelfAttention.vote)
            1 / 0
        assert before == (m.selective_attention, m.Temperature, m.CausalSelfAttention, m.CausalSelfAttention.vote)
        assert m.CausalSelfAttention.attention is m.selective_attention


def test_temperatures_of_other_papers():
    config = m.GPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=9)
    x, pos = torch.zeros(1, 5, 8), torch.arange(5)
    n = torch.arange(1, 6.0)
    theirs = ablate.PositionOnly(config, True)(x, x, pos)
    torch.testing.assert_close(theirs, (1 + 0.0113 * n.log())[:, None], atol=1e-4, rtol=0)      # exp(-exp(1.5)) = 0.0113
    scaled = ablate.ScalableSoftmax(config, True)(x, x, pos)
    torch.testing.assert_close(scaled, 0.43 * (n + 1).log()[:, None].expand(5, 2))


def losses(folder):
    return [line['val_loss'] for line in map(json.loads, open(folder / 'log.jsonl')) if 'val_loss' in line]


@pytest.mark.parametrize('rule, flags', [
    ('as_published', ['--selective']), ('no_relu', ['--selective']), ('fox', ['--selective', '--rope']), ('window=3', ['--selective']),
    ('alibi', ['--selective', '--rope']), ('double_heads', ['--rope', '--qk_norm']), ('no_position', ['--ssa=qv']),
    ('position_on_values', ['--ssa=v', '--ssa_lr=10']),
    ('position_only', ['--ssa=q', '--ssa_lr=10']), ('ssmax', ['--ssa=q'])])
def test_trained_by_the_rule(run, dataset, tmp_path, rule, flags):
    args = [*TINY, dataset, '--max_iters=8', '--warmup_iters=1', '--learning_rate=0.05', *flags]
    run(train, *args, f'--out_dir={tmp_path / "plain"}')
    run(ablate, rule, *args, f'--out_dir={tmp_path / "changed"}')
    plain, changed = losses(tmp_path / 'plain'), losses(tmp_path / 'changed')
    assert (max(abs(a - b) for a, b in zip(plain, changed)) < 1e-5) == (rule == 'as_published')
    resumed = [f'--out_dir={tmp_path / "changed"}', '--eval_only']
    assert 'step 8' in run(ablate, rule, *resumed)              # the checkpoint says what the rule has to fit
    assert 'does not fit' in run(ablate, 'fox' if '--selective' not in flags else 'ssmax', *TINY, '--selective', *resumed)
    saved = torch.load(tmp_path / 'changed/ckpt.pt', weights_only=True)['model']
    if rule == 'double_heads':
        assert saved['transformer.h.0.attn.c_attn.weight'].shape == (96, 16)
        assert saved['transformer.h.0.attn.c_proj.weight'].shape == (16, 32)
    if rule == 'no_position':
        assert (saved['transformer.h.0.attn.ssa.q.alpha'].sigmoid() == 0).all()
    if rule == 'position_on_values':
        assert saved['transformer.h.0.attn.ssa.v.alpha'].shape == (4,) and (saved['transformer.h.0.attn.ssa.v.alpha'] != -4).any()
    if rule == 'position_only':
        assert saved['transformer.h.0.attn.ssa.q.beta'].shape == (1,) and saved['transformer.h.0.attn.ssa.q.beta'] != 1.5
    if rule == 'ssmax':
        assert saved['transformer.h.0.attn.ssa.q.s'].shape == (4,)


@pytest.mark.parametrize('args, words', [
    ([], 'the rule comes first'), (['nothing'], 'the rule comes first'), (['no_relu'], 'does not fit'),
    (['double_heads', '--selective'], 'does not fit'), (['no_position', '--ssa=v'], 'does not fit'), (['position_on_values', '--ssa=q'], 'does not fit'),
    (['window=4'], 'does not fit'), (['window=1', '--selective'], 'the rule comes first'), (['window', '--selective'], 'the rule comes'),
    (['window=K', '--selective'], 'the rule comes first'), (['alibi=1', '--selective'], 'the rule comes first'), (['groups=3', '--selective'], 'the rule comes first'),
    (['ssmax', '--ssa=qv'], 'does not fit'), (['fox', '--selective', '--vote_scale'], 'no vote_scale'),
    (['double_heads', '--dropout=0.1'], 'no dropout')])
def test_refusals_of_ablate(run, args, words):
    assert words in run(ablate, *args)


def test_section():
    page = runs_page = reproduce.section('# Results\n', 'one', 'first')
    page = reproduce.section(page, 'two', 'second')
    assert page.startswith(runs_page) and page.index('first') < page.index('second')
    again = reproduce.section(page, 'one', 'third')
    assert again == page.replace('first', 'third')
    with pytest.raises(settings.UserError, match='end of one'):
        reproduce.section(page.replace('<!-- end of one -->', ''), 'one', 'x')


def test_spread():
    assert runs.spread([1.0, 2.0, 3.0], '{:.1f}') == '2.0 ± 1.0'
    assert runs.spread([0.5], '{:.0%}') == '50%' and runs.spread([None, None]) == 'never'
    assert runs.spread([1.0, None], '{:.0f}') == '1 (1 of 2 seeds)'


@pytest.fixture
def claim(monkeypatch, dataset, tmp_path):
    """reproduce.py with one small claim; the commands that it ran are in the list returned."""
    def small(r):
        """A small claim."""
        models = r.train({'standard': '', 'no ReLU': 'no_relu --selective'}, 'config/base_small.py', 8, [*TINY, dataset])
        flags = {'standard': '', 'no ReLU': 'no_relu --selective'}
        return reproduce.table('model', flags, models, {'loss': runs.last('val_loss'), 'memory': runs.last('memory', '{:.0%}')}) \
            + '\n' + runs.curves(r, 'small', models)
    ran, command = [], runs.command
    monkeypatch.setattr(runs, 'command', lambda args: (ran.append(args), command(args)))
    monkeypatch.setattr(reproduce, 'CLAIMS', {small: 1})
    (tmp_path / 'page.md').write_text('# Results\n\nsome words\n')
    return ran


def test_a_claim(run, claim, tmp_path):
    args = ['small', '--seeds=2', f'--out_dir={tmp_path}/runs', f'--to={tmp_path}/page.md']
    print(run(reproduce, *args))
    page = (tmp_path / 'page.md').read_text()
    rows = re.findall(r'\| (standard|no ReLU) \| .* \| (\d\.\d{4}) ± (\d\.\d{4}) \| (|.*%.*) \| 0\.\d \|', page)
    assert [row[0] for row in rows] == ['standard', 'no ReLU'] and [bool(row[3]) for row in rows] == [False, True]
    assert page.startswith('# Results\n\nsome words\n') and 'the seeds 1 to 2' in page
    assert 'python train.py config/base_small.py' in page and '--max_iters=8' in page
    assert (tmp_path / 'results/small.png').read_bytes().startswith(b'\x89PNG')
    assert len(claim) == 4 and len(os.listdir(tmp_path / 'runs')) == 4

    run(reproduce, *args)                                       # nothing is trained again, and the page is the same
    assert len(claim) == 4 and (tmp_path / 'page.md').read_text() == page

    folder = next(path for path in (tmp_path / 'runs').iterdir() if path.name.startswith('base_small'))
    log = (folder / 'log.jsonl').read_text().splitlines(keepends=True)
    (folder / 'log.jsonl').write_text(''.join(log[:-1]))        # as if stopped before its last evaluation
    assert runs.read_run(str(folder), 8) is None and runs.read_run(str(folder), 4).steps == [0, 4]
    saved = reproduce.ckpt.load(folder)
    saved['config']['learning_rate'] = 1.0
    reproduce.ckpt.save(folder, saved)
    assert 'learning_rate=1.0' in run(reproduce, *args)         # it was changed since


def test_quick_writes_no_page(run, claim, tmp_path):
    out = run(reproduce, 'small', '--quick', f'--out_dir={tmp_path}/runs', f'--to={tmp_path}/page.md')
    assert '| standard |' in out and (tmp_path / 'page.md').read_text() == '# Results\n\nsome words\n'
    assert len(claim) == 2 and not (tmp_path / 'results').exists()


def test_a_run_that_fails_is_named(run, claim, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, 'CLAIMS', {broken: 1})
    out = run(reproduce, 'broken', f'--out_dir={tmp_path}/runs', f'--to={tmp_path}/page.md')
    assert 'train.py' in out and "data set 'nowhere'" in out
    assert (tmp_path / 'page.md').read_text() == '# Results\n\nsome words\n'


def broken(r):
    """A claim whose runs cannot start."""
    r.train({'standard': ''}, 'config/base_small.py', 8, ['--dataset=nowhere'])


def test_records_right_and_entropy(run, tmp_path):
    tasks_args = ['copying', f'--data_dir={tmp_path}', '--records=700', '--length=2']
    run(tasks, *tasks_args)
    run(train, *TINY, f'--dataset={tmp_path}/copying', '--max_iters=1', f'--out_dir={tmp_path}/out', '--ssa=qv')
    trained = runs.read_run(str(tmp_path / 'out'), 1)
    assert 0 <= figures.records_right(trained, f'{tmp_path}/copying', batches=1) < 0.5
    spread_out = figures.entropy(trained, batches=1)
    assert 0.95 < spread_out <= 1                               # a fresh model looks everywhere
    gpt, saved = reproduce.ckpt.load_model(str(tmp_path / 'out'))
    with torch.no_grad():
        saved['model']['transformer.h.0.attn.c_attn.weight'][:32] *= 1e4
    torch.save(saved, tmp_path / 'out/ckpt.pt')
    assert figures.entropy(trained, batches=1) < 0.2


def test_a_run_that_was_resumed(tmp_path):
    lines = [{'config': {}}, {'iter': 0, 'val_loss': 5.0, 'accuracy': 0.1}, *({'iter': n, 'loss': 1.0, 'seconds': s}
             for n, s in enumerate([1.0, 7.0, 2.0, 4.0])), {'iter': 4, 'val_loss': 3.0, 'accuracy': 0.5}, {'iter': 8, 'val_loss': 2.0, 'accuracy': 0.9}]
    (tmp_path / 'log.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    read = runs.read_run(str(tmp_path), 8)
    assert read.seconds == 11 and read.memory == []
    assert (read.crossing('val_loss', 4.0), read.crossing('val_loss', 2.0), read.crossing('val_loss', 1.0)) == (2, 8, None)
    assert read.crossing('accuracy', 0.3) == pytest.approx(2) and read.crossing('accuracy', 0.95) is None


def test_ctrl_c_starts_no_other_run(claim, tmp_path):
    runner, started = runs.Runner(reproduce.ReproduceConfig(workers=1), 'small'), []

    def work(name):
        started.append(name)
        if name == 'b':
            raise KeyboardInterrupt
        return name.upper()
    assert runner.each(work, ['a', 'c']) == ['A', 'C']
    with pytest.raises(KeyboardInterrupt):
        runner.each(work, ['b', *'defghijklmnop'])
    assert len(started) < 8


def test_sigterm_is_passed_on():
    with concurrent.futures.ThreadPoolExecutor() as pool:
        running = pool.submit(runs.command, ['-c', 'import time; time.sleep(60)'])
        wait_until(lambda: runs.RUNNING)
        with pytest.raises(KeyboardInterrupt):
            runs.stop()
        with pytest.raises(settings.UserError):
            running.result(timeout=30)
    assert not runs.RUNNING


def test_data_sets_are_what_their_settings_say(run, tmp_path):
    runner = runs.Runner(reproduce.ReproduceConfig(data_dir=str(tmp_path)), 'small')
    folder = reproduce.task_data(runner, 'copying', records=40)
    assert reproduce.task_data(runner, 'copying', records=40) == folder
    args = {'standard': ''}, 'config/tasks.py', 2, [*TINY, '--block_size=64', f'--dataset={folder}']
    runner.folder, runner.seeds = str(tmp_path / 'out'), 1
    assert runner.train(*args) == runner.train(*args)           # the second one finds the first, though records have no BOS
    run(tasks, 'copying', f'--data_dir={tmp_path}', '--records=40', f'--name={os.path.basename(folder)}', '--length=3')
    with pytest.raises(settings.UserError, match='other settings'):
        reproduce.task_data(runner, 'copying', records=40)


def test_searches(tmp_path, monkeypatch):
    """Unfinished ones are resumed, finished ones kept; a model that misses the target unpruned is left out."""
    ran = []
    monkeypatch.setattr(figures, 'command', ran.append)
    runner, one = runs.Runner(reproduce.ReproduceConfig(), 'small'), runs.Run(str(tmp_path), [], [], [], [], 0.0)
    for policy, held_out in ('selective', {'holds': {'saving': 4.0}}), ('oldest', {}), ('none', {'holds': None}):
        (tmp_path / f'{policy}.json').write_text(json.dumps({'held_out': held_out}))
    policies = 'selective', 'oldest', 'random', 'none'
    jobs = [(one, policy, ['--tolerance=0.01'], f'{policy}.json') for policy in policies]
    figures.search(runner, jobs, 64)
    assert sorted(args[3] for args in ran) == ['--policy=oldest', '--policy=random']
    assert [figures.saving(f'{policy}.json')([one]) for policy in policies] == ['4.0x', 'never', 'never', 'never']

    def fails(args):
        raise settings.UserError('prune.py: the loss is above the target: ' + words)
    monkeypatch.setattr(figures, 'command', fails)
    words = prune.ABOVE                     # tests/test_prune.py has prune.py say it
    figures.search(runner, jobs, 64)
    words = 'something else'
    with pytest.raises(settings.UserError, match='something else'):
        figures.search(runner, jobs, 64)


def test_equal_memory(monkeypatch):
    """Each loss stands in its column, and the controls see as many tokens as the model that keeps the least."""
    asked = []

    def token_losses(run, windows, budgets=None, policy='selective', rule=None):
        asked.append((run.folder, budgets, policy, rule))
        return types.SimpleNamespace(mean=lambda kind=None, n=len(asked) - 1: n)
    kept = {'a': [8, 4], 'b': [2, 5]}
    monkeypatch.setattr(figures, 'token_losses', token_losses)
    monkeypatch.setattr(figures, 'search', lambda *args: None)
    monkeypatch.setattr(figures, 'holds', lambda run, file: run.folder in kept and {
        'budgets': kept[run.folder], 'saving': 3.0 if 'selective' in file else 2.0})
    runner = types.SimpleNamespace(cfg=reproduce.ReproduceConfig(), seeds=1, train=lambda models, *args, **more: {
        name: [types.SimpleNamespace(folder=flags)] for name, flags in models.items()})
    runs = {name: [types.SimpleNamespace(folder=name)] for name in ('standard', 'a', 'b', 'c')}
    text = figures.equal_memory(runner, 16, runs, points := {}, [])
    header, _, *rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in text.splitlines()[2:]]
    found = {(row[0], column): asked[int(float(cell.split('/')[0]))] for row in rows
             for column, cell in zip(header[4:], row[4:]) if cell}
    whole, age, chance = (None, 'selective', None), 'oldest', 'random'
    assert found == {
        **{(name, 'all of its context'): (name, *whole) for name in runs},
        ('ALiBi', 'all of its context'): ('alibi --selective', *whole),
        **{(name, column): (run or name, budgets, policy, None) for name, budgets in kept.items() for column, run, policy in
           [('by F', '', 'selective'), ('newest', '', age), ('random', '', chance), ('standard, newest', 'standard', age)]},
        ('b', 'trained on as many'): ('window=4 --selective', *whole),
        ('b', 'ALiBi, newest'): ('alibi --selective', None, 'selective', 'alibi=4')}
    assert [row[:4] for row in rows] == [['standard', '', '', ''], ['a', '8 4', '3.0x', '2.0x'], ['b', '2 5', '3.0x', '2.0x'],
                                         ['c', 'above the loss of standard', 'none', 'none'], ['ALiBi', '', '', '']]
    assert points == {'a': {16: [6]}, 'a, newest': {16: [6]}, 'b': {16: [3.5]}, 'b, newest': {16: [3.5]}}


def test_kinds_of_targets():
    """Against loops: new, among the newest, farther back."""
    tokens = torch.randint(9, (3, 41), generator=torch.Generator().manual_seed(0))
    x, y = tokens[:, :-1], tokens[:, 1:]
    found = figures.kinds(x, y, near=5)
    for b in range(3):
        for t in range(40):
            seen = x[b, :t + 1].tolist()
            kind = 'new' if y[b, t] not in seen else 'near' if y[b, t] in seen[-5:] else 'recall'
            assert figures.KINDS[found[b, t]] == kind
    assert set(found.flatten().tolist()) == {0, 1, 2}


def test_losses_of_kinds():
    g = torch.Generator().manual_seed(0)
    losses = figures.Losses(torch.rand(3, 40, generator=g), torch.randint(3, (3, 40), generator=g))
    assert losses.mean() == pytest.approx(losses.nats.mean())
    assert losses.mean() == pytest.approx(sum(losses.mean(kind) * losses.of(kind).mean() for kind in figures.KINDS))
    assert losses.mean('recall') == pytest.approx(losses.nats[losses.kinds == 2].mean())
    worse = figures.Losses(losses.nats + 0.5 * (losses.kinds == 2), losses.kinds)
    assert worse.against(losses, 'recall') == '+0.5000 [+0.5000, +0.5000]'
    assert losses.against(losses) == worse.against(losses, 'near') == '+0.0000 [+0.0000, +0.0000]'
    assert figures.mean_over_seeds([losses, worse]).mean() == pytest.approx(figures.mean_of([losses, worse]))
    other = figures.Losses(torch.rand(3, 40, generator=g), losses.kinds)        # seeds make no windows, nor intervals narrower
    assert figures.mean_over_seeds([other] * 3).against(losses) == other.against(losses)


def test_table_of_kinds():
    """Two seeds: the rows of the base and of another model, which is better on recall tokens alone."""
    base = [figures.Losses(torch.full((4, 10), nats), torch.arange(10).remainder(3).expand(4, 10)) for nats in (1.0, 1.2)]
    better = [figures.Losses(one.nats - 0.1 * (one.kinds == 2), one.kinds) for one in base]
    one = [runs.Run('x', [], [], [], [], 60.0)] * 2
    rows = figures.kinds_table('model', {'standard': '', 'other': '--flag'}, {'standard': one, 'other': list(one)},
                               {'standard': base, 'other': better}).splitlines()
    assert 'new (40%) | near (30%) | recall (30%)' in rows[0]
    assert rows[2].startswith('| standard |  | 1.1000 ± 0.1414 |  | ')
    assert rows[3].startswith('| other | `--flag` | 1.0700 ± 0.1414 | -0.0300 [-0.0300, -0.0300] | ')
    assert '| -0.1000 [-0.1000, -0.1000] | 1.0 |' in rows[3]


def test_token_losses(run, dataset, tmp_path):
    """Under a budget and with the rule that a run was trained with."""
    args = [*TINY, dataset, '--selective', '--rope', '--max_iters=4']
    run(ablate, 'window=4', *args, f'--out_dir={tmp_path}/window=4-x')
    run(train, *args, f'--out_dir={tmp_path}/plain')
    window, plain = (runs.read_run(str(tmp_path / name), 4) for name in ('window=4-x', 'plain'))
    assert (figures.rule_of(window.folder), figures.rule_of(plain.folder)) == ('window=4', None)
    losses = figures.token_losses(window, 6)
    assert losses.nats.shape == losses.kinds.shape == (6, 12)
    pruned = figures.token_losses(window, 6, [4], 'oldest')         # the same tokens; the votes are tiny
    torch.testing.assert_close(pruned.nats, losses.nats, atol=1e-3, rtol=0)
    assert not torch.allclose(figures.token_losses(plain, 6).nats, losses.nats)
    assert figures.position_part([plain]) == '' and figures.new_parameters(plain) == 0


def test_a_text_of_ones_own_has_its_own_section():
    cfg = reproduce.ReproduceConfig(dataset='mine')
    assert reproduce.title(cfg, reproduce.gate) == 'gate mine' and reproduce.title(cfg, reproduce.passkey) == 'passkey'
    assert reproduce.title(reproduce.ReproduceConfig(), reproduce.gate) == 'gate'
    page = reproduce.section(reproduce.section('# R', 'gate', 'a'), 'gate mine', 'b')
    assert '<!-- lab.reproduce gate -->\na\n' in page and '<!-- lab.reproduce gate mine -->\nb\n' in page


def test_list_and_refusals(run):
    out = run(reproduce, '--list')
    assert all(claim.__name__ in out for claim in reproduce.CLAIMS)
    assert 'which claims' in run(reproduce) and 'nothing is no claim' in run(reproduce, 'nothing')
    assert 'not in the range 1 to 100' in run(reproduce, 'gate', '--seeds=0')
    for wrong in '--windows=1', '--windows=16,', '--contexts=x', '--contexts=31':
        assert f'{wrong}: numbers of' in run(reproduce, 'gate', wrong)
    assert '--to=nowhere.md: No such file' in run(reproduce, 'gate', '--to=nowhere.md')
