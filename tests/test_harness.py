"""An export in lm-evaluation-harness, by the harness's own `hf`, against plain sums of model.py."""

import json
import os
import subprocess
import sys

import pytest
import torch

import model as m
from conftest import ROOT
from lab import export_hf

pytestmark = pytest.mark.slow
EOT = 256
SIZE = 64
METHODS = {
    'selective': dict(selective=True, rope=True),
    'both': dict(selective=True, ssa='qv'),
    'standard': dict(),
}


@pytest.fixture(scope='module')
def HFLM():
    if not os.environ.get('CI'):  # there all of these tests must run
        pytest.importorskip('lm_eval')
        pytest.importorskip('accelerate')
    from lm_eval.models.huggingface import HFLM

    return HFLM


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """exported(method, bos): a model, and the folder of its export, which keeps [5, 9] tokens."""

    def export(method, bos=False, **sizes):
        torch.manual_seed(0)
        sizes = {'block_size': SIZE, 'n_embd': 16, **sizes}
        config = m.GPTConfig(vocab_size=257, n_layer=2, n_head=2, **sizes, **METHODS[method])
        model = m.GPT(config).eval()
        for p in model.parameters():
            p.data += torch.randn_like(p) * 0.3
        folder = tmp_path_factory.mktemp(method)
        checkpoint = {
            'config': {'bos': bos},
            'dataset': 'x',
            'tokenizer': 'bytes',
            'iter_num': 9,
            'val_loss': 2.0,
            'pretrained': None,
        }
        export_hf.export(model, checkpoint, str(folder), [5, 9], policy(model))
        return model, str(folder)

    return export


def policy(model):
    return 'selective' if model.config.selective else 'oldest'


class Request:
    task_name = 'mine'

    def __init__(self, *args):
        self.args = args


def summed(model, tokens, n, budgets):
    """The log-probability of the last n tokens, and whether all are the most likely."""
    x = torch.tensor([tokens[:-1]])
    y = torch.tensor(tokens[-n:])
    with torch.no_grad():
        if budgets == 'none':
            logits = model(x, x)[0]
        else:  # token by token, as in generation
            cache = m.KVCache(model, 1, budgets, policy(model))
            logits = torch.cat([model(token, cache=cache)[0] for token in x.split(1, 1)], dim=1)
    logits = logits[0, -n:].log_softmax(dim=-1)
    return logits[range(n), y].sum().item(), torch.equal(logits.argmax(dim=-1), y)


@pytest.mark.parametrize('budgets', ['none', None, 7])
@pytest.mark.parametrize('bos', [False, True])
@pytest.mark.parametrize('method', METHODS)
def test_texts(HFLM, exported, method, bos, budgets):
    """Log-probabilities of ends of texts and of whole texts, and texts that the model writes.

    In batches of unequal lengths, as one by one. budgets None: those of the export. Long texts lose
    their beginning, and with keep_bos begin with <|endoftext|> all the same.
    """
    model, folder = exported(method, bos)
    options = dict(pretrained=folder, trust_remote_code=True, device='cpu', batch_size=3)
    if budgets:
        options['budgets'] = budgets
    lm = HFLM(**options, keep_bos=bos)
    budgets = budgets or [5, 9]

    pairs = [
        ('', 'cd'),
        ('the', ' old man'),
        ('x' * 70, 'y' * 9),
        ('over the hill', ' to'),
        ('a', 'b'),
    ]
    answers = lm.loglikelihood([Request(*pair) for pair in pairs], disable_tqdm=True)
    for (context, end), answer in zip(pairs, answers):
        text = [EOT] * (bos or not context) + list((context + end).encode())
        if len(text) > SIZE + 1:
            text = text[-SIZE - 1 :]
            text[0] = EOT if bos else text[0]
        log_p, likely = summed(model, text, len(end), budgets)
        assert answer == (pytest.approx(log_p, abs=1e-3), likely), (context, end)

    text = list(b'over the hill and far away. ' * 6)
    windows = [[EOT] + text[:64], text[63:128], text[103:]]
    expected = 0
    for window, n in zip(windows, (64, 64, 40)):
        assert len(window) == SIZE + 1
        if bos:
            window[0] = EOT
        expected += summed(model, window, n, budgets)[0]
    rolling = HFLM(**options, keep_bos=True, add_bos_token=False) if bos else lm
    answers = rolling.loglikelihood_rolling([Request(bytes(text).decode())], disable_tqdm=True)
    assert answers == [pytest.approx(expected, abs=1e-3)]

    contexts = ['the old', 'x', 'sea ' * 30]
    settings = {'until': [], 'max_gen_toks': 20}
    texts = lm.generate_until([Request(text, settings) for text in contexts], disable_tqdm=True)
    for context, found in zip(contexts, texts):
        ids = ([EOT] * bos + list(context.encode()))[-SIZE + 20 :]
        limits = dict(budgets=None if budgets == 'none' else budgets, policy=policy(model))
        new = model.generate(torch.tensor([ids]), 20, temperature=0, **limits)[
            0, len(ids) :
        ].tolist()
        new = new[: new.index(EOT)] if EOT in new else new
        assert found == bytes(new).decode('utf-8', 'replace'), context


