"""lab/reproduce.py and lab/runs.py: runs that end in a section of a page."""

import concurrent.futures
import json
import re
import types

import pytest
import torch

import prune
import train
from conftest import wait_until
from lab import ablate, reproduce, runs, tasks
from lab.runs import Losses
from support import checkpoint as ckpt
from support import settings

TINY = ['--n_layer=1', '--n_head=4', '--n_embd=16', '--block_size=12', '--batch_size=4']
TINY += ['--eval_interval=4', '--eval_iters=1', '--gradient_accumulation_steps=1', '--device=cpu']
MODELS = {'standard': '', 'no ReLU': 'no_relu --selective'}


def runner_of(tmp_path, **options):
    cfg = reproduce.ReproduceConfig(
        out_dir=f'{tmp_path}/runs', data_dir=str(tmp_path), to=f'{tmp_path}/page.md', **options
    )
    return runs.Runner(cfg, 'small', 'small')


def run_of(folder='', rule='', evaluations=(), seconds=60.0):
    return runs.Run(str(folder), rule, list(evaluations), seconds)


# ---- The page ------------------------------------------------------------------------------------


def test_section():
    page = reproduce.section('# Results\n', 'gate', 'first')
    both = reproduce.section(page, 'gate mine', 'second')
    assert both.startswith(page) and '<!-- lab.reproduce gate mine -->\nsecond\n' in both
    assert reproduce.section(both, 'gate', 'third') == both.replace('first', 'third')
    with pytest.raises(settings.UserError, match='end of gate'):
        reproduce.section(page.replace('<!-- end of gate -->', ''), 'gate', 'x')


@pytest.mark.parametrize(
    'dataset, name, title',
    [('mine', 'gate', 'gate mine'), ('mine', 'passkey', 'passkey'), ('stdlib', 'gate', 'gate')],
)
def test_a_text_of_ones_own_has_its_own_section(dataset, name, title):
    assert reproduce.title(reproduce.ReproduceConfig(dataset=dataset), name) == title


@pytest.mark.parametrize(
    'values, form, text',
    [
        ([1.0, 2.0, 3.0], '{:.1f}', '2.0 ± 1.0'),
        ([0.5], '{:.0%}', '50%'),
        ([1.0, None], '{:.0f}', '1 (1 of 2 seeds)'),
        ([None, None], '{:.4f}', 'never'),
        ([], '{:.4f}', ''),
    ],
)
def test_spread(values, form, text):
    assert runs.spread(values, form) == text


@pytest.mark.parametrize(
    'args, words',
    [
        ([], 'which claims'),
        (['nothing'], "'nothing' is not one of 'gate'"),
        (['gate', '--seeds=0'], 'not in the range 1 to 100'),
        (['gate', '--windows=1'], '--windows=1: numbers of 2'),
        (['gate', '--windows=16,'], '--windows=16,: numbers of 2'),
        (['headline', '--contexts=x'], '--contexts=x: numbers of 32'),
        (['headline', '--contexts=31'], '--contexts=31: numbers of 32'),
    ],
)
def test_refusals(run, tmp_path, args, words):
    page = tmp_path / 'page.md'
    page.touch()
    assert words in run(reproduce, f'--to={page}', *args)


def test_list(run):
    out = run(reproduce, '--list')
    assert all(name in out for name in reproduce.CLAIMS) and '40 minutes' in out


# ---- Runs ----------------------------------------------------------------------------------------


@pytest.fixture
def claim(monkeypatch, dataset, tmp_path):
    """reproduce.py with one small claim; the commands that it ran are in the list returned.

    They run in this process, one after the other.
    """

    def small(r):
        """A small claim."""
        arms = r.train(MODELS, 8, 8, ['config/base_small.py', *TINY, dataset])

        def cells(arm):
            memory = runs.spread(arm.last('memory'), '{:.0%}')
            return {'loss': runs.spread(arm.last('val_loss')), 'memory': memory}

        return runs.table('model', arms, cells), r.curves(arms)

    def command(args):
        ran.append(args)
        script = train
        if args[0] == '-m':
            script = ablate
            args = args[1:]
        with monkeypatch.context() as patch:
            patch.setattr('sys.argv', args)
            script.main()

    def each(self, function, jobs):
        return {path: function(path, *arguments) for path, arguments in jobs.items()}

    ran = []
    monkeypatch.setattr(runs, 'command', command)
    monkeypatch.setattr(runs.Runner, 'each', each)
    monkeypatch.setitem(reproduce.CLAIMS, 'gate', small)
    (tmp_path / 'page.md').write_text('# Results\n\nsome words\n')
    return ran


