"""lab/evaluate.py: its scores against sums made one text at a time, on models whose logits are known."""
import json
import math
import os
import re
import shutil
import sys
import threading
import types
import zipfile
from pathlib import Path

import pytest
import torch

import data
import model as m
from lab import evaluate
from support import checkpoint as ckpt
from support.settings import UserError
from test_prepare_c4 import Handler, Server

BYTES = data.get_tokenizer('bytes')
EOT = BYTES.eot_token


class Bigram(torch.nn.Module):
    """A model whose logits depend on the last token alone, so that every score is a sum that can be written down."""

    def __init__(self, block_size=1000, seed=0):
        super().__init__()
        self.config = types.SimpleNamespace(block_size=block_size, vocab_size=257, selective=False)
        self.W = torch.randn(257, 257, generator=torch.Generator().manual_seed(seed))

    def forward(self, x, targets):
        assert x.size(1) <= self.config.block_size
        return self.W[x], None

    def log_p(self, text, before=()):
        """Sum over the bytes of the text, after the token before."""
        ids = [*before, *text] if isinstance(text, bytes) else [*before, *text.encode()]
        return sum(self.W[a].log_softmax(0)[b].item() for a, b in zip(ids, ids[1:]))


def subject(model, budgets=None, **changes):
    cfg = evaluate.Settings(device='cpu', dtype='float32', **changes)
    for name in 'lengths', 'depths':
        setattr(cfg, name, evaluate.numbers(name, getattr(cfg, name), float if name == 'depths' else int))
    return evaluate.Subject('it', model, BYTES, budgets, cfg)


def figures_of(task, model, text, **changes):
    """What a task gives for the text of its file."""
    s = subject(model, **changes)
    parse = {'wikitext': evaluate.articles, 'lambada': evaluate.passages, 'hellaswag': evaluate.questions}[task]
    return evaluate.TASKS[task](s, parse(text), s.cfg)


def gpt(**changes):
    torch.manual_seed(0)
    made = m.GPT(m.GPTConfig(**{**dict(block_size=32, vocab_size=257, n_layer=2, n_head=2, n_embd=16), **changes}))
    for p in made.parameters():
        p.data += torch.randn_like(p) * 0.3
    return made.eval()


# ----------------------------------------------------------------------------------------------------------------------
# Scores

@pytest.mark.parametrize('batch_size', [1, 3, 100])
@pytest.mark.parametrize('budgets', [None, [5, 9]])
def test_score(batch_size, budgets):
    """In batches of padded texts as one by one; the beginning of a long text is lost."""
    model = gpt(selective=budgets is not None)
    g = torch.Generator().manual_seed(0)
    requests = [(torch.randint(257, (length,), generator=g).tolist(), n)
                for length, n in [(2, 1), (9, 8), (33, 32), (20, 3), (33, 1), (50, 7), (5, 2)]]
    best = requests[3][0]       # one whose last three tokens are the model's own choice
    for k in (-3, -2, -1):
        best[k] = model.generate(torch.tensor([best[:k]]), 1, temperature=0, budgets=budgets)[0, -1].item()
    results = subject(model, budgets, batch_size=batch_size).score(requests)
    for (tokens, n), (log_p, likely) in zip(requests, results):
        x = torch.tensor([tokens[-33:][:-1]])
        with torch.no_grad():
            logits = model(x, x, cache=m.KVCache(model, 1, budgets) if budgets else None)[0][0, -n:]
        expected = logits.log_softmax(-1)[range(n), tokens[-n:]].sum().item()
        assert log_p == pytest.approx(expected, abs=1e-4)
        assert likely == (logits.argmax(-1).tolist() == tokens[-n:])
    assert results[3][1] and not results[2][1]


def test_scores_that_cannot_be():
    with pytest.raises(UserError, match='33 tokens are to be scored at once, block_size is 32'):
        subject(gpt()).score([(list(range(34)), 33)])
    with pytest.raises(UserError, match='vocabulary, 100,'):
        subject(gpt(vocab_size=100)).score([([1, 2, 200], 1)])


