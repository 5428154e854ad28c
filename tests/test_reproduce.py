"""lab/reproduce.py, lab/runs.py and lab/real.py: runs that end in a page of tables."""

import json
import re
import shutil
import time
import types

import pytest
import torch

import data
import model as m
import prepare_text
import prune
import train
from lab import ablate, plot, real, reproduce, runs, tasks
from lab.runs import Losses
from support import checkpoint as ckpt, settings

TINY = ['--n_layer=1', '--n_head=4', '--n_embd=16', '--block_size=12', '--batch_size=4']
TINY += ['--eval_interval=4', '--eval_iters=1', '--gradient_accumulation_steps=1', '--device=cpu']
MODELS = {'standard': '', 'no ReLU': 'no_relu --selective'}


@pytest.fixture
def runner(tmp_path):
    cfg = reproduce.ReproduceConfig(out_dir=f'{tmp_path}/runs', workers=1)
    return runs.Runner(cfg, 'small')


def test_spread():
    assert runs.spread([1.0, 2.0, 3.0], '{:.1f}') == '2.0 ± 1.0'
    assert runs.spread([1.0]) == '1.0000' and runs.spread([]) == ''


@pytest.mark.parametrize(
    'args, words',
    [
        (['--list'], 'Takes 40 minutes'),
        ([], 'Takes 40 minutes'),
        (['nothing'], "is not one of 'gate'"),
        (['gate', '--windows=1'], 'is not in the range 2 to'),
        (['headline', '--contexts=64,'], "--contexts: '' is not a whole number"),
        (['headline', '--contexts=31'], 'is not in the range 32 to'),
    ],
)
def test_messages(run, tmp_path, args, words):
    assert words in run(reproduce, f'--out_dir={tmp_path}', *args)
    assert not list(tmp_path.iterdir())


# ---- Runs ----------------------------------------------------------------------------------------


@pytest.fixture
def commands(monkeypatch):
    """The commands of lab/runs.py, which run in this process, one after the other."""

    def run(self, commands):
        ran.extend(commands)
        for args in commands:
            script = train
            if args[0] == '-m':
                script = ablate
                args = args[1:]
            with monkeypatch.context() as patch:
                patch.setattr('sys.argv', list(args))
                script.main()

    ran = []
    monkeypatch.setattr(runs.Runner, 'run', run)
    return ran


def test_a_claim(run, commands, dataset, tmp_path, monkeypatch):
    def small(r):
        arms = r.train(MODELS, 8, ['config/base_small.py', *TINY, dataset])
        return runs.losses_table(arms), r.curves(arms)

    monkeypatch.setitem(reproduce.CLAIMS, 'gate', small)
    args = ['gate', '--dataset=mine', f'--out_dir={tmp_path}/runs']
    run(reproduce, *args, '--seeds=2')
    page = tmp_path / 'runs/gate_mine.md'
    text = page.read_text()
    figure = r'-?\d\.\d{4} ± \d\.\d{4}'
    zero = r'\+0\.0000 \[\+0\.0000, \+0\.0000\]'
    assert re.search(rf'\| standard \|  \| {figure} \| {zero} \|.*\|  \|', text)
    assert re.search(r'\| no ReLU \| no_relu --selective \|.*\| \d+\.\d% ± \d\.\d% \|', text)
    assert len(re.findall(zero, text)) == 1 and 'recall (0%)' in text
    assert text.startswith('# gate_mine\n') and '![gate_mine](gate_mine.png)' in text
    assert '--seeds=2' in text and (tmp_path / 'runs/gate_mine.png').exists()
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


def test_figures_of_an_arm(monkeypatch):
    logs = {'a': [5.0, 3.0, 2.0], 'b': [5.0, 4.0, 3.0]}
    monkeypatch.setattr(plot, 'curve', lambda folder, name: ([0, 4, 8], logs[folder]))
    models = {}
    for name, folders in {'standard': 'bb', 'better': 'ab', 'worse': 'b'}.items():
        models[name] = runs.Arm('fox --selective')
        models[name].folders = list(folders)
    assert (models['better'].rule, models['better'].options) == ('fox', ['--selective'])
    assert models['better'].last('val_loss').tolist() == [2, 3]
    rows = runs.steps_table(models).splitlines()[2:]
    assert [row.split(' | ')[-2:] for row in rows] == [
        ['+0.0000', '8 |'],
        ['-0.5000', '8 |'],
        ['+0.0000', '8 |'],
    ]
    logs['a'][2] = 0.0
    assert '| -1.5000 | 8 |' in runs.steps_table(models)
    logs['b'][2] = 9.0
    del models['worse']
    models['standard'].folders = ['a']
    assert '| +4.5000 | never |' in runs.steps_table(models)


