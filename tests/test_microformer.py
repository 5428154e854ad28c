"""A trained GPT-2 instead of random weights: MGM, a language model of microbiomes (8 layers, 8 heads, 256 channels).

It comes in a package: pip install --no-deps microformer-mgm==0.5.8. A text is <bos>, genera in the order of how common
they are in a sample, and <eos>. The package has no samples, so the model's own texts are what the loss is measured on.
"""
import importlib.util
import os
from pathlib import Path

import pytest
import torch

from support import checkpoint as ckpt, pretrained

if os.environ.get('CI'):        # there all of these tests must run
    import transformers
else:
    pytest.importorskip('safetensors')
    transformers = pytest.importorskip('transformers')
    if importlib.util.find_spec('mgm') is None:
        pytest.skip('microformer-mgm is not installed', allow_module_level=True)

BOS, EOS = 2, 3


@pytest.fixture(scope='module')
def theirs():
    folder = Path(importlib.util.find_spec('mgm').origin).parent / 'resources' / 'general_model'
    return transformers.GPT2LMHeadModel.from_pretrained(folder).eval()


@pytest.fixture(scope='module')
def load(theirs, tmp_path_factory):
    """load(**flags): the model by init_from, with what the flags put in."""
    folder = str(tmp_path_factory.mktemp('mgm'))
    theirs.save_pretrained(folder)          # the package has pytorch_model.bin, which is a pickle
    checkpoint = pretrained.load(folder, pretrained.PretrainedConfig())
    return lambda **flags: ckpt.build(checkpoint, **flags).eval()


@pytest.fixture(scope='module')
def texts(load):
    """Eight texts of at most 96 tokens that the model wrote."""
    torch.manual_seed(0)
    return load().generate(torch.full((8, 1), BOS), 95)


def loss_of(model, texts):
    """In nats a token; what follows <eos> does not count."""
    ended = ((texts == EOS).cumsum(dim=1) - (texts == EOS).int()).bool()
    return model(texts[:, :-1], texts.masked_fill(ended, -1)[:, 1:])[1]


def test_logits(theirs, load, texts):
    ours = load()
    assert sum(p.numel() for p in ours.parameters()) == theirs.num_parameters() == 8_924_928
    with torch.no_grad():
        torch.testing.assert_close(ours.double()(texts, texts)[0], theirs.double()(texts).logits, atol=1e-8, rtol=1e-8)
        theirs.float()


def test_it_is_trained(load, texts):
    """Its own texts are far likelier than the same tokens in another order, and than by chance (9.2 nats)."""
    torch.manual_seed(0)
    shuffled = torch.cat([texts[:, :1], texts[:, 1:][:, torch.randperm(95)]], dim=1)
    with torch.no_grad():
        loss = loss_of(load(), texts)
        assert loss < 6 and loss_of(load(), shuffled) > loss + 0.5


@pytest.mark.parametrize('flags, low, high', [
    (dict(selective=True, vote_scale=True), 0, 1e-4),       # a factor of 0 on the votes: the same model
    (dict(ssa='qv'), 0, 0.1), (dict(ssa='qv', ssa_sharing=False), 0, 0.1),
    (dict(selective=True), 0.02, 3)])                       # head 0 was not trained to vote
def test_loss_right_after_a_method_is_put_in(load, texts, flags, low, high):
    with torch.no_grad():
        change = abs(loss_of(load(**flags), texts) - loss_of(load(), texts)).item()
    assert low <= change <= high, change


def test_a_few_steps_of_fine_tuning_repair_what_selection_broke(load, texts):
    model, texts, losses = load(selective=True), texts[:4], []
    optimizer = model.configure_optimizers(0.0, 3e-4, (0.9, 0.99), 'cpu')
    for _ in range(5):
        optimizer.zero_grad()
        loss = loss_of(model, texts)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        assert losses[0] > loss_of(load(), texts) and losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize('flags, policy', [
    ({}, 'oldest'), (dict(selective=True), 'selective'), (dict(ssa='qv'), 'random')])
def test_generation_within_budgets(theirs, load, texts, flags, policy):
    model, prompt = load(**flags), texts[:2, :60]
    whole = model.generate(prompt, 20, temperature=0)
    assert torch.equal(model.generate(prompt, 20, temperature=0, budgets=80, policy=policy), whole)
    small = model.generate(prompt, 20, temperature=0, budgets=[4] * 4 + [16] * 4, policy=policy)       # keeps 80 of 640
    assert small.shape == (2, 80) and not torch.equal(small, whole)
    if not flags:
        greedy = theirs.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=99999)
        assert torch.equal(greedy, whole)
