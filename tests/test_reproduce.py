"""lab/reproduce.py, lab/runs.py and lab/real.py: runs that end in a page of tables."""

import concurrent.futures
import json
import re
import time
import types

import pytest
import torch

import data
import model as m
import prepare_text
import prune
import train
from conftest import wait_until
from lab import ablate, real, reproduce, runs, tasks
from lab.runs import Losses, Run
from support import checkpoint as ckpt, settings

TINY = ['--n_layer=1', '--n_head=4', '--n_embd=16', '--block_size=12', '--batch_size=4']
TINY += ['--eval_interval=4', '--eval_iters=1', '--gradient_accumulation_steps=1', '--device=cpu']
MODELS = {'standard': '', 'no ReLU': 'no_relu --selective'}


@pytest.fixture
def runner(tmp_path):
    cfg = reproduce.ReproduceConfig(out_dir=f'{tmp_path}/runs', data_dir=str(tmp_path), workers=1)
    return runs.Runner(cfg, 'small')


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
    assert words in run(reproduce, f'--to={tmp_path}', *args)
    assert not list(tmp_path.iterdir())


# ---- Runs ----------------------------------------------------------------------------------------


@pytest.fixture
def commands(monkeypatch):
    """The commands of lab/runs.py, which run in this process, one after the other."""

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
    return ran


def test_a_claim(run, commands, dataset, tmp_path, monkeypatch):
    def small(r):
        arms = r.train(MODELS, 8, ['config/base_small.py', *TINY, dataset])
        return runs.kinds_table(r, 'model', arms), r.curves(arms)

    monkeypatch.setitem(reproduce.CLAIMS, 'gate', small)
    args = ['gate', '--dataset=mine', f'--out_dir={tmp_path}/runs', f'--to={tmp_path}']
    run(reproduce, *args, '--seeds=2')
    page = tmp_path / 'gate_mine.md'
    text = page.read_text()
    figure = r'-?\d\.\d{4} ± \d\.\d{4}'
    zero = r'\+0\.0000 \[\+0\.0000, \+0\.0000\]'
    assert re.search(rf'\| standard \|  \| {figure} \| {zero} \|.*\|  \|', text)
    assert re.search(r'\| no ReLU \| `no_relu --selective` \|.*\| \d+\.\d% ± \d\.\d% \|', text)
    assert len(re.findall(zero, text)) == 1 and 'recall (0%)' in text
    assert text.startswith('# gate_mine\n') and '![gate_mine](gate_mine.png)' in text
    assert '--seeds=2' in text and 'python train.py config' in text
    assert (tmp_path / 'gate_mine.png').exists()
    run(reproduce, *args, '--seeds=2')  # nothing is trained again, and the page is the same
    assert len(commands) == 4 and page.read_text() == text
    log = next(tmp_path.glob('runs/*/log.jsonl'))
    log.write_text(''.join(log.read_text().splitlines(keepends=True)[:-1]))  # as if stopped there
    run(reproduce, *args, '--quick', '--steps=8')  # a version of its own
    assert len(commands) == 6 and page.read_text() == text
    assert (tmp_path / 'runs/quick/gate_mine.md').exists()
    run(reproduce, *args, '--seeds=2')
    assert '--init_from=resume' in commands.pop()


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
    arm = runs.Arm('', [Run('')])
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
    args = [f'--data_dir={tmp_path}', '--name=claims_passkey_records_40', '--records=20']
    run(tasks, 'passkey', *args)
    for _ in range(2):
        folder = reproduce.task_data(runner, 'passkey', records=40)
        assert data.Dataset(folder).tokens('train') == 40 * 75


# ---- What is measured ----------------------------------------------------------------------------


@pytest.mark.parametrize('wrong', [0, 1])
def test_records_right(run, tmp_path, monkeypatch, wrong):
    """Of five digits, of which the last is wrong."""

    def model(x, y):
        y = y.clamp(min=0)
        y[:, -1] += wrong
        return torch.nn.functional.one_hot(y), None

    model.config = types.SimpleNamespace(block_size=20)
    run(tasks, 'passkey', f'--data_dir={tmp_path}', '--records=2000', '--length=1')
    monkeypatch.setattr(runs, 'load', lambda run: (model, None))
    assert runs.records_right(Run(''), f'{tmp_path}/passkey') == 1 - wrong


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
    runs.search(runner, [(one, policy, 'other') for policy in policies], 64)
    assert ran == ['--policy=oldest', '--policy=random']
    assert [runs.holds(one, policy) for policy in policies] == [{'saving': 4.0}, None, None]


