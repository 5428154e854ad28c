"""lab/reproduce.py and lab/runs.py: runs that end in a section of a page."""

import concurrent.futures
import json
import re
import time
import types

import pytest
import torch

import data
import prune
import train
from conftest import wait_until
from lab import ablate, reproduce, runs, tasks
from lab.runs import Losses, Run
from support import settings

TINY = ['--n_layer=1', '--n_head=4', '--n_embd=16', '--block_size=12', '--batch_size=4']
TINY += ['--eval_interval=4', '--eval_iters=1', '--gradient_accumulation_steps=1', '--device=cpu']
MODELS = {'standard': '', 'no ReLU': 'no_relu --selective'}


@pytest.fixture
def runner(tmp_path):
    cfg = reproduce.ReproduceConfig(out_dir=f'{tmp_path}/runs', data_dir=str(tmp_path), workers=1)
    return runs.Runner(cfg, 'small')


# ---- The page ------------------------------------------------------------------------------------


def test_section():
    page = reproduce.section('# Results\n', 'gate', 'first')
    both = reproduce.section(page, 'gate mine', 'second')
    assert both.startswith(page) and '<!-- lab.reproduce gate mine -->\nsecond\n' in both
    assert reproduce.section(both, 'gate', 'third') == both.replace('first', 'third')
    with pytest.raises(settings.UserError, match='end of gate'):
        reproduce.section(page.replace('<!-- end of gate -->', ''), 'gate', 'x')


@pytest.mark.parametrize(
    'values, form, text',
    [
        ([1.0, 2.0, 3.0], '{:.1f}', '2.0 ± 1.0'),
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
        (['--list'], 'Takes 40 minutes'),
        ([], 'Takes 40 minutes'),
        (['nothing'], "'nothing' is not one of 'gate'"),
        (['gate', '--windows=1'], '--windows: 1 is not in the range 2 to'),
        (['headline', '--contexts=64,'], "--contexts: '' is not a whole number"),
        (['headline', '--contexts=31'], '--contexts: 31 is not in the range 32 to'),
    ],
)
def test_messages(run, tmp_path, args, words):
    page = tmp_path / 'page.md'
    page.touch()
    assert words in run(reproduce, f'--to={page}', *args)


# ---- Runs ----------------------------------------------------------------------------------------


@pytest.fixture
def claim(monkeypatch, dataset, tmp_path):
    """reproduce.py with one small claim; the commands that it ran are in the list returned.

    They run in this process, one after the other.
    """

    def small(r):
        """A small claim."""
        arms = r.train(MODELS, 8, ['config/base_small.py', *TINY, dataset])
        return runs.kinds_table(r, 'model', arms), r.curves(arms)

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
        for job in jobs:
            function(*job)

    ran = []
    monkeypatch.setattr(runs, 'command', command)
    monkeypatch.setattr(runs.Runner, 'each', each)
    monkeypatch.setitem(reproduce.CLAIMS, 'gate', small)
    (tmp_path / 'page.md').write_text('# Results\n\nsome words\n')
    return ran


def test_a_claim(run, claim, tmp_path):
    page = tmp_path / 'page.md'
    args = ['gate', '--seeds=2', '--dataset=mine', f'--out_dir={tmp_path}/runs', f'--to={page}']
    run(reproduce, *args)
    text = page.read_text()
    figure = r'-?\d\.\d{4} ± \d\.\d{4}'
    zero = r'\+0\.0000 \[\+0\.0000, \+0\.0000\]'
    assert re.search(rf'\| standard \|  \| {figure} \| {zero} \|.*\|  \|', text)
    assert re.search(r'\| no ReLU \| `no_relu --selective` \|.*\| \d+\.\d% ± \d\.\d% \|', text)
    assert len(re.findall(zero, text)) == 1 and 'recall (0%)' in text
    assert text.startswith('# Results\n\nsome words\n\n<!-- lab.reproduce gate mine -->')
    assert '--seeds=2' in text and 'python train.py config' in text
    assert (tmp_path / 'results/gate_mine.png').exists()
    run(reproduce, *args)  # nothing is trained again, and the page is the same
    assert len(claim) == 4 and page.read_text() == text
    log = next(tmp_path.glob('runs/*/log.jsonl'))
    log.write_text(''.join(log.read_text().splitlines(keepends=True)[:-1]))  # as if stopped there
    run(reproduce, *args)
    assert '--init_from=resume' in claim.pop()


