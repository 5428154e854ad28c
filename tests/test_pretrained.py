"""pretrained.py and lab/export_hf.py against transformers, and downloads from a server that misbehaves."""
import functools
import hashlib
import json
import os
import re
import sys
import threading

import pytest
import torch

import model as m
import prune
import sample
import train
from lab import export_hf
from support import checkpoint as ckpt, download, pretrained, settings
from support.settings import UserError
from test_prepare_c4 import Handler, Server, fault

if os.environ.get('CI'):        # there all of these tests must run
    import safetensors.torch
    import transformers
else:
    safetensors = pytest.importorskip('safetensors')
    pytest.importorskip('safetensors.torch')
    transformers = pytest.importorskip('transformers')

SHAPE = dict(vocab_size=300, n_positions=40, n_embd=32, n_layer=2, n_head=4)


@pytest.fixture(scope='module')
def theirs():
    """theirs(**changes): a GPT2LMHeadModel with random weights large enough to tell every rule from another."""
    def make(seed=0, **changes):
        torch.manual_seed(seed)
        config = transformers.GPT2Config(**{**SHAPE, 'bos_token_id': 0, 'eos_token_id': 0, **changes})
        gpt = transformers.GPT2LMHeadModel(config)
        for p in gpt.parameters():
            p.data += torch.randn_like(p) * (0.2 if p.dim() == 2 else 0.1)
        return gpt.eval()
    return make


@pytest.fixture(scope='module')
def folder(theirs, tmp_path_factory):
    """A folder as transformers saves it."""
    path = tmp_path_factory.mktemp('hf')
    theirs().save_pretrained(path)
    return str(path)


def load(folder, **changes):
    return ckpt.build(pretrained.load(str(folder), pretrained.PretrainedConfig()), **changes).eval()


def tokens(T=40, B=3):
    return torch.randint(257, (B, T), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(gpt, idx):
    """In float64, so that what differs is the rule and not the rounding."""
    gpt = gpt.double()
    return gpt(idx).logits if isinstance(gpt, transformers.GPT2LMHeadModel) else gpt(idx, idx)[0]


def tensors_of(folder):
    return safetensors.torch.load_file(os.path.join(folder, 'model.safetensors'))


# ----------------------------------------------------------------------------------------------------------------------
# The round trip

@pytest.mark.parametrize('activation', ['gelu_new', 'gelu'])
def test_round_trip(theirs, tmp_path, activation):
    gpt = theirs(activation_function=activation)
    gpt.save_pretrained(tmp_path / 'a')
    ours = load(tmp_path / 'a')
    expected = logits(gpt, tokens())
    torch.testing.assert_close(logits(ours, tokens()), expected, atol=1e-10, rtol=1e-10)
    export_hf.export(ours.float(), pretrained.load(str(tmp_path / 'a'), None), str(tmp_path / 'b'))
    back = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / 'b')
    assert torch.equal(logits(back, tokens()), expected)
    assert back.config.eos_token_id == 256 and back.config.tie_word_embeddings
    torch.testing.assert_close(logits(load(tmp_path / 'b'), tokens()), expected, atol=1e-10, rtol=1e-10)


def test_file_as_the_hub_has_it(theirs, folder, tmp_path):
    """Names without a prefix, the causal masks among them, and half precision."""
    hub = {name.removeprefix('transformer.'): x.half() for name, x in tensors_of(folder).items()}
    for l in range(2):
        hub[f'h.{l}.attn.bias'] = torch.ones(1, 1, 40, 40).tril()
        hub[f'h.{l}.attn.masked_bias'] = torch.tensor(-1e4)
    safetensors.torch.save_file(hub, tmp_path / 'model.safetensors')
    (tmp_path / 'config.json').write_text(open(os.path.join(folder, 'config.json')).read())
    assert {x.dtype for x in pretrained.load(str(tmp_path), None)['model'].values()} == {torch.float32}
    expected = logits(theirs().half(), tokens())
    torch.testing.assert_close(logits(load(tmp_path), tokens()), expected, atol=1e-10, rtol=1e-10)


