"""lab/gpu.py in small: every part comes to its end, a part that fails does not stop the others."""

import json

import pytest
import torch

from conftest import ROOT
from lab import gpu


@pytest.mark.slow
def test_all_parts(run, dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    run(gpu, '--small', dataset, f'--out_dir={tmp_path}')
    text = (tmp_path / 'small/gpu.md').read_text()
    assert 'FAILED' not in text
    for part in gpu.PARTS:
        assert f'## {part}\n' in text
    compared = []
    for row in json.loads((tmp_path / 'small/parity.json').read_text())['rows']:
        compared.append(row['case'])
        assert row['part'] in ('gpu.py', 'cpu.py')
        assert row['ratio'] < 1 or 'allowed' in row['case']
    assert {'y', 'M', 'the gradient of q', 'the gradient of v'} < set(compared)


def test_a_part_that_fails_is_done_again(run, tmp_path, monkeypatch):
    parts = {'slow': (0.1, '-c while(1):pass'), 'broken': (9, '-m nowhere'), 'fine': (9, '-m this')}
    monkeypatch.setattr(gpu, 'PARTS', parts)
    command = gpu, '--small', f'--out_dir={tmp_path}'
    assert 'slow failed' in run(*command)
    text = (tmp_path / 'small/gpu.md').read_text()
    assert text.count('FAILED') == 2 and 'timed out' in text
    assert 'No module named nowhere' in text and 'Beautiful is better' in text
    parts['slow'] = 9, '-m this'
    printed = run(*command)
    assert 'python -m this' in printed and printed.count('failed') == 1 and '/fine' not in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_without_a_gpu(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert 'torch sees no GPU here' in run(gpu)
    assert not list(tmp_path.iterdir())