def test_quick_leaves_the_page(run, claim, tmp_path):
    args = ['--quick', '--steps=4', f'--out_dir={tmp_path}/runs', f'--to={tmp_path}/page.md']
    assert '| standard |' in run(reproduce, 'gate', *args)
    assert len(claim) == 2
    assert (tmp_path / 'page.md').read_text() == '# Results\n\nsome words\n'


@pytest.mark.slow
def test_processes(runner, dataset):
    """The real thing: runs side by side, and one that cannot start."""
    runner.cfg.workers = 2
    arms = runner.train(MODELS, 4, ['config/base_small.py', *TINY, dataset], seeds=[1])
    assert [len(arm.runs[0].evaluations) for arm in arms.values()] == [2, 2]


def test_another_config_file_is_another_run(runner, tmp_path):
    config = tmp_path / 'config.py'
    folders = set()
    for text in 'n_head = 2', 'n_head = 4', 'n_head = 4  # as many':
        config.write_text(text)
        folders.add(runner.folder_of('', [str(config), '--seed=1']))
    assert len(folders) == 2


def test_evaluations(monkeypatch):
    lines = [{'iter': 0, 'val_loss': 5.0}, {'iter': 4, 'val_loss': 3.0}]
    monkeypatch.setattr(Run, 'evaluations', [*lines, {'iter': 8, 'val_loss': 2.0}])
    arm = runs.Arm('', '', [Run('')])
    assert arm.last('memory') == []
    assert arm.first(lambda line: line['val_loss'] <= 4) == [4]
    assert arm.first(lambda line: line['val_loss'] <= 1) == [None]


def test_ctrl_c_starts_no_other_run(runner):
    started = []

    def work(n):
        started.append(n)
        time.sleep(0.05)
        if n == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.each(work, [(n,) for n in range(20)])
    assert len(started) < 8


def test_commands(runner):
    """One that fails is named; SIGTERM is passed on."""
    with pytest.raises(settings.UserError, match='python -c .*: what is wrong'):
        runs.command(['-c', 'print(1); raise SystemExit("what is wrong")'])
    with concurrent.futures.ThreadPoolExecutor() as pool:
        running = pool.submit(runs.command, ['-c', 'import time; time.sleep(60)'])
        wait_until(lambda: runs.RUNNING)
        with pytest.raises(KeyboardInterrupt):
            runs.stop()
        with pytest.raises(settings.UserError):
            running.result(timeout=30)


def test_data_sets_are_what_their_settings_say(runner, run, tmp_path):
    folder = f'{tmp_path}/claims_copying_records_40'
    run(tasks, 'copying', f'--data_dir={tmp_path}', '--name=claims_copying_records_40')
    for _ in range(2):
        assert reproduce.task_data(runner, 'copying', records=40) == folder
        assert data.Dataset(folder).tokens('train') == 40 * 50


# ---- What is measured ----------------------------------------------------------------------------


@pytest.mark.parametrize('wrong', [0, 1])
def test_records_right(run, tmp_path, monkeypatch, wrong):
    """Of two letters, of which the second is wrong."""

    def model(x, y):
        y = y.clamp(min=0)
        y[:, -1] += wrong
        return torch.nn.functional.one_hot(y), None

    model.config = types.SimpleNamespace(block_size=5)
    run(tasks, 'copying', f'--data_dir={tmp_path}', '--records=2000', '--length=2')
    monkeypatch.setattr(runs, 'load', lambda run: (model, None))
    assert runs.records_right(Run(''), f'{tmp_path}/copying') == 1 - wrong