def test_command(HFLM, exported, tmp_path):
    """The command of docs/harness.md, with passkey and budgets that are read from text."""
    model, folder = exported('selective', block_size=1100, n_embd=8)
    command = [sys.executable, '-m', 'lm_eval', 'run', '--model', 'hf', '--tasks', 'passkey']
    command += ['--include_path', f'{ROOT}/lab/harness', '--limit', '2', '--device', 'cpu']
    arguments = f'pretrained={folder},trust_remote_code=True,budgets=[64,32]'
    command += ['--model_args', arguments, '--output_path', str(tmp_path), '--log_samples']
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and '|passkey|' in done.stdout, done.stderr
    (path,) = tmp_path.glob('**/samples_passkey_*.jsonl')
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(samples) == 2
    for sample in samples:
        text, key = sample['arguments']['gen_args_0'].values()
        log_p, likely = summed(model, list((text + key).encode()), len(key), [64, 32])
        assert float(sample['filtered_resps'][0][0]) == pytest.approx(log_p, abs=1e-3)
        assert sample['acc'] == likely


def test_own_task(HFLM, exported, tmp_path, monkeypatch):
    """The task file that docs/harness.md shows."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    with open(os.path.join(ROOT, 'docs', 'harness.md'), encoding='utf-8') as f:
        shown = f.read().split('```yaml\n')[1].split('```')[0]
    row = shown.split('# ')[1].splitlines()[0]
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'mine.yaml').write_text(shown)
    (tmp_path / 'mine' / 'mine.jsonl').write_text(f'{row}\n' * 3)
    monkeypatch.chdir(tmp_path)
    manager = TaskManager(include_path=['mine'], include_defaults=False)
    lm = HFLM(pretrained=exported('both')[1], trust_remote_code=True, device='cpu')
    found = lm_eval.simple_evaluate(lm, tasks=['mine'], task_manager=manager)
    assert found['n-samples']['mine']['effective'] == 3
    assert found['results']['mine']['acc,none'] in (0, 1)


def test_passkey():
    pytest.importorskip('datasets')
    from lab.harness import passkey

    items = passkey.docs(length=700, keys=3)['test']
    assert len(items) == 15
    for item in items:
        text, key = item['text'], item['key']
        room = 700 - len(passkey.INTRO + passkey.KEY.format(key) + passkey.QUESTION)
        before = text.index('\nThe pass') - len(passkey.INTRO)
        assert before == room * item['depth'] // 100
        assert len(text) == 700 and text.count(key) == 2 and text.endswith('The pass key is')
    with pytest.raises(ValueError, match='length 240: the prompt alone has 247'):
        passkey.docs(length=240)
    assert passkey.results({'depth': 25}, [(-1.5, True)]) == {'acc': True, 'depth_25': True}
