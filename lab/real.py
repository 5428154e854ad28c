"""Claims about a real language model: what eviction costs it, and both methods put into it.

    python -m lab.reproduce eviction --model=FOLDER --texts=wikitext,english
    python -m lab.reproduce retrofit finetune --model=FOLDER --dataset=english --texts=wikitext

FOLDER has Hugging Face's layout, or is the out_dir of a run. The texts were prepared with its
tokenizer. Every measurement is kept in a file, so a claim that was stopped goes on.
"""

import functools
import hashlib
import os

import numpy as np
import torch

import data
from lab import export_hf, runs
from lab.harness import passkey
from lab.runs import Losses, markdown, spread
from support import checkpoint as ckpt, files, pretrained

PRESENT = 'streaming', 'oldest', 'random', 'knorm', 'tova', 'h2o', 'h2o_mean', 'vatp'
VOTER = '--selective --voter=16 --memory_loss=1 --ssa_lr=60 --freeze=base'
ADDED = {
    'going on': '',
    'qv, learning rate x 0.1': '--ssa=qv --ssa_alpha=-8 --ssa_lr=0.1',
    'qv, learning rate x 1': '--ssa=qv --ssa_alpha=-8 --ssa_lr=1',
    'qv, learning rate x 10': '--ssa=qv --ssa_alpha=-8 --ssa_lr=10',
    'position only, x 10': 'position_only --ssa=q --ssa_lr=10',
    'position only, x 100': 'position_only --ssa=q --ssa_lr=100',
}
TOKENS = 8192  # of each held-out text
LEGEND = f"""Losses in nats per token, of all targets / of recall tokens, which occurred in the
window before, but not among the newest {runs.NEAR} tokens. Every layer keeps as many tokens as the
header says, and drops one by the row's policy as each token comes. Heads share the decision."""


@functools.lru_cache(1)
def load(folder):
    """The model of a folder and its checkpoint."""
    init_from = folder
    if os.path.isfile(f'{folder}/ckpt.pt'):
        init_from = 'resume'
    return pretrained.load_model(init_from, folder)


@functools.lru_cache
def identity(folder):
    """The fingerprint of the weights of a folder, which takes seconds, and its tokenizer."""
    model, checkpoint = load(folder)
    return ckpt.fingerprint(model), checkpoint['tokenizer']


def losses(r, folders, text, T, K=None, policy='oldest'):
    """The Losses of models on held-out windows of T tokens of a text, in layers of K tokens."""
    found = []
    for folder in folders:
        weights, tokenizer = identity(folder)
        dataset = data.load_dataset(text, tokenizer=tokenizer)
        what = repr([weights, dataset.meta, T, K, policy])
        path = f'{r.cfg.out_dir}/losses-{hashlib.sha256(what.encode()).hexdigest()[:16]}.pt'
        if not os.path.isfile(path):
            model, _ = load(folder)
            new = runs.losses_on(model, dataset, T, TOKENS // T, True, K, policy)
            with files.replacing(path) as f:
                torch.save(vars(new), f)
        found.append(Losses(**torch.load(path, weights_only=True)))
    return runs.joined(found)


def policies(r, models, T, Ks):
    """The losses of models in layers of K of T tokens, by each policy of eviction, for each text.

    models: {name: its folders}. The last columns compare with the best policy of the first model.
    """
    first, *_ = models
    parts = [LEGEND]
    for text in r.cfg.texts.split(','):
        best = {}
        for K in Ks:
            tried = [losses(r, models[first], text, T, K, policy) for policy in PRESENT]
            best[K] = min(tried, key=lambda found: found.nats.mean())
        rows = []
        for name, folders in models.items():
            full = losses(r, folders, text, T).shown()
            rows.append({'weights': name, 'policy': 'keeps all', f'{Ks[0]} of {T} tokens': full})
            tried = PRESENT
            if load(folders[0])[0].config.selective:
                tried = 'selective', *PRESENT
            for policy in tried:
                row = {'weights': name, 'policy': policy}
                for K in Ks:
                    found = losses(r, folders, text, T, K, policy)
                    row[f'{K} of {T} tokens'] = found.shown()
                    row[f'{K}: against the best of {first}'] = found.against(best[K])
                rows.append(row)
        parts += [f'**{text}**', markdown(rows)]
    return parts


def eviction(r):
    """What a language model loses when every layer keeps 32, 64, 128 or 256 of 1,024 tokens, by
    each policy of eviction; fewer where it knows fewer. Takes 2 hours."""
    T = min(1024, load(r.cfg.model)[0].config.block_size)
    Ks = [max(2, T // part) for part in (32, 16, 8, 4)]
    return policies(r, {'as it is': [r.cfg.model]}, T, Ks)


def train(r, models, steps, start, seeds=None):
    """The arms of models that go on from the folder start with --dataset."""
    flags = ['config/real_model.py', f'--init_from={start}', f'--dataset={r.cfg.dataset}']
    return r.train(models, steps, flags, seeds)


def retrofit(r):
    """A voter in each layer of a language model that has trained on, frozen, beside the same
    weights under the best of the other policies. Ours, not of a paper. Takes an hour for each
    seed."""
    plain = train(r, {'plain': ''}, 200, r.cfg.model)['plain'].folders
    voters = []
    for seed, folder in enumerate(plain, 1):
        start = f'{folder}/hf'
        export_hf.export(*load(folder), start)
        voters += train(r, {'voter': VOTER}, 400, start, [seed])['voter'].folders
    return policies(r, {'plain': plain, 'voter': voters}, 512, (64, 128))


def finetune(r):
    """2411.12892: with SSA added to it, a language model reaches the loss of continued training in
    1.45x fewer steps, and finds 74.4% of passkeys instead of 56.9% (theirs, second-hand). Takes 2
    hours for each seed."""
    arms = train(r, ADDED, 200, r.cfg.model)
    folders = {'before': [r.cfg.model]}
    for name in 'going on', 'qv, learning rate x 1':
        folders[name] = arms[name].folders
    rows = []
    for name, some in folders.items():
        row = {'model': name}
        for T in 512, 1024:
            right = [passkeys_found(folder, T) for folder in some]
            row[f'passkeys in {T} tokens'] = spread(right, '{:.0%}')
        rows.append(row)
    return runs.steps_table(arms), r.curves(arms), markdown(rows)


@torch.no_grad()
def passkeys_found(folder, T):
    """The fraction of passkeys of five digits that a model finds in T tokens or just fewer."""
    model, checkpoint = load(folder)
    tokenizer = data.get_tokenizer(checkpoint['tokenizer'])
    right = []
    for prompt in passkey.prompts(4 * T, 10):
        ids = data.encode_prompt(prompt['text'], tokenizer, True)
        key = tokenizer.encode_ordinary(f' {prompt["key"]}')
        x = torch.tensor([ids + key])
        best = model(x, x)[0][0, -1 - len(key) : -1].argmax(dim=-1)
        right.append(best.tolist() == key)
    return np.mean(right)
