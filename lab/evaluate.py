"""Public benchmarks: checkpoints side by side in one table, each with and without a memory budget.

    python -m lab.evaluate --out_dir=out/a,out/b,gpt2 --tasks=wikitext,lambada,hellaswag,passkey
    python -m lab.evaluate --out_dir=out/a --tasks=wikitext --budgets=64 --limit=10

The files are downloaded into data_dir, unless they lie there. Scores are those of lm-evaluation-harness, zero-shot,
for the tasks named in brackets; it runs in float32, so compare with --dtype=float32.

wikitext [wikitext]: WikiText-2 raw, test (wiki.test.raw), one text for each article, detokenized, after <|endoftext|>.
    Windows of block_size tokens; `stride` new ones are scored in each. With stride = block_size, the default, windows
    do not overlap, but the last of an article reaches back to be full. word_perplexity counts the words, and
    bits_per_byte the bytes, of the article before it is detokenized; token_perplexity the tokens.
lambada [lambada_openai]: OpenAI's version (lambada_test.jsonl). Of the last word, after all others: accuracy, that each
    of its tokens is the most likely one; perplexity by word, exp of the mean of -log of its probability.
hellaswag [hellaswag]: validation set (hellaswag_val.jsonl), which of four endings is the most likely: accuracy, and
    accuracy_norm, where the log-probability is divided by the characters of the ending.
passkey: a number in the middle of repeated sentences, asked for at the end, in the words of Mohtashami and Jaggi
    (arXiv 2305.16300). The prompt and the answer take exactly `length` tokens; depth 0 has the number first, 1 last.
    Accuracy, that each token of the answer is the most likely one. Not a task of the harness.

A text longer than block_size loses its beginning. With budgets, texts are read under the rules of context pruning; a
model without selective attention drops the oldest tokens then, which is local attention.
"""
import dataclasses
import json
import math
import os
import random
import re
import sys
import zipfile
from dataclasses import dataclass

import torch

import data
from model import KVCache, check_budgets
from support import checkpoint as ckpt, devices, files, pretrained, settings
from support.settings import UserError


@dataclass
class EvaluateConfig(pretrained.PretrainedConfig):
    out_dir: str = 'out/selective_small'    # folders of ckpt.pt, or what init_from names (gpt2, a folder), with commas
    tasks: str = 'wikitext,lambada,hellaswag,passkey'   # which
    budgets: str = ''                       # tokens that a layer may keep: a number, 4,9,16,8 or a budgets.json; 'none'
    data_dir: str = 'data/benchmarks'       # folder of wiki.test.raw, lambada_test.jsonl, hellaswag_val.jsonl
    json: str = 'out/evaluate.json'         # where the figures go
    limit: int = 0                          # items of each task (articles of wikitext); 0: all [0 to 1e9]
    batch_size: int = 8                     # texts at a time [1 to 100_000]
    stride: int = 0                         # wikitext: tokens from one window to the next; 0: block_size [0 to 2**20]
    lengths: str = ''                       # passkey: tokens; '': quarter, half and all of block_size [list of 1 to 2**20]
    depths: str = '0,0.25,0.5,0.75,1'       # passkey: where the number is, 0 to 1 [list of 0.0 to 1.0]
    passkeys: int = 20                      # passkey: numbers for each length and depth [1 to 100_000]
    seed: int = 1337                        # passkey: of the numbers [0 to 2**31]
    device: str = 'auto'                    # 'cuda', 'mps', 'cpu'; 'auto': the best one there is
    dtype: str = 'auto'                     # bfloat16 where a GPU has it ['auto', 'float32', 'bfloat16', 'float16']

# ----------------------------------------------------------------------------- scoring

