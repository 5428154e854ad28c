"""lab/export_hf.py: what transformers makes of the folder, against model.py."""

import dataclasses
import os
import subprocess
import sys

import pytest
import tiktoken
import torch

import data
import model as m
from lab import export_hf
from support import checkpoint as ckpt
from support.settings import UserError

if os.environ.get('CI'):  # there all of these tests must run
    import accelerate  # noqa: F401
    import transformers
else:
    pytest.importorskip('safetensors')
    transformers = pytest.importorskip('transformers')

EOT = 256
METHODS = {
    'selective': dict(selective=True),
    'ssa': dict(ssa='qv'),
    'both': dict(selective=True, ssa='qkv'),
    'rope': dict(rope=True),
    'qk_norm': dict(qk_norm=True, ssa='q', ssa_sharing=False),
    'all': dict(selective=True, vote_scale=True, ssa='qv', rope=True, qk_norm=True, bias=True),
}


def gpt(**changes):
    """A model whose weights are large enough to tell every rule from another."""
    torch.manual_seed(0)
    sizes = dict(block_size=24, vocab_size=257, n_layer=2, n_head=2, n_embd=16)
    made = m.GPT(m.GPTConfig(**{**sizes, **changes}))
    for p in made.parameters():
        p.data += torch.randn_like(p) * 0.3
    return made.eval()


def checkpoint(model, bos=False, tokenizer='bytes'):
    return {
        'model': model.state_dict(),
        'model_args': vars(model.config),
        'config': {'bos': bos, 'learning_rate': 0.5},
        'dataset': 'stdlib',
        'tokenizer': tokenizer,
        'iter_num': 1200,
        'val_loss': 1.23456,
        'pretrained': None,
    }


def load(folder, **options):
    options['trust_remote_code'] = True
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """exported(method): (our model, transformers' one, its folder), made once."""
    made = {}

    def export(method):
        if method not in made:
            ours = gpt(**METHODS[method])
            folder = str(tmp_path_factory.mktemp(method))
            export_hf.export(ours, checkpoint(ours), folder)
            made[method] = ours, load(folder), folder
        return made[method]

    return export


def tokens(B=3, T=20, seed=1):
    return torch.randint(EOT, (B, T), generator=torch.Generator().manual_seed(seed))


def greedy(model, idx, n, **options):
    return model.generate(idx, max_new_tokens=n, do_sample=False, eos_token_id=None, **options)


def pad(side):
    """Three texts; and, as a batch that is padded on one side, their tokens and the mask."""
    texts = [tokens(1, T, seed=T) for T in (18, 2, 9)]
    x = torch.full((3, 18), EOT)
    mask = torch.zeros_like(x)
    for b, text in enumerate(texts):
        where = slice(-text.size(1), None) if side == 'left' else slice(text.size(1))
        x[b, where] = text[0]
        mask[b, where] = 1
    return texts, x, mask


# ---- Logits and loss -----------------------------------------------------------------------------


@pytest.mark.parametrize('B', [1, 2, 3])
@pytest.mark.parametrize('method', METHODS)
def test_logits(exported, method, B):
    ours, theirs, _ = exported(method)
    x = tokens(B)
    labels = x.clone()
    labels[:, 7:9] = -100
    targets = labels[:, 1:].masked_fill(labels[:, 1:] < 0, -1)
    with torch.no_grad():
        logits = ours(x, x)[0]
        loss = ours(x[:, :-1], targets)[1]
        assert torch.equal(theirs(x).logits, logits)
        assert torch.equal(theirs(x, logits_to_keep=2).logits, logits[:, -2:])
        torch.testing.assert_close(theirs(x, labels=labels).loss, loss)
    assert theirs.get_input_embeddings().weight is theirs.get_output_embeddings().weight


def alone(model, text, budgets, policy):
    """The logits (1, T, V) of a text, under budgets token by token."""
    if budgets is None:
        return model(text, text)[0]
    cache = m.KVCache(model, 1, budgets, policy)
    return torch.cat([model(token, cache=cache)[0] for token in text.split(1, dim=1)], dim=1)


