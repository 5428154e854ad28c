"""Read what a model learned: text from a checkpoint, inside a memory budget if you like.

    python sample.py --out_dir=out/selective_small --start="def "
    python sample.py --out_dir=out/selective_small --start=FILE:data.py --temperature=0
    echo "import os" | python sample.py --out_dir=out/selective_small --start=-
    python sample.py --out_dir=out/selective_small --budgets=32 --num_samples=4
    python sample.py --init_from=gpt2 --start="The answer is"

One text appears as it is generated; several are generated together, as one batch, and printed at the end. The last line
tells tokens per second, and the bytes of the KV cache with and without budgets.
"""
import codecs
import sys
import time
from dataclasses import dataclass

import support      # before torch, see there
import torch

import data
import kernels
from model import KVCache, stream
from support import checkpoint as ckpt, devices, files, pretrained, settings
from support.settings import UserError


@dataclass
class SampleConfig(pretrained.PretrainedConfig):
    out_dir: str = 'out/selective_small'    # folder of ckpt.pt
    init_from: str = 'resume'               # 'resume': <out_dir>/ckpt.pt; or 'gpt2', 'gpt2-medium', … or a folder
    start: str = ''                         # text, FILE:path, or - for standard input; '': the beginning of a text
    num_samples: int = 1                    # how many texts [1 to 10_000]
    max_new_tokens: int = 500               # tokens of each [1 to 1e6]
    temperature: float = 0.8                # 1: the model as it is, below 1 more careful, 0 the most likely [0 to 100]
    top_k: int = 200                        # only the k most likely tokens; 0: all [0 to 2**20]
    seed: int = 1337                        # same seed, same text [0 to 2**31]
    budgets: str = ''                       # tokens that a layer may keep: a number, 4,9,16,8 or a budgets.json; 'none'
    policy: str = 'selective'               # what is dropped at the budget ['selective', 'oldest', 'random']
    device: str = 'auto'                    # 'cuda', 'mps', 'cpu'; 'auto': the best one there is
    dtype: str = 'auto'                     # bfloat16 where a GPU has it ['auto', 'float32', 'bfloat16', 'float16']


def show(tokens, tokenizer):
    """Print tokens as text, each as soon as it comes."""
    text = codecs.getincrementaldecoder('utf-8')('replace')             # a character may take several tokens
    for token in tokens:
        if token < tokenizer.n_vocab:                                   # a padded vocabulary has ids without text
            print(text.decode(tokenizer.decode_single_token_bytes(token)), end='', flush=True)
    print(text.decode(b'', final=True) + '\n' + '-' * 40, flush=True)


def main():
    cfg = settings.parse(SampleConfig)
    device = devices.pick_device(cfg.device)
    dtype = devices.pick_dtype(cfg.dtype, device)
    model, checkpoint = pretrained.load_model(cfg.init_from, cfg.out_dir, cfg, device)
    kernels.fast_rows(model)
    devices.threads_for_generation(model)
    tokenizer = data.get_tokenizer(checkpoint['tokenizer'])
    prompt = files.read_text(cfg.start)
    ids = data.encode_prompt(prompt, tokenizer, ckpt.starts_with_bos(checkpoint))
    if max(ids) >= model.config.vocab_size:
        raise UserError(f'the prompt has token {max(ids)}, the model knows {model.config.vocab_size}')
    folder = cfg.out_dir if cfg.init_from == 'resume' else cfg.init_from
    budgets = ckpt.read_budgets(cfg.budgets, folder, model, cfg.policy)
    try:
        cache = KVCache(model, 1, budgets, cfg.policy, getattr(torch, dtype))
    except ValueError as e:
        raise UserError(f'--budgets, --policy: {e}') from None
    size = cache.bytes()
    full = KVCache(model, 1, dtype=getattr(torch, dtype)).bytes()

    torch.manual_seed(cfg.seed)
    started = time.time()
    with devices.autocast(device, dtype):
        steps = stream(model, torch.tensor([ids], device=device), cfg.max_new_tokens, cfg.temperature, cfg.top_k,
                       cache=cache, num_samples=cfg.num_samples)
        if cfg.num_samples == 1:
            print(prompt, end='', flush=True)
            show((new.item() for new in steps), tokenizer)
        else:
            texts = torch.cat(list(steps), dim=1).tolist()
        seconds = time.time() - started
    for tokens in texts if cfg.num_samples > 1 else []:
        print(prompt, end='')
        show(tokens, tokenizer)
    print(f'{cfg.num_samples * cfg.max_new_tokens / seconds:,.0f} tokens/s; KV cache {size:,} bytes a text'
          + (f' for budgets {cache.budgets}, {full:,} without: {full / size:.1f}x less' if budgets else ''),
          file=sys.stderr)


if __name__ == '__main__':
    settings.run(main)