def test_ctrl_c_starts_no_other_run(runner, monkeypatch):
    started = []

    def work(n):
        started.append(n)
        time.sleep(0.05)
        if n == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(runs, 'command', work)
    with pytest.raises(KeyboardInterrupt):
        runner.run(range(20))
    assert len(started) < 8


def test_commands():
    """One that fails is named, but for a search that has nothing to find."""
    with pytest.raises(settings.UserError, match='python -c .*: what is wrong'):
        runs.command(['-c', 'print(1); raise SystemExit("what is wrong")'])
    runs.command(['-c', f'raise SystemExit("the loss {prune.ABOVE}")'])


def test_data_sets_are_made_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        found = reproduce.task_data('passkey', records=40)
        assert found.tokens('train') == 40 * 75
        monkeypatch.setattr(tasks, 'make', None)


# ---- What is measured ----------------------------------------------------------------------------


@pytest.mark.parametrize('wrong', [0, 1])
def test_records_right(run, tmp_path, monkeypatch, wrong):
    """Of five digits, of which the last is wrong."""

    def model(x, y):
        y = y.clamp(min=0)
        y[:, -1] += wrong
        return torch.nn.functional.one_hot(y), None

    model.config = types.SimpleNamespace(block_size=80)
    run(tasks, 'passkey', f'--data_dir={tmp_path}', '--records=2000')
    monkeypatch.setattr(runs, 'load', lambda folder: (model, None))
    assert runs.records_right('', data.Dataset(f'{tmp_path}/passkey')) == 1 - wrong


def test_token_losses(run, dataset, tmp_path):
    """Under a budget and with the rule that a run was trained with."""
    folder = f'--out_dir={tmp_path}'
    run(ablate, 'window=4', *TINY, dataset, '--selective', '--rope', '--max_iters=4', folder)
    losses = runs.token_losses(tmp_path, 'window=4', 6)
    assert losses.nats.shape == (1, 341, 12) and losses.recall.shape == (341, 12)
    pruned = runs.token_losses(tmp_path, '', 6, [4], 'oldest')  # the same; the votes are tiny
    torch.testing.assert_close(pruned.nats, losses.nats, atol=1e-3, rtol=0)
    whole = runs.token_losses(tmp_path, '', 6)
    assert not torch.allclose(whole.nats, losses.nats, atol=1e-3)


def test_recall_tokens():
    """Those that occurred before, but not among the newest three."""
    x = torch.tensor([[1, 2, 1, 3, 4, 5], [7, 7, 7, 7, 7, 8]])
    y = torch.tensor([[2, 1, 3, 4, 1, 1], [7, 7, 7, 7, 8, 7]])
    expected = torch.zeros(2, 6, dtype=torch.bool)
    expected[0, 5] = True
    assert torch.equal(runs.is_recall(x, y, near=3), expected)
    expected[0, 1] = expected[0, 4] = expected[1, 5] = True
    assert torch.equal(runs.is_recall(x, y, near=1), expected)


def test_losses_of_recall_tokens():
    g = torch.Generator().manual_seed(0)
    recall = torch.rand(3, 40, generator=g) < 0.3
    nats = torch.rand(2, 3, 40, generator=g)  # of two seeds
    losses = Losses(nats, recall)
    assert losses.means(False) == [pytest.approx(of_seed[recall].mean()) for of_seed in nats]
    worse = Losses(nats + 0.5 * recall, recall)
    assert worse.against(losses, False) == '+0.5000 [+0.5000, +0.5000]'
    share = recall.float().mean().item()
    assert float(worse.against(losses).split()[0]) == pytest.approx(0.5 * share, abs=1e-4)


def test_searches(runner, tmp_path, monkeypatch):
    """Unfinished ones are resumed, finished ones kept."""
    for policy, held_out in ('selective', {'holds': {'saving': 4.0}}), ('oldest', {}):
        (tmp_path / f'budgets_{policy}.json').write_text(json.dumps({'held_out': held_out}))
    ran = []
    monkeypatch.setattr(runner, 'run', ran.extend)
    runs.search(runner, [tmp_path, 'new'], ['base', 'other'], 64)
    found = [(args[1], args[3], args[4]) for args in ran]
    assert found == [
        (f'--out_dir={tmp_path}', '--baseline=base', '--policy=oldest'),
        ('--out_dir=new', '--baseline=other', '--policy=selective'),
        ('--out_dir=new', '--baseline=other', '--policy=oldest'),
    ]
    assert runs.holds(tmp_path, 'selective') == {'saving': 4.0}
    assert runs.holds(tmp_path, 'oldest') is runs.holds('new', 'oldest') is None