@pytest.mark.parametrize('budgets', [None, [5, 9]])
@pytest.mark.parametrize('side', ['left', 'right'])
@pytest.mark.parametrize('method, policy', [('both', 'selective'), ('all', 'random')])
def test_logits_of_padded_texts(exported, method, side, budgets, policy):
    ours, _, folder = exported(method)
    theirs = load(folder, budgets=budgets, policy=policy)
    texts, x, mask = pad(side)
    with torch.no_grad():
        logits = theirs(x, attention_mask=mask).logits
        for text, row, seen in zip(texts, logits, mask.bool()):
            expected = alone(ours, text, budgets, policy)[0]
            torch.testing.assert_close(row[seen], expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(theirs.train()(x).logits, ours(x, x)[0])  # training needs all tokens
    mask[0, 4] = 0
    with pytest.raises(ValueError, match='an attention mask is 1 from'):
        theirs(x, attention_mask=mask)


# ---- What is a plain GPT-2 -----------------------------------------------------------------------


@pytest.mark.parametrize('changes', [dict(), dict(bias=True, gelu='tanh')])
def test_a_standard_model_is_a_plain_gpt2(changes, tmp_path):
    ours = gpt(**changes)
    names = export_hf.export(ours, checkpoint(ours), str(tmp_path))
    assert names == sorted(os.listdir(tmp_path)) and 'model.py' not in names
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs, info = load(tmp_path, output_loading_info=True)
    assert type(theirs) is transformers.GPT2LMHeadModel and not info['missing_keys']
    x = tokens()
    with torch.no_grad():
        logits = ours.double()(x, x)[0]
        torch.testing.assert_close(theirs.double().eval()(x).logits, logits, atol=1e-10, rtol=1e-10)


@dataclasses.dataclass
class Fork(m.GPTConfig):
    window: int = 0


def test_what_gpt2_does_not_know_is_not_plain():
    ours = gpt()
    assert export_hf.is_plain(ours)
    ours.config = Fork(**vars(ours.config))
    assert export_hf.is_plain(ours)
    ours.config.window = 8
    assert not export_hf.is_plain(ours)
    ours = gpt()
    ours.gate = torch.nn.Linear(2, 2)
    assert not export_hf.is_plain(ours)


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


@pytest.mark.parametrize('method', ['selective', 'ssa', 'all'])
@pytest.mark.parametrize('T', [1, 20, 40])
def test_greedy_text_is_ours(exported, method, T):
    """Within block_size and far past it, from prompts that are shorter and longer than it."""
    ours, theirs, _ = exported(method)
    text = ours.generate(tokens(T=T), 40, temperature=0)
    assert torch.equal(greedy(theirs, tokens(T=T), 40), text)


def test_budgets(exported, tmp_path):
    """Those of the export, of from_pretrained and of generate; the later win."""
    ours, theirs, _ = exported('both')
    export_hf.export(ours, checkpoint(ours), str(tmp_path / 'a'), [8, 5])
    kept = load(tmp_path / 'a')

    def text(**options):
        return ours.generate(tokens(), 30, temperature=0, **options)

    assert torch.equal(greedy(kept, tokens(), 30), text(budgets=[8, 5]))
    assert torch.equal(greedy(kept, tokens(), 30, budgets='none'), text())
    limits = dict(budgets=6, policy='oldest')
    assert torch.equal(greedy(kept, tokens(), 30, **limits), text(**limits))
    assert torch.equal(
        greedy(load(tmp_path / 'a', budgets=[4, 9]), tokens(), 30), text(budgets=[4, 9])
    )
    assert len({str(text(budgets=budgets)) for budgets in (None, [8, 5], [4, 9])}) == 3
    with pytest.raises(ValueError, match='3 budgets for a model of 2 layers$'):
        greedy(theirs, tokens(), 1, budgets=[2, 2, 2])
    kept.save_pretrained(tmp_path / 'b')
    assert {'model.py', 'modeling_selective_gpt.py'} <= set(os.listdir(tmp_path / 'b'))
    assert torch.equal(greedy(load(tmp_path / 'b'), tokens(), 30), text(budgets=[8, 5]))


@pytest.mark.parametrize('method', ['both', 'all'])
@pytest.mark.parametrize('budgets', [None, 6])
def test_padded_prompts(exported, method, budgets):
    ours, theirs, _ = exported(method)
    texts, x, mask = pad('left')
    rows = greedy(theirs, x, 30, attention_mask=mask, budgets=budgets)
    for text, row in zip(texts, rows):
        expected = ours.generate(text, 30, temperature=0, budgets=budgets)
        assert torch.equal(row[18 - text.size(1) :], expected[0])
    with pytest.raises(ValueError, match="padding_side = 'left'$"):
        greedy(theirs, x, 1, attention_mask=mask.flip(1))


def test_other_ways_to_generate(exported):
    _, model, _ = exported('both')
    x = tokens(2, 10)
    assert torch.equal(greedy(model, x, 10, use_cache=False), greedy(model, x, 10))
    beams = greedy(model, x, 10, num_beams=3)
    assert torch.equal(beams, greedy(model, x, 10, num_beams=3, use_cache=False))
    assert not torch.equal(beams, greedy(model, x, 10))
    with torch.no_grad():  # a cache by hand, with several new tokens at a time
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
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=12, learning_rate=1e-2, report_to=[], use_cpu=True
    )
    collator = transformers.DataCollatorForSeq2Seq(tokenizer)
    trainer = transformers.Trainer(load(folder), args, collator, items)
    start = trainer.evaluate(items)['eval_loss']
    trainer.train()
    end = trainer.evaluate(items)['eval_loss']
    assert end < start - 1
    again = transformers.Trainer(load(tmp_path / 'checkpoint-12'), args, collator)
    assert again.evaluate(items)['eval_loss'] == pytest.approx(end, abs=1e-4)


