"""lab/export_hf.py: what transformers makes of the folder, against model.py."""

import functools
import os
import subprocess
import sys

import pytest
import tiktoken
import torch
import torch.nn.functional as fn
from torch.nn.utils.rnn import pad_sequence

import data
import model as m
from lab import export_hf
from support import checkpoint as ckpt

if not os.environ.get('CI'):  # there all of these tests must run
    pytest.importorskip('transformers')
import transformers

EOT = 256
METHODS = {
    'both': dict(selective=True, ssa='qkv'),
    'ssa': dict(ssa='q', ssa_sharing=False, qk_norm=True),
    'all': dict(selective=True, vote_scale=True, ssa='qv', rope=True, qk_norm=True, bias=True),
}


def gpt(block_size=24, vocab_size=257, n_embd=16, **changes):
    """A model whose weights are large enough to tell every rule from another."""
    torch.manual_seed(0)
    made = m.GPT(m.GPTConfig(block_size, vocab_size, 2, 2, n_embd, **changes))
    for p in made.parameters():
        p.data += torch.randn_like(p) * 0.3
    return made.eval()


def checkpoint(model, bos=False, tokenizer='bytes'):
    return {
        'model': model.state_dict(),
        'model_args': vars(model.config),
        'config': {'bos': bos},
        'dataset': 'stdlib',
        'tokenizer': tokenizer,
        'iter_num': 1200,
        'val_loss': 1.23456789,
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
    torch.testing.assert_close(theirs(x, labels=labels).loss, loss)


@pytest.mark.parametrize('method', ['both', 'all'])
@pytest.mark.parametrize('budgets', [None, 6])
@torch.no_grad()
def test_padding_on_the_left(exported, method, budgets):
    model = load(exported(method)[2], budgets=budgets)
    texts = [tokens(1, T, seed=T)[0] for T in (18, 2, 9)]
    x = pad_sequence(texts, True, EOT, 'left')
    mask = (x != EOT).long()
    logits = model(x, attention_mask=mask).logits
    longer = greedy(model, x, 30, attention_mask=mask)
    for b, text in enumerate(texts):
        alone = model(text[None]).logits[0]
        torch.testing.assert_close(logits[b, -len(alone) :], alone, atol=1e-4, rtol=1e-4)
        alone = greedy(model, text[None], 30)[0]
        assert torch.equal(longer[b, -len(alone) :], alone)
    with pytest.raises(ValueError, match="padding_side = 'left'$"):
        greedy(model, x, 1, attention_mask=mask.flip(1))


# ---- What is a plain GPT-2 -----------------------------------------------------------------------


@pytest.mark.parametrize('changes', [dict(), dict(bias=True, gelu='tanh')])
def test_a_standard_model_is_a_plain_gpt2(changes, tmp_path):
    ours = gpt(**changes)
    export_hf.export(ours, checkpoint(ours), str(tmp_path))
    theirs = load(tmp_path)
    assert type(theirs) is transformers.GPT2LMHeadModel
    x = tokens()
    logits = ours.double()(x, x)[0]
    torch.testing.assert_close(theirs.double()(x).logits, logits, atol=1e-10, rtol=1e-10)


def test_what_gpt2_does_not_know_is_not_plain():
    assert not export_hf.is_plain(m.GPTConfig(), ['gate.weight'])
    assert not export_hf.is_plain(m.GPTConfig(qk_norm=True), ['lm_head.weight'])


FORK = """
from support import settings
import torch
import model as m
from lab import export_hf
from support import checkpoint as ckpt
import transformers
model = m.GPT(m.GPTConfig(24, 257, 2, 2, 16, shift=8.0)).eval()
facts = dict(dataset='x', tokenizer='bytes', iter_num=1, val_loss=None, pretrained=None, config={})
export_hf.export(model, facts, 'hf')
theirs = transformers.AutoModelForCausalLM.from_pretrained('hf', trust_remote_code=True)
x = torch.arange(20)[None]
print(torch.equal(theirs(x).logits, model(x, x)[0]))
"""


@pytest.mark.slow
def test_a_fork_takes_its_model_along(tree):
    place = '    @property\n    def head_size(self):'
    tree('model.py', place, '    shift: float = 0.0\n\n' + place)
    tree(
        'model.py',
        'x = self.transformer.ln_f(x)',
        'x = self.transformer.ln_f(x + self.config.shift)',
    )
    assert tree.run('-c', FORK).endswith('True\n')


# ---- Generation ----------------------------------------------------------------------------------


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('T', [1, 20, 40])
def test_greedy_text_is_ours(exported, method, T):
    """Within block_size and far past it, from prompts that are shorter and longer than it."""
    ours, theirs, _ = exported(method)
    text = ours.generate(tokens(T=T), 40, temperature=0)
    assert torch.equal(greedy(theirs, tokens(T=T), 40), text)


@torch.no_grad()
def test_budgets(exported, tmp_path):
    """Those of the export, of from_pretrained and of generate; the later win."""
    ours = exported('both')[0]
    x = tokens()
    export_hf.export(ours, checkpoint(ours), str(tmp_path / 'a'), [8, 5])
    kept = load(tmp_path / 'a')
    kept.save_pretrained(tmp_path / 'b')
    again = load(tmp_path / 'b', policy='oldest')
    texts = set()
    for model, options, budgets, policy in [
        (kept, {}, [8, 5], 'selective'),
        (kept, {'budgets': 'none'}, None, 'selective'),
        (again, {}, [8, 5], 'oldest'),
        (again, {'budgets': 6, 'policy': 'random'}, 6, 'random'),
    ]:
        text = ours.generate(x, 30, temperature=0, budgets=budgets, policy=policy)
        assert torch.equal(greedy(model, x, 30, **options), text)
        texts.add(str(text))
    assert len(texts) == 4
    logits = ours(x, x, m.KVCache(ours, 3, [8, 5], 'oldest'))[0]
    assert torch.equal(again(x).logits, logits)
    assert torch.equal(again.train()(x).logits, ours(x, x)[0])  # training needs all tokens


@torch.no_grad()
def test_other_ways_to_generate(exported):
    _, model, _ = exported('both')
    x = tokens(2, 10)
    assert torch.equal(greedy(model, x, 10, use_cache=False), greedy(model, x, 10))
    with pytest.raises(ValueError, match='beam search needs use_cache=False'):
        greedy(model, x, 10, num_beams=3)
    with pytest.raises(ValueError, match='assisted generation is not possible'):
        greedy(model, x[:1], 10, prompt_lookup_num_tokens=2)
    # a cache by hand, with several new tokens at a time
    out = model(x[:, :4], use_cache=True)
    more = model(x[:, 4:], past_key_values=out.past_key_values)
    logits = torch.cat([out.logits, more.logits], dim=1)
    torch.testing.assert_close(logits, model(x).logits, atol=1e-5, rtol=1e-5)


# ---- Training, another process -------------------------------------------------------------------


@pytest.mark.slow
def test_trainer(exported, tmp_path):
    text = list(b'0123456789' * 2)
    items = [{'input_ids': text[n:], 'labels': text[n:]} for n in range(8)] * 4
    _, _, folder = exported('both')
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=12, learning_rate=1e-2, report_to=[], use_cpu=True
    )
    collator = transformers.DataCollatorForSeq2Seq(tokenizer)
    trainer = transformers.Trainer(load(folder), args, collator, items)
    start = trainer.evaluate(items)['eval_loss']
    trainer.train()
    assert trainer.evaluate(items)['eval_loss'] < start - 1


