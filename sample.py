"""Generate text from a checkpoint, within a memory budget if you like.

    python sample.py --out_dir=out/selective_small --start="def "
    python sample.py --out_dir=out/selective_small --start=FILE:data.py --temperature=0
    echo "import os" | python sample.py --out_dir=out/selective_small --start=-
    python sample.py --out_dir=out/selective_small --budgets=32 --num_samples=4
    python sample.py --init_from=gpt2 --start="The answer is"

One text appears as it is generated; several are generated together, as one batch, and printed at
the end. The last line gives tokens per second, the bytes of the KV cache, and what budgets save.
"""

import codecs
import sys
import time
from dataclasses import dataclass

from support import settings  # before torch, see support/__init__.py

import torch

import data
import kernels
from model import POLICIES, KVCache, stream
from support import checkpoint as ckpt
from support import devices, files, pretrained
from support.settings import option


@dataclass
class SampleConfig:
    out_dir: str = option('out/selective_small', 'folder of ckpt.pt')
    init_from: str = option('resume', "'resume': ckpt.pt; or a folder, or a model on the hub")
    start: str = option('', "text, FILE:path, or - for standard input; '': the start of a text")
    num_samples: int = option(1, 'how many texts', low=1)
    max_new_tokens: int = option(500, 'new tokens per text', low=1)
    temperature: float = option(0.8, 'lower is less random; 0: the most likely token')
    top_k: int = option(200, 'only the k most likely tokens; 0: all')
    seed: int = option(1337, 'same seed, same text')
    budgets: str = option('', "tokens of a layer: 8, or 4,9,16,8, or a budgets.json; 'none'")
    policy: str = option('selective', f'eviction policy: {", ".join(POLICIES)}')
    device: str = option('auto', "'cuda', 'mps', 'cpu'; 'auto': the best one there is")
    dtype: str = option('auto', "'auto': bfloat16 where a GPU has it", choices=devices.DTYPES)


def show(prompt, tokens, tokenizer):
    """Print a prompt, then tokens as text, each as soon as it comes."""
    print(prompt, end='', flush=True)
    text = codecs.getincrementaldecoder('utf-8')('replace')  # a character may take several tokens
    for token in tokens:
        if token < tokenizer.n_vocab:  # a padded vocabulary has ids without text
            piece = tokenizer.decode_single_token_bytes(token)
            print(text.decode(piece), end='', flush=True)
    print(text.decode(b'', final=True), '-' * 40, sep='\n')


def main():
    cfg = settings.parse(SampleConfig)
    device = devices.pick_device(cfg.device)
    dtype = devices.pick_dtype(cfg.dtype, device)
    model, checkpoint = pretrained.load_model(cfg.init_from, cfg.out_dir, device)
    kernels.fast_rows(model)
    devices.threads_for_generation(model)

    # the prompt
    tokenizer = data.get_tokenizer(checkpoint['tokenizer'])
    prompt = files.read_text(cfg.start)
    ids = data.encode_prompt(prompt, tokenizer, ckpt.starts_with_bos(checkpoint))
    idx = torch.tensor([ids] * cfg.num_samples, device=device)

    # the memory
    folder = cfg.out_dir if cfg.init_from == 'resume' else cfg.init_from
    budgets = ckpt.read_budgets(cfg.budgets, folder, model, cfg.policy)
    cache = KVCache(model, len(idx), budgets, cfg.policy, getattr(torch, dtype))
    memory = f'KV cache {cache.bytes():,} bytes'
    if budgets:
        saving = model.config.block_size * len(budgets) / sum(budgets)
        memory += f' for budgets {cache.budgets}, {saving:.1f}x less than without'

    # the texts
    torch.manual_seed(cfg.seed)
    started = time.time()
    with devices.autocast(device, dtype):
        steps = stream(model, idx, cfg.max_new_tokens, cfg.temperature, cfg.top_k, cache)
        if cfg.num_samples == 1:
            texts = [(new.item() for new in steps)]
        else:
            texts = torch.cat(list(steps), dim=1).tolist()
        for tokens in texts:
            show(prompt, tokens, tokenizer)
    rate = cfg.num_samples * cfg.max_new_tokens / (time.time() - started)
    print(f'{rate:,.0f} tokens/s; {memory}', file=sys.stderr)


if __name__ == '__main__':
    settings.run(main)
