"""Read what a model learned: text from a checkpoint, inside a memory budget if you like.

    python sample.py --out_dir=out/selective_small --start="def "
    python sample.py --out_dir=out/selective_small --start=FILE:settings.py --temperature=0
    echo "import os" | python sample.py --out_dir=out/selective_small --start=-
    python sample.py --out_dir=out/selective_small --budgets=32
    python sample.py --init_from=gpt2 --start="The answer is"

Text appears as it is generated. At the end: tokens per second, and bytes of the KV cache with and without budgets.
"""
import codecs
import sys
import time
from dataclasses import dataclass

import torch

from support import checkpoint as ckpt
import data
from support import pretrained
from support import settings
from model import KVCache
from support.settings import UserError


@dataclass
class SampleConfig(pretrained.Settings):
    out_dir: str = 'out/selective_small'    # folder of ckpt.pt
    init_from: str = 'resume'               # 'resume': <out_dir>/ckpt.pt; or 'gpt2', 'gpt2-medium', … or a folder
    start: str = ''                         # text, FILE:path, or - for standard input; '': the end-of-text token
    num_samples: int = 1                    # how many texts
    max_new_tokens: int = 500               # tokens of each
    temperature: float = 0.8                # 1 samples from the model as it is, below 1 more careful, 0 the most likely
    top_k: int = 200                        # only the k most likely tokens; 0: all
    seed: int = 1337                        # same seed, same text
    budgets: str = ''                       # tokens that a layer may keep: a number, 4,9,16,8 or a budgets.json; 'none'
    policy: str = 'selective'               # what is dropped at the budget: 'selective', 'oldest' or 'random'
    device: str = 'auto'                    # 'cuda', 'mps', 'cpu'; 'auto': the best one there is
    dtype: str = 'auto'                     # 'float32', 'bfloat16', 'float16'; 'auto': bfloat16 where a GPU has it


def read_prompt(start, tokenizer):
    """Token ids of the setting `start`."""
    try:
        if start == '-':
            start = sys.stdin.read()
        elif start.startswith('FILE:'):
            with open(start[5:], encoding='utf-8') as f:
                start = f.read()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f'--start: {e}') from None
    return tokenizer.encode_ordinary(start) or [tokenizer.eot_token]    # the end of a text is the start of the next


def main():
    cfg = settings.parse(SampleConfig)
    if cfg.num_samples < 1 or cfg.max_new_tokens < 1 or cfg.temperature < 0 or cfg.top_k < 0:
        raise UserError('num_samples and max_new_tokens must be at least 1, temperature and top_k at least 0')
    device = ckpt.pick_device(cfg.device)
    dtype = ckpt.pick_dtype(cfg.dtype, device)
    model, checkpoint = pretrained.load_model(cfg.init_from, cfg.out_dir, cfg, device)
    tokenizer = data.get_tokenizer(checkpoint['tokenizer'])
    ids = read_prompt(cfg.start, tokenizer)
    if max(ids) >= model.config.vocab_size:
        raise UserError(f'the prompt has token {max(ids)}, the model knows {model.config.vocab_size}')
    idx = torch.tensor([ids], device=device)
    folder = cfg.out_dir if cfg.init_from == 'resume' else cfg.init_from
    budgets = ckpt.read_budgets(cfg.budgets, folder, model, cfg.policy)

    torch.manual_seed(cfg.seed)
    seconds = 0.0
    for n in range(cfg.num_samples):
        try:
            cache = KVCache(model, 1, budgets, cfg.policy, getattr(torch, dtype))
        except ValueError as e:
            raise UserError(f'--budgets, --policy: {e}') from None
        text = codecs.getincrementaldecoder('utf-8')('replace')         # a character may take several tokens
        print(tokenizer.decode_bytes(ids).decode('utf-8', 'replace'), end='', flush=True)
        started = time.time()
        with ckpt.autocast(device, dtype):
            for new in model.stream(idx, cfg.max_new_tokens, cfg.temperature, cfg.top_k, cache=cache):
                token = new.item()
                if token < tokenizer.n_vocab:                           # a padded vocabulary has ids without text
                    print(text.decode(tokenizer.decode_single_token_bytes(token)), end='', flush=True)
        seconds += time.time() - started
        print(text.decode(b'', final=True) + '\n' + '-' * 40, flush=True)

    full = KVCache(model, 1, dtype=getattr(torch, dtype)).bytes()
    print(f'{cfg.num_samples * cfg.max_new_tokens / seconds:,.0f} tokens/s; KV cache {cache.bytes():,} bytes'
          + (f' for budgets {cache.budgets}, {full:,} without: {full / cache.bytes():.1f}x less' if budgets else ''),
          file=sys.stderr)


if __name__ == '__main__':
    settings.run(main)