ELSEWHERE = """
import sys, transformers
pipe = transformers.pipeline('text-generation', sys.argv[1], trust_remote_code=True)
print(pipe('ab', max_new_tokens=9, do_sample=False, budgets=4, eos_token_id=999))
assert not {'support', 'kernels', 'data', 'model'} & set(sys.modules)
"""


@pytest.mark.slow
def test_in_an_environment_without_this_repository(exported):
    ours, _, folder = exported('all')
    command = [sys.executable, '-I', '-c', ELSEWHERE, folder]
    printed = subprocess.check_output(command, text=True)
    ids = ours.generate(torch.tensor([list(b'ab')]), 9, temperature=0, budgets=4)[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert printed.splitlines()[-1] == str([{'generated_text': text}])


# ---- Tokenizer, card, command --------------------------------------------------------------------

# GPT-2's
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
MERGES = b', |th|the|in| t| the|ing|re| there'.split(b'|')  # the first one goes across words
TEXTS = ['the thing, then: Wörter\n\n  3.14 in there\t', '', ' ', '日本 the<àí']


def test_tokenizer(tmp_path, monkeypatch):
    words = [bytes([byte]) for byte in range(256)] + MERGES
    ranks = {word: rank for rank, word in enumerate(words)}
    ends = {data.END_OF_TEXT: len(ranks)}
    ours = tiktoken.Encoding('small', pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=ends)
    monkeypatch.setattr(data, 'get_tokenizer', lambda name: ours)
    model = gpt(vocab_size=ours.n_vocab)
    export_hf.export(model, checkpoint(model, bos=True), str(tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = [ours.eot_token] + ours.encode_ordinary(text)
        assert theirs(text).input_ids == ids, text
        assert theirs.decode(ids, skip_special_tokens=True) == text
    assert theirs.eos_token_id == theirs.bos_token_id == theirs.pad_token_id == ours.eot_token
    assert theirs.padding_side == 'left'


@pytest.fixture
def out_dir(tmp_path):
    ckpt.save(tmp_path / 'a', checkpoint(gpt(selective=True), bos=True))
    return tmp_path / 'a'


def test_command(out_dir, run):
    run(export_hf, f'--out_dir={out_dir}', '--budgets=7')
    folder = out_dir / 'hf'
    card = (folder / 'README.md').read_text()
    for row in (
        '| data | stdlib |',
        '| steps | 1200 |',
        '| validation loss, nats a token | 1.2345 |',
        '| budgets | [7, 7] |',
    ):
        assert row in card.splitlines()
    example = card.split('```python')[1].split('```')[0]
    exec(example.replace("'hf'", f"'{folder}'"), {})  # what the card says works
    assert 'is a model' in run(export_hf, f'--out_dir={out_dir}')  # again, over our own


@pytest.mark.parametrize(
    'option, message',
    [
        ('--folder=ckpt.pt/x', 'not a folder that takes files'),
        ('--budgets=1', 'a whole number from 2'),
        ('--folder=.', 'choose another'),
        ('--folder=others', 'choose another'),
    ],
)
def test_bad_input(out_dir, run, option, message, monkeypatch):
    monkeypatch.chdir(out_dir)
    os.mkdir('others')
    (out_dir / 'others' / 'README.md').write_text('theirs')
    assert message in run(export_hf, '--out_dir=.', option)
    assert not list(out_dir.glob('**/config.json'))
    assert (out_dir / 'others' / 'README.md').read_text() == 'theirs'


def test_a_package_is_missing(out_dir, run, monkeypatch):
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    assert 'pip install transformers' in run(export_hf, f'--out_dir={out_dir}')