@dataclass
class Subject:
    """What is evaluated: a model and how it is run. budgets None: the whole context; a list: tokens of each layer."""
    name: str
    model: torch.nn.Module
    tokenizer: object
    budgets: list
    cfg: EvaluateConfig

    @torch.no_grad()
    def logits(self, x):
        """x (B, T) int64 -> logits (B, T, V), under the budgets."""
        model, dtype = self.model, self.cfg.dtype
        with devices.autocast(self.cfg.device, dtype):
            if self.budgets is None:
                return model(x, x)[0]
            policy = 'selective' if model.config.selective else 'oldest'
            cache = KVCache(model, len(x), self.budgets, policy, getattr(torch, dtype))
            return torch.cat([model(rows, rows, cache=cache)[0] for rows in x.split(64, dim=1)], dim=1)

    def score(self, requests):
        """For each (tokens, n): the log-probability of the last n tokens, given those before them, in nats, and
        whether each of the n was the most likely. Raises UserError if n tokens are more than block_size."""
        size, results = self.model.config.block_size, [None] * len(requests)
        order = sorted(range(len(requests)), key=lambda r: -len(requests[r][0]))    # alike in length: little padding
        for start in range(0, len(order), self.cfg.batch_size):
            batch = order[start:start + self.cfg.batch_size]
            rows = [requests[r][0][-size - 1:] for r in batch]
            x = torch.zeros(len(rows), max(map(len, rows)) - 1, dtype=torch.long)
            y = torch.full_like(x, -1)
            for b, (row, r) in enumerate(zip(rows, batch)):
                n = requests[r][1]
                if n > size:
                    raise UserError(f'{self.name}: {n} tokens are to be scored at once, block_size is {size}')
                x[b, :len(row) - 1] = torch.tensor(row[:-1])        # padding comes last and is seen by nobody
                y[b, len(row) - 1 - n:len(row) - 1] = torch.tensor(row[-n:])
            if max(x.max(), y.max()) >= self.model.config.vocab_size:
                raise UserError(f'{self.name}: its vocabulary, {self.model.config.vocab_size}, is not its tokenizer\'s')
            x, y = x.to(self.cfg.device), y.to(self.cfg.device)
            which = y >= 0
            logits, y = self.logits(x)[which].float(), y[which]     # (all n, V), (all n)
            likely = logits.argmax(dim=-1) == y
            log_p = logits.log_softmax(dim=-1).gather(1, y[:, None])[:, 0]
            counts = which.sum(dim=1).tolist()
            for r, p, ok in zip(batch, log_p.split(counts), likely.split(counts)):
                results[r] = p.double().sum().item(), ok.all().item()
        return results

    def pair(self, context, continuation):
        """The request for a continuation after a context: both are tokenized as one text."""
        encode = self.tokenizer.encode_ordinary
        tokens = encode(context + continuation)
        n = len(tokens) - len(encode(context.rstrip()))
        return (tokens, n) if n < len(tokens) else ([self.tokenizer.eot_token, *tokens], n)

# ----------------------------------------------------------------------------- tasks

DETOKENIZE = [(re.compile(pattern), to) for pattern, to in [     # the order matters
    ("s '", "s'"), (r"/' [0-9]/", "/'[0-9]/"), (' @-@ ', '-'), (' @,@ ', ','), (r' @\.@ ', '.'),
    (' : ', ': '), (' ; ', '; '), (r' \. ', '. '), (' ! ', '! '), (r' \? ', '? '), (' , ', ', '),
    (r'\(\s*([^\)]*?)\s*\)', r'(\1)'), (r'\[\s*([^\]]*?)\s*\]', r'[\1]'), (r'{\s*([^}]*?)\s*}', r'{\1}'),
    (r'"\s*([^"]*?)\s*"', r'"\1"'), (r"'\s*([^']*?)\s*'", r"'\1'"),
    ('= = = =', '===='), ('= = =', '==='), ('= =', '=='), (' ° ', '°'),
    (' \n', '\n'), ('\n ', '\n'), (' N ', ' 1 '), (" 's", "'s")]]


def articles(text):
    pages = re.split(r'(?m)\n(?= *= (?!= ).*(?<! =) = *$)', text)     # an article begins with = its title =
    return [page for page in pages if page.strip()]


def wikitext(subject, pages, cfg):
    size = subject.model.config.block_size
    requests = []
    for page in pages:
        for pattern, to in DETOKENIZE:
            page = pattern.sub(to, page)
        requests += windows([subject.tokenizer.eot_token, *subject.tokenizer.encode_ordinary(page)], size,
                            min(cfg.stride or size, size))
    nats = -sum(log_p for log_p, _ in subject.score(requests))
    words = sum(len(re.split(r'\s+', page)) for page in pages)
    return {'word_perplexity': exp(nats / words), 'token_perplexity': exp(nats / sum(n for _, n in requests)),
            'bits_per_byte': nats / math.log(2) / sum(len(page.encode()) for page in pages), 'items': len(pages)}


