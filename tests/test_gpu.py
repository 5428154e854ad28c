"""lab/gpu.py in small: every part comes to its end, a part that fails does not stop the others."""

import pytest
import torch

from conftest import ROOT
from lab import gpu
from support import files


@pytest.mark.slow
def test_parity(run, tmp_path):
    run(gpu, '--small', '--what=parity', f'--out_dir={tmp_path}')
    text = (tmp_path / 'small/parity.md').read_text()
    assert gpu.DONE in text
    compared = []
    for line in text.splitlines():
        cells = line.split(' | ')
        if '.py' in cells[0] and 'allowed' not in cells[4]:
            compared.append(cells[4])
            assert float(cells[-1].strip(' |')) < 1  # of what is allowed
    assert {'y', 'M', 'the gradient of q', 'the gradient of v'} < set(compared)


@pytest.mark.slow
def test_all_parts(run, dataset, tmp_path, monkeypatch):
    """But parity, which is done: it is not done again."""
    monkeypatch.chdir(ROOT)
    files.write_file(tmp_path / 'small/parity.md', gpu.DONE)
    command = gpu, '--small', dataset, f'--out_dir={tmp_path}'
    run(*command, '--trained=nowhere')
    text = (tmp_path / 'small/table.md').read_text()
    assert text.count('FAILED') == 1 and '| trained | FAILED: UserError: nowhere' in text
    run(*command)
    text = (tmp_path / 'small/table.md').read_text()
    assert text.count(gpu.DONE) == len(gpu.PARTS) and 'FAILED' not in text
    for name in 'forward', 'attention', 'training', 'step', 'decode1', 'decode32', 'cache1':
        assert f'\n| {name} | ' in text
    assert 'gpu.py' not in text.replace(gpu.TITLE, '')


def test_a_part_that_is_killed_says_so(run, tmp_path, monkeypatch):
    def killed(cfg, keep):
        raise KeyboardInterrupt

    monkeypatch.setitem(gpu.PARTS, 'step', killed)
    monkeypatch.setattr(gpu, 'limited', lambda command, seconds: None)
    args = '--small', f'--out_dir={tmp_path}/out', f'--to={tmp_path}/gpu.md'
    with pytest.raises(KeyboardInterrupt):
        run(gpu, *args, '--what=step')
    run(gpu, *args)
    text = (tmp_path / 'gpu.md').read_text()
    assert text.count('FAILED: it did not start') == len(gpu.PARTS) - 1
    assert '| step | FAILED: its process ended |' in text


def test_a_command_has_a_limit(capsys):
    gpu.limited(['sleep', '60'], 0.1)
    assert 'stopped after 0.1 seconds: 60' in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_without_a_gpu(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert 'torch sees no GPU here' in run(gpu)
    assert "'all' is not one of parity, random" in run(gpu, '--what=all')
    assert not list(tmp_path.iterdir())
