"""A fork ends in numbers that are right, or in one line that says why not.

Each test edits model.py as a reader would who tries a variant.
"""

import importlib.util
import json
import re
import sys

import pytest
import torch

import kernels
import model
from conftest import ROOT

TINY = dict(block_size=40, vocab_size=17, n_layer=3, n_head=2, n_embd=16)
LLAMA = dict(llama=True, rope=True, n_kv_head=1, voter=3)
FIELD = "    ssa: str = option(''"
INIT = '        self.vote_scale = None\n'
SUM = '        return torch.cat([F[:, None], S], dim=1).cumsum(dim=1)\n'

# F <- decay * F + S, with a learned factor: a field, a parameter, the recurrence
DECAY = [
    (FIELD, f"    decay: bool = option(False, 'F fades')\n{FIELD}"),
    (
        INIT,
        f"""{INIT}        if config.decay:
            self.decay = nn.Parameter(torch.tensor(0.9))
""",
    ),
    (
        SUM,
        f"""        if not self.config.decay:
            {SUM.strip()}
        rows = [F]
        for row in S.unbind(dim=1):
            rows.append(self.decay * rows[-1] + row)
        return torch.stack(rows, dim=1)
""",
    ),
]
HEAD_0 = ' L[:, 0]'  # in attend and in the listing
TWO_VOTERS = [(HEAD_0, ' L[:, :2].relu().sum(dim=1)')]
TWO_GROUPS = [(HEAD_0, ' L[:, :2]')]
NO_RELU = [('S = L0.relu()', 'S = L0')]
GATE = [(INIT, f'{INIT}        self.gate = nn.Linear(config.n_embd, config.n_embd)\n')]
ONE_QUIET = [
    (
        '        self.transformer.ln_f = ',
        '        self.transformer.h[1].attn.selects = False\n        self.transformer.ln_f = ',
    )
]


def readme():
    with open(f'{ROOT}/README.md', encoding='utf-8') as f:
        return f.read()


def readme_edits():
    """The edits of README's diff, each as the line before it and that line with what is added."""
    edits = []
    for hunk in readme().split('\n@@ ')[1:]:
        before, added, _ = re.match(r'.*\n((?: .*\n)*)((?:\+.*\n)+)((?: .*\n)*)', hunk).groups()
        line = before.splitlines()[-1][1:] + '\n'
        edits.append((line, line + re.sub('^.', '', added, flags=re.M)))
    assert len(edits) == 2
    return edits


def edited(edits):
    """The text of model.py with these edits; an edit may apply in several places."""
    with open(f'{ROOT}/model.py', encoding='utf-8') as f:
        text = f.read()
    for old, new in edits:
        assert old in text, old
        text = text.replace(old, new)
    return text


@pytest.fixture
def fork(tmp_path, monkeypatch):
    """fork(edits): an edited model.py as a module."""

    def fork(edits):
        path = tmp_path / 'forked_model.py'
        path.write_text(edited(edits))
        spec = importlib.util.spec_from_file_location('forked_model', path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, 'forked_model', module)
        spec.loader.exec_module(module)
        return module

    return fork


def make(m, dtype=torch.float64, **more):
    """A small model of a module, whose weights are large enough for all terms to matter."""
    torch.manual_seed(0)
    gpt = m.GPT(m.GPTConfig(**{**TINY, 'selective': True, **more})).to(dtype).eval()
    with torch.no_grad():
        for p in gpt.parameters():
            p.add_(torch.randn_like(p) * (0.5 if p.dim() == 2 else 0.1))
    return gpt


@pytest.mark.parametrize(
    'edits, more',
    [
        ([], LLAMA),
        (readme_edits(), dict(vote_cap=0.02)),
        (DECAY, dict(decay=True, **LLAMA)),
        (NO_RELU, {}),
        (TWO_VOTERS, {}),
        (ONE_QUIET, {}),
        (GATE, {}),
    ],
)
@pytest.mark.parametrize('B', [1, 2, 3])
def test_all_ways_agree(fork, edits, more, B):
    """Blocks and the listing, cached and whole, step by step and in parallel within budgets."""
    m = fork(edits)
    gpt = make(m, **more)
    idx = torch.randint(17, (B, 40))
    whole, loss, memory = gpt(idx, idx, memory_tau=1.0)
    assert memory > 0
    for block in gpt.transformer.h:
        block.attn.attention = m.selective_attention_listing
    by_listing = gpt(idx, idx, memory_tau=1.0)
    torch.testing.assert_close(by_listing, (whole, loss, memory))
    for budgets in None, [5, 9, 3]:
        parallel, steps = m.KVCache(gpt, B, budgets), m.KVCache(gpt, B, budgets)
        expected, _ = gpt(idx, idx, cache=parallel)
        assert torch.allclose(expected, whole) == (budgets is None)
        for t in range(40):
            torch.testing.assert_close(gpt(idx[:, [t]], cache=steps)[0][:, 0], expected[:, t])