def test_block_size_is_cropped(folder):
    small = load(folder, block_size=16)
    assert small.config.block_size == 16 and len(small.transformer.wpe.weight) == 16
    torch.testing.assert_close(logits(small, tokens(16)), logits(load(folder), tokens(16)))
    with pytest.raises(UserError, match='--block_size=40 is the largest'):
        load(folder, block_size=41)


def test_flags_on_the_loaded_model(folder):
    idx = tokens()
    loss = lambda **flags: load(folder, **flags)(idx, idx)[1].item()
    standard = loss()
    assert loss(selective=True, vote_scale=True) == pytest.approx(standard, abs=1e-5)
    assert abs(loss(ssa='qv') - standard) / standard < 0.02
    assert abs(loss(selective=True) - standard) > 0.01
    gpt = load(folder, selective=True, vote_scale=True, ssa='qv')
    added = {name for name, _ in gpt.named_parameters() if ckpt.is_added(name)}
    assert len(added) == 2 * (1 + 3)            # each layer: the scale; w of q and v, alpha of q
    assert {n for n, _ in gpt.named_parameters()} - added == {n for n, _ in load(folder).named_parameters()}


# ----------------------------------------------------------------------------------------------------------------------
# Folders that are not what they should be

@pytest.mark.parametrize('change, message', [
    ({'model_type': 'llama'}, 'model_type'), ({'n_inner': 50}, 'n_inner'), ({'layer_norm_epsilon': 1e-6}, 'layer_norm'),
    ({'activation_function': 'relu'}, 'activation_function'), ({'scale_attn_weights': False}, 'scale_attn_weights'),
    ({'scale_attn_by_inverse_layer_idx': True}, 'scale_attn_by'), ({'tie_word_embeddings': False}, 'tie_word'),
    ({'n_layer': 3}, 'does not fit model.py'), ({'n_layer': 1}, 'does not fit'), ({'vocab_size': 299}, 'does not fit'),
    ({'n_embd': 'x'}, 'damaged'), ('{"n_layer"', 'config.json is damaged'), (None, 'config.json is missing')])
def test_configs_that_are_refused(folder, tmp_path, change, message):
    config = open(os.path.join(folder, 'config.json')).read()
    if change is not None:
        config = change if isinstance(change, str) else json.dumps({**json.loads(config), **change})
        (tmp_path / 'config.json').write_text(config)
    os.link(os.path.join(folder, 'model.safetensors'), tmp_path / 'model.safetensors')
    with pytest.raises(UserError, match=f'{message}[^\n]*$'):
        load(tmp_path)


@pytest.mark.parametrize('weights, message', [
    (None, 'model.safetensors does not exist'), (b'', 'cannot be read'), ('half', 'cannot be read'),
    ('less', 'does not fit model.py'), ('more', 'does not fit model.py')])
