"""lab/export_hf.py: what transformers makes of the folder, against model.py."""

import functools
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as fn

import model as m
from lab import export_hf
from support import checkpoint as ckpt
from support import pretrained

if not os.environ.get('CI'):  # there all of these tests must run
    pytest.importorskip('transformers')
import transformers

EOT = 256
LLAMA = dict(llama=True, rope=True, n_kv_head=2, n_inner=24)
METHODS = {
    'both': dict(selective=True, vote_scale=True, ssa='qkv', bias=True),
    'ssa': dict(ssa='q', ssa_sharing=False, qk_norm=True),
    'llama': dict(LLAMA, selective=True, voter=3, ssa='qv', tied=False),
}


def gpt(block_size=24, vocab_size=257, n_embd=16, **changes):
    """A model whose weights are large enough to tell every rule from another."""
    torch.manual_seed(0)
    made = m.GPT(m.GPTConfig(block_size, vocab_size, 2, 4, n_embd, **changes))
    for p in made.parameters():
        p.data += torch.randn_like(p) * 0.3
    return made.eval()


def checkpoint(model, bos=False):
    return {
        'model': model.state_dict(),
        'model_args': vars(model.config),
        'config': {'bos': bos},
        'tokenizer': 'bytes',
    }


def load(folder, **options):
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(folder, trust_remote_code=True, **options).eval()


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """exported(method): (our model, transformers' one, its folder), made once."""

    @functools.cache
    def export(method):
        ours = gpt(**METHODS[method])
        folder = str(tmp_path_factory.mktemp(method))
        export_hf.export(ours, checkpoint(ours), folder)
        return ours, load(folder), folder

    return export


def tokens(B=3, T=20, seed=1):
    return torch.randint(EOT, (B, T), generator=torch.Generator().manual_seed(seed))


def greedy(model, idx, n, **options):
    return model.generate(idx, max_new_tokens=n, do_sample=False, eos_token_id=None, **options)


# ---- Logits and loss -----------------------------------------------------------------------------


@pytest.mark.parametrize('method', METHODS)
@torch.no_grad()
def test_logits(exported, method):
    ours, theirs, _ = exported(method)
    x = tokens()
    logits = ours(x, x)[0]
    assert torch.equal(theirs(x).logits, logits)
    assert torch.equal(theirs(x, logits_to_keep=2).logits, logits[:, -2:])
    labels = x.clone()
    labels[:, 7:9] = -100
    loss = fn.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    mask = torch.ones_like(x)
    mask[:, -1] = 0  # padding on the right makes no difference to the tokens before it
    torch.testing.assert_close(theirs(x, mask, labels=labels).loss, loss)
    with pytest.raises(ValueError, match="score them with tokenizer.padding_side = 'right'$"):
        theirs(x, mask.flip(1))
    with pytest.raises(ValueError, match='padding on the left is not possible, and in generation'):
        greedy(theirs, x, 1, attention_mask=mask)


# ---- What is a plain GPT-2 or Llama --------------------------------------------------------------


@pytest.mark.parametrize(
    'changes',
    [
        dict(),
        dict(bias=True, gelu='tanh'),
        dict(LLAMA, rope_base=500.0),
        dict(llama=True, rope=True, tied=False),
    ],
)
@torch.no_grad()
def test_a_standard_model_needs_no_code(changes, tmp_path):
    ours = gpt(**changes)
    export_hf.export(ours, checkpoint(ours, bos=True), str(tmp_path))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    again, kept = pretrained.load_model(str(tmp_path), '')
    assert kept['tokenizer'] == 'bytes' and kept['config'] == {'bos': True}
    x = tokens()
    wanted = ours.double()(x, x)[0]
    for logits in theirs.double()(x).logits, again.double()(x, x)[0]:
        torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in 'Wörter\n\n  3\t', '':
        ids = [EOT, *text.encode()]
        assert tokenizer(text).input_ids == ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.pad_token_id == EOT


@pytest.mark.parametrize(
    'changes',
    [dict(qk_norm=True), dict(rope=True), dict(n_kv_head=1), dict(n_inner=8), dict(tied=False)]
    + [dict(llama=True), dict(LLAMA, bias=True), dict(LLAMA, selective=True), dict(ssa_alpha=-3.0)],
)
def test_any_other_model_takes_the_code_along(changes, tmp_path):
    export_hf.export(gpt(**changes), checkpoint(gpt(**changes)), str(tmp_path))
    assert json.loads((tmp_path / 'config.json').read_text())['model_type'] == 'selective_gpt'
    assert (tmp_path / 'model.py').is_file()


# ---- Generation ----------------------------------------------------------------------------------