def test_token_losses(run, dataset, tmp_path):
    """Under a budget and with the rule that a run was trained with."""
    folder = f'--out_dir={tmp_path}'
    run(ablate, 'window=4', *TINY, dataset, '--selective', '--rope', '--max_iters=4', folder)
    losses = runs.token_losses(Run(str(tmp_path), 'window=4'), 6)
    assert losses.nats.shape == (1, 341, 12) and losses.kinds.shape == (341, 12)
    plain = Run(str(tmp_path))
    pruned = runs.token_losses(plain, 6, [4], 'oldest')  # the same tokens; the votes are tiny
    torch.testing.assert_close(pruned.nats, losses.nats, atol=1e-3, rtol=0)
    whole = runs.token_losses(plain, 6)
    assert not torch.allclose(whole.nats, losses.nats, atol=1e-3)


def test_kinds_of_targets():
    """new, near: among the newest three, and recall: farther back."""
    x = torch.tensor([[1, 2, 1, 3, 4, 5], [7, 7, 7, 7, 7, 8]])
    y = torch.tensor([[2, 1, 3, 4, 1, 1], [7, 7, 7, 7, 8, 7]])
    kinds = torch.tensor([[0, 1, 0, 0, 1, 2], [1, 1, 1, 1, 0, 1]])
    assert torch.equal(runs.kinds_of(x, y, near=3), kinds)


def test_losses_of_kinds():
    g = torch.Generator().manual_seed(0)
    kinds = torch.randint(3, (3, 40), generator=g)
    nats = torch.rand(2, 3, 40, generator=g)  # of two seeds
    losses = Losses(nats, kinds)
    expected = [pytest.approx(of_seed[kinds == 2].mean()) for of_seed in nats]
    assert losses.means('recall') == expected
    worse = Losses(nats + 0.5 * (kinds == 2), kinds)
    assert worse.against(losses, 'recall') == '+0.5000 [+0.5000, +0.5000]'
    assert worse.against(losses, 'near') == '+0.0000 [+0.0000, +0.0000]'


def test_searches(runner, tmp_path, monkeypatch):
    """Unfinished ones are resumed, finished ones kept; a model above the target is left out."""
    ran = []

    def command(args):
        ran.append(args[4])
        raise settings.UserError(f'prune.py: the loss {prune.ABOVE}')  # see tests/test_prune.py

    monkeypatch.setattr(runs, 'command', command)
    one = Run(str(tmp_path))
    for policy, held_out in ('selective', {'holds': {'saving': 4.0}}), ('oldest', {}):
        (tmp_path / f'budgets_{policy}.json').write_text(json.dumps({'held_out': held_out}))
    policies = 'selective', 'oldest', 'random'
    runs.search(runner, [(one, policy, '--tolerance=0.01') for policy in policies], 64)
    assert ran == ['--policy=oldest', '--policy=random']
    assert [reproduce.savings([one], policy) for policy in policies] == ['4.0x', '', '']


def test_equal_memory(runner, monkeypatch):
    """Each loss is in its column, and the control sees as many tokens as the model keeps."""
    calls = [None]

    def token_losses(run, windows, *how):
        calls.append([run.folder, run.rule, *how])
        return Losses(torch.full((1, 1, 1), len(calls) - 1.0), torch.tensor([[2]]))

    def holds(run, policy):
        if run.folder == 'a':
            return {'budgets': budgets, 'saving': len(policy)}

    def train(models, *args, **options):
        return {'window': runs.Arm('', '', [Run(models['window'])])}

    monkeypatch.setattr(runs, 'token_losses', token_losses)
    monkeypatch.setattr(reproduce, 'holds', holds)
    monkeypatch.setattr(reproduce, 'text', lambda r, T: [])
    runner.train = train
    budgets = [2, 6]
    some = {name: Run(name) for name in ('standard', 'ALiBi', 'a')}
    *_, other, row = reproduce.rows_of_seed(runner, 16, 1, some)
    expected = {
        'all of its context': ['a', ''],
        'by F': ['a', '', budgets],
        'newest': ['a', '', budgets, 'oldest'],
        'random': ['a', '', budgets, 'random'],
        'standard, newest': ['standard', '', budgets, 'oldest'],
        'ALiBi, newest': ['ALiBi', 'alibi=4'],
        'trained on as many': ['window=4 --selective', ''],
    }
    found = {header: calls[int(row[header][0])] for header in expected}
    assert found == expected and list(row)[:5] == list(other)
    assert (row['kept by F'], row['saving by F'], row['saving by age']) == ('2 6', '9.0x', '6.0x')
