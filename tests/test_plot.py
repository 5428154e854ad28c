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
    for name in 'a', 'b', 'no_run':
        (tmp_path / name).mkdir()
        if name != 'no_run':
            (tmp_path / name / 'log.jsonl').write_text(LOG)
    assert 'no_run is left out' in run(plot, 'a', 'b', 'no_run', '--to=figures')
    assert [path.name for path in (tmp_path / 'figures').iterdir()] == ['loss.png']
    assert points() == [[[0, 5.0], [40, 3.5]]] * 2
    labels = [text.get_text() for text in plt.gca().get_legend().get_texts()]
    assert labels == ['a', 'b']

    (tmp_path / 'a/budgets.json').write_text(json.dumps({'curve': CURVE}))
    run(plot, 'a')
    assert points() == [[[1, 3.25], [2, 3.5]]]


def test_nothing_to_draw(tmp_path, run, monkeypatch):
    assert 'which runs' in run(plot) == run(plot, str(tmp_path))
    monkeypatch.setitem(plot.sys.modules, 'matplotlib', None)
    with pytest.raises(UserError, match='pip install matplotlib'):
        plot.import_pyplot()