@pytest.mark.parametrize('method, T, new', [('both', 1, 23), ('ssa', 20, 4), ('llama', 40, 40)])
def test_greedy_text_is_ours(exported, method, T, new):
    """Up to block_size, and with rotary positions far past it."""
    ours, theirs, _ = exported(method)
    x = tokens(T=T)
    assert torch.equal(greedy(theirs, x, new), ours.generate(x, new, temperature=0))
    if method != 'llama':
        with pytest.raises(ValueError, match='25 tokens do not fit into block_size 24'):
            greedy(theirs, x, new + 2)


@torch.no_grad()
def test_budgets_and_policies(tmp_path):
    """Those of the export, of from_pretrained and of generate; the later win."""
    ours = gpt(**LLAMA)
    x = tokens()
    export_hf.export(ours, checkpoint(ours), str(tmp_path / 'a'), [8, 5], 'h2o_mean')
    kept = load(tmp_path / 'a')
    kept.save_pretrained(tmp_path / 'b')
    again = load(tmp_path / 'b', policy='tova')
    logits = ours(x, x, m.KVCache(ours, 3, [8, 5], 'tova'))[0]
    assert torch.equal(again(x).logits, logits)
    cases = [
        (kept, {}, [8, 5], 'h2o_mean'),
        (kept, {'budgets': 'none'}, None, 'h2o_mean'),
        (again, {}, [8, 5], 'tova'),
    ]
    for policy in 'streaming:2', 'h2o':
        cases.append((again, {'budgets': 6, 'policy': policy}, 6, policy))
    texts = set()
    for model, options, budgets, policy in cases:
        text = ours.generate(x, 30, temperature=0, budgets=budgets, policy=policy)
        assert torch.equal(greedy(model, x, 30, **options), text)
        texts.add(str(text))
    assert len(texts) == len(cases)
    assert torch.equal(again.train()(x).logits, ours(x, x)[0])  # training needs all tokens


@torch.no_grad()
def test_other_ways_to_generate(exported):
    _, model, _ = exported('both')
    x = tokens(2, 10)
    assert torch.equal(greedy(model, x, 10, use_cache=False), greedy(model, x, 10))
    with pytest.raises(ValueError, match='need the cache'):
        greedy(model, x, 10, use_cache=False, budgets=4)
    with pytest.raises(ValueError, match='beam search needs use_cache=False'):
        greedy(model, x, 10, num_beams=3)
    with pytest.raises(ValueError, match='assisted generation is not possible'):
        greedy(model, x[:1], 10, prompt_lookup_num_tokens=2)
    # a cache by hand, with several new tokens at a time
    out = model(x[:, :4], use_cache=True)
    more = model(x[:, 4:], past_key_values=out.past_key_values)
    logits = torch.cat([out.logits, more.logits], dim=1)
    torch.testing.assert_close(logits, model(x).logits, atol=1e-5, rtol=1e-5)


# ---- Another process -------------------------------------------------------------------


ELSEWHERE = """
import sys, transformers
pipe = transformers.pipeline('text-generation', sys.argv[1], trust_remote_code=True)
print(pipe('ab', max_new_tokens=9, do_sample=False, budgets=4, eos_token_id=999))
assert not {'support', 'kernels', 'data', 'model'} & set(sys.modules)
"""


@pytest.mark.slow
def test_in_an_environment_without_this_repository(exported):
    ours, _, folder = exported('llama')
    command = [sys.executable, '-I', '-c', ELSEWHERE, folder]
    printed = subprocess.check_output(command, text=True)
    ids = ours.generate(torch.tensor([list(b'ab')]), 9, temperature=0, budgets=4)[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert printed.splitlines()[-1] == str([{'generated_text': text}])


# ---- The command ---------------------------------------------------------------------------------


@pytest.fixture
def out_dir(tmp_path):
    ckpt.save(tmp_path / 'a', checkpoint(gpt(64, selective=True), bos=True))
    return tmp_path / 'a'


def test_command(out_dir, run):
    run(export_hf, f'--out_dir={out_dir}', '--budgets=7')
    folder = out_dir / 'hf'
    card = (folder / 'README.md').read_text()
    assert json.loads((folder / 'config.json').read_text())['budgets'] == [7, 7]
    exec(card.split('```python')[1].split('```')[0], {'folder': folder})  # what the card says works
    assert 'is a model' in run(export_hf, f'--out_dir={out_dir}')  # again, over our own


@pytest.mark.parametrize(
    'option, message',
    [
        ('--budgets=1', 'a whole number from 2'),
        ('--folder=.', 'choose another'),
        ('--init_from=nowhere', 'is no folder'),
    ],
)
def test_bad_input(out_dir, run, option, message, monkeypatch):
    monkeypatch.chdir(out_dir)
    assert message in run(export_hf, '--out_dir=.', option)
    assert os.listdir() == ['ckpt.pt']


def test_a_package_is_missing(out_dir, run, monkeypatch):
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    assert 'pip install transformers' in run(export_hf, f'--out_dir={out_dir}')
