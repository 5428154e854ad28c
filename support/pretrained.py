"""GPT-2's weights: from the Hugging Face hub, or from a folder in its layout (config.json and model.safetensors).

    python train.py config/finetune_gpt2_ssa.py                 init_from = 'gpt2', with SSA put in
    python sample.py --init_from=gpt2-xl --start="The answer is"
    python -m support.pretrained gpt2-xl                     fetch it now, for a run without a network

A download is checked by size and by the hash that the hub gives, goes on where it was cut, and is kept in cache_dir;
one process at a time may fetch a model. The numbers are GPT-2's own: equal logits to Hugging Face's transformers.
"""
import hashlib
import json
import os
from dataclasses import dataclass, field
from urllib.parse import urljoin

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from support import checkpoint as ckpt
import data
import prepare_c4
from support import settings
from support.settings import UserError

MODELS = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
SHAPE = ('vocab_size', 'n_layer', 'n_head', 'n_embd', 'bias', 'gelu')     # what the weights decide, not the settings


@dataclass
class Settings:
    # pretrained weights
    base_url: str = 'https://huggingface.co'    # the hub, or a mirror of it
    cache_dir: str = 'data/pretrained'          # downloads are kept here


@dataclass
class FetchSettings(Settings):
    # what
    models: list = field(default_factory=lambda: ['gpt2'])      # gpt2, gpt2-medium, gpt2-large, gpt2-xl

# ----------------------------------------------------------------------------- loading

def load_model(init_from, out_dir, cfg, device='cpu'):
    """A model, ready to use on the device, and its checkpoint: <out_dir>/ckpt.pt for 'resume', else see `load`."""
    if init_from == 'resume':
        return ckpt.load_model(out_dir, device)
    checkpoint = load(init_from, cfg)
    return ckpt.build(checkpoint).to(device).eval(), checkpoint


def check(name):
    """Raises UserError unless name is one of MODELS or a folder that is there."""
    if name not in MODELS and not os.path.isdir(name):
        raise UserError(f"init_from {name!r}: no such folder; "
                        f"else it is 'scratch', 'resume', or one of {', '.join(MODELS)}")


def load(name, cfg):
    """The weights of a GPT-2 as a checkpoint, which `checkpoint.build` makes a model of, with new flags if wanted.

    name: one of MODELS, or a folder. cfg: `Settings`. Raises UserError if they cannot be had or are no GPT-2.
    The tokenizer is taken to be GPT-2's; for a vocabulary too small for it, bytes.
    """
    try:
        import safetensors.torch
    except ImportError:
        raise UserError(f'init_from {name!r} needs the package safetensors: pip install safetensors') from None
    check(name)
    folder = fetch(name, cfg) if name in MODELS else name
    args = read_config(os.path.join(folder, 'config.json'))
    path = os.path.join(folder, 'model.safetensors')
    try:
        state = convert(safetensors.torch.load_file(path))
    except FileNotFoundError:
        raise UserError(f'{path} does not exist (weights in several files or another format are not read)') from None
    except (OSError, safetensors.SafetensorError) as e:
        raise UserError(f'{path} cannot be read, download it again ({e})') from None
    return {'model': state, 'model_args': args, 'pretrained': name, 'config': {}, 'iter_num': 0, 'val_loss': None,
            'val_iter': None, 'dataset': None, 'tokenizer': 'gpt2' if args['vocab_size'] >= 50257 else 'bytes'}


def read_config(path):
    """The fields of GPTConfig from a config.json of transformers; UserError for what model.py does not compute."""
    try:
        with open(path, encoding='utf-8') as f:
            c = json.load(f)
        # what a config.json leaves out is as in transformers' GPT2Config
        c = {'n_positions': 1024, 'vocab_size': 50257, 'n_layer': 12, 'n_head': 12, 'n_embd': 768, 'n_inner': None,
             'activation_function': 'gelu_new', **c}
        n_inner = c['n_inner'] or 4 * int(c['n_embd'])
    except FileNotFoundError:
        raise UserError(f'{path} does not exist: it belongs to a model in the layout of Hugging Face') from None
    except (OSError, ValueError, TypeError) as e:
        raise UserError(f'{path} is damaged ({type(e).__name__})') from None
    for key, have, want in [
            ('model_type', c.get('model_type'), 'gpt2'), ('n_inner', n_inner, 4 * c['n_embd']),
            ('layer_norm_epsilon', c.get('layer_norm_epsilon', 1e-5), 1e-5),
            ('scale_attn_weights', c.get('scale_attn_weights', True), True),
            ('scale_attn_by_inverse_layer_idx', c.get('scale_attn_by_inverse_layer_idx', False), False),
            ('tie_word_embeddings', c.get('tie_word_embeddings', True), True)]:
        if have != want:
            raise UserError(f'{path}: {key} is {have!r}, model.py computes with {want!r} only')
    gelu = {'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh', 'gelu': 'none'}.get(c['activation_function'])
    if gelu is None:
        raise UserError(f'{path}: activation_function {c["activation_function"]!r} is no GELU')
    return {'block_size': c['n_positions'], 'bias': True, 'gelu': gelu,
            **{key: c[key] for key in ('vocab_size', 'n_layer', 'n_head', 'n_embd')}}