def windows(tokens, size, stride):
    """Requests that score every token after the first once: at most size tokens are read, at most stride scored."""
    end = min(size + 1, len(tokens))
    requests = [(tokens[:end], end - 1)]
    while end < len(tokens):
        n = min(stride, len(tokens) - end)
        end += n
        requests.append((tokens[end - size - 1:end], n))
    return requests


def passages(text):
    return [(context, word) for context, _, word in (item['text'].rpartition(' ') for item in json_lines(text))]


def lambada(subject, items, cfg):
    scores = subject.score([subject.pair(context, ' ' + word) for context, word in items])
    return {'accuracy': mean(ok for _, ok in scores), 'perplexity': exp(-mean(log_p for log_p, _ in scores)),
            'items': len(items)}


def questions(text):
    return [(clean(f'{item["activity_label"]}: {item["ctx_a"]} {item["ctx_b"].capitalize()}'),
             [clean(ending) for ending in item['endings']], int(item['label'])) for item in json_lines(text)]


def hellaswag(subject, items, cfg):
    requests = [subject.pair(context, ' ' + ending) for context, endings, _ in items for ending in endings]
    scores, right, right_norm = iter(subject.score(requests)), [], []
    for _, endings, label in items:
        log_p = [next(scores)[0] for _ in endings]
        right.append(argmax(log_p) == label)
        right_norm.append(argmax([p / max(len(ending), 1) for p, ending in zip(log_p, endings)]) == label)
    return {'accuracy': mean(right), 'accuracy_norm': mean(right_norm), 'items': len(items)}


def clean(text):
    """HellaSwag's texts without the marks of WikiHow."""
    return re.sub(r'\[.*?\]', '', text.strip().replace(' [title]', '. ')).replace('  ', ' ')


INTRO = ('There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz '
         'you about the important information there.\n')
FILLER = ' The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.'
KEY = '\nThe pass key is {0}. Remember it. {0} is the pass key.\n'
QUESTION = '\nWhat is the pass key? The pass key is'