def test_a_claim(run, claim, tmp_path):
    args = ['gate', '--seeds=2', f'--out_dir={tmp_path}/runs', f'--to={tmp_path}/page.md']
    run(reproduce, *args)
    page = (tmp_path / 'page.md').read_text()
    row = r'\| {} \| .* \| \d\.\d{{4}} ± \d\.\d{{4}} \| {} \| 0\.\d \|'
    assert re.search(row.format('standard', ''), page)
    assert re.search(row.format('no ReLU', r'\d+% ± \d+%'), page)
    assert page.startswith('# Results\n\nsome words\n') and '--seeds=2' in page
    assert 'python train.py config/base_small.py' in page and '--max_iters=8' in page
    assert (tmp_path / 'results/gate.png').read_bytes().startswith(b'\x89PNG')
    folders = sorted((tmp_path / 'runs').iterdir())
    assert len(claim) == len(folders) == 4

    run(reproduce, *args)  # nothing is trained again, and the page is the same
    assert len(claim) == 4 and (tmp_path / 'page.md').read_text() == page

    log = folders[0] / 'log.jsonl'
    lines = log.read_text().splitlines(keepends=True)
    log.write_text(''.join(lines[:-1]))  # as if stopped before its last evaluation
    assert runs.read_run(folders[0], '', 8) is None
    assert len(runs.read_run(folders[0], '', 4).evaluations) == 2
    run(reproduce, *args)
    assert '--init_from=resume' in claim[-1]


def test_quick_writes_no_page(run, claim, tmp_path):
    args = ['--quick', f'--out_dir={tmp_path}/runs', f'--to={tmp_path}/page.md']
    assert '| standard |' in run(reproduce, 'gate', *args)
    assert len(claim) == 2 and not (tmp_path / 'results').exists()
    assert (tmp_path / 'page.md').read_text() == '# Results\n\nsome words\n'


@pytest.mark.slow
def test_processes(run, dataset, tmp_path):
    """The real thing: runs side by side, and one that cannot start."""
    r = runner_of(tmp_path, workers=2)
    arms = r.train(MODELS, 4, 4, ['config/base_small.py', *TINY, dataset])
    assert [len(arm.runs[0].evaluations) for arm in arms.values()] == [2, 2]
    with pytest.raises(settings.UserError, match="train.py .* data set 'nowhere'"):
        r.train({'standard': ''}, 8, 8, ['config/base_small.py', '--dataset=nowhere'])


def test_a_command_that_fails_is_named():
    with pytest.raises(settings.UserError, match='python -c .*: what is wrong'):
        runs.command(['-c', 'print(1); raise SystemExit("what is wrong")'])


def test_another_config_file_is_another_run(tmp_path):
    r = runner_of(tmp_path)
    config = tmp_path / 'config.py'
    folders = set()
    for text in 'n_head = 2', 'n_head = 4', 'n_head = 4  # as many':
        config.write_text(text)
        folders.add(r.folder_of('', [str(config), '--seed=1']))
    assert len(folders) == 2


