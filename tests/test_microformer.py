"""A trained GPT-2 instead of random weights: MGM, of 8 layers, 8 heads and 256 channels.

It is a language model of microbiomes and comes in a package: pip install --no-deps
microformer-mgm==0.5.8. A text is <bos>, genera in the order of how common they are in a sample, and
<eos>. The package has no samples, so the loss is measured on the model's own texts.
"""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from support import checkpoint as ckpt
from support import pretrained
from test_pretrained import save

if os.environ.get('CI'):  # there all of these tests must run
    import transformers
else:
    pytest.importorskip('safetensors')
    transformers = pytest.importorskip('transformers')
    if importlib.util.find_spec('mgm') is None:
        pytest.skip('microformer-mgm is not installed', allow_module_level=True)

pytestmark = pytest.mark.slow
BOS = 2
EOS = 3


@pytest.fixture(scope='module')
def theirs():
    package = Path(importlib.util.find_spec('mgm').origin).parent
    folder = package / 'resources' / 'general_model'
    return transformers.GPT2LMHeadModel.from_pretrained(folder).eval()


@pytest.fixture(scope='module')
def load(theirs, tmp_path_factory):
    """load(**flags): the model by init_from, with what the flags put in."""
    folder = tmp_path_factory.mktemp('mgm')
    save(theirs, folder)  # the package has pytorch_model.bin, which is a pickle
    checkpoint = pretrained.load(str(folder))
    return lambda **flags: ckpt.build(checkpoint, add_new=True, **flags).eval()


@pytest.fixture(scope='module')
def texts(load):
    """Eight texts of at most 96 tokens that the model wrote."""
    torch.manual_seed(0)
    return load().generate(torch.full((8, 1), BOS), 95)


def loss_of(model, texts):
    """In nats a token; what follows <eos> does not count."""
    x, y = texts[:, :-1], texts[:, 1:]
    return model(x, y.masked_fill((x == EOS).cumsum(dim=1) > 0, -1))[1]


@torch.no_grad()
def test_logits(theirs, load, texts):
    torch.testing.assert_close(load()(texts, texts)[0], theirs(texts).logits, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    'flags, low, high',
    [
        # a factor of 0 on the votes is the same model
        (dict(selective=True, vote_scale=True), 0, 1e-4),
        (dict(ssa='qv'), 0, 0.1),
        # head 0 was not trained to vote
        (dict(selective=True), 0.02, 3),
    ],
)
@torch.no_grad()
def test_loss_right_after_a_method_is_put_in(load, texts, flags, low, high):
    change = abs(loss_of(load(**flags), texts) - loss_of(load(), texts))
    assert low <= change <= high


def test_a_few_steps_of_fine_tuning_repair_what_selection_broke(load, texts):
    model = load(selective=True)
    [optimizer] = model.configure_optimizers(0.0, 3e-4, (0.9, 0.99), 'cpu')
    losses = []
    for _ in range(5):
        loss = loss_of(model, texts[:4])
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    assert loss_of(load(), texts[:4]) < min(6, losses[0])  # by chance it is 9.2


@pytest.mark.parametrize('budgets, same', [(80, True), ([4] * 4 + [16] * 4, False)])
def test_generation_within_budgets(theirs, load, texts, budgets, same):
    prompt = texts[:2, :60]
    greedy = theirs.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=99999)
    found = load().generate(prompt, 20, temperature=0, budgets=budgets, policy='oldest')
    assert torch.equal(found, greedy) == same
