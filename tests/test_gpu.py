"""lab/gpu.py in small: every part comes to its end, a part that fails does not stop the others."""

import re

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
    # of each kernel in each dtype first what is allowed, then the errors
    assert 'the gradient of v' in text
    parity = text.split('## random')[0]
    ratios = [float(x) for x in re.findall(r'([0-9.]+)x', parity)]
    assert len(ratios) > 10 and max(ratios) == 1


def test_a_part_that_fails(run, tmp_path, monkeypatch):
    """The others follow, and it is done again once its text is deleted."""
    parts = {'slow': (0.1, '-c while(1):pass'), 'broken': (9, '-m nowhere'), 'fine': (9, '-m this')}
    monkeypatch.setattr(gpu, 'PARTS', parts)
    command = gpu, '--small', f'--out_dir={tmp_path}'
    assert 'slow failed' in run(*command)
    text = (tmp_path / 'small/gpu.md').read_text()
    assert text.count('FAILED') == 2 and 'timed out' in text
    assert 'No module named nowhere' in text and 'Beautiful is better' in text
    (tmp_path / 'small/broken.txt').unlink()
    printed = run(*command)
    assert printed.count('python -m') == 1 and 'broken failed' in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_without_a_gpu(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert 'torch sees no GPU here' in run(gpu)
    assert not list(tmp_path.iterdir())
