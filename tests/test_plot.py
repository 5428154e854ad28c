"""lab/plot.py: what it reads and draws."""

import json

import pytest

from lab import plot
from support.settings import UserError

plt = pytest.importorskip('matplotlib.pyplot')
LOG = """{"config": {"selective": true}}
{"iter": 0, "val_loss": 5.0, "memory": 0.9}
{"iter": 0, "loss": 5.1, "lr": 0.1}
{"iter": 20, "loss": 4.0, "lr": 0.1}
{"iter": 40, "val_loss": 3.5}
{"iter": 60, "lo"""
CURVE = [{'saving': 1.0, 'val_loss': 3.25}, {'saving': 2.0, 'val_loss': 3.5}]


def points():
    """What the newest picture shows."""
    return [line.get_xydata().tolist() for line in plt.gca().lines]


def test_runs(tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in 'a', 'b_$x', 'no_run':
        (tmp_path / name).mkdir()
        if name != 'no_run':
            (tmp_path / name / 'log.jsonl').write_text(LOG)
    assert 'no_run is left out' in run(plot, 'a', 'b_$x', 'no_run', '--to=figures')
    assert [path.name for path in (tmp_path / 'figures').iterdir()] == ['loss.png']
    loss, val_loss = [[0, 5.1], [20, 4.0]], [[0, 5.0], [40, 3.5]]
    assert points() == [loss, val_loss] * 2
    labels = [text.get_text() for text in plt.gca().get_legend().get_texts()]
    assert labels == ['a', r'b_\$x']

    (tmp_path / 'a/budgets.json').write_text(json.dumps({'curve': CURVE}))
    run(plot, 'a')
    assert points() == [[[1, 3.25], [2, 3.5]]]


def test_cost(tmp_path, run):
    rows = [dict(part='step', case='selective', T=64, value=7.0)]
    for T in 64, 128:
        for case, ms in ('standard', T), ('selective', 3 * T):
            rows.append(dict(part='attention', case=case, T=T, value=ms, batch=2))
    for name in 'x.json', 'y.json':
        (tmp_path / name).write_text(json.dumps({'rows': rows}))
    run(plot, f'--cost={tmp_path}/x.json,{tmp_path}/y.json', f'--to={tmp_path}')
    assert (tmp_path / 'cost.png').read_bytes().startswith(b'\x89PNG')
    selective = [[64, 96], [128, 192]]
    assert points() == [[[64, 32], [128, 64]], selective, selective]


@pytest.mark.parametrize(
    'rows, words',
    [
        ({}, 'is damaged'),
        ([], 'no times of attention'),
        ([dict(part='attention', case='standard', T=64)], "'value' is missing"),
    ],
)
def test_tables_that_cannot_be_drawn(rows, words, tmp_path, run):
    (tmp_path / 'x.json').write_text(json.dumps({'rows': rows}))
    assert words in run(plot, f'--cost={tmp_path}/x.json', f'--to={tmp_path}')


def test_nothing_to_draw(tmp_path, run, monkeypatch):
    assert 'which runs' in run(plot)
    assert 'none of these' in run(plot, str(tmp_path))
    monkeypatch.setitem(plot.sys.modules, 'matplotlib', None)
    with pytest.raises(UserError, match='pip install matplotlib'):
        plot.import_pyplot()
