"""lab/evaluate.py: tasks of lm-evaluation-harness on data made here, against its own `hf` model type and plain sums."""
import functools
import json
import os
import shutil
import sys

import pytest
import torch

import data
import model as m
from lab import evaluate, export_hf
from support import checkpoint as ckpt
from support.settings import UserError

if os.environ.get('CI'):        # there all of these tests must run
    import accelerate
    import lm_eval
    import transformers
else:
    lm_eval = pytest.importorskip('lm_eval')
    transformers = pytest.importorskip('transformers')
    pytest.importorskip('accelerate')
import lm_eval.tasks
from lm_eval.models.huggingface import HFLM

from harness_tasks import make_tasks
from lab.harness import passkey
from lab.harness.model import Model

BYTES = data.get_tokenizer('bytes')
EOT = BYTES.eot_token


def gpt(**changes):
    torch.manual_seed(0)
    config = dict(block_size=64, vocab_size=257, n_layer=2, n_head=2, n_embd=16, bias=True, gelu='tanh')
    made = m.GPT(m.GPTConfig(**{**config, **changes}))
    for p in made.parameters():
        p.data += torch.randn_like(p) * 0.3
    return made.eval()


def save(model, folder, bos=False):
    checkpoint = {'model': model.state_dict(), 'model_args': vars(model.config), 'config': {'bos': bos}, 'iter_num': 9,
                  'dataset': 'x', 'tokenizer': 'bytes', 'val_loss': 2.0, 'val_iter': 9, 'pretrained': None}
    ckpt.save(str(folder), checkpoint)
    return checkpoint


def subject(model, **options):
    return Model('it', model, BYTES, **options)


class Request:
    def __init__(self, *args):
        self.args = args


# ----------------------------------------------------------------------------------------------------------------------
# The harness's own tasks

@pytest.fixture(scope='module')
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tasks')
    return folder, make_tasks(folder)


@pytest.fixture
def run_evaluate(run, tasks, tmp_path, monkeypatch):
    """run_evaluate(out_dir, tasks, …): what it prints, and the results in its JSON."""
    monkeypatch.chdir(tmp_path)

    def call(out_dir, names, *args):
        out = run(evaluate, f'--out_dir={out_dir}', f'--tasks={names}', f'--include_path={tasks[0]}', '--device=cpu',
                  *args)
        path = tmp_path / 'out' / 'evaluate.json'
        return out, json.loads(path.read_text())['results'] if path.exists() else None
    return call


def same(ours, theirs):
    for task, figures in theirs.items():
        for key, value in figures.items():
            if isinstance(value, float):
                assert ours[task][key] == pytest.approx(value, rel=1e-5), (task, key)


def hf_results(lm, folder, names):
    """The same by lm_eval.simple_evaluate and its own model type."""
    manager = lm_eval.tasks.TaskManager(include_path=[str(folder)], include_defaults=False)
    found = lm_eval.simple_evaluate(lm, tasks=names, task_manager=manager, bootstrap_iters=100, log_samples=False)
    return found['results']


@pytest.mark.parametrize('limit', [0, 3])
def test_equal_to_the_harness_s_own_model_type(tasks, tmp_path, run_evaluate, limit):
    folder, names = tasks
    export_hf.export(gpt(), save(gpt(), tmp_path / 'a'), str(tmp_path / 'hf'))
    out, (ours,) = run_evaluate('a', ','.join(names), '--batch_size=3', f'--limit={limit}')
    if limit:
        assert ours['n-samples']['hellaswag'] == {'original': 15, 'effective': 3}
        return
    theirs = hf_results(HFLM(pretrained=str(tmp_path / 'hf'), device='cpu', batch_size=4), folder, names)
    assert set(theirs) == set(names)
    same(ours['results'], theirs)
    figures = [value for task in theirs.values() for key, value in task.items() if key.startswith(('acc,', 'exact'))]
    assert sum(0 < value < 1 for value in figures) >= 5                 # the tasks tell something
    lines = {line.rsplit('  ', 1)[0].strip(): line.rsplit('  ', 1)[1] for line in out.splitlines() if '  ' in line}
    assert lines['arc_easy acc_norm'].startswith(f"{theirs['arc_easy']['acc_norm,none']:.4f} ±0.")
    assert 0 < ours['cut']['hellaswag'] == int(lines['hellaswag: texts that lost their beginning']) < 60
    assert ours['cut']['wikitext'] == 0