@pytest.mark.parametrize(
    'edits, more, kernel',
    [
        ([], {}, True),
        ([], dict(LLAMA, voter=0), True),
        (readme_edits(), dict(vote_cap=0.02), True),
        (GATE, {}, True),
        (ONE_QUIET, {}, True),
        (NO_RELU, {}, True),
        (DECAY, dict(decay=True), False),
        (DECAY, {}, True),
        (TWO_VOTERS, {}, False),
    ],
)
def test_a_kernel_that_cannot_follow_steps_aside(fork, edits, more, kernel):
    gpt = make(fork(edits), torch.float32, **more)
    idx = torch.randint(17, (2, 40))
    expected = gpt(idx, idx)[0]
    line = kernels.install(gpt)
    assert ('gives the numbers of model.py' in line) == kernel, line
    assert kernel or 'it gives other numbers' in line
    bound = kernels.tolerance(idx.device, torch.float32) * expected.norm()
    assert (gpt(idx, idx)[0] - expected).norm() < bound
    if not edits:
        kernels.install(gpt, 'listing')
        assert (gpt(idx, idx)[0] - expected).norm() < bound


def test_an_argument_that_a_kernel_ignores(fork):
    """The layer hands its attention one thing more, and a kernel takes it and does nothing with
    it."""
    edits = [
        ('memory_tau=None, rows=128', 'memory_tau=None, rows=128, sharper=1.0'),
        (
            '    B, _, T, _ = q.shape\n    pos',
            '    q = q * sharper\n    B, _, T, _ = q.shape\n    pos',
        ),
        ('rule, dropout, memory_tau)\n', 'rule, dropout, memory_tau, sharper=2.0)\n'),
    ]
    gpt = make(fork(edits), torch.float32)
    from kernels import cpu

    def ignores(*args, sharper=1.0):
        return cpu.selective_attention(*args)

    layer = gpt.transformer.h[0].attn
    cpu_device = torch.device('cpu')
    assert 'other numbers' in kernels.check(ignores, layer, cpu_device, torch.float32)
    assert 'fails here' in kernels.check(cpu.selective_attention, layer, cpu_device, torch.float32)


def test_shapes_that_could_broadcast(fork):
    """Votes of two heads, each meant for its own: nothing is added up to wrong numbers."""
    gpt = make(fork(TWO_GROUPS), torch.float32)
    for B in 1, 2:
        idx = torch.randint(17, (B, 40))
        with pytest.raises((ValueError, RuntimeError)):
            gpt(idx, idx)
        with pytest.raises((ValueError, RuntimeError)):
            gpt.generate(idx[:, :5], 5, budgets=4)
    with pytest.raises(ValueError, match='model.py fails on an example'):
        kernels.install(gpt)


@pytest.mark.parametrize(
    'edits, more', [(GATE, {}), (DECAY, dict(decay=True)), ([], dict(ssa='qv', voter=3))]
)
def test_new_parameters_leave_the_others_as_they_are(fork, edits, more):
    import model

    torch.manual_seed(3)
    standard = model.GPT(model.GPTConfig(**TINY, selective=True))
    m = fork(edits)
    torch.manual_seed(3)
    variant = dict(m.GPT(m.GPTConfig(**TINY, selective=True, **more)).named_parameters())
    for name, p in standard.named_parameters():
        assert torch.equal(p, variant.pop(name)), name
    assert variant
    if edits == DECAY:  # what a module chose stays
        assert all(p == 0.9 for p in variant.values())


# ---- A whole training, in a copy of the repository -----------------------------------------------

TRAIN = (
    'train.py --block_size=32 --n_layer=2 --n_head=2 --n_embd=16 --batch_size=2 --device=cpu '
    '--gradient_accumulation_steps=1 --eval_iters=1 --eval_interval=4 --log_interval=1 '
    '--warmup_iters=2 --learning_rate=0.01 --lr_decay_iters=8 --selective'
).split()
MUON = """        names = [name for name, p in self.named_parameters() if p.requires_grad]
        matrices = [p for p in self.transformer.h.parameters() if p.dim() == 2]
        rest = [p for p in self.parameters() if all(p is not q for q in matrices)]
        muon = torch.optim.Muon([dict(params=matrices, lr=learning_rate, initial_lr=learning_rate)])
        adam = torch.optim.AdamW([dict(params=rest, lr=learning_rate, initial_lr=learning_rate)])
        return [muon, adam]
"""
GROUPS = """        groups = []
        for l, block in enumerate(reversed(self.transformer.h)):
            lr = learning_rate * (l + 1)
            groups.append(dict(params=list(block.parameters()), lr=lr, initial_lr=lr))
        rest = [self.lm_head.weight, *self.transformer.ln_f.parameters()]
        rest += self.transformer.wpe.parameters()
        groups.append(dict(params=rest, lr=learning_rate, initial_lr=learning_rate))
        return [torch.optim.AdamW(groups, betas=betas)]
"""