TABLE = """\
| standard, seed 1 |  |  |  | standard |  |  |  |  |  |  |
| ALiBi, seed 1 |  |  |  | ALiBi |  |  |  |  |  |  |
| a, seed 1 | 2 6 | 9.0x | 6.0x | a | a K | a K oldest | a K random | standard K oldest \
| ALiBi alibi=4 | window=4 --selective |"""


def test_equal_memory(runner, monkeypatch):
    """Each loss is in its column, and the control sees as many tokens as the model keeps."""
    budgets = [2, 6]

    def token_losses(run, windows, *how):
        words = [run.folder, run.rule, *how]
        text = ' '.join('K' if word is budgets else word for word in words if word)
        return types.SimpleNamespace(shown=lambda: text)

    def holds(run, policy):
        if run.folder == 'a':
            return {'budgets': budgets, 'saving': len(policy)}

    def train(models, *args, **options):
        return {'window': runs.Arm('', [Run(models['window'])])}

    searched = []
    monkeypatch.setattr(runs, 'search', lambda r, jobs, windows: searched.extend(jobs))
    monkeypatch.setattr(runs, 'token_losses', token_losses)
    monkeypatch.setattr(runs, 'holds', holds)
    monkeypatch.setattr(reproduce, 'text', lambda r, T: [])
    runner.train = train
    runner.cfg.seeds = 1
    arms = {name: runs.Arm('', [Run(name)]) for name in ('standard', 'ALiBi', 'a')}
    assert reproduce.equal_memory(runner, 16, arms).endswith(TABLE)
    assert searched == [(Run('a'), policy, 'standard') for policy in ('selective', 'oldest')]


# ---- A real model, which is a tiny one here ------------------------------------------------------


def test_eviction(run, lines, tmp_path, monkeypatch):
    """Every policy; what was measured is kept in a file."""
    torch.manual_seed(0)
    shape = dict(block_size=40, vocab_size=257, n_layer=2, n_head=2, n_embd=16)
    gpt = m.GPT(m.GPTConfig(rope=True, selective=True, **shape))
    for p in gpt.parameters():
        p.data *= 10
    state = {'model': gpt.state_dict(), 'model_args': vars(gpt.config), 'tokenizer': 'bytes'}
    ckpt.save(tmp_path, state)
    args = [f'--model={tmp_path}', f'--texts={lines}', '--quick', f'--out_dir={tmp_path}/out']
    page = run(reproduce, 'eviction', *args)
    assert 'all 40 tokens: ' in page and '| policy | 32 tokens |' in page
    assert re.findall(r'^\| (\w+) \| \d+\.', page, re.M) == ['selective', *real.PRESENT]
    found = runs.losses_on(gpt, data.Dataset(lines), 40, 16, True, 32, 'tova')
    assert f'| tova | {found.shown()} |' in page
    monkeypatch.setattr(runs, 'losses_on', None)
    assert run(reproduce, 'eviction', *args) == page


@pytest.mark.slow
def test_retrofit_and_finetune(run, commands, tmp_path, monkeypatch):
    """Plain weights are compared with the best policy, so none of them is ahead of it."""
    import test_llama  # which is skipped where packages are missing

    folder = tmp_path / 'llama'
    test_llama.save(folder, hidden_size=64, max_position_embeddings=512)
    (tmp_path / 'file').write_text(test_llama.text())
    args = [f'--data_dir={tmp_path}', '--name=text', f'--tokenizer={folder}']
    run(prepare_text, f'{tmp_path}/file', *args)
    prompts = real.passkey.prompts(1000, 1)
    monkeypatch.setattr(real.passkey, 'prompts', lambda length, keys: prompts)
    monkeypatch.setattr(real, 'PRESENT', ('oldest', 'knorm'))
    monkeypatch.setattr(runs.Runner, 'windows', lambda self, count: 1)
    args = [f'--data_dir={tmp_path}', '--dataset=text', '--texts=text', f'--out_dir={tmp_path}/out']
    args += [f'--model={folder}', f'--to={tmp_path}', '--seeds=1', '--steps=2']
    run(reproduce, 'retrofit', 'finetune', *args)
    page = (tmp_path / 'retrofit_text.md').read_text()
    rows = re.findall(r'^\| (\w+) \| (\w+) \|.* ([+-]\d\.\d+) \[.* ([+-]\d\.\d+) \[', page, re.M)
    names = ['plain oldest', 'plain knorm', 'voter selective', 'voter oldest', 'voter knorm']
    assert [' '.join(row[:2]) for row in rows] == names
    for K in 2, 3:
        assert min(float(row[K]) for row in rows[:2]) == 0
    page = (tmp_path / 'finetune_text.md').read_text()
    assert len(re.findall(r'^\| .* \| \d+% \| \d+% \|$', page, re.M)) == 3
