"""tutorial.ipynb runs from its first cell to its last, in a copy of the code, with fewer steps."""

import pathlib

import pytest

from conftest import ROOT

nbformat = pytest.importorskip('nbformat')
nbclient = pytest.importorskip('nbclient')
pytest.importorskip('ipykernel')
pytest.importorskip('matplotlib')


@pytest.mark.slow
def test_tutorial(tree):
    text = pathlib.Path(ROOT, 'tutorial.ipynb').read_text(encoding='utf-8')
    assert text.count('STEPS = 400') == 1
    notebook = nbformat.reads(text.replace('STEPS = 400', 'STEPS = 100'), as_version=4)
    nbclient.NotebookClient(notebook, timeout=250).execute(cwd=str(tree.path))
    assert (tree.path / 'data' / 'tutorial' / 'meta.json').is_file()
