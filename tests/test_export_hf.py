"""lab/export_hf.py: what transformers makes of the folder, against model.py."""
import json
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

if os.environ.get('CI'):        # there all of these tests must run
    import accelerate
    import transformers
else:
    pytest.importorskip('safetensors')
    transformers = pytest.importorskip('transformers')

EOT = 256
METHODS = {'selective': dict(selective=True), 'ssa': dict(ssa='qv'), 'both': dict(selective=True, ssa='qkv'),
           'rope': dict(rope=True), 'qk_norm': dict(qk_norm=True, ssa='q', ssa_sharing=False),
           'all': dict(selective=True, vote_scale=True, ssa='qv', rope=True, qk_norm=True, bias=True, gelu='tanh')}


def gpt(**changes):
    """A model whose weights are large enough to tell every rule from another."""
    torch.manual_seed(0)
    made = m.GPT(m.GPTConfig(**{**dict(block_size=24, vocab_size=257, n_layer=2, n_head=2, n_embd=16), **changes}))
    for p in made.parameters():
        p.data += torch.randn_like(p) * 0.3
    return made.eval()


def checkpoint(model, bos=False, tokenizer='bytes'):
    return {'model': model.state_dict(), 'model_args': vars(model.config), 'config': {'bos': bos, 'learning_rate': 0.5},
            'dataset': 'stdlib', 'tokenizer': tokenizer, 'iter_num': 1200, 'val_loss': 1.2345, 'pretrained': None}


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """exported(method, budgets): (our model, transformers' one, its folder), made once."""
    made = {}

    def export(method, budgets=None):
        if (method, str(budgets)) not in made:
            ours, folder = gpt(**METHODS[method]), str(tmp_path_factory.mktemp(method))
            export_hf.export(ours, checkpoint(ours), folder, budgets)
            made[method, str(budgets)] = ours, load(folder), folder
        return made[method, str(budgets)]
    return export


def tokens(B=3, T=20, seed=1):
    return torch.randint(EOT, (B, T), generator=torch.Generator().manual_seed(seed))


def greedy(model, idx, n, **options):
    return model.generate(idx, max_new_tokens=n, do_sample=False, eos_token_id=None, **options)


# ----------------------------------------------------------------------------------------------------------------------
# Logits and loss

@pytest.mark.parametrize('method', METHODS)
def test_logits(exported, method):
    ours, theirs, _ = exported(method)
    x = tokens()
    with torch.no_grad():
        assert torch.equal(theirs(x).logits, ours(x, x)[0])
        assert torch.equal(theirs(x, logits_to_keep=2).logits, ours(x, x)[0][:, -2:])
        labels = x.clone()
        labels[:, 7:9] = -100
        loss = ours(x[:, :-1], labels[:, 1:].masked_fill(labels[:, 1:] < 0, -1))[1]
        torch.testing.assert_close(theirs(x, labels=labels).loss, loss)
    assert theirs.get_input_embeddings().weight is theirs.get_output_embeddings().weight


