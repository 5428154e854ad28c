"""SSA's own small experiments: one attention layer of model.py, trained alone, in seconds.

    python -m lab.ssa --task=graph --ssa=q
    python -m lab.ssa --task=denoising --ssa=v --noise=3
    python -m lab.reproduce graph denoising

After 2411.12892, whose sizes we do not know: the docstrings below say what ours are. A run tries
each learning rate, and its figures go into <out_dir>/log.jsonl. There is no transformer around the
layer, as an MLP knows a graph by heart, with no attention at all.
"""

import json
import math
import os
from dataclasses import dataclass
from statistics import mean

from support import settings  # before torch, see support/__init__.py

import torch
import torch.nn as nn
import torch.nn.functional as fn

import model as m
import train
from lab.runs import Arm, Run, command, markdown, spread, table
from support import files
from support.settings import option

NODES = 60
NEIGHBOURS = 1, 2, 4, 8, 16  # of a node; as many nodes have each number
TOKENS = 16
BATCH = 128


class Graph(nn.Module):
    """The next node of a walk is one of the neighbours of the present node, each as likely.

    The context has every node once, the query is the present node, and its attention weights are
    the probabilities of the next one. Neighbours are drawn at random, and an edge has a direction.
    Embeddings have as many channels as --n_embd says, fewer than there are nodes, and all have the
    same length. There are no positions.
    """

    rates = 0.01, 0.03, 0.1, 0.3  # learning rates that a run tries

    def __init__(self, cfg):
        super().__init__()
        self.truth = torch.zeros(NODES, NODES)  # of each row, the probabilities of the next node
        for node, row in enumerate(self.truth):
            count = NEIGHBOURS[node % len(NEIGHBOURS)]
            row[torch.randperm(NODES)[:count]] = 1 / count
        embedding = torch.randn(NODES, cfg.n_embd)
        self.embedding = nn.Parameter(embedding, requires_grad=cfg.learned)
        self.layer = make_layer(cfg)
        self.position = torch.zeros(NODES)  # log n is 0: SSA has its token-aware part alone

    def attend(self, q, k, v, i, rule):
        """What the layer calls in place of a cache's `attend`: it keeps the logits."""
        self.L = m.logits(q, k)[0, 0]  # (NODES, NODES)
        return v

    def nodes(self):
        """What the layer reads, (1, NODES, C)."""
        return fn.rms_norm(self.embedding, self.embedding.shape[1:])[None]

    def log_P(self):
        """The logarithm of the transition matrix, (NODES, NODES)."""
        self.layer(self.nodes(), self.position, cache=self)
        return self.L.log_softmax(dim=1)

    def loss(self):
        """The cross-entropy of steps from nodes that are drawn evenly."""
        node = torch.randint(NODES, (BATCH,))
        following = self.truth[node].multinomial(1)[:, 0]
        return fn.nll_loss(self.log_P()[node], following)

    def figures(self):
        """The distance to the truth, exactly; the operator norm of the query-key matrix."""
        log_P = self.log_P()
        q, k, _ = self.layer.c_attn.weight.chunk(3)  # (C, C) each
        found = {
            'val_loss': fn.kl_div(log_P, self.truth, reduction='batchmean'),
            'l1': (log_P.exp() - self.truth).abs().sum(dim=1).mean(),
            'norm': torch.linalg.matrix_norm(q.T @ k, 2) / math.sqrt(len(q)),
        }
        if 'q' in self.layer.ssa:
            x = self.nodes()
            q_in, _, _ = self.layer.c_attn(x).chunk(3, dim=2)
            tau = self.layer.ssa['q'](x, q_in, self.position)[0, :, 0]
            for n, count in enumerate(NEIGHBOURS):
                found[f'temperature {count}'] = tau[n :: len(NEIGHBOURS)].mean()
        return found