def test_weights_that_are_refused(folder, tmp_path, weights, message):
    (tmp_path / 'config.json').write_text(open(os.path.join(folder, 'config.json')).read())
    whole, path = open(os.path.join(folder, 'model.safetensors'), 'rb').read(), tmp_path / 'model.safetensors'
    if isinstance(weights, bytes):
        path.write_bytes(weights)
    elif weights == 'half':
        path.write_bytes(whole[:len(whole) // 2])
    elif weights:
        tensors = tensors_of(folder)
        tensors.pop('transformer.wpe.weight') if weights == 'less' else tensors.update(x=torch.zeros(1))
        safetensors.torch.save_file(tensors, path)
    with pytest.raises(UserError, match=f'{message}[^\n]*$'):
        load(tmp_path)


def test_no_such_name_and_no_package(folder, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="'gpt3': no such folder, and none of .*gpt2-xl"):
        load('gpt3')
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    with pytest.raises(UserError, match='pip install safetensors'):
        load(folder)
    assert not (tmp_path / 'x').exists()


# ----------------------------------------------------------------------------------------------------------------------
# Downloads

class Hub(Handler):
    """Answers as the Hugging Face hub does: weights by a redirect to another host that says how large the file is and
    what its sha256, small files by a redirect to another path. server.lies: headers to send instead."""

    def do_GET(self):
        name = self.path.split('/')[-1]
        body = self.server.files.get(name)
        if body is None or '/resolve/' not in self.path:
            return super().do_GET()
        self.server.asked.append((self.command, self.path))
        headers = {'Location': self.server.url.replace('127.0.0.1', 'localhost') + f'/cdn/{name}', 'X-Repo-Commit': '1',
                   'X-Linked-Size': len(body), 'X-Linked-Etag': f'"{hashlib.sha256(body).hexdigest()}"'}
        if name == 'config.json':
            blob = hashlib.sha1(b'blob %d\0' % len(body) + body).hexdigest()
            headers = {'Location': f'/api/resolve-cache/{name}', 'X-Repo-Commit': '1', 'ETag': f'"{blob}"'}
        headers |= self.server.lies if name != 'config.json' else {}
        self.send_response(self.server.statuses.pop(0) if self.server.statuses else 302)
        for key, value in headers.items():
            if value is not None:
                self.send_header(key, value)
        self.send_header('Content-Length', 0)
        self.end_headers()


WEIGHTS = 'model.safetensors'


@pytest.fixture
def hub(folder, monkeypatch):
    monkeypatch.setattr(download, 'Server', functools.partial(download.Server, backoff=0.01, retries=2, timeout=5))
    with Server(('127.0.0.1', 0), Hub) as s:
        s.files = {name: open(os.path.join(folder, name), 'rb').read() for name in ('config.json', WEIGHTS)}
        s.faults, s.requests, s.asked, s.ranges, s.delay, s.sent, s.lies, s.statuses = {}, [], [], True, 0, 0, {}, []
        s.url = f'http://127.0.0.1:{s.server_port}'
        threading.Thread(target=s.serve_forever, args=(0.01,), daemon=True).start()
        yield s
        s.shutdown()


def fetch(hub, tmp_path, name='gpt2-medium'):
    return pretrained.fetch(name, pretrained.PretrainedConfig(base_url=hub.url + '/', cache_dir=str(tmp_path)))


def in_cache(tmp_path, name='gpt2-medium'):
    return {f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} if (tmp_path / name).exists() else {}


def ranges(hub):
    return [r for name, r in hub.requests if name == WEIGHTS and r is not None]


def test_download(hub, tmp_path, theirs):
    fetch(hub, tmp_path)
    assert in_cache(tmp_path) == hub.files
    assert {path for _, path in hub.asked} == {f'/openai-community/gpt2-medium/resolve/main/{f}' for f in hub.files}
    before = len(hub.asked) + len(hub.requests)
    torch.testing.assert_close(logits(load(fetch(hub, tmp_path)), tokens()), logits(theirs(), tokens()))
    assert len(hub.asked) + len(hub.requests) == before         # once is enough


@pytest.mark.parametrize('can_resume', [True, False])
def test_a_cut_is_resumed(hub, tmp_path, can_resume):
    hub.ranges = can_resume
    hub.faults[WEIGHTS] = [fault(send=10_000), fault(send=20_000)]
    fetch(hub, tmp_path)
    assert in_cache(tmp_path) == hub.files
    assert ranges(hub) == ['bytes=10000-', 'bytes=30000-' if can_resume else 'bytes=20000-']


def test_a_run_that_failed_is_continued(hub, tmp_path):
    hub.faults[WEIGHTS] = [fault(send=10_000)] + [fault(status=503, body=b'')] * 2
    with pytest.raises(UserError, match='3 times in a row'):
        fetch(hub, tmp_path)
    assert in_cache(tmp_path) == {'config.json': hub.files['config.json'],
                                  WEIGHTS + '.part': hub.files[WEIGHTS][:10_000]}
    hub.requests.clear()
    fetch(hub, tmp_path)
    assert in_cache(tmp_path) == hub.files and hub.requests == [(WEIGHTS, 'bytes=10000-')]


def test_a_whole_part_is_only_checked(hub, tmp_path):
    os.makedirs(tmp_path / 'gpt2-medium')
    (tmp_path / 'gpt2-medium' / (WEIGHTS + '.part')).write_bytes(hub.files[WEIGHTS])
    fetch(hub, tmp_path)
    assert in_cache(tmp_path) == hub.files
    assert ranges(hub) == [f'bytes={len(hub.files[WEIGHTS])}-']


@pytest.mark.parametrize('part', ['longer', 'other'])
def test_a_part_of_something_else(hub, tmp_path, part):
    os.makedirs(tmp_path / 'gpt2-medium')
    size = len(hub.files[WEIGHTS])
    (tmp_path / 'gpt2-medium' / (WEIGHTS + '.part')).write_bytes(b'x' * (size + 1 if part == 'longer' else 1000))
    with pytest.raises(UserError, match='its hash is wrong: it was deleted, run it again'):
        fetch(hub, tmp_path)
    assert list(in_cache(tmp_path)) == ['config.json']
    fetch(hub, tmp_path)
    assert in_cache(tmp_path) == hub.files


@pytest.mark.parametrize('lies, answer, message', [
    ({'X-Linked-Etag': '"' + '0' * 64 + '"'}, {}, 'its hash is wrong'),
    ({'X-Linked-Etag': None, 'X-Repo-Commit': None}, {}, 'gives no hash'),
    ({}, {'headers': {'Content-Length': 5000}}, 'its hash is wrong'),
    ({}, {'headers': {'Content-Length': 10**6}}, 'it cannot continue'),
    ({}, {'status': 404}, 'HTTP 404'),
])
def test_what_was_not_announced_is_not_kept(hub, tmp_path, lies, answer, message):
    hub.lies = lies
    hub.faults[WEIGHTS] = [fault(**answer)] * 5
    with pytest.raises(UserError, match=f'{WEIGHTS}.*({message})[^\n]*$'):
        fetch(hub, tmp_path)
    assert WEIGHTS not in in_cache(tmp_path)
    hub.lies, hub.faults = {}, {}
    for _ in range(2):          # whatever was left behind: the next runs get it right
        try:
            fetch(hub, tmp_path)
        except UserError:
            pass
    assert in_cache(tmp_path) == hub.files


def test_a_small_file_with_a_wrong_hash(hub, tmp_path):
    hub.faults['config.json'] = [lambda a: a.update(body=a['body'].replace(b'300', b'301'))]
    with pytest.raises(UserError, match='config.json: its hash is wrong'):
        fetch(hub, tmp_path)
    assert in_cache(tmp_path) == {}


def test_a_busy_hub_is_asked_again_an_absent_one_is_not(hub, tmp_path):
    hub.statuses = [503, 302]
    fetch(hub, tmp_path)
    assert in_cache(tmp_path) == hub.files
    hub.statuses = [404]
    with pytest.raises(UserError, match='HTTP 404: check --base_url'):
        fetch(hub, tmp_path, 'gpt2-xl')
    hub.shutdown(), hub.server_close()
    with pytest.raises(UserError, match='cannot be reached .* check the network and --base_url'):
        fetch(hub, tmp_path, 'gpt2-large')
    assert in_cache(tmp_path, 'gpt2-xl') == in_cache(tmp_path, 'gpt2-large') == {}


# ----------------------------------------------------------------------------------------------------------------------
# The scripts

TINY = ['--block_size=32', '--batch_size=4', '--gradient_accumulation_steps=1', '--max_iters=6', '--eval_interval=3',
        '--eval_iters=2', '--warmup_iters=1', '--learning_rate=1e-2', '--device=cpu']


@pytest.mark.parametrize('recipe, flags', [
    ('ssa', dict(selective=False, vote_scale=False, ssa='qv')),
    ('selective', dict(selective=True, vote_scale=True, ssa='')),
    ('standard', dict(selective=False, vote_scale=False, ssa=''))])
def test_recipe_resume_sample(folder, dataset, tmp_path, run, recipe, flags):
    args = [f'config/finetune_gpt2_{recipe}.py', dataset, *TINY, f'--out_dir={tmp_path}', f'--init_from={folder}']
    out = run(train, *args)
    losses = [float(x) for x in re.findall(r'validation loss ([\d.]+)', out)]
    assert len(losses) == 3 and losses[-1] < losses[0]
    saved = ckpt.load(tmp_path)
    assert saved['model_args'] == {**saved['model_args'], **flags, 'n_layer': 2, 'n_embd': 32, 'bias': True,
                                   'gelu': 'tanh', 'vocab_size': 300, 'block_size': 32}
    start = load(folder, block_size=32, **flags)
    assert all(not torch.equal(p, saved['model'][name]) for name, p in start.named_parameters())    # all were trained
    assert 'validation loss' in run(train, *args, '--max_iters=7', '--init_from=resume')
    assert ckpt.load(tmp_path)['pretrained'] == folder
    assert 'KV cache' in run(sample, f'--out_dir={tmp_path}', '--max_new_tokens=3', '--device=cpu', '--start=line')


def test_freeze(folder, dataset, tmp_path, run):
    args = [dataset, *TINY, f'--out_dir={tmp_path}', f'--init_from={folder}', '--freeze=base']
    flags, other = ['--ssa=qv', '--selective', '--vote_scale'], f'--out_dir={tmp_path / "x"}'
    run(train, *args, *flags)
    start = load(folder, block_size=32, ssa='qv', selective=True, vote_scale=True)
    for name, trained in ckpt.load(tmp_path)['model'].items():
        assert torch.equal(trained, start.state_dict()[name]) != ckpt.is_added(name), name
    assert "another run by freeze=''" in run(train, *args, *flags, '--init_from=resume', '--freeze=')
    assert 'trains nothing' in run(train, *args, '--selective', other)
    assert "'all' is not one of '', 'base'" in run(train, *args, '--freeze=all', other)
    assert '--block_size=40 is the largest' in run(train, *args, *flags, '--block_size=64', other)
    assert 'no such folder' in run(train, *args, *flags, '--init_from=gpt3', other)
    assert not (tmp_path / 'x').exists()


def test_sample_and_prune_read_a_folder(folder, dataset, tmp_path, run):
    out = run(sample, f'--init_from={folder}', '--max_new_tokens=4', '--device=cpu', '--temperature=0',
              '--start=line 1')
    with torch.no_grad():
        ids = load(folder).generate(torch.tensor([list(b'line 1')]), 4, temperature=0)[0].tolist()
    assert out.startswith(bytes(i for i in ids if i < 256).decode('utf-8', 'replace'))
    out = run(prune, f'--init_from={folder}', f'--out_dir={tmp_path / "b"}', dataset, '--policy=oldest',
              '--tolerance=5', '--windows=2', '--device=cpu')
    assert 'less memory' in out and os.listdir(tmp_path / 'b') == ['budgets_oldest.json']
    assert "data set ''" in run(prune, f'--init_from={folder}', f'--out_dir={tmp_path / "c"}', '--policy=oldest', '--tolerance=5',
                                 '--device=cpu')
    assert 'needs an --out_dir' in run(prune, f'--init_from={folder}', '--policy=oldest', '--tolerance=5')


def test_fetch_as_a_command(hub, tmp_path, run):
    where = [f'--base_url={hub.url}', f'--cache_dir={tmp_path}']
    assert run(pretrained, 'gpt2', *where).strip() == str(tmp_path / 'gpt2')
    assert in_cache(tmp_path, 'gpt2') == hub.files
    assert "'gpt4' is unknown" in run(pretrained, 'gpt4', *where)
    assert settings.parse(pretrained.FetchConfig, [], 'models').models == ['gpt2']