def losses(path):
    """{step: training loss} of a run."""
    found = {}
    for line in path.read_text().splitlines():
        figures = json.loads(line)
        if 'loss' in figures:
            found[figures['iter']] = figures['loss']
    return found


@pytest.mark.slow
@pytest.mark.parametrize('body', [MUON, GROUPS], ids=['muon', 'groups'])
def test_another_optimizer_resumes_exactly(tree, dataset, body):
    signature = 'self, weight_decay, learning_rate, betas, device_type, ssa_lr=1.0'
    rule = f'    def configure_optimizers({signature}):\n{body}\n'  # the later one counts
    tree('model.py', '    def num_params(', f'{rule}    def num_params(')
    for out_dir, steps in ('whole', [8]), ('parts', [4, 8]):
        for number, step in enumerate(steps):
            resume = ['--init_from=resume'] if number else []
            args = [*TRAIN, dataset, f'--out_dir={out_dir}', f'--max_iters={step}', *resume]
            tree.run(*args)
    whole = losses(tree.path / 'whole' / 'log.jsonl')
    assert len(whole) == 8 and whole == losses(tree.path / 'parts' / 'log.jsonl')


@pytest.mark.slow
def test_parameters_that_a_checkpoint_lacks_are_named(tree, dataset):
    tree.run(*TRAIN, dataset, '--out_dir=old', '--max_iters=4')
    tree('model.py', INIT, INIT + '        self.gate = nn.Parameter(torch.ones(3))\n')
    resume = [*TRAIN, dataset, '--out_dir=old', '--max_iters=8', '--init_from=resume']
    for args in ['sample.py', '--out_dir=old'], resume:
        line = tree.fail(*args)
        assert 'transformer.h.0.attn.gate' in line


@pytest.mark.slow
def test_a_failing_edit_is_one_line(tree, dataset):
    for file_edit in TWO_GROUPS:
        text = (tree.path / 'model.py').read_text()
        (tree.path / 'model.py').write_text(text.replace(*file_edit))
    line = tree.fail(*TRAIN, dataset, '--out_dir=x', '--max_iters=2')
    assert 'model.py fails on an example' in line
    assert not list(tree.path.glob('x/*'))


@pytest.mark.slow
def test_the_page_refuses_votes_that_it_cannot_draw(tree, dataset):
    tree('model.py', *NO_RELU[0])
    tree.run(*TRAIN, dataset, '--out_dir=x', '--max_iters=2')
    line = tree.fail('-m', 'lab.visualize', '--out_dir=x', '--start=line 1: 1')
    assert 'votes' in line


@pytest.mark.slow
def test_an_edit_without_a_flag_is_exported_with_its_code(tree, dataset):
    pytest.importorskip('transformers')
    norm = '        self.ln_1 = make_norm(config)\n'
    tree('model.py', norm, '        self.ln_1 = nn.RMSNorm(config.n_embd)\n')
    args = [arg for arg in TRAIN if arg != '--selective']
    tree.run(*args, dataset, '--out_dir=x', '--max_iters=2')
    tree.run('-m', 'lab.export_hf', '--out_dir=x', '--folder=hf')
    code = """
import torch
from transformers import AutoModelForCausalLM
from support import checkpoint
gpt, _ = checkpoint.load_model('x')
idx = torch.arange(20)[None]
theirs = AutoModelForCausalLM.from_pretrained('./hf', trust_remote_code=True)(idx).logits
torch.testing.assert_close(theirs, gpt(idx, idx)[0])
print(theirs.shape)
"""
    assert '257' in tree.run('-c', code)


def test_a_policy_that_reads_F_needs_votes(monkeypatch):
    policy = type('Newest', (model.Selective,), {})
    monkeypatch.setitem(model.POLICIES, 'newest', policy)
    gpt = model.GPT(model.GPTConfig(8, 17, 1, 2, 16))
    with pytest.raises(ValueError, match='no F to prune by'):
        model.KVCache(gpt, 1, 4, 'newest')