def passkey(subject, _, cfg):
    size, cells = subject.model.config.block_size, {}
    for length in cfg.lengths or (size // 4, size // 2, size):
        for depth in cfg.depths:
            rng = random.Random(f'{cfg.seed} {length} {depth}')
            requests = [passkey_item(subject.tokenizer, length, depth, rng.randint(1, 50_000))
                        for _ in range(cfg.passkeys)]
            if length > size or None in requests:       # too long for the model, too short for the prompt
                continue
            cells[f'{length} tokens, depth {depth:.0%}'] = mean(ok for _, ok in subject.score(requests))
    if not cells:
        raise UserError(f'{subject.name}: no length of passkey fits into block_size {size} and holds its prompt')
    return {**cells, 'accuracy': mean(cells.values()), 'items': cfg.passkeys * len(cells)}


def passkey_item(tokenizer, length, depth, key):
    """The request of exactly length tokens; None if the prompt takes more."""
    intro, middle, question, answer, filler = (
        tokenizer.encode_ordinary(text) for text in (INTRO, KEY.format(key), QUESTION, f' {key}', FILLER))
    room = length - len(intro + middle + question + answer)
    if room < 0:
        return None
    before = round(depth * room)
    filler = filler * (room // len(filler) + 1)
    return intro + filler[:before] + middle + filler[:room - before] + question + answer, len(answer)


def json_lines(text):
    return [json.loads(line) for line in text.split('\n') if line.strip()]


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def argmax(values):
    return values.index(max(values))


def exp(x):
    return math.exp(x) if x < 700 else math.inf


TASKS = {'wikitext': wikitext, 'lambada': lambada, 'hellaswag': hellaswag, 'passkey': passkey}

# ----------------------------------------------------------------------------- files, settings, the table

def read_items(task, cfg):
    """The items of a task from its file in data_dir, downloaded if it is missing; None for passkey, which is made."""
    if task == 'passkey':
        return None
    name, parse, url = {
        'wikitext': ('wiki.test.raw', articles,
                     f'{cfg.base_url}/datasets/ggml-org/ci/resolve/main/wikitext-2-raw-v1.zip'),
        'lambada': ('lambada_test.jsonl', passages,
                    'https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl'),
        'hellaswag': ('hellaswag_val.jsonl', questions,
                      'https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl'),
    }[task]
    path = os.path.join(cfg.data_dir, name)
    try:
        if not os.path.exists(path):
            file = os.path.join(cfg.data_dir, url.rsplit('/', 1)[1])
            pretrained.download(url, file, hashed=False)
            if file.endswith('.zip'):
                with zipfile.ZipFile(file) as z, open(path + '.tmp', 'wb') as f:
                    f.write(z.read(next(n for n in z.namelist() if n.endswith('/' + name))))
                os.replace(path + '.tmp', path)
        with open(path, encoding='utf-8') as f:
            text = f.read()
    except UserError as e:
        raise UserError(f'{e} (or put {name} into {cfg.data_dir})') from None
    except (OSError, UnicodeDecodeError, zipfile.BadZipFile, StopIteration) as e:
        raise UserError(f'{path} cannot be read ({type(e).__name__}): put {name} into {cfg.data_dir}') from None
    try:
        items = parse(text)[:cfg.limit or None]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f'{path} is damaged ({type(e).__name__}: {e})') from None
    if not items:
        raise UserError(f'{path} is empty')
    return items


def numbers(name, text, kind):
    try:
        return [kind(part) for part in text.split(',') if part]
    except ValueError:
        raise UserError(f'--{name}={text}: numbers with commas between them') from None


def check(cfg):
    """Settings as the tasks use them; UserError for invalid ones."""
    cfg.tasks, cfg.out_dir = cfg.tasks.split(','), cfg.out_dir.split(',')
    for task in cfg.tasks:
        if task not in TASKS:
            raise UserError(f'--tasks: {task!r} is unknown: it is one of {", ".join(TASKS)}')
    cfg.lengths, cfg.depths = numbers('lengths', cfg.lengths, int), numbers('depths', cfg.depths, float)
    if not cfg.depths or not all(0 <= depth <= 1 for depth in cfg.depths):
        raise UserError('--depths are from 0 to 1')
    if min(cfg.batch_size, cfg.passkeys) < 1 or min(cfg.limit, cfg.stride) < 0:
        raise UserError('batch_size and passkeys must be at least 1, limit and stride at least 0')
    cfg.device = devices.pick_device(cfg.device)
    cfg.dtype = devices.pick_dtype(cfg.dtype, cfg.device)


def subjects(name, cfg):
    """What is to be evaluated of one entry of out_dir: the model, and the model under its budgets if there are any."""
    init_from = 'resume' if os.path.isfile(os.path.join(name, 'ckpt.pt')) else name
    model, checkpoint = pretrained.load_model(init_from, name, cfg, cfg.device)
    tokenizer = data.get_tokenizer(checkpoint['tokenizer'])
    budgets = ckpt.read_budgets(cfg.budgets, name, model)
    yield Subject(name, model, tokenizer, None, cfg)
    if budgets is not None:
        try:
            budgets = check_budgets(model.config, budgets, 'selective' if model.config.selective else 'oldest')
        except ValueError as e:
            raise UserError(f'--budgets: {name}: {e}') from None
        yield Subject(f'{name} @{sum(budgets)}', model, tokenizer, budgets, cfg)


def table(results):
    """One column for each result, one row for each figure."""
    rows = {}
    for r in results:
        for task, figures in r['tasks'].items():
            for figure, value in figures.items():
                text = f'{value:.4f}' if value < 1e4 and value % 1 else f'{value:.4g}'
                rows.setdefault(f'{task} {figure}', {})[r['name']] = text
    names = [r['name'] for r in results]
    first, widths = max(map(len, rows)), [max(8, len(name)) for name in names]
    lines = [' ' * first + ''.join(f'  {name:>{w}}' for name, w in zip(names, widths))]
    lines += [f'{row:<{first}}' + ''.join(f'  {cells.get(name, "-"):>{w}}' for name, w in zip(names, widths))
              for row, cells in rows.items()]
    return '\n'.join(lines)


def main():
    cfg = settings.parse(EvaluateConfig)
    asked = dataclasses.asdict(cfg)
    check(cfg)
    items, results = {task: read_items(task, cfg) for task in cfg.tasks}, []
    for name in cfg.out_dir:
        for subject in subjects(name, cfg):
            result = {'name': subject.name, 'budgets': subject.budgets, 'tasks': {}}
            for task in cfg.tasks:
                print(f'{subject.name}: {task} …', file=sys.stderr, flush=True)
                result['tasks'][task] = TASKS[task](subject, items[task], cfg)
            results.append(result)
    print(table(results))
    files.write_file(cfg.json, json.dumps({'settings': asked, 'results': results}, indent=1))


if __name__ == '__main__':
    settings.run(main)