@pytest.mark.parametrize('bias', [False, True])
def test_a_standard_model_is_a_plain_gpt2(bias, tmp_path):
    ours = gpt(bias=bias)
    names = export_hf.export(ours, checkpoint(ours), str(tmp_path), budgets=[5, 5])
    assert names == sorted(os.listdir(tmp_path)) and not [name for name in names if name.endswith('.py')]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(theirs) is transformers.GPT2LMHeadModel
    x = tokens()
    with torch.no_grad():
        torch.testing.assert_close(theirs.double()(x).logits, ours.double()(x, x)[0], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize('method', ['both', 'all'])
def test_padding(exported, method):
    """Tokens have the logits that they have alone, whichever side the padding is on."""
    _, model, _ = exported(method)
    texts = [tokens(1, T, seed=T)[0] for T in (20, 3, 9)]
    with torch.no_grad():
        for side in 'left', 'right':
            x, mask = pad(texts, side)
            logits = model(x, attention_mask=mask).logits
            for text, row, seen in zip(texts, logits, mask.bool()):
                torch.testing.assert_close(row[seen], model(text[None]).logits[0], atol=1e-5, rtol=1e-5)
    mask[0, 4] = 0
    with pytest.raises(ValueError, match='the attention mask must be 1 from'):
        model(x, attention_mask=mask)


def pad(texts, side):
    x = torch.full((len(texts), max(map(len, texts))), EOT)
    mask = torch.zeros_like(x)
    for b, text in enumerate(texts):
        where = slice(-len(text), None) if side == 'left' else slice(None, len(text))
        x[b, where], mask[b, where] = text, 1
    return x, mask


# ----------------------------------------------------------------------------------------------------------------------
# Generation

@pytest.mark.parametrize('method', ['selective', 'ssa', 'all'])
@pytest.mark.parametrize('T', [1, 20, 40])
def test_greedy_text_is_ours(exported, method, T):
    """Within block_size and far past it, from prompts that are shorter and longer than it."""
    ours, theirs, _ = exported(method)
    assert torch.equal(greedy(theirs, tokens(T=T), 40), ours.generate(tokens(T=T), 40, temperature=0))


def test_budgets(exported, tmp_path):
    ours, theirs, folder = exported('both', [8, 5])
    text = lambda **options: ours.generate(tokens(), 30, temperature=0, **options)
    assert json.load(open(os.path.join(folder, 'generation_config.json')))['budgets'] == [8, 5]
    assert torch.equal(greedy(theirs, tokens(), 30), text(budgets=[8, 5]))
    assert torch.equal(greedy(theirs, tokens(), 30, budgets='none'), text())
    assert torch.equal(greedy(theirs, tokens(), 30, budgets=6, policy='oldest'), text(budgets=6, policy='oldest'))
    config = transformers.GenerationConfig(budgets=[4, 9], max_new_tokens=30, do_sample=False)
    config.eos_token_id = 999               # never comes
    assert torch.equal(theirs.generate(tokens(), config), text(budgets=[4, 9]))
    assert len({str(text(budgets=budgets)) for budgets in (None, [8, 5], [4, 9])}) == 3
    with pytest.raises(ValueError, match='3 budgets for a model of 2 layers$'):
        greedy(theirs, tokens(), 1, budgets=[2, 2, 2])
    theirs.save_pretrained(tmp_path)
    assert torch.equal(greedy(load(tmp_path), tokens(), 30), text(budgets=[8, 5]))


@pytest.mark.parametrize('method', ['both', 'all'])
@pytest.mark.parametrize('budgets', [None, 6])
def test_padded_prompts(exported, method, budgets):
    ours, theirs, _ = exported(method)
    texts = [tokens(1, T, seed=T)[0] for T in (18, 2, 9)]
    x, mask = pad(texts, 'left')
    out = greedy(theirs, x, 30, attention_mask=mask, budgets=budgets)
    for text, row in zip(texts, out):
        assert torch.equal(row[18 - len(text):], ours.generate(text[None], 30, temperature=0, budgets=budgets)[0])
    x, mask = pad(texts, 'right')
    with pytest.raises(ValueError, match="padding_side = 'left'$"):
        greedy(theirs, x, 1, attention_mask=mask)


def test_other_ways_to_generate(exported):
    _, model, _ = exported('both')
    x = tokens(2, 10)
    assert torch.equal(greedy(model, x, 10, use_cache=False), greedy(model, x, 10))
    beams = greedy(model, x, 10, num_beams=3)
    assert torch.equal(beams, greedy(model, x, 10, num_beams=3, use_cache=False))
    assert not torch.equal(beams, greedy(model, x, 10))
    torch.manual_seed(0)
    drawn = model.generate(x, max_new_tokens=10, do_sample=True, num_return_sequences=2, budgets=6)
    assert drawn.shape == (4, 20) and len({str(row) for row in drawn}) == 4
    with torch.no_grad():           # a cache by hand, with several new tokens at a time
        out = model(x[:, :4], use_cache=True)
        logits = torch.cat([out.logits, model(x[:, 4:], past_key_values=out.past_key_values).logits], dim=1)
        torch.testing.assert_close(logits, model(x).logits, atol=1e-5, rtol=1e-5)


def test_pipeline(exported):
    ours, _, folder = exported('both', [8, 5])
    pipe = transformers.pipeline('text-generation', folder, trust_remote_code=True)
    ids = ours.generate(torch.tensor([list(b'ab ')]), 12, temperature=0, budgets=[8, 5])[0].tolist()
    out = pipe('ab ', max_new_tokens=12, do_sample=False, eos_token_id=999)[0]['generated_text']
    assert out == bytes(i for i in ids if i != EOT).decode('utf-8', 'replace')


# ----------------------------------------------------------------------------------------------------------------------
# Saving, training, another process

@pytest.mark.parametrize('method', ['both', 'all'])
def test_save_pretrained(exported, tmp_path, method):
    ours, theirs, _ = exported(method)
    theirs.save_pretrained(tmp_path)
    assert {'model.py', 'modeling_selective_gpt.py'} <= set(os.listdir(tmp_path))
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(tokens()).logits, ours(tokens(), tokens())[0])


def test_trainer(exported, tmp_path):
    _, _, folder = exported('both')
    model, text = load(folder), list(b'0123456789' * 2)
    items = [{'input_ids': text[n:], 'labels': text[n:], 'attention_mask': [1] * (20 - n)} for n in [*range(8)] * 4]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=12, per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=1e-2,
        logging_steps=1, save_steps=12, report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = transformers.Trainer(model, args, train_dataset=items,
                                   data_collator=transformers.DataCollatorForSeq2Seq(tokenizer))
    start = trainer.evaluate(items)['eval_loss']
    trainer.train()
    end = trainer.evaluate(items)['eval_loss']
    assert end < start - 1
    again = transformers.Trainer(load(tmp_path / 'checkpoint-12'), args, data_collator=trainer.data_collator)
    assert again.evaluate(items)['eval_loss'] == pytest.approx(end, abs=1e-4)


