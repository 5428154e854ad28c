"""support/pretrained.py against transformers."""

import fnmatch
import functools
import json
import os
import re
import shutil
import sys

import huggingface_hub
import pytest
import torch

import data
import prune
import sample
import train
from lab import export_hf
from model import is_gpt2
from support import checkpoint as ckpt
from support import pretrained
from support.settings import UserError

if os.environ.get('CI'):  # there all of these tests must run
    import safetensors.torch
    import transformers
else:
    safetensors = pytest.importorskip('safetensors')
    pytest.importorskip('safetensors.torch')
    transformers = pytest.importorskip('transformers')

SHAPE = dict(vocab_size=300, n_positions=40, n_embd=32, n_layer=2, n_head=4)
WEIGHTS = 'model.safetensors'
NEW = dict(selective=True, vote_scale=True, ssa='qv')
TOKENS = torch.randint(257, (3, 40), generator=torch.Generator().manual_seed(1))
# in float64, so that what differs is the rule and not the rounding
close = functools.partial(torch.testing.assert_close, atol=1e-10, rtol=1e-10)


def make(**changes):
    """A GPT2LMHeadModel with random weights, large enough to tell every rule from another."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(**SHAPE, bos_token_id=0, eos_token_id=0, **changes)
    gpt = transformers.GPT2LMHeadModel(config)
    for p in gpt.parameters():
        p.data += torch.randn_like(p) * (0.2 if p.dim() == 2 else 0.1)
    return gpt.eval()


def save(gpt, path):
    """A folder as transformers saves it, with the tokenizer bytes as lab.export_hf names it."""
    gpt.save_pretrained(path)
    tokenizer = data.get_tokenizer('bytes')
    (path / 'tokenizer.json').write_text(export_hf.tokenizer_json(tokenizer, False))
    (path / 'tokenizer_config.json').write_text('{"tiktoken": "bytes"}')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('hf')
    save(make(), path)
    return path


def load(folder, **changes):
    checkpoint = pretrained.load(str(folder))
    return ckpt.build(checkpoint, add_new=True, **changes).eval()


def refused(folder, copied, name, change):
    """What is said of a copy of the folder in which a file is changed.

    change: new entries of a JSON file, or a function that makes new content of the old; None: the
    file is missing.
    """
    shutil.copytree(folder, copied)
    content = (copied / name).read_bytes()
    (copied / name).unlink()
    if isinstance(change, dict):
        (copied / name).write_text(json.dumps({**json.loads(content), **change}))
    elif change:
        (copied / name).write_bytes(change(content))
    with pytest.raises(UserError) as error:
        load(copied)
    return str(error.value)


def half(content):
    return content[: len(content) // 2]


@torch.no_grad()
def logits(gpt, idx=TOKENS):
    gpt = gpt.double()
    if isinstance(gpt, transformers.GPT2LMHeadModel):
        return gpt(idx).logits
    return gpt(idx, idx)[0]


def loss(folder, **flags):
    return load(folder, **flags)(TOKENS, TOKENS)[1].item()


# ---- Weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize('activation', ['gelu_new', 'gelu'])
def test_logits(tmp_path, activation):
    gpt = make(activation_function=activation)
    save(gpt, tmp_path)
    close(logits(load(tmp_path)), logits(gpt))


def test_file_as_the_hub_has_it(folder, tmp_path):
    """Names without a prefix, the causal masks among them, and half precision."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    hub = {'h.0.attn.bias': torch.ones(1, 1, 40, 40), 'h.0.attn.masked_bias': torch.tensor(-1e4)}
    for name, x in safetensors.torch.load_file(folder / WEIGHTS).items():
        hub[name.removeprefix('transformer.')] = x.half()
    safetensors.torch.save_file(hub, tmp_path / WEIGHTS)
    close(logits(load(tmp_path)), logits(make().half()))


def test_block_size_is_cropped(folder):
    small = load(folder, block_size=16)
    assert len(small.transformer.wpe.weight) == 16
    close(logits(small, TOKENS[:, :16]), logits(load(folder), TOKENS[:, :16]))
    with pytest.raises(UserError, match='knows 40 tokens of context, not more'):
        load(folder, block_size=41)


def test_what_a_method_adds(folder):
    """It is new on request only, and what GPT-2 has is never new."""
    standard = loss(folder)
    assert loss(folder, selective=True, vote_scale=True) == pytest.approx(standard, abs=1e-5)
    assert abs(loss(folder, ssa='qv') - standard) / standard < 0.02
    assert abs(loss(folder, selective=True) - standard) > 0.01
    checkpoint = pretrained.load(str(folder))
    with pytest.raises(UserError, match='Missing .*h.0.attn.vote_scale", .*ssa.q.alpha'):
        ckpt.build(checkpoint, **NEW)
    del checkpoint['model']['transformer.h.1.ln_1.bias']
    with pytest.raises(UserError, match='Missing .*"transformer.h.1.ln_1.bias'):
        ckpt.build(checkpoint, add_new=True, **NEW)


# ---- Folders that are not what they should be ----------------------------------------------------