def test_a_run_that_was_resumed(tmp_path):
    lines = [{'config': {}}, {'iter': 0, 'val_loss': 5.0, 'accuracy': 0.1}]
    lines += [{'iter': 1, 'loss': 1.0, 'seconds': s} for s in (1.0, 7.0, 2.0, 4.0)]
    lines += [{'iter': 4, 'val_loss': 3.0, 'accuracy': 0.5}]
    lines += [{'iter': 8, 'val_loss': 2.0, 'accuracy': 0.9}]
    (tmp_path / 'log.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    read = runs.read_run(str(tmp_path), '', 8)
    assert read.seconds == 11 and runs.Arm('', '', [read]).last('memory') == []
    for name, goal, step in [
        ('val_loss', 4.0, 2),
        ('val_loss', 2.0, 8),
        ('val_loss', 1.0, None),
        ('accuracy', 0.3, 2),
        ('accuracy', 0.95, None),
    ]:
        assert read.crossing(name, goal) == (step and pytest.approx(step))


def test_ctrl_c_starts_no_other_run(tmp_path):
    runner = runner_of(tmp_path, workers=1)
    started = []

    def work(path, name):
        started.append(name)
        if name == 'stop':
            raise KeyboardInterrupt
        return name.upper()

    assert runner.each(work, {'1': ('a',), '2': ('c',)}) == {'1': 'A', '2': 'C'}
    jobs = {str(n): (str(n),) for n in range(20)}
    with pytest.raises(KeyboardInterrupt):
        runner.each(work, {'first': ('stop',), **jobs})
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
    r = runner_of(tmp_path)
    folder = reproduce.task_data(r, 'copying', records=40)
    assert reproduce.task_data(r, 'copying', records=40) == folder
    name = f'--name={folder.rpartition("/")[2]}'
    run(tasks, 'copying', f'--data_dir={tmp_path}', '--records=40', name, '--length=3')
    with pytest.raises(settings.UserError, match='other settings'):
        reproduce.task_data(r, 'copying', records=40)


# ---- What is measured ----------------------------------------------------------------------------


def test_records_right_and_entropy(run, tmp_path):
    data = f'{tmp_path}/copying'
    run(tasks, 'copying', f'--data_dir={tmp_path}', '--records=700', '--length=2')
    args = [*TINY, f'--dataset={data}', '--max_iters=1', '--ssa=qv']
    run(train, *args, f'--out_dir={tmp_path}/out')
    trained = run_of(tmp_path / 'out')
    assert 0 <= runs.records_right(trained, data, batches=1) < 0.5
    assert 0.95 < runs.entropy(trained, batches=1) <= 1  # a fresh model looks everywhere
    part = runs.position_part(runs.Arm('', '', [trained]))
    assert [float(word) for word in part.split(' to ')] == [pytest.approx(0.018, abs=1e-3)] * 2
    saved = ckpt.load(tmp_path / 'out')
    saved['model']['transformer.h.0.attn.c_attn.weight'][:32] *= 1e4
    ckpt.save(tmp_path / 'out', saved)
    assert runs.entropy(trained, batches=1) < 0.2


def test_token_losses(run, dataset, tmp_path):
    """Under a budget and with the rule that a run was trained with."""
    folder = f'--out_dir={tmp_path}/window'
    run(ablate, 'window=4', *TINY, dataset, '--selective', '--rope', '--max_iters=4', folder)
    losses = runs.token_losses(run_of(tmp_path / 'window', 'window=4'), 6)
    assert losses.nats.shape == (1, 6, 12) and losses.kinds.shape == (6, 12)
    plain = run_of(tmp_path / 'window')
    asked = runs.token_losses(plain, 6, rule='window=4')
    torch.testing.assert_close(asked.nats, losses.nats)
    pruned = runs.token_losses(plain, 6, [4], 'oldest')  # the same tokens; the votes are tiny
    torch.testing.assert_close(pruned.nats, losses.nats, atol=1e-3, rtol=0)
    whole = runs.token_losses(plain, 6)
    assert not torch.allclose(whole.nats, losses.nats, atol=1e-3)
    assert runs.position_part(runs.Arm('', '', [plain])) == ''


def test_kinds_of_targets():
    """new, near: among the newest three, and recall: farther back."""
    x = torch.tensor([[1, 2, 1, 3, 4, 5], [7, 7, 7, 7, 7, 8]])
    y = torch.tensor([[2, 1, 3, 4, 1, 1], [7, 7, 7, 7, 8, 7]])
    kinds = [['new', 'near', 'new', 'new', 'near', 'recall'], ['near'] * 4 + ['new', 'near']]
    found = runs.kinds_of(x, y, near=3)
    assert [[runs.KINDS[kind] for kind in row] for row in found.tolist()] == kinds


def test_losses_of_kinds():
    g = torch.Generator().manual_seed(0)
    kinds = torch.randint(3, (3, 40), generator=g)
    some, other = torch.rand(2, 1, 3, 40, generator=g)
    losses = Losses(some, kinds)
    assert losses.means() == [pytest.approx(some.mean())]
    assert losses.means('recall') == [pytest.approx(some[0, kinds == 2].mean())]
    worse = Losses(some + 0.5 * (kinds == 2), kinds)
    assert worse.against(losses, 'recall') == '+0.5000 [+0.5000, +0.5000]'
    assert worse.against(losses, 'near') == '+0.0000 [+0.0000, +0.0000]'
    seeds = Losses(other.expand(3, -1, -1), kinds)
    assert seeds.against(losses) == Losses(other, kinds).against(losses)  # they make no windows


def test_table_of_kinds(tmp_path, monkeypatch):
    """Two seeds: the rows of the base and of another model, better on recall tokens alone."""
    kinds = torch.arange(10).remainder(3).expand(4, 10)

    def token_losses(run, windows):
        nats = torch.full((1, 4, 10), 1.0 if 'seed=1' in run.folder else 1.2)
        if 'other' in run.folder:
            nats = nats - 0.1 * (kinds == 2)
        return Losses(nats, kinds)

    monkeypatch.setattr(runs, 'token_losses', token_losses)
    arms = {}
    for name, flags in ('standard', ''), ('other', '--flag'):
        some = [run_of(f'{name} seed={n}', evaluations=[{}]) for n in (1, 2)]
        arms[name] = runs.Arm(name, flags, some)
    rows = runs.kinds_table(runner_of(tmp_path), 'model', arms).splitlines()
    assert 'new (40%) | near (30%) | recall (30%)' in rows[0]
    assert rows[2].startswith('| standard |  | 1.1000 ± 0.1414 |  | ')
    other = '| other | `--flag` | 1.0700 ± 0.1414 | -0.0300 [-0.0300, -0.0300] | '
    assert rows[3].startswith(other)
    assert '| -0.1000 [-0.1000, -0.1000] |  | 1.0 |' in rows[3]


def test_searches(tmp_path, monkeypatch):
    """Unfinished ones are resumed, finished ones kept; a model above the target is left out."""
    ran = []

    def command(args):
        ran.append(args[3])
        if words:
            raise settings.UserError(f'prune.py: the loss {words}')

    monkeypatch.setattr(runs, 'command', command)
    one = run_of(tmp_path)
    found = {'selective': {'holds': {'saving': 4.0}}, 'oldest': {}, 'none': {'holds': None}}
    for policy, held_out in found.items():
        path = tmp_path / f'budgets_{policy}_tolerance.json'
        path.write_text(json.dumps({'held_out': held_out}))
    jobs = [(one, policy, '--tolerance=0.01') for policy in (*found, 'random')]
    words = ''
    for text in '', prune.ABOVE:  # tests/test_prune.py has prune.py say it
        words = text
        ran.clear()
        runs.search(runner_of(tmp_path), jobs, 'tolerance', 64)
        assert sorted(ran) == ['--tolerance=0.01'] * 2
    words = 'something else'
    with pytest.raises(settings.UserError, match=words):
        runs.search(runner_of(tmp_path), jobs, 'tolerance', 64)
    assert runs.holds(one, 'selective', 'tolerance') == {'saving': 4.0}
    for policy in 'oldest', 'none', 'random':
        assert runs.holds(one, policy, 'tolerance') is None


class Told(str):
    """Text in the place of a number."""

    def __format__(self, form):
        return str(self)


def told(*words):
    return ' '.join(map(str, words))


def test_equal_memory(tmp_path, monkeypatch):
    """Each loss is in its column, and the controls see what the model keeps that keeps least."""
    budgets = {'a': [2, 5], 'b': [8, 4]}

    def token_losses(run, windows, budgets=None, policy='selective', rule=''):
        text = told(run.folder, budgets, policy, rule)
        return types.SimpleNamespace(means=lambda kind='all': [Told(f'{kind} {text}')])

    def holds(run, policy, goal):
        if run.folder in budgets:
            return {'budgets': budgets[run.folder], 'saving': len(policy)}
        return None

    def train(models, *args, **options):
        return {name: runs.Arm(name, flags, [run_of(flags)]) for name, flags in models.items()}

    def cell(*how):
        return f'all {told(*how)} / recall {told(*how)}'

    monkeypatch.setattr(runs, 'token_losses', token_losses)
    monkeypatch.setattr(reproduce, 'holds', holds)
    monkeypatch.setattr(reproduce, 'text', lambda *args: [])
    r = runner_of(tmp_path)
    r.train = train
    some = {name: run_of(name) for name in ('standard', 'a', 'b', 'c')}
    points = {}
    rows = reproduce.rows_of_seed(r, 16, 1, some, points)
    assert [row['model'] for row in rows] == ['standard', 'a', 'b', 'c', 'ALiBi']
    assert 'trained on as many' not in rows[2]
    assert rows[1] == {
        'model': 'a',
        'kept by F': '2 5',
        'saving by F': '9.0x',
        'saving by age': '6.0x',
        'all of its context': cell('a', None, 'selective', ''),
        'by F': cell('a', [2, 5], 'selective', ''),
        'newest': cell('a', [2, 5], 'oldest', ''),
        'random': cell('a', [2, 5], 'random', ''),
        'standard, newest': cell('standard', [2, 5], 'oldest', ''),
        'trained on as many': cell('window=4 --selective', None, 'selective', ''),
        'ALiBi, newest': cell('alibi --selective', None, 'selective', 'alibi=4'),
    }
    assert set(rows[1]) == set(reproduce.COLUMNS)
    assert (rows[3]['kept by F'], rows[3]['saving by F']) == ('above the loss of standard', 'none')
    kept = {'a, by F': 3.5, 'a, by age': 3.5, 'b, by F': 6, 'b, by age': 6}
    assert points == {name: {16: [tokens]} for name, tokens in kept.items()}