def test_windows():
    t = list(range(12))
    assert evaluate.windows(t, 4, 4) == [([0, 1, 2, 3, 4], 4), ([4, 5, 6, 7, 8], 4), ([7, 8, 9, 10, 11], 3)]
    assert evaluate.windows(t, 4, 2) == [([0, 1, 2, 3, 4], 4), ([2, 3, 4, 5, 6], 2), ([4, 5, 6, 7, 8], 2),
                                         ([6, 7, 8, 9, 10], 2), ([7, 8, 9, 10, 11], 1)]
    assert evaluate.windows(t, 11, 11) == evaluate.windows(t, 50, 50) == [(t, 11)]


WIKI = ''' 
 = Lobster = 
 
 The lobster 's claw is 1 @,@ 000 years old , and " blue " . 
 
 = = Habitat = = 
 
 It lives ( mostly ) at 5 @.@ 5 ° N = = . 
 
 = Valkyria 3 = 
 
 A game – well @-@ known . 
'''
PAGES = [''' = Lobster = 
 
 The lobster 's claw is 1 @,@ 000 years old , and " blue " . 
 
 = = Habitat = = 
 
 It lives ( mostly ) at 5 @.@ 5 ° N = = . 
 ''', ''' = Valkyria 3 = 
 
 A game – well @-@ known . 
''']
READ = [' = Lobster =\n\nThe lobster\'s claw is 1,000 years old, and "blue".\n\n== Habitat ==\n\n'
        'It lives (mostly) at 5.5°N ==.\n', ' = Valkyria 3 =\n\nA game – well-known.\n']


@pytest.mark.parametrize('block_size, stride', [(1000, 0), (30, 0), (30, 7)])
def test_wikitext(block_size, stride):
    """A bigram model's score is the same whatever the windows: every token is scored once, after the one before it."""
    model = Bigram(block_size)
    figures = figures_of('wikitext', model, WIKI, stride=stride)
    nats = -sum(model.log_p(text, [EOT]) for text in READ)
    words = sum(len(re.split(r'\s+', page)) for page in PAGES)
    assert figures['word_perplexity'] == pytest.approx(math.exp(nats / words), rel=1e-4)
    assert figures['token_perplexity'] == pytest.approx(math.exp(nats / sum(len(t.encode()) for t in READ)), rel=1e-4)
    assert figures['bits_per_byte'] == pytest.approx(nats / math.log(2) / sum(len(p.encode()) for p in PAGES), rel=1e-4)
    assert figures['items'] == 2
    assert evaluate.articles(WIKI) == PAGES


def test_lambada():
    model = Bigram()
    texts = ['the cat dog', 'of  two spaces dot', 'é dog']
    lines = '\n'.join(json.dumps({'text': t}, ensure_ascii=False) for t in texts) + '\n\n'
    figures = figures_of('lambada', model, lines)
    words = [model.log_p(' dog', b't'), model.log_p(' dot', b's'), model.log_p(' dog', 'é'.encode()[-1:])]
    assert figures['perplexity'] == pytest.approx(math.exp(-sum(words) / 3), rel=1e-4) and figures['items'] == 3
    model.W[:, 0] = 8                                   # what it says, but for these:
    for a, b in 't ', 's ', ' d', 'do', 'og':
        model.W[ord(a), ord(b)] = 9
    assert figures_of('lambada', model, lines)['accuracy'] == pytest.approx(1 / 3)
    assert figures_of('lambada', model, lines.split('\n')[0])['accuracy'] == 1