def test_equal_with_bos(tasks, tmp_path, run_evaluate):
    """The exported tokenizer puts <|endoftext|> in front of every text; texts that fit are scored alike."""
    model = gpt(block_size=256)
    export_hf.export(model, save(model, tmp_path / 'a', bos=True), str(tmp_path / 'hf'))
    names = ['hellaswag', 'lambada_openai', 'triviaqa']
    _, (ours,) = run_evaluate('a', ','.join(names))
    same(ours['results'], hf_results(HFLM(pretrained=str(tmp_path / 'hf'), device='cpu'), tasks[0], names))
    save(model, tmp_path / 'b')
    assert run_evaluate('b', ','.join(names))[1][0]['results'] != ours['results']


# ----------------------------------------------------------------------------------------------------------------------
# Requests, one text at a time

TEXTS = [('', 'ab'), ('the', ' old man'), ('x' * 70, 'y' * 9), ('a', 'b' * 150), ('over the hill', ' to')]


def alone(model, tokens, n, budgets=None, policy='selective'):
    """Log-probability of the last n tokens, and whether all are the most likely, from one pass over one text."""
    x, y = torch.tensor([tokens[:-1]]), torch.tensor(tokens[-n:])
    with torch.no_grad():
        logits = model(x, x, cache=m.KVCache(model, 1, budgets, policy) if budgets else None)[0][0, -n:]
    log_p = logits.log_softmax(-1)[range(n), y]
    return log_p.sum().item(), torch.equal(logits.argmax(-1), y)


@pytest.mark.parametrize('bos', [False, True])
@pytest.mark.parametrize('selective', [False, True])
@pytest.mark.parametrize('budgets', [None, [5, 9]])
def test_loglikelihood(bos, selective, budgets):
    """In batches as one by one. A long context loses its beginning, a long continuation is scored in pieces."""
    model, policy = gpt(selective=selective), 'selective' if selective else 'oldest'
    requests = [Request(*text) for text in TEXTS]           # spaces between the two belong to the continuation
    ids = list(b'go up')        # a request whose answer is the model's own choice
    own = model.generate(torch.tensor([[EOT] * bos + ids]), 3, temperature=0, budgets=budgets, policy=policy)[0, -3:]
    if max(own) < 128:
        requests.append(Request('go up', bytes(own.tolist()).decode()))
    results = {batch_size: subject(model, bos=bos, budgets=budgets, batch_size=batch_size).loglikelihood(requests)
               for batch_size in (1, 3, 100)}
    for r, request in enumerate(requests):
        context, continuation = (list(text.encode()) for text in request.args)
        text, log_p, greedy = context or [EOT] * (not bos), 0.0, True
        for start in range(0, len(continuation), 64):
            part = continuation[start:start + 64]
            text = text + part
            p, likely = alone(model, [EOT] + text[-64:] if bos else text[-65:], len(part), budgets, policy)
            log_p, greedy = log_p + p, greedy and likely
        for batch_size, answers in results.items():
            assert answers[r] == (pytest.approx(log_p, abs=1e-3), greedy), (request.args, batch_size)
    assert len(requests) == len(TEXTS) or results[1][-1][1]


@pytest.mark.parametrize('bos', [False, True])
def test_rolling(bos):
    """Each token is scored once; the last window reaches back to be full."""
    model, text = gpt(), 'over the hill and far away. ' * 6
    assert len(text) == 168
    t = list(text.encode())
    windows = [[EOT] + t[:64], [EOT] * bos + t[64 - (not bos):128], [EOT] * bos + t[103 + bos:]]
    assert [len(w) for w in windows] == [65, 65, 65]
    expected = sum(alone(model, window, n)[0] for window, n in zip(windows, (64, 64, 40)))
    lm = subject(model, bos=bos, batch_size=2)
    assert lm.loglikelihood_rolling([Request(text), Request('')]) == [pytest.approx(expected, abs=1e-3), 0.0]


@pytest.mark.parametrize('bos', [False, True])
def test_texts_that_lose_their_beginning(bos):
    lm = subject(gpt(), bos=bos)
    for n in range(50, 66):
        request = Request('x' * n, 'yyy')
        request.request_type = 'loglikelihood'
        first = Request('z' + 'x' * (n - 1), 'yyy')
        cut = lm.loses_beginning(request)
        assert cut == (lm.loglikelihood([first]) == lm.loglikelihood([request])) == (n + 2 + bos > 64)