def test_in_an_environment_without_this_repository(exported, tmp_path):
    ours, _, folder = exported('all')
    script = ('import sys; from transformers import AutoModelForCausalLM, AutoTokenizer; a = dict(trust_remote_code=1);'
              'tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], **a);'
              'model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **a);'
              'ids = tokenizer("ab", return_tensors="pt").input_ids;'
              'out = model.generate(ids, max_new_tokens=9, budgets=4, eos_token_id=999);'
              'print(out[0].tolist()); assert not {"support", "kernels", "data", "model"} & set(sys.modules)')
    done = subprocess.run([sys.executable, '-c', script, folder], cwd=tmp_path, capture_output=True, text=True,
                          env={k: v for k, v in os.environ.items() if k != 'PYTHONPATH'})
    assert done.returncode == 0, done.stderr
    expected = ours.generate(torch.tensor([list(b'ab')]), 9, temperature=0, budgets=4)[0].tolist()
    assert json.loads(done.stdout.splitlines()[-1]) == expected


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer, card, command

PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"      # GPT-2's
TEXTS = ['the thing, then: Wörter\n\n  3.14 in there\t', '', ' ', '日本 the<']


@pytest.mark.parametrize('bos', [False, True])
@pytest.mark.parametrize('kind', ['bytes', 'small', 'gpt2', 'gpt2:4096'])
def test_tokenizer(kind, bos, tmp_path, monkeypatch):
    if kind == 'small':         # a byte-pair encoding of a few merges, the first one across words
        ranks = [*(bytes([b]) for b in range(256)), *b', |th|the|in| t| the|ing|re| there'.split(b'|')]
        small = tiktoken.Encoding('small', pat_str=PATTERN,
                                  mergeable_ranks={token: n for n, token in enumerate(ranks)},
                                  special_tokens={data.END_OF_TEXT: len(ranks)})
        monkeypatch.setattr(data, 'get_tokenizer', lambda name: small)
    try:
        ours = data.get_tokenizer(kind)
    except UserError:
        pytest.skip('the vocabulary of GPT-2 is not here')
    model = gpt(vocab_size=ours.n_vocab)
    export_hf.export(model, checkpoint(model, bos, kind), str(tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = ours.encode_ordinary(text)
        assert theirs(text).input_ids == [ours.eot_token] * bos + ids, text
        assert theirs.decode(theirs(text).input_ids, skip_special_tokens=True) == text
    assert theirs.eos_token_id == theirs.bos_token_id == theirs.pad_token_id == ours.eot_token == len(theirs) - 1
    n = len(ours.encode_ordinary('bcd'))
    assert theirs(['a', 'bcd'], padding=True).attention_mask == [[0] * (n - 1) + [1] * (1 + bos), [1] * (n + bos)]


def test_command(tmp_path, run):
    ours, out_dir = gpt(selective=True), tmp_path / 'a'
    os.makedirs(out_dir)
    ckpt.save(out_dir, checkpoint(ours, bos=True))
    assert 'model.safetensors' in run(export_hf, f'--out_dir={out_dir}', '--budgets=7')
    folder = out_dir / 'hf'
    card = (folder / 'README.md').read_text()
    for fact in ('| data | stdlib |', '| steps | 1,200 |', '1.2345', '2410.02703', '[7, 7] tokens a layer',
                 '| n_layer | 2 |', 'learning_rate | 0.5', 'trust_remote_code=True', 'Every text begins with'):
        assert fact in card, fact
    assert open(m.__file__).read() == (folder / 'model.py').read_text()
    with torch.no_grad():
        assert torch.equal(load(folder)(tokens()).logits, ours(tokens(), tokens())[0])
    example = card.split('```python')[1].split('```')[0].replace("'hf'", f'{str(folder)!r}')
    exec(example, {})           # what the card says works
    (tmp_path / 'file').write_text('')
    assert 'Not a directory' in run(export_hf, f'--out_dir={out_dir}', f'--folder={tmp_path}/file/x')
    assert 'a whole number from 2' in run(export_hf, f'--out_dir={out_dir}', '--budgets=1', f'--folder={tmp_path}/x')
    assert 'does not exist' in run(export_hf, f'--out_dir={tmp_path}/b')
    assert not (tmp_path / 'x').exists()
    assert 'model.safetensors' in run(export_hf, f'--out_dir={out_dir}')        # again, over our own
    (tmp_path / 'theirs').mkdir()
    for name in 'model.safetensors', 'README.md':
        (tmp_path / 'theirs' / name).write_text('theirs')
        assert 'choose another' in run(export_hf, f'--out_dir={out_dir}', f'--folder={tmp_path}/theirs')
        assert {path.read_text() for path in (tmp_path / 'theirs').iterdir()} == {'theirs'}


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    with pytest.raises(UserError, match='pip install safetensors'):
        export_hf.export(gpt(), checkpoint(gpt()), str(tmp_path / 'x'))
    assert not (tmp_path / 'x').exists()