def test_hellaswag():
    model, items, right, right_norm = Bigram(), [], 0, 0
    endings = ['saws [step] it.', 'eats a very long dinner with his friends and a dog.', 'x', 'goes  home']
    context = 'Roof repair: A man is up. He'
    clean = ['saws it.', 'eats a very long dinner with his friends and a dog.', 'x', 'goes home']
    log_p = [model.log_p(' ' + e, context[-1].encode()) for e in clean]
    norm = [p / len(e) for p, e in zip(log_p, clean)]
    for label in range(4):
        items.append({'activity_label': 'Roof repair', 'ctx_a': 'A man is up.', 'ctx_b': 'he', 'endings': endings,
                      'label': str(label)})
        right += log_p[label] == max(log_p)
        right_norm += norm[label] == max(norm)
    for item in items:
        only = figures_of('hellaswag', model, json.dumps(item))
        label = int(item['label'])
        assert only == {'accuracy': log_p[label] == max(log_p), 'accuracy_norm': norm[label] == max(norm), 'items': 1}
    assert log_p.index(max(log_p)) != norm.index(max(norm))         # else this tells nothing
    assert evaluate.questions(json.dumps(items[3])) == [(context, clean, 3)]
    assert evaluate.clean(' How to [title] cook [substeps] rice ') == 'How to. cook rice'


def test_passkey():
    for length, depth in [(400, 0), (400, 0.5), (400, 1), (700, 0.25)]:
        tokens, n = evaluate.passkey_item(BYTES, length, depth, 12345)
        text = bytes(tokens).decode()
        assert len(tokens) == length and text.endswith('The pass key is 12345') and n == len(' 12345')
        assert text.count('12345') == 3 and text.startswith('There is an important info')
        before = text.index('\nThe pass key is 12345.') - len(evaluate.INTRO)
        filler = length - len(evaluate.INTRO + evaluate.KEY.format(12345) + evaluate.QUESTION + ' 12345')
        assert before == round(depth * filler)
        assert (' The grass is green.' in text) == (filler > 20)
    assert evaluate.passkey_item(BYTES, 250, 0, 12345) is None


def test_passkey_cells(monkeypatch):
    s = subject(Bigram(block_size=800), depths='0,1', passkeys=4)
    seen = []

    def score(self, requests):      # right where the key is in the second half of the text
        seen.extend(requests)
        return [(0.0, bytes(tokens).index(b'Remember it') > len(tokens) / 2) for tokens, _ in requests]
    monkeypatch.setattr(evaluate.Subject, 'score', score)
    figures = evaluate.passkey(s, None, s.cfg)
    assert figures == {'400 tokens, depth 0%': 0, '400 tokens, depth 100%': 1, '800 tokens, depth 0%': 0,
                       '800 tokens, depth 100%': 1, 'accuracy': 0.5, 'items': 16}    # 200 tokens cannot hold the prompt
    assert len({tuple(tokens) for tokens, _ in seen}) == 16
    with pytest.raises(UserError, match='block_size 100'):
        evaluate.passkey(subject(Bigram(100)), None, s.cfg)


# ----------------------------------------------------------------------------------------------------------------------
# The command

@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    def run(*args):
        monkeypatch.setattr(sys, 'argv', ['evaluate.py', f'--data_dir={tmp_path}', f'--json={tmp_path}/out/e.json',
                                          '--device=cpu', *args])
        try:
            evaluate.main()
        except UserError as e:
            assert '\n' not in str(e)
            return str(e)
        return capfd.readouterr().out
    return run


@pytest.fixture
def files(tmp_path):
    (tmp_path / 'wiki.test.raw').write_text(WIKI)
    (tmp_path / 'lambada_test.jsonl').write_text('{"text": "the cat and the dog"}\n')
    (tmp_path / 'hellaswag_val.jsonl').write_text(json.dumps(
        {'activity_label': 'a', 'ctx_a': 'b', 'ctx_b': 'c', 'endings': list('wxyz'), 'label': 2}) + '\n')


@pytest.fixture
def models(tmp_path):
    """Two checkpoints: selective (with the tokenizer's vocabulary) and standard."""
    for name, selective in ('sel', True), ('std', False):
        model = gpt(block_size=420, selective=selective)
        os.makedirs(tmp_path / name)
        ckpt.save(str(tmp_path / name), {'model': model.state_dict(), 'model_args': vars(model.config),
                                         'tokenizer': 'bytes'})
    return f'--out_dir={tmp_path}/sel,{tmp_path}/std'