def convert(tensors):
    """Hugging Face's tensors under our names, in float32. Its Conv1D keeps matrices (in, out), we keep (out, in)."""
    state = {}
    for name, x in tensors.items():
        name = 'transformer.' + name.removeprefix('transformer.')
        if name.endswith(('.attn.bias', '.attn.masked_bias', 'lm_head.weight')):    # causal masks; the tied weight
            continue
        if name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight')):
            x = x.t()
        state[name] = x.float().contiguous()
    if 'transformer.wte.weight' in state:
        state['lm_head.weight'] = state['transformer.wte.weight']
    return state

# ----------------------------------------------------------------------------- downloading

def fetch(name, cfg):
    """The folder of one of MODELS in the cache, after downloading what is missing of it."""
    folder = os.path.join(cfg.cache_dir, name)
    for file in 'config.json', 'model.safetensors':
        if not os.path.exists(os.path.join(folder, file)):
            url = f'{cfg.base_url.rstrip("/")}/openai-community/{name}/resolve/main/{file}'
            download(url, os.path.join(folder, file))
    return folder


def download(url, path, hashed=True):
    """Fetch url to path, which appears once it is whole: checked by size and hash where the server gives them.

    What was fetched before a cut, a kill or a failure is kept as <path>.part and not fetched again. hashed: raise
    UserError where the server gives no hash. Raises UserError also if the file is not what the server announced.
    """
    size, digest = announced(url)
    if hashed and not digest:
        raise UserError(f'{url}: the server gives no hash (X-Linked-Etag) to check it by: check --base_url')
    base, name = url.rsplit('/', 1)
    server, part = prepare_c4.Server(prepare_c4.Settings(base_url=base)), path + '.part'
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(part, 'ab') as f, data.Progress() as progress:
            if size is None or f.tell() > size:                     # of no use
                f.truncate(0)
                f.seek(0)
            if f.tell() != size:
                for chunk in server.read(name, f.tell()):
                    f.write(chunk)
                    progress.show(server.megabytes, None, server.place, f'{name}: ')
                    if size is not None and f.tell() > size:
                        break
            got = f.tell()
            f.flush()
            os.fsync(f.fileno())
        problem = (f'{got:,} bytes came, {size:,} were announced' if size not in (None, got) else
                   'its hash is wrong' if digest and digest_of(part, digest) != digest else None)
        if problem:
            os.remove(part)
            raise UserError(f'{url}: {problem}: it was deleted, run it again')
        os.replace(part, path)
    except OSError as e:
        raise UserError(f'{e.filename or path}: {e.strerror}') from None


def announced(url):
    """(size, hash) of a file, each None if the server does not say.

    The hub answers a large file with a redirect to another host that names both, the hash being sha256; a small one has
    its git hash as ETag, perhaps after a redirect to another path.
    """
    headers = requests.structures.CaseInsensitiveDict()
    with requests.Session() as session:     # a server that cannot be reached is not asked again, a busy one is
        session.mount(url, HTTPAdapter(max_retries=Retry(5, connect=0, backoff_factor=0.5, raise_on_status=False,
                                                         status_forcelist=(429, 500, 502, 503, 504))))
        where = url
        for _ in range(5):
            try:
                answer = session.head(where, timeout=(5, 30), headers={'Accept-Encoding': 'identity'})
            except OSError as e:            # every error of requests is an OSError
                raise UserError(f'{url} cannot be reached ({type(e).__name__}): check the network and --base_url') \
                    from None
            if answer.status_code >= 400:
                raise UserError(f'{url}: HTTP {answer.status_code}: check --base_url')
            headers.update(answer.headers)
            path = answer.headers.get('Location', '')
            if not path.startswith('/'):
                break
            where = urljoin(where, path)
    size = headers.get('X-Linked-Size') or (headers.get('Content-Length') if answer.status_code == 200 else None)
    digest = headers.get('X-Linked-Etag') or ('X-Repo-Commit' in headers and headers.get('ETag')) or ''
    return int(size) if size else None, digest.removeprefix('W/').strip('"') or None


def digest_of(path, like):
    """The hash of a file, of the kind that `like` is: sha256 (64 digits), or git's sha1 of a blob (40)."""
    h = hashlib.sha256() if len(like) == 64 else hashlib.sha1(b'blob %d\0' % os.path.getsize(path))
    with open(path, 'rb') as f:
        while chunk := f.read(1 << 20):
            h.update(chunk)
    return h.hexdigest()


def main():
    cfg = settings.parse(FetchSettings, positional='models')
    for name in cfg.models:
        if name not in MODELS:
            raise UserError(f'{name!r} is unknown: it is one of {", ".join(MODELS)}')
    for name in cfg.models:
        print(fetch(name, cfg))


if __name__ == '__main__':
    settings.run(main)
