"""lab/ssa.py: the truth of each task, and what is measured."""

import math

import pytest
import torch

from lab import reproduce, runs, ssa


def test_graph():
    """Its figures, from SSA's formula and from the definition of each."""
    torch.manual_seed(0)
    model = ssa.Graph(6, False, ssa='q')
    w = torch.nn.init.normal_(model.ssa['q'].w.weight)
    x = torch.nn.functional.normalize(model.embedding) * 6**0.5
    Wq, Wk, _ = model.c_attn.weight.split(6)
    W = Wq.T @ Wk / 6**0.5
    tau = 1 + torch.tanh(torch.nn.functional.gelu(x @ Wq.T) @ w[0])
    P = (tau[:, None] * (x @ W @ x.T)).softmax(dim=1)
    truth = model.truth
    assert truth.count_nonzero(dim=1).tolist() == 12 * list(ssa.NEIGHBOURS)
    torch.testing.assert_close(truth.sum(dim=1), torch.ones(60))
    divergence = (truth * (truth / P).log()).nansum() / 60  # 0 log 0 = 0
    expected = [divergence, torch.linalg.svdvals(W)[0]]
    expected += [tau[n::5].mean() for n in range(5)]
    torch.testing.assert_close(torch.stack(model.figures()), torch.stack(expected))


@pytest.mark.parametrize('noise', [1, 3])
def test_denoising(noise):
    """Errors that have a formula, for n tokens with the signal; a layer that says 0 has 1."""
    model = ssa.Denoising(noise)
    torch.nn.init.zeros_(model.c_proj.weight)
    average = least = 0
    for n in range(1, 17):
        share = math.comb(15, n - 1) / 2**15
        average += share * ((1 - n / 16) ** 2 + (n + noise**2 * (16 - n)) / 256)
        least += share / (n + 1)
    found = torch.stack(model.figures()).tolist()
    assert found == pytest.approx([1, average, least], rel=0.02)


def test_best():
    """The best learning rate counts, and SSA does what it is for; a row for each model."""
    r = runs.Runner(reproduce.ReproduceConfig(seeds=1, steps=150), 'x')
    row = ssa.best(r, ssa.Graph, 16, False, ssa='q')
    assert row['learning rate'] != '0.003' and float(row['τ 1']) > 1.2 * float(row['τ 16'])
    row = ssa.best(r, ssa.Denoising, 3, ssa='v')
    assert row['learning rate'] != '0.1' and float(row['error']) < 0.5 * float(
        row['of the average']
    )
    r.cfg.steps = 1
    assert [len(claim(r)[1].split('\n')) for claim in (ssa.graph, ssa.denoising)] == [20, 14]