def test_side_by_side(run, files, models, tmp_path):
    out = run(models, '--passkeys=2', '--depths=0.5', '--lengths=410', '--budgets=40,60')
    header, *rows = out.splitlines()
    names = [f'{tmp_path}/{name}' for name in ('sel', 'sel @100', 'std', 'std @100')]
    assert re.split(r'\s{2,}', header.strip()) == names
    assert [re.split(r'\s{2,}', row)[0] for row in rows] == [
        'wikitext word_perplexity', 'wikitext token_perplexity', 'wikitext bits_per_byte', 'wikitext items',
        'lambada accuracy', 'lambada perplexity', 'lambada items', 'hellaswag accuracy', 'hellaswag accuracy_norm',
        'hellaswag items', 'passkey 410 tokens, depth 50%', 'passkey accuracy', 'passkey items']
    written = json.load(open(tmp_path / 'out' / 'e.json'))
    assert [r['name'] for r in written['results']] == names
    assert [r['budgets'] for r in written['results']] == [None, [40, 60], None, [40, 60]]
    bits = [r['tasks']['wikitext']['bits_per_byte'] for r in written['results']]
    assert len(set(bits)) == 4                                                  # the budgets did bite
    assert [f'{b:.4f}' for b in bits] == re.split(r'\s{2,}', rows[2])[1:]
    whole = figures_of('wikitext', ckpt.load_model(str(tmp_path / 'std'))[0], WIKI)
    assert bits[2] == pytest.approx(whole['bits_per_byte'])
    assert 'items' in (out := run(models, '--tasks=wikitext', '--limit=1')) and out.splitlines()[-1].split()[-1] == '1'


def test_mistakes(run, files, models, tmp_path):
    assert "'arc' is unknown" in run(models, '--tasks=wikitext,arc')
    assert 'from 0 to 1' in run(models, '--depths=0,2')
    assert 'numbers with commas' in run(models, '--lengths=4,x')
    assert 'not in the range 1 to' in run(models, '--batch_size=0')
    assert 'sel: 3 budgets for a model of 2 layers' in run(models, '--tasks=lambada', '--budgets=3,4,5')
    assert 'no such folder' in run(f'--out_dir={tmp_path}/nowhere', '--tasks=lambada')
    (tmp_path / 'lambada_test.jsonl').write_text('{"txt": 1}\n')
    assert 'lambada' in (out := run(models, '--tasks=lambada')) and 'is damaged (KeyError' in out
    (tmp_path / 'lambada_test.jsonl').write_text('')
    assert 'is empty' in run(models, '--tasks=lambada')
    os.remove(tmp_path / 'wiki.test.raw')
    out = run(models, '--tasks=wikitext', '--base_url=http://127.0.0.1:1')
    assert 'check the network' in out and f'put wiki.test.raw into {tmp_path}' in out
    assert not (tmp_path / 'out').exists()


def test_wikitext_is_downloaded(run, models, tmp_path):
    name = 'wikitext-2-raw-v1.zip'
    with zipfile.ZipFile(tmp_path / 'x.zip', 'w') as z:
        z.writestr('wikitext-2-raw/wiki.test.raw', WIKI)
        z.writestr('wikitext-2-raw/wiki.train.raw', 'other')
    with Server(('127.0.0.1', 0), Handler) as s:
        s.files = {name: (tmp_path / 'x.zip').read_bytes()}
        s.faults, s.requests, s.ranges, s.delay, s.sent = {}, [], True, 0, 0
        threading.Thread(target=s.serve_forever, args=(0.01,), daemon=True).start()
        assert 'wikitext items' in run(models, '--tasks=wikitext', f'--base_url=http://127.0.0.1:{s.server_port}')
        s.files = {name: b'not a zip'}
        s.shutdown()
    assert (tmp_path / 'wiki.test.raw').read_text() == WIKI
    assert 'wikitext items' in run(models, '--tasks=wikitext', '--base_url=http://127.0.0.1:1')     # once is enough


# ----------------------------------------------------------------------------------------------------------------------
# lm-evaluation-harness, where it is installed (pip install lm-eval[hf]) and the gpt2 vocabulary lies on disk

CACHE = Path(__file__).parent.parent / '../shared/data/tiktoken_cache'