@pytest.mark.parametrize('bos', [False, True])
@pytest.mark.parametrize('budgets', [None, 6])
def test_generate_until(bos, budgets):
    """Texts of equal and different lengths, short and too long, and empty, stopped by a text or by <|endoftext|>."""
    model = gpt(selective=True)
    contexts = ['the old', 'man and', 'x', 'sea ' * 30, '']
    write = lambda settings: subject(model, bos=bos, budgets=budgets, batch_size=2).generate_until(
        [Request(context, settings) for context in contexts])
    texts = write({'until': [], 'max_gen_toks': 20})
    for context, text in zip(contexts, texts):
        ids = ([EOT] * bos + list(context.encode())[-(44 - bos):]) or [EOT]
        new = model.generate(torch.tensor([ids]), 20, temperature=0, budgets=budgets)[0, len(ids):].tolist()
        assert text == BYTES.decode(new[:new.index(EOT)] if EOT in new else new)
    stop = texts[0][5:7]
    assert write({'until': [stop, ''], 'max_gen_toks': 20})[0] == texts[0][:texts[0].index(stop)]
    assert len(write({'until': stop, 'max_gen_toks': 200})) == 5         # more than fits: the window slides
    torch.manual_seed(0)
    assert write({'max_gen_toks': 20, 'do_sample': True, 'temperature': 2.0, 'top_k': 50, 'top_p': 1.0}) != texts
    with pytest.raises(UserError, match='it: .*top_p=0.9'):
        write({'do_sample': True, 'temperature': 1.0, 'top_p': 0.9})


def test_a_text_ends_with_the_end_of_text_token(monkeypatch):
    written = iter([97, 98, EOT, 99, 100])
    monkeypatch.setattr('lab.harness.model.stream', lambda *_, **__: (torch.tensor([[token]]) for token in written))
    assert subject(gpt()).generate_until([Request('x', {'until': []})]) == ['ab'] and list(written) == [99, 100]


def test_a_vocabulary_that_is_too_small():
    with pytest.raises(UserError, match='vocabulary of 100$'):
        subject(gpt(vocab_size=100)).loglikelihood([Request('a', '~')])


def test_passkey(run_evaluate, tmp_path, monkeypatch):
    items = passkey.docs(length=700, keys=3)['test']
    for item in items:
        before = len(item['text'].split('\nThe pass')[0]) - len(passkey.INTRO)
        room = 700 - len(passkey.INTRO + passkey.KEY.format(item['key']) + passkey.QUESTION)
        assert len(item['text']) == 700 and item['text'].count(item['key']) == 2
        assert before == room * item['depth'] // 100 and item['text'].endswith('The pass key is')
    with pytest.raises(ValueError, match='length 240: the prompt alone has 247'):
        passkey.docs(length=240)
    save(gpt(), tmp_path / 'a')

    def found(self, rows, counts):      # the number is known when it is near the end of what is read
        near = [BYTES.decode(row[:-n]).rfind(BYTES.decode(row[-n:])) > len(row) - 120 for row, n in zip(rows, counts)]
        return [-1.0] * len(rows), near
    monkeypatch.setattr(Model, 'score', found)
    save(gpt(block_size=1100), tmp_path / 'b')
    _, (ours,) = run_evaluate('b', 'passkey')
    assert ours['results']['passkey'] == {**ours['results']['passkey'], 'acc,none': 0.2, 'depth_100,none': 1.0,
                                          'depth_0,none': 0.0, 'depth_75,none': 0.0}
    assert ours['n-samples']['passkey'] == {'original': 100, 'effective': 100} and ours['cut'] == {'passkey': 0}
    assert 'lost their beginning' in run_evaluate('a', 'passkey_4000', '--limit=2')[0]


# ----------------------------------------------------------------------------------------------------------------------
# The script

def test_several_models_with_and_without_budgets(run_evaluate, tmp_path):
    one, two = gpt(selective=True), gpt(n_embd=8)
    save(one, tmp_path / 'one'), save(two, tmp_path / 'two')
    (tmp_path / 'one' / 'budgets.json').write_text(json.dumps({
        'budgets': [5, 9], 'policy': 'selective', 'checkpoint': ckpt.fingerprint(one)}))
    out, results = run_evaluate('one,two', 'lambada_openai,piqa')
    assert [r['name'] for r in results] == ['one', 'one @14', 'two'] and results[1]['budgets'] == [5, 9]
    header, *rows = [line for line in out.splitlines() if line.startswith((' ' * 8, 'lambada', 'piqa'))]
    assert header.split()[-1] == 'two' and 'one @14' in header
    assert [row.split()[1] for row in rows[:2]] == ['perplexity', 'acc'] and len(rows) >= 4
    ppl = [r['results']['lambada_openai']['perplexity,none'] for r in results]
    assert len(set(ppl)) == 3 and all(f'{p:.4f}' in rows[0] or f'{p:.4g}' in rows[0] for p in ppl)
    _, results = run_evaluate('two', 'piqa', '--budgets=7')             # local attention
    assert [r['budgets'] for r in results] == [None, [7, 7]]
    for budgets, message in (('1', 'a whole number from 2'), ('4,4,4', '3 budgets for a model of 2 layers'),
                             ('x', 'a file')):
        assert message in run_evaluate('two', 'piqa', f'--budgets={budgets}')[0]


