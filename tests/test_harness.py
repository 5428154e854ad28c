"""An export in lm-evaluation-harness, by the harness's own `hf`, against plain sums of model.py."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import model as m
from conftest import ROOT
from lab import export_hf
from test_export_hf import EOT, checkpoint, gpt

pytestmark = pytest.mark.slow
SIZE = 64


@pytest.fixture
def exported(tmp_path):
    """exported(): a model, and the folder of its export."""
    if not os.environ.get('CI'):  # there all of these tests must run
        pytest.importorskip('lm_eval')
        pytest.importorskip('accelerate')

    def export(bos=False, block_size=SIZE, **changes):
        model = gpt(block_size, **changes)
        export_hf.export(model, checkpoint(model, bos), str(tmp_path / 'hf'))
        return model, str(tmp_path / 'hf')

    return export


@pytest.fixture
def adapter(exported):
    """adapter(): a model, and the harness's own adapter of its export."""

    def make(bos=False, batch_size=3, **options):
        from lm_eval.models.huggingface import HFLM

        model, folder = exported(bos, selective=True, ssa='qv')
        options.update(trust_remote_code=True, device='cpu', batch_size=batch_size)
        return model, HFLM(folder, **options)

    return make


def asked(method, *requests):
    """The answers of a method of the adapter to requests, each a tuple."""
    made = [SimpleNamespace(args=request, task_name='mine') for request in requests]
    return method(made, disable_tqdm=True)


@torch.no_grad()
def summed(model, tokens, n, budgets=None, policy='selective'):
    """The log-probability of the last n tokens, and whether all are the most likely."""
    x = torch.tensor([tokens[:-1]])
    y = torch.tensor(tokens[-n:])
    cache = None
    if budgets:
        cache = m.KVCache(model, 1, budgets, policy)
    logits = model(x, x, cache)[0][0, -n:].log_softmax(dim=-1)
    total = logits[range(n), y].sum().item()
    return pytest.approx(total, abs=1e-3), torch.equal(logits.argmax(dim=-1), y)


@pytest.mark.parametrize('bos, budgets', [(False, None), (True, None), (True, [5, 9])])
def test_ends_of_texts(adapter, bos, budgets):
    """In a batch of unequal lengths, as one by one.

    A long text loses its beginning, and with keep_bos begins with <|endoftext|> all the same.
    """
    model, lm = adapter(bos, keep_bos=bos, budgets=budgets or 'none')
    pairs = [('', 'cd'), ('the', ' old man'), ('x' * 70, 'y' * 9), ('over the hill', ' to')]
    for (context, end), answer in zip(pairs, asked(lm.loglikelihood, *pairs)):
        text = list((context + end).encode())
        if bos or not context:
            text.insert(0, EOT)
        text = text[-SIZE - 1 :]
        if bos:
            text[0] = EOT
        assert answer == summed(model, text, len(end), budgets)


def test_whole_texts(adapter):
    """As docs/harness.md says for a model with BOS."""
    model, lm = adapter(bos=True, budgets='none', keep_bos=True, add_bos_token=False)
    text = 'over the hill and far away. ' * 6
    expected = 0
    for begin, end, n in (0, 64, 64), (64, 128, 64), (104, 168, 40):
        window = [EOT] + list(text[begin:end].encode())
        expected += summed(model, window, n)[0].expected
    assert asked(lm.loglikelihood_rolling, (text,)) == [pytest.approx(expected, abs=1e-3)]


def test_new_texts(adapter):
    model, lm = adapter(batch_size=1, budgets=9)
    settings = {'until': [], 'max_gen_toks': 20}
    contexts = ['the old', 'sea ' * 30]
    found = asked(lm.generate_until, *[(context, settings) for context in contexts])
    for context, text in zip(contexts, found):
        ids = list(context.encode())[-SIZE + 20 :]
        new = model.generate(torch.tensor([ids]), 20, temperature=0, budgets=9)[0, len(ids) :]
        assert text == lm.tokenizer.decode(new).split('<|endoftext|>')[0]


def test_command(exported, tmp_path):
    """The command of docs/harness.md, with passkey, budgets that are read from text, a policy."""
    model, folder = exported(block_size=1100, n_embd=8, rope=True)
    command = (
        f'-m lm_eval run --model=hf --tasks=passkey --include_path={ROOT}/lab/harness --limit=2 '
        f'--model_args=pretrained={folder},trust_remote_code=True,budgets=[64,32],policy=h2o_mean '
        '--device=cpu --output_path=. --log_samples'
    )
    subprocess.check_call([sys.executable, *command.split()], cwd=tmp_path)
    (path,) = tmp_path.glob('**/samples_passkey_*.jsonl')
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(samples) == 2
    for sample in samples:
        text, key = sample['arguments']['gen_args_0'].values()
        expected = summed(model, list((text + key).encode()), len(key), [64, 32], 'h2o_mean')
        assert (float(sample['filtered_resps'][0][0]), sample['depth_0']) == expected


def test_own_task(adapter, tmp_path, monkeypatch):
    """The task file that docs/harness.md shows."""
    _, lm = adapter()
    import lm_eval
    from lm_eval.tasks import TaskManager

    shown = Path(ROOT, 'docs', 'harness.md').read_text().split('```yaml\n')[1].split('```')[0]
    row = shown.split('# ')[1].splitlines()[0]
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'mine.yaml').write_text(shown)
    (tmp_path / 'mine' / 'mine.jsonl').write_text(f'{row}\n' * 3)
    monkeypatch.chdir(tmp_path)
    manager = TaskManager(include_path=['mine'], include_defaults=False)
    found = lm_eval.simple_evaluate(lm, tasks=['mine'], task_manager=manager)
    assert found['n-samples']['mine']['effective'] == 3


def test_passkey(exported):
    from lab.harness import passkey

    items = passkey.docs(length=700, keys=3)['test']
    assert len(items) == 15
    for item in items:
        text = item['text']
        assert len(text) == 700 and text.endswith('The pass key is')
        place = text.index(passkey.KEY.format(item['key'])) / 700
        assert place == pytest.approx(item['depth'] / 100, abs=0.3)
    with pytest.raises(ValueError, match='length 240 is too short'):
        passkey.docs(length=240)