TABLE = """\
| selective, seed 1 | 2 6 | 9.0x | 6.0x | standard | a K | a K oldest | ALiBi alibi=4 \
| window=4 window=4 |
| memory loss 0.1, seed 1 |  |  |  |  |  |  |  |  |
| memory loss 0.02, seed 1 |  |  |  |  |  |  |  |  |"""


def test_equal_memory(runner, monkeypatch):
    """Each loss is in its column, and the control sees as many tokens as the model keeps."""
    budgets = [2, 6]

    def token_losses(folder, rule, windows, *how):
        words = [folder, rule, *how]
        text = ' '.join('K' if word is budgets else word for word in words if word)
        return types.SimpleNamespace(shown=lambda: text)

    def holds(folder, policy):
        if folder == 'a':
            return {'budgets': budgets, 'saving': len(policy)}

    def arm(name, flags=''):
        made = runs.Arm(flags)
        made.folders = [name]
        return made

    def train(models, *args, **options):
        return {'window': arm('window=4', models['window'])}

    searched = []
    monkeypatch.setattr(runs, 'search', lambda *args: searched.append(args[1:3]))
    monkeypatch.setattr(runs, 'token_losses', token_losses)
    monkeypatch.setattr(runs, 'holds', holds)
    monkeypatch.setattr(reproduce, 'text', lambda r, T: [])
    runner.train = train
    runner.cfg.seeds = 1
    folders = dict(zip(['standard', 'ALiBi', *reproduce.VOTERS], ['standard', 'ALiBi', *'abc']))
    arms = {name: arm(folder) for name, folder in folders.items()}
    assert reproduce.equal_memory(runner, 16, arms).endswith(TABLE)
    assert searched == [([folder], ['standard']) for folder in 'abc']


# ---- A real model, which is a tiny one here ------------------------------------------------------


def test_eviction(run, lines, tmp_path, monkeypatch):
    """Every policy; what was measured is kept in a file."""
    torch.manual_seed(0)
    shape = dict(block_size=64, vocab_size=257, n_layer=2, n_head=2, n_embd=16)
    gpt = m.GPT(m.GPTConfig(rope=True, selective=True, **shape))
    for p in gpt.parameters():
        p.data *= 10
    state = {'model': gpt.state_dict(), 'model_args': vars(gpt.config), 'tokenizer': 'bytes'}
    ckpt.save(tmp_path, state)
    monkeypatch.setattr(real, 'TOKENS', 1024)
    args = [f'--model={tmp_path}', f'--texts={lines}', '--quick', f'--out_dir={tmp_path}/out']
    page = run(reproduce, 'eviction', *args)
    assert '| weights | policy | 2 of 64 tokens |' in page
    rows = re.findall(r'^\| as it is \| (\w+) \| \d+\.', page, re.M)
    assert rows == ['selective', *real.PRESENT]
    found = runs.losses_on(gpt, data.Dataset(lines), 64, 16, True, 2, 'tova')
    assert f'| tova | {found.shown()} |' in page
    meta = shutil.copytree(lines, tmp_path / 'text') / 'meta.json'
    meta.write_text(meta.read_text().replace('"bytes"', '"gpt2:300"'))
    said = run(reproduce, 'eviction', *args, f'--texts={tmp_path}/text')
    assert 'has the tokenizer gpt2:300, the model bytes' in said
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
    monkeypatch.setattr(real, 'TOKENS', 512)
    args = [f'--dataset={tmp_path}/text', f'--texts={tmp_path}/text', f'--out_dir={tmp_path}']
    args += [f'--model={folder}', '--seeds=1', '--steps=2']
    run(reproduce, 'retrofit', 'finetune', *args)
    page = (tmp_path / 'retrofit_text.md').read_text()
    rows = re.findall(r'^\| (\w+) \| (\w+) \|.* ([+-]\d\.\d+) \[.* ([+-]\d\.\d+) \[', page, re.M)
    names = ['plain oldest', 'plain knorm', 'voter selective', 'voter oldest', 'voter knorm']
    assert [' '.join(row[:2]) for row in rows] == names
    for K in 2, 3:
        assert min(float(row[K]) for row in rows[:2]) == 0
    page = (tmp_path / 'finetune_text.md').read_text()
    assert len(re.findall(r'^\| .* \| \d+% \| \d+% \|$', page, re.M)) == 3