@pytest.mark.parametrize(
    'change, message',
    [
        ({'model_type': 'opt'}, 'model_type'),
        ({'n_inner': 50}, 'n_inner'),
        ({'layer_norm_epsilon': 1e-6}, 'layer_norm'),
        ({'activation_function': 'relu'}, 'activation_function'),
        ({'scale_attn_weights': False}, 'scale_attn_weights'),
        ({'scale_attn_by_inverse_layer_idx': True}, 'scale_attn_by'),
        ({'tie_word_embeddings': False}, 'tie_word'),
        ({'n_layer': 3}, 'Missing key(s) in state_dict: "transformer.h.2'),
        ({'n_layer': 1}, 'Unexpected key(s) in state_dict: "transformer.h.1'),
        ({'vocab_size': 299}, 'does not fit'),
        ({'n_embd': 30}, 'not divisible'),
        ({'n_embd': 'x'}, "config.json: n_embd: 'x' is not a whole number"),
        ({'n_layer': 10**6}, 'n_layer'),
        (None, 'config.json is missing'),
        (half, 'config.json is damaged'),
    ],
)
def test_configs_that_are_refused(folder, tmp_path, change, message):
    assert message in refused(folder, tmp_path / 'x', 'config.json', change)


def others(content):
    return safetensors.torch.save({'x': torch.zeros(1)})


def not_finite(content):
    tensors = safetensors.torch.load(content)
    tensors['transformer.ln_f.bias'][3] = torch.nan
    return safetensors.torch.save(tensors)


@pytest.mark.parametrize(
    'change, message',
    [
        (None, 'model.safetensors does not exist'),
        (half, 'cannot be read'),
        (others, 'does not fit'),
        (not_finite, 'transformer.ln_f.bias is not finite'),
    ],
)
def test_weights_that_are_refused(folder, tmp_path, change, message):
    assert message in refused(folder, tmp_path / 'x', WEIGHTS, change)


def test_no_such_name_and_no_package(folder, monkeypatch):
    with pytest.raises(UserError, match="'../x' is no folder, and cannot be downloaded .HFValid"):
        load('../x')
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    with pytest.raises(UserError, match='pip install safetensors'):
        load(folder)


# ---- Downloads -----------------------------------------------------------------------------------


def test_download(folder, monkeypatch):
    """The names that the hub is asked for. Without a network one line is said."""

    def snapshot_download(name, allow_patterns):
        if name not in ('gpt2-medium', 'some_one/GPT.2-x'):
            raise ConnectionError('long\nstory')
        for file in os.listdir(folder):
            assert any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot_download)
    for name in 'gpt2-medium', 'some_one/GPT.2-x':
        close(logits(load(name)), logits(make()))
    with pytest.raises(UserError, match="gpt2-xl' is no folder, and cannot be downloaded .Conn"):
        load('gpt2-xl')


# ---- The scripts ---------------------------------------------------------------------------------

TINY = (
    '--block_size=32 --batch_size=4 --gradient_accumulation_steps=1 --max_iters=6 --device=cpu '
    '--eval_interval=3 --eval_iters=2 --warmup_iters=1 --learning_rate=1e-2'
).split()


@pytest.mark.parametrize(
    'flags', [{'ssa': 'qv'}, {'selective': True, 'vote_scale': True}, {}], ids=repr
)
def test_recipe_resume(folder, dataset, tmp_path, run, flags):
    args = ['config/finetune_gpt2.py', dataset, *TINY, f'--out_dir={tmp_path}']
    args += [f'--init_from={folder}', *[f'--{name}={value}' for name, value in flags.items()]]
    out = run(train, *args)
    losses = [float(x) for x in re.findall(r'val_loss ([\d.]+)', out)]
    assert len(losses) == 3 and losses[-1] < losses[0]
    start = load(folder, block_size=32, **flags)
    saved = ckpt.load(tmp_path)
    assert saved['model_args'] == vars(start.config)
    for name, p in start.named_parameters():
        assert not torch.equal(p, saved['model'][name]), f'{name} was not trained'
    out = run(train, *args, '--max_iters=7', '--init_from=resume')
    assert 'val_loss' in out
    assert ckpt.load(tmp_path)['pretrained'] == str(folder)


@pytest.mark.parametrize('new, loss', [(NEW, 0), (dict(selective=True, voter=3), 1)])
def test_freeze(folder, dataset, tmp_path, run, new, loss):
    args = [dataset, *TINY, f'--out_dir={tmp_path}', f'--init_from={folder}', '--freeze=base']
    flags = [f'--{name}={value}' for name, value in new.items()]
    flags.append(f'--memory_loss={loss}')
    run(train, *args, *flags)
    start = load(folder, block_size=32, **new).state_dict()
    for name, trained in ckpt.load(tmp_path)['model'].items():
        assert torch.equal(trained, start[name]) == is_gpt2(name), name
    resumed = [*args, *flags, '--init_from=resume', '--max_iters=7']
    assert 'step 7/7' in run(train, *resumed)
    out = run(train, *resumed, '--freeze=', '--max_iters=8', '--resume_changed')
    assert 'step 8/8' in out
    assert 'trains nothing' in run(train, *args, f'--out_dir={tmp_path / "x"}')


def test_sample_and_prune_read_a_folder(folder, dataset, tmp_path, run):
    init = f'--init_from={folder}'
    assert 'KV cache' in run(sample, init, '--max_new_tokens=4', '--device=cpu')
    search = [init, '--policy=oldest', '--tolerance=5', '--windows=2', '--device=cpu']
    assert 'needs an --out_dir' in run(prune, *search)
    search.append(f'--out_dir={tmp_path / "b"}')
    assert "data set ''" in run(prune, *search)
    assert 'less memory' in run(prune, *search, dataset)
    assert os.listdir(tmp_path / 'b') == ['budgets_oldest.json']