def test_against_the_harness(files, run, tmp_path, monkeypatch):
    """The same tiny GPT-2, the same items, its own task definitions: the same figures."""
    lm_eval = pytest.importorskip('lm_eval')
    if not CACHE.is_dir():
        pytest.skip('no vocabulary')
    for name in 'HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE':
        monkeypatch.setenv(name, '1')
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(CACHE))
    import transformers
    import yaml
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.hellaswag.utils import process_docs
    from lm_eval.tasks.wikitext import preprocess_wikitext as wiki

    os.makedirs(tmp_path / 'vocabulary')
    for file in CACHE.iterdir():        # tiktoken keeps them under hashes
        name = 'vocab.json' if file.read_bytes()[:1] == b'{' else 'merges.txt'
        shutil.copyfile(file, tmp_path / 'vocabulary' / name)
    torch.manual_seed(0)
    tiny = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=24, n_embd=16, n_layer=1, n_head=2))
    for p in tiny.parameters():
        p.data += torch.randn_like(p) * 0.1
    tiny.eval().save_pretrained(tmp_path / 'tiny')
    rng = torch.Generator().manual_seed(0)
    words = 'the a dog cat [title] runs with , friends  in “quotes” and Zürich [step] sleeps 1990 .'.split(' ')
    def some(n):
        return ' '.join(words[i] for i in torch.randint(len(words), (n,), generator=rng))
    (tmp_path / 'lambada_test.jsonl').write_text(''.join(json.dumps({'text': some(n)}) + '\n' for n in (3, 9, 30, 12)))
    (tmp_path / 'hellaswag_val.jsonl').write_text(''.join(json.dumps({
        'activity_label': some(2), 'ctx_a': some(9), 'ctx_b': some(2 * (n % 2)),
        'endings': [some(k + 1) + ' end' for k in range(4)], 'label': n % 4}) + '\n' for n in range(9)))
    (tmp_path / 'pages.jsonl').write_text(''.join(json.dumps({'page': page}) + '\n' for page in PAGES))

    def task(path, file, **functions):
        text = (Path(lm_eval.__file__).parent / 'tasks' / path).read_text()
        config = yaml.safe_load(re.sub(r'!function \S+', 'x', text)) | functions
        for key in 'training_split', 'validation_split', 'dataset_name':
            config.pop(key, None)
        return config | {'dataset_path': 'json', 'dataset_kwargs': {'data_files': {'test': str(tmp_path / file)}},
                         'test_split': 'test', 'should_decontaminate': False}
    tokenizer = transformers.GPT2Tokenizer.from_pretrained(tmp_path / 'vocabulary')
    lm = HFLM(pretrained=tiny, tokenizer=tokenizer, batch_size=3, max_length=24)
    theirs = lm_eval.simple_evaluate(lm, bootstrap_iters=0, tasks=[
        task('lambada/lambada_openai.yaml', 'lambada_test.jsonl'),
        task('hellaswag/hellaswag.yaml', 'hellaswag_val.jsonl', process_docs=process_docs),
        task('wikitext/wikitext.yaml', 'pages.jsonl', doc_to_target=wiki.wikitext_detokenizer,
             process_results=wiki.process_results)])['results']
    run(f'--out_dir={tmp_path}/tiny', '--tasks=wikitext,lambada,hellaswag')
    ours = json.load(open(tmp_path / 'out' / 'e.json'))['results'][0]['tasks']
    for task, figure, their_task, their_figure in [
            ('wikitext', 'word_perplexity', 'wikitext', 'word_perplexity'),
            ('wikitext', 'bits_per_byte', 'wikitext', 'bits_per_byte'),
            ('lambada', 'perplexity', 'lambada_openai', 'perplexity'), ('lambada', 'accuracy', 'lambada_openai', 'acc'),
            ('hellaswag', 'accuracy', 'hellaswag', 'acc'), ('hellaswag', 'accuracy_norm', 'hellaswag', 'acc_norm')]:
        assert ours[task][figure] == pytest.approx(theirs[their_task][their_figure + ',none'], rel=1e-5), (task, figure)