def test_what_fails_leaves_the_rest(run_evaluate, tasks, tmp_path, capfd):
    save(gpt(), tmp_path / 'a'), save(gpt(), tmp_path / 'c')
    (tasks[0] / 'lost.yaml').write_text('task: lost\ndataset_path: nobody/nothing\noutput_type: loglikelihood\n'
                                        'test_split: test\ndoc_to_text: "{{a}}"\ndoc_to_target: "{{b}}"\n')
    try:
        message, results = run_evaluate('a,b,c', 'lost,piqa')
    finally:
        os.remove(tasks[0] / 'lost.yaml')
    printed = capfd.readouterr()
    assert message.startswith('task lost cannot be loaded: ') and 'piqa acc' in printed.out
    assert "; init_from 'b': no such folder" in message
    assert [(r['name'], 'acc,none' in r['results']['piqa']) for r in results] == [('a', True), ('c', True)]
    assert 'no such folder' in run_evaluate('b', 'piqa')[0]


def test_the_first_figures_survive_a_crash(run_evaluate, tmp_path, monkeypatch):
    save(gpt(), tmp_path / 'a'), save(gpt(n_embd=8), tmp_path / 'b')
    score = Model.score
    monkeypatch.setattr(Model, 'score', lambda self, *a: score(self, *a) if self.name == 'a' else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_evaluate('a,b', 'piqa')
    results = json.loads((tmp_path / 'out' / 'evaluate.json').read_text())['results']
    assert results[0]['name'] == 'a' and 'acc,none' in results[0]['results']['piqa']


def test_resume(run_evaluate, tmp_path, monkeypatch):
    """A stopped run computes only what is missing; other weights, other budgets or another model.py start anew."""
    save(gpt(), tmp_path / 'a')
    score, calls = Model.score, []

    def counted(self, rows, counts):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(len(rows))
        return score(self, rows, counts)
    monkeypatch.setattr(Model, 'score', counted)
    with pytest.raises(KeyboardInterrupt):
        run_evaluate('a', 'hellaswag', '--batch_size=10')
    monkeypatch.setattr(Model, 'score', lambda *args: calls.append(len(args[1])) or score(*args))
    _, resumed = run_evaluate('a', 'hellaswag', '--batch_size=10')
    assert sum(calls) == 60 and calls[4:] == [10, 10]
    _, again = run_evaluate('a', 'hellaswag')
    assert sum(calls) == 60 and resumed == again
    assert run_evaluate('a', 'hellaswag', '--answers=')[1] == again and sum(calls) == 120
    run_evaluate('a', 'hellaswag', '--budgets=5')
    assert sum(calls) == 180
    getsource = evaluate.inspect.getsource
    monkeypatch.setattr(evaluate.inspect, 'getsource', lambda what: getsource(what) + '# edited' * (what is m))
    run_evaluate('a', 'hellaswag')
    assert sum(calls) == 240
    other = gpt()
    other.lm_head.weight.data += 0.1
    save(other, tmp_path / 'a')
    run_evaluate('a', 'hellaswag')
    assert sum(calls) == 300


def test_list_and_names(run_evaluate, tasks, monkeypatch):
    manager = lm_eval.tasks.TaskManager
    whole = functools.cache(lambda: manager(include_path=[evaluate.OURS, str(tasks[0])]))       # this takes seconds
    monkeypatch.setattr(lm_eval.tasks, 'TaskManager', lambda include_defaults=True, **options:
                        whole() if include_defaults else manager(include_defaults=False, **options))
    out, results = run_evaluate('a', 'list')
    assert {'passkey', 'passkey_4000', 'arc_easy_3', 'arc_challenge', 'winogrande', 'mmlu'} <= set(out.splitlines())
    assert results is None
    message, _ = run_evaluate('a', 'piqa,arc_chalenge')
    assert message == "--tasks: 'arc_chalenge' is unknown; did you mean 'arc_challenge'?"


def test_settings(run_evaluate, run, tmp_path, monkeypatch):
    save(gpt(), tmp_path / 'a')
    (tmp_path / 'file').write_text('')
    for where in ('--json=file/x.json', '--json=a', '--answers=file/x'):
        message, results = run_evaluate('a', 'piqa', where)
        assert message.startswith('cannot write ') and results is None, message
    assert not [name for name in os.listdir(tmp_path) if name not in ('a', 'file', 'out')]
    assert 'batch_size' in run_evaluate('a', 'piqa', '--batch_size=0')[0]
    assert 'no such folder' in run(evaluate, '--include_path=nowhere')
    shutil.rmtree(tmp_path / 'a')
    monkeypatch.setitem(sys.modules, 'lm_eval', None)
    assert 'pip install lm_eval==0.4.13' in run_evaluate('a', 'piqa')[0]