class Denoising(nn.Module):
    """A record has 16 tokens: about half are a signal u plus noise, the others noise. What is u?

    u, in --n_embd channels, is from N(0, 1). A token is u + N(0, 1) or N(0, noise^2) in each, by
    chance. With the noise louder than the signal, √2, a token's length tells which it is. The
    answer is the output of the last row. It is that of a token of signal, or of zeros behind the
    others, which know nothing of u.
    """

    rates = 0.001, 0.003, 0.01, 0.03

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.layer = make_layer(cfg)

    def draw(self, records):
        """u (records, C), x (records, TOKENS, C), and which of x are signal, (…, TOKENS, 1)."""
        u = torch.randn(records, 1, self.cfg.n_embd)
        noise = torch.randn(records, TOKENS, self.cfg.n_embd)
        is_signal = torch.rand(records, TOKENS, 1) < 0.5
        if self.cfg.query == 'signal':
            is_signal[:, -1] = True
        x = torch.where(is_signal, u + noise, self.cfg.noise * noise)
        return u[:, 0], x, is_signal

    def estimate(self, x):
        """The layer's estimate of u (B, C) from x (B, TOKENS, C)."""
        if self.cfg.query == 'zeros':
            x = fn.pad(x, (0, 0, 0, 1))
        y, _ = self.layer(x, torch.zeros(x.size(1)))
        return y[:, -1]

    def loss(self):
        """The mean squared error."""
        u, x, _ = self.draw(BATCH)
        return fn.mse_loss(self.estimate(x), u)

    def figures(self):
        """Mean squared errors on 20,000 new records, which all models have in common.

        'told' is the mean of u given the tokens and which of them are signal. None is better.
        """
        torch.manual_seed(0)
        u, x, is_signal = self.draw(20_000)
        average = x.mean(dim=1)
        share = (average * u).sum() / average.square().sum()
        told = (x * is_signal).sum(dim=1) / (is_signal.sum(dim=1) + 1)
        return {
            'val_loss': fn.mse_loss(self.estimate(x), u),
            'average': fn.mse_loss(average, u),
            'best share': fn.mse_loss(share * average, u),
            'told': fn.mse_loss(told, u),
        }


TASKS = {'graph': Graph, 'denoising': Denoising}


def make_layer(cfg):
    """An attention layer of one head."""
    config = m.GPTConfig(
        n_head=1, n_embd=cfg.n_embd, bias=cfg.bias, ssa=cfg.ssa, ssa_sharing=cfg.ssa_sharing
    )
    return m.CausalSelfAttention(config)


@dataclass
class SSAConfig:
    task: str = option('graph', 'what to learn', choices=tuple(TASKS))
    ssa: str = option('', 'what gets a temperature', choices=('', 'q', 'k', 'v', 'qv'))
    ssa_sharing: bool = option(True, 'temperatures read q, k, v; False: their own hidden layer')
    bias: bool = option(False, 'biases of q, k and v')
    n_embd: int = option(16, 'channels', low=1, high=1024)
    learned: bool = option(False, 'graph: the embeddings of the nodes learn, too')
    noise: float = option(3.0, 'denoising: standard deviation of the tokens without signal')
    query: str = option('signal', 'denoising: the last token', choices=('signal', 'zeros'))
    steps: int = option(2000, 'of training at each learning rate', low=1)
    seed: int = option(1, 'of the graph, the weights and the batches')
    out_dir: str = option('out/ssa', 'folder of log.jsonl')