ELSEWHERE = """
import sys, transformers
pipe = transformers.pipeline('text-generation', sys.argv[1], trust_remote_code=True)
print(pipe('ab', max_new_tokens=9, do_sample=False, budgets=4, eos_token_id=999))
assert not {'support', 'kernels', 'data', 'model'} & set(sys.modules)
"""


@pytest.mark.slow
def test_in_an_environment_without_this_repository(exported, tmp_path):
    ours, _, folder = exported('all')
    env = {**os.environ, 'PYTHONPATH': ''}
    command = [sys.executable, '-c', ELSEWHERE, folder]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    ids = ours.generate(torch.tensor([list(b'ab')]), 9, temperature=0, budgets=4)[0].tolist()
    text = bytes(i for i in ids if i != EOT).decode('utf-8', 'replace')
    assert done.stdout.splitlines()[-1] == str([{'generated_text': text}])


# ---- Tokenizer, card, command --------------------------------------------------------------------

# GPT-2's
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
MERGES = b', |th|the|in| t| the|ing|re| there'.split(b'|')  # the first one goes across words
TEXTS = ['the thing, then: Wörter\n\n  3.14 in there\t', '', ' ', '日本 the<']


@pytest.mark.parametrize('bos', [False, True])
@pytest.mark.parametrize('kind', ['bytes', 'small', 'gpt2', 'gpt2:4096'])
def test_tokenizer(kind, bos, tmp_path, monkeypatch):
    if kind == 'small':
        ranks = {bytes([byte]): byte for byte in range(256)}
        for token in MERGES:
            ranks[token] = len(ranks)
        ends = {data.END_OF_TEXT: len(ranks)}
        small = tiktoken.Encoding(
            'small', pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=ends
        )
        monkeypatch.setattr(data, 'get_tokenizer', lambda name: small)
    try:
        ours = data.get_tokenizer(kind)
    except UserError:
        pytest.skip('the vocabulary of GPT-2 is not here')
    model = gpt(vocab_size=ours.n_vocab)
    export_hf.export(model, checkpoint(model, bos, kind), str(tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = [ours.eot_token] * bos + ours.encode_ordinary(text)
        assert theirs(text).input_ids == ids, text
        assert theirs.decode(ids, skip_special_tokens=True) == text
    assert theirs.eos_token_id == theirs.bos_token_id == theirs.pad_token_id == ours.eot_token
    assert theirs.padding_side == 'left'


@pytest.fixture
def out_dir(tmp_path):
    ckpt.save(tmp_path / 'a', checkpoint(gpt(selective=True), bos=True))
    return tmp_path / 'a'


def test_command(out_dir, run):
    assert 'model.safetensors' in run(export_hf, f'--out_dir={out_dir}', '--budgets=7')
    card = (out_dir / 'hf' / 'README.md').read_text()
    facts = {
        'data': 'stdlib',
        'steps': '1200',
        'validation loss, nats a token': '1.2346',
        'bos': 'True',
        'n_layer': '2',
        'learning_rate': '0.5',
        'budgets': '[7, 7]',
    }
    for name, value in facts.items():
        assert f'| {name} | {value} |\n' in card
    with open(m.__file__) as f:
        assert f.read() == (out_dir / 'hf' / 'model.py').read_text()
    example = card.split('```python')[1].split('```')[0]
    exec(example.replace("'hf'", f"'{out_dir}/hf'"), {})  # what the card says works
    assert 'model.safetensors' in run(export_hf, f'--out_dir={out_dir}')  # again, over our own


def test_bad_input(out_dir, run, tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('')
    new = f'--folder={tmp_path}/x'
    for options, message in [
        ([f'--folder={tmp_path}/file/x'], 'cannot make the folder'),
        ([new, '--budgets=1'], 'a whole number from 2'),
        ([new, f'--out_dir={tmp_path}/b'], 'does not exist'),
    ]:
        assert message in run(export_hf, f'--out_dir={out_dir}', *options)
    for name in 'model.safetensors', 'README.md':
        (tmp_path / name).write_text('theirs')
        assert 'choose another' in run(export_hf, f'--out_dir={out_dir}', f'--folder={tmp_path}')
        assert (tmp_path / name).read_text() == 'theirs'
    assert not (tmp_path / 'config.json').exists()
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    assert 'pip install transformers' in run(export_hf, f'--out_dir={out_dir}', new)
    assert not (tmp_path / 'x').exists()
