"""What README.md shows is what the code does: the idea in numbers, the variation, the files."""

import os
import re

import pytest
import torch

import model as m
from test_forks import readme, readme_edits

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def six_tokens():
    """The table of README's section "The idea in numbers", computed by model.py."""
    names = ['BOS', 'x=1', 'y=5', 'x=2', 'x?', 'y?']
    L = torch.zeros(2, 6, 6)  # head 0 votes, head 1 reads
    L[0, 3, 1], L[0, 4, 3] = 4, 2
    L[0, 2, 1], L[0, 5, 4] = -1, -3
    L[1, 4, 1], L[1, 4, 3], L[1, 5, 2] = 3, 3, 3
    q, k = L[None] * 6**0.5, torch.eye(6).expand(1, 2, 6, 6)  # so that q.k / sqrt(D) = L
    v, i, F0 = (
        k,
        torch.arange(6),
        torch.zeros(1, 6),
    )  # v = 1: what attention returns are its weights P
    rule = m.CausalSelfAttention(m.GPTConfig(n_head=2, n_embd=12))
    P, F, _, _ = m.attend(q, k, v, F0, i, i[None], rule)
    S = F[0].diff(dim=0)
    without, _, _, _ = m.attend(q, k, v, F0, i, i[None])
    cache = m.LayerCache(rule.config, 1, 4, 'selective', 'cpu', torch.float32)
    lost = cache.forget(F0, F[:, :-1], i[:, None], i[None, None])[0]

    def table(code, title, rows, show):
        lines = ['# ' + code, title.ljust(29) + ''.join(name.rjust(6) for name in names)]
        for n in rows:
            lines.append(
                names[n].rjust(28)
                + ' '
                + ''.join((show(n, j) if j <= n else '·').rjust(6) for j in range(6))
            )
        return lines

    return '\n'.join(
        [
            *table(
                'L = logits(q, k)',
                'L₀  logits of head 0',
                range(6),
                lambda n, j: f'{L[0, n, j]:.0f}',
            ),
            *table(
                'S = votes(rule, L[:, 0], i, j)',
                'S   votes, max(0, L₀)',
                range(6),
                lambda n, j: f'{S[n, j]:.0f}',
            ),
            *table(
                'F = rule.accumulate(F, S)',
                'F   votes of earlier rows',
                range(6),
                lambda n, j: f'{F[0, n, j]:.0f}',
            ),
            *table(
                'P = (L - F[:, None, :-1]).masked_fill(hidden[:, None], -math.inf).softmax(dim=-1)',
                'P   head 1 if F were 0',
                (4, 5),
                lambda n, j: f'{without[0, 1, n, j]:.0%}',
            ),
            *table(
                'P = (L - F[:, None, :-1]).masked_fill(hidden[:, None], -math.inf).softmax(dim=-1)',
                'P   head 1',
                (4, 5),
                lambda n, j: f'{P[0, 1, n, j]:.0%}',
            )[1:],
            *table(
                'hidden = hidden | forget(F[:, :-1], i, j)',
                'kept, with K = 4',
                (3, 4, 5),
                lambda n, j: '✗' if lost[n, j] else '✓',
            ),
        ]
    )


def test_the_idea_in_numbers():
    block = re.search(r'## The idea in numbers.*?```\n(.*?)\n```', readme(), re.S)[1]
    assert block == six_tokens()
    with open(os.path.join(ROOT, 'model.py'), encoding='utf-8') as f:
        code = f.read()
    lines = re.findall(r'^# (.*)$', block, re.M)
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


if __name__ == '__main__':
    print(six_tokens())