def fit(model, rate, steps):
    """AdamW, with a learning rate that falls to 0 in a line."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    for n in range(steps):
        optimizer.param_groups[0]['lr'] = rate * (1 - n / steps)
        optimizer.zero_grad()
        model.loss().backward()
        optimizer.step()


def main():
    cfg = settings.parse(SSAConfig)
    lines = ''
    for rate in TASKS[cfg.task].rates:
        torch.manual_seed(cfg.seed)
        model = TASKS[cfg.task](cfg)
        fit(model, rate, cfg.steps)
        figures = {'learning_rate': rate}
        with torch.no_grad():
            for name, value in model.figures().items():
                figures[name] = value.item()
        train.check_finite(cfg.steps, figures)
        print(f'step {cfg.steps}{train.shown(figures)}')
        lines += json.dumps({'iter': cfg.steps, **figures}) + '\n'
    files.write_file(f'{cfg.out_dir}/log.jsonl', lines)


# ---- The claims of lab/reproduce.py --------------------------------------------------------------


def sweep(r, models, steps, flags):
    """{name: its Arm}, whose runs, one a seed, have tried all learning rates.

    models: {name: its flags as text}. steps, flags: of all of them.
    """
    if r.cfg.quick:
        steps //= 8
    flags = [*flags, f'--steps={r.cfg.steps or steps}']
    r.commands.append(f'    python -m lab.ssa {" ".join(flags)} FLAGS --seed=SEED')
    arms = {}
    jobs = []
    for name, own in models.items():
        arms[name] = Arm(name, own, [])
        for seed in range(1, r.cfg.seeds + 1):
            args = [*flags, *own.split(), f'--seed={seed}']
            run = Run(f'{r.cfg.out_dir}/ssa{"".join(args)}')
            arms[name].runs.append(run)
            jobs.append((run, args))
    r.each(one, jobs)
    return arms


def one(run, args):
    """A run of this script, where it is missing."""
    if not os.path.isfile(f'{run.folder}/log.jsonl'):
        command(['-m', 'lab.ssa', *args, f'--out_dir={run.folder}'])


def best(arm):
    """The last line of each seed at the learning rate with which they lose least."""

    def loss(lines):
        return mean(line['val_loss'] for line in lines)

    return min(zip(*[run.evaluations for run in arm.runs]), key=loss)


def over_seeds(lines, name):
    """A figure of the lines of several seeds, as text."""
    return spread([line[name] for line in lines], '{:.3f}')


def graph(r):
    """2411.12892: where the nodes of a graph have few or many neighbours, SSA's transition matrix
    is closer to the truth, its temperatures follow the number of neighbours, and the norm of its
    query-key matrix is smaller. Takes 10 minutes."""
    models = {}
    for C in 8, 16, 32:
        models[f'{C} channels, standard'] = f'--n_embd={C}'
        models[f'{C + 1} channels, standard'] = f'--n_embd={C + 1}'
        models[f'{C} channels, SSA'] = f'--n_embd={C} --ssa=q'

    def cells(arm):
        lines = best(arm)
        temperatures = []
        for count in NEIGHBOURS:
            found = [line.get(f'temperature {count}', 1) for line in lines]
            temperatures.append(f'{mean(found):.2f}')
        return {
            'cross-entropy above the truth': over_seeds(lines, 'val_loss'),
            'L1': over_seeds(lines, 'l1'),
            'norm': over_seeds(lines, 'norm'),
            'temperatures': ' '.join(temperatures),
            'learning rate': str(lines[0]['learning_rate']),
        }

    parts = [GRAPH]
    for kind, flag in ('fixed', '--learned=False'), ('learned', '--learned=True'):
        arms = sweep(r, models, 2000, ['--task=graph', flag])
        parts.append(f'**Embeddings are {kind}**\n\n{table("attention", arms, cells)}')
    return parts


GRAPH = f"""{NODES} nodes of 1, 2, 4, 8 or 16 neighbours. Cross-entropy in nats a step, of which the
truth's own is subtracted, and L1, the sum of |P - truth| over a row, are means over rows. Norm: the
operator norm of the query-key matrix, temperatures left out. Temperatures: means over nodes of 1,
2, 4, 8 and 16 neighbours and over seeds; the softmax is sharper where they are larger. Each model
has the best of the learning rates {Graph.rates}, by its cross-entropy."""


def denoising(r):
    """2411.12892: mean squared errors of standard attention, value-selective attention (SSA's
    temperatures on values), averages, and the Bayes-optimal estimator. Takes 10 minutes."""
    models = {'standard': ''}
    for own in '--bias', '--ssa=v', '--ssa=v --ssa_sharing=False', '--ssa=qv':
        models[f'`{own}`'] = own
    rows = []
    for query in 'signal', 'zeros':
        for noise in '1.5', '3':
            flags = ['--task=denoising', f'--query={query}', f'--noise={noise}']
            arms = sweep(r, models, 1000, flags)
            row = {'last token': query, 'noise': noise}
            for name in 'average', 'best share', 'told':
                row[name] = over_seeds(best(arms['standard']), name)
            for name, arm in arms.items():
                row[name] = over_seeds(best(arm), 'val_loss')
            rows.append(row)
    return DENOISING, markdown(rows)


DENOISING = f"""Mean squared errors of a channel, where the estimate 0 has 1. Each model has the
best of the learning rates {Denoising.rates}. *average*: the mean of the tokens. *best share*: the
best multiple of it. *told*: the mean of u given the tokens and which of them are signal. No
estimate is better, and it is the Bayes-optimal one where the length of a token tells what it is.
Headers are FLAGS; value-selective attention is `--ssa=v`."""


if __name__ == '__main__':
    settings.run(main)
