"""What README.md shows is what the code does: the listing, the variation, the files."""

import os
import re

import pytest

from test_forks import readme, readme_edits

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def test_how_it_works_is_what_runs():
    block = re.search(r'## How it works.*?```python\n(.*?)```', readme(), re.S)[1]
    with open(os.path.join(ROOT, 'model.py'), encoding='utf-8') as f:
        code = f.read()
    lines = [line.split('#')[0].strip() for line in block.splitlines()]
    assert len(lines) == 5 and all(line in code for line in lines)


@pytest.mark.slow
def test_change_it(tree, dataset):
    """The variation that README shows trains, at full speed, and its model generates."""
    for old, new in readme_edits():
        tree('model.py', old, new)
    config = re.search(r'`config/capped_small.py`:\n\n```python\n(.*?)```', readme(), re.S)[1]
    (tree.path / 'config' / 'capped_small.py').write_text(config)
    size = '--n_layer=2 --n_head=2 --n_embd=32 --block_size=48 --max_iters=20 --eval_iters=1'
    args = ['config/capped_small.py', '--vote_cap=0.02', dataset, *size.split(), '--device=cpu']
    output = tree.run('train.py', *args)
    assert 'kernels/cpu.py, which gives the numbers of model.py' in output
    tree.run('sample.py', '--out_dir=out/capped_small', '--budgets=9', '--max_new_tokens=3')


def test_files_have_the_lines_that_readme_says():
    for file, lines in re.findall(r'^\| ([a-z_]+\.py) \| (\d+) \|', readme(), re.M):
        with open(os.path.join(ROOT, file), encoding='utf-8') as f:
            assert abs(len(f.readlines()) - int(lines)) <= 20, file
