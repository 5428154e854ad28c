"""Tests of model.py. The papers' equations, written out with full T x T matrices in float64, are
the oracle.

Run with: python -m pytest
"""

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as fn

import model as m
from model import GPT, GPTConfig, KVCache

torch.set_num_threads(1)  # these tensors are tiny: threads would wait for each other, no more
BOTH = [False, True]
FLAGS = []
for values in itertools.product(BOTH, ['', 'qv', 'k', 'qkv'], BOTH, BOTH):
    FLAGS.append(dict(zip(['selective', 'ssa', 'rope', 'qk_norm'], values)))
SHARED = dict(n_head=4, n_embd=16, n_kv_head=2)  # keys and values that two heads read
LLAMA = dict(llama=True, rope=True, rope_base=50.0, n_inner=11, tied=False, **SHARED)
FLAGS += [
    dict(selective=False, **LLAMA),
    dict(selective=True, voter=3, **LLAMA),
    dict(selective=True, voter=3, ssa='qkv', ssa_sharing=False, qk_norm=True, **LLAMA),
    dict(selective=True, voter=4, vote_scale=True, ssa='qv', **SHARED),
    dict(selective=True, voter=2, bias=True),
    dict(selective=True, llama=True, bias=True, ssa='qkv', **SHARED),
    dict(selective=True, ssa='qkv', bias=True, ssa_sharing=False),
    dict(selective=True, ssa='qv', bias=True, vote_scale=True, gelu='tanh'),
    dict(selective=False, n_inner=5, tied=False, n_kv_head=1),
]
every_flag = pytest.mark.parametrize('flags', FLAGS, ids=str)
TINY = dict(block_size=24, vocab_size=17, n_layer=2, n_head=2, n_embd=8)


def make(seed=0, dtype=torch.float64, spread=0.5, **config):
    """A small model in float64 whose weights are large enough for every term of the equations to
    matter."""
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(**{**TINY, **config})).to(dtype).eval()
    with torch.no_grad():
        for p in gpt.parameters():
            p.add_(torch.randn_like(p) * (spread if p.dim() == 2 else 0.1))
    return gpt


def tokens(B, T, seed=1, vocab_size=TINY['vocab_size']):
    return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------------
# The oracle


class Rule:
    """How votes are made of logits; they add up as model.py says."""

    accumulate = m.CausalSelfAttention.accumulate

    def __init__(self, vote, masks=True):
        self.vote = vote
        self.masks = masks

    def make_cache(self, B, K, policy, **config):
        config = GPTConfig(**SHARED, **config)
        return m.LayerCache(config, B, K, policy, 'cpu', torch.float64)


def naive_logits(q, k):
    """L (B, H, T, T); of the heads of k each serves as many of q, which lie side by side."""
    return torch.einsum('bhid,bhjd->bhij', q, naive_repeat(k, q)) / math.sqrt(q.size(3))


def naive_repeat(x, q):
    H = q.size(1)
    return x[:, [h * x.size(1) // H for h in range(H)]]


def naive_F(votes):
    """F (B, T, T) from votes (B, T, T), row by row as the paper has it."""
    S = votes.tril(-1)  # nobody masks itself or the future
    S[:, :, 0] = 0
    return torch.stack([S[:, :i].sum(dim=1) for i in range(S.size(1))], dim=1)


def naive_attention(q, k, v, F):
    """y (B, H, T, D)."""
    T = q.size(2)
    seen = torch.ones(T, T).tril().bool()
    L = (naive_logits(q, k) - F[:, None]).masked_fill(~seen, -math.inf)
    return L.softmax(-1) @ naive_repeat(v, q)


def naive_rotate(x, base):
    """x (B, T, H, D): channels c and c + D/2 are a complex number, turned by n * base^(-2c/D) at
    position n."""
    T, D = x.size(1), x.size(3)
    z = torch.complex(x[..., : D // 2], x[..., D // 2 :])
    turn = torch.tensor(
        [[n / base ** (2 * c / D) for c in range(D // 2)] for n in range(T)], dtype=torch.float64
    )
    z = z * torch.exp(1j * turn)[:, None]
    return torch.cat([z.real, z.imag], dim=-1)


def naive_rms(x, gain):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * gain


def naive_gpt(gpt, idx):
    """Logits (B, T, V), and F and foresight_loss of each layer, from the parameters alone."""
    p = dict(gpt.named_parameters())
    c = gpt.config
    (B, T), D = idx.shape, c.n_embd // c.n_head

    def linear(x, name):
        return fn.linear(x, p[name + '.weight'], p.get(name + '.bias'))

    def norm(x, name):
        if c.llama:
            return naive_rms(x, p[name + '.weight'])
        return fn.layer_norm(x, x.shape[-1:], p[name + '.weight'], p.get(name + '.bias'))

    n = torch.arange(1, T + 1, dtype=torch.float64)[:, None]
    x = p['transformer.wte.weight'][idx]
    if not c.rope:
        x = x + p['transformer.wpe.weight'][:T]
    Fs, losses = [], []
    for l in range(c.n_layer):
        h = f'transformer.h.{l}.'
        z = norm(x, h + 'ln_1')
        qkv = []
        kv = D * (c.n_kv_head or c.n_head)
        for name, flat in zip('qkv', linear(z, h + 'attn.c_attn').split([D * c.n_head, kv, kv], 2)):
            t = flat.view(B, T, -1, D)
            if c.qk_norm and name != 'v':
                t = naive_rms(t, p[h + f'attn.{name}_norm.weight'])
            if c.rope and name != 'v':
                t = naive_rotate(t, c.rope_base)
            if name in c.ssa:
                s = h + f'attn.ssa.{name}.'
                hidden = flat if c.ssa_sharing else linear(z, s + 'hidden')
                temperature = 1 + torch.tanh(fn.gelu(hidden) @ p[s + 'w.weight'].T)  # (B, T, H)
                if name == 'q':
                    temperature = temperature + torch.sigmoid(p[s + 'alpha']) * torch.log(n)
                t = t * temperature[..., None]
            qkv.append(t.transpose(1, 2))
        q, k, v = qkv
        L0 = naive_logits(q, k)[:, 0]
        if c.voter:
            voter = h + 'attn.voter.'
            L0 = linear(z, voter + 'q') @ linear(z, voter + 'k').mT / math.sqrt(c.voter)
        votes = p.get(h + 'attn.vote_scale', 1.0) * fn.relu(L0) * c.selective
        F = naive_F(votes)
        y = naive_attention(q, k, v, F * (not c.voter))
        Fs.append(F)
        losses.append(naive_foresight(F, q, k, v))
        x = x + linear(y.transpose(1, 2).reshape(B, T, -1), h + 'attn.c_proj')
        z = norm(x, h + 'ln_2')
        hidden = linear(z, h + 'mlp.c_fc')
        if c.llama:
            gate = linear(z, h + 'mlp.c_gate')
            hidden = hidden * gate / (1 + torch.exp(-gate))
        else:
            hidden = fn.gelu(hidden, approximate=c.gelu)
        x = x + linear(hidden, h + 'mlp.c_proj')
    head = 'transformer.wte.weight' if c.tied else 'lm_head.weight'
    return norm(x, 'transformer.ln_f') @ p[head].T, Fs, losses


def naive_memory(Fs, tau):
    """The memory requirement, 2410.02703 section 6, as a fraction of the context."""
    total = 0
    for F in Fs:
        B, T, _ = F.shape
        M = torch.stack([i - F[:, i].clamp(max=tau).sum(dim=1) / tau for i in range(T)], dim=1)
        total = total + M.max(dim=1).values
    return total.mean() / (len(Fs) * T)


def naive_foresight(F, q, k, v):
    """The loss of a voter: row by row, whether each token is on the right side of the K-th."""
    B, T, _ = F.shape
    K = T // 16
    hidden = torch.ones(T, T).triu(1).bool()
    P = naive_logits(q, k).masked_fill(hidden, -math.inf).softmax(-1).detach()
    used = P * naive_repeat(v, q).detach().square().sum(dim=3).sqrt()[:, :, None]
    lost, cost = 0.0 * F.sum(), 1e-12
    for b in range(B):
        for i in range(K + 2, T):
            need = used[b, :, i:, 1:i].mean(dim=0).sum(dim=0)
            margin = need - sorted(need, reverse=True)[K]
            above = F[b, i, 1:i] - sorted(F[b, i, 1:i].detach())[K]
            wrong = torch.where(margin > 0, above, -above)
            lost = lost + (margin.abs() * torch.log1p(wrong.exp())).sum()
            cost = cost + margin.abs().sum()
    return lost / cost


def naive_pruned(q, k, v, votes, K, policy='selective', masks=True):
    """Token by token with a list of what is held: y (B, H, T, D), and whether row i holds token j
    (B, T, T)."""
    B, _, T, _ = q.shape
    y = torch.zeros_like(q)
    kept = torch.zeros(B, T, T, dtype=torch.bool)
    L = naive_logits(q, k)
    norms = k.norm(dim=3).mean(dim=1)
    v = naive_repeat(v, q)
    for b in range(B):
        held, F, P = [], torch.zeros(T, dtype=torch.float64), torch.zeros(T, T)
        for i in range(T):
            if len(held) == K:
                scores = [naive_score(policy, K, i, j, F, P, norms[b], held) for j in held[1:]]
                del held[1 + scores.index(max(scores))]
            held.append(i)
            weights = (L[b, :, i, held] - F[held] * masks).softmax(-1)  # (H, held)
            y[b, :, i] = (weights[:, :, None] * v[b, :, held]).sum(dim=1)
            if policy == 'vatp':
                weights = weights * v[b, :, held].abs().sum(dim=2)
            P[i, held] = weights.mean(dim=0).float()
            kept[b, i, held] = True
            F[held[1:-1]] += votes[b, i, held[1:-1]]
    return y, kept


def naive_score(policy, K, i, j, F, P, norms, held):
    """Whether row i, which is yet to be stored, drops j: of the held the highest goes."""
    name, _, sinks = policy.partition(':')
    received = P[j:i, j]  # by the rows that saw it
    if name == 'selective':
        return F[j]
    if name == 'knorm':
        return norms[j]
    if name == 'random':
        return naive_random(i, j)
    if name == 'tova':
        return -received[-1]
    if name == 'streaming' and j < min(int(sinks or 4), K - 1):
        return -math.inf
    if name in ('oldest', 'streaming'):
        return -j
    if j in [*held, i][-(K // 2) :]:
        return -math.inf
    return -received.sum() if name == 'h2o' else -received.mean()


def naive_random(i, j):
    x = i * 1_000_003 + j
    for _ in range(2):
        x = ((x >> 16) ^ x) * 0x45D9F3B & 0xFFFFFFFF
    return x & 0xFFFFFF


# --------------------------------------------------------------------------------------------------
# Attention in blocks of rows


ROWS = functools.partial(m.selective_attention, rows=8)
VOTES = {
    'relu': fn.relu,
    'capped': lambda L0: L0.clamp(0, 0.3),
    'without relu': lambda L0: L0,
    'strong': lambda L0: 9 * fn.relu(L0),
    'by the reader alone': lambda L0: fn.softplus(L0[..., :1]).expand_as(L0),
}


@pytest.mark.parametrize('T', [1, 2, 7, 8, 9, 29])
@pytest.mark.parametrize(
    'attention', [ROWS, m.selective_attention_listing], ids=['rows', 'listing']
)
@pytest.mark.parametrize('memory_tau', [None, 1.0, 0.7])
@pytest.mark.parametrize('vote', VOTES)
def test_selective_attention_and_gradients(T, attention, memory_tau, vote):
    torch.manual_seed(T)
    q, k, v = (torch.randn(3, 2, T, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    y, M = attention(q, k, v, Rule(VOTES[vote]), memory_tau=memory_tau)
    votes = VOTES[vote](naive_logits(q, k)[:, 0])
    F = naive_F(votes)
    expected = naive_attention(q, k, v, F)
    torch.testing.assert_close(y, expected)
    weight, weight_M = torch.randn_like(y), torch.randn(3, T, dtype=torch.float64)
    loss, expected_loss = (y * weight).sum(), (expected * weight).sum()
    if memory_tau is None:
        assert M is None
    else:
        expected_M = torch.arange(T) - (F.clamp(max=memory_tau) / memory_tau).sum(-1)
        torch.testing.assert_close(M, expected_M)
        loss = loss + (M * weight_M).sum()
        expected_loss = expected_loss + (expected_M * weight_M).sum()
    got = torch.autograd.grad(loss, (q, k, v))
    torch.testing.assert_close(got, torch.autograd.grad(expected_loss, (q, k, v)))


def test_dropout_of_probabilities():
    q, k, v = torch.randn(3, 1, 1, 64, 8).unbind()
    v = torch.ones_like(v)  # without dropout every output is 1
    y, _ = m.selective_attention(q, k, v, Rule(fn.relu), dropout=0.5)
    assert y.std() > 0.1 and abs(y.mean() - 1) < 0.3


# --------------------------------------------------------------------------------------------------
# The model


@every_flag
@pytest.mark.parametrize('T', [1, 24])
def test_logits_loss_and_gradients(flags, T):
    gpt = make(**flags)
    idx, targets = tokens(3, T), tokens(3, T, seed=2)
    targets[0, 0] = -1
    logits, loss = gpt(idx, targets)
    expected, _, _ = naive_gpt(gpt, idx)
    torch.testing.assert_close(logits, expected)
    expected_loss = fn.cross_entropy(expected.view(-1, 17), targets.view(-1), ignore_index=-1)
    torch.testing.assert_close(loss, expected_loss)
    params = list(gpt.parameters())
    got = torch.autograd.grad(loss, params, materialize_grads=True)
    want = torch.autograd.grad(expected_loss, params, materialize_grads=True)
    torch.testing.assert_close(got, want)
    for (name, _), grad in zip(gpt.named_parameters(), got):
        votes_only = 'voter' in name or ('vote_scale' in name and flags.get('voter'))
        assert T == 1 or grad.any() != votes_only, name
    last, none = gpt(idx)
    assert none is None
    torch.testing.assert_close(last, expected[:, -1:])


def test_fresh_votes():
    """A fresh layer, whose vote_scale is 0, is standard attention, and learns."""
    idx = tokens(3, 24)
    fresh = GPT(GPTConfig(**TINY, selective=True, vote_scale=True))
    assert all(block.attn.vote_scale == 0 for block in fresh.transformer.h)
    standard = GPT(GPTConfig(**TINY))
    standard.load_state_dict(fresh.state_dict(), strict=False)
    torch.testing.assert_close(fresh(idx, idx)[0], standard(idx, idx)[0])
    fresh(idx, idx)[1].backward()
    assert all(block.attn.vote_scale.grad != 0 for block in fresh.transformer.h)


def test_memory_requirement():
    gpt = make(selective=True, ssa='qv')
    idx = tokens(3, 24)
    logits, loss, memory = gpt(idx, idx, memory_tau=1.0)
    _, Fs, _ = naive_gpt(gpt, idx)
    expected_memory = naive_memory(Fs, 1.0)
    torch.testing.assert_close(memory, expected_memory)
    assert 0 < memory < 1
    got = torch.autograd.grad(memory, gpt.transformer.wte.weight)[0]
    want = torch.autograd.grad(expected_memory, gpt.transformer.wte.weight)[0]
    torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match='selective'):
        make()(idx, idx, memory_tau=1.0)


VOTERS = [flags for flags in FLAGS if flags.get('voter')]


@pytest.mark.parametrize('flags', VOTERS, ids=repr)
@pytest.mark.parametrize('T', [1, 2, 3, 24, 40])
def test_foresight(flags, T):
    """The loss of voters, which moves nothing but voters and vote_scale."""
    gpt = make(block_size=40, **flags)
    idx = tokens(3, T)
    _, _, lost = gpt(idx, idx, memory_tau=1.0)
    expected = torch.stack(naive_gpt(gpt, idx)[2]).mean()
    torch.testing.assert_close(lost, expected)
    params = dict(gpt.named_parameters())
    got = torch.autograd.grad(lost, params.values(), materialize_grads=True)
    voting = {name: p for name, p in params.items() if 'vote' in name}
    want = torch.autograd.grad(expected, voting.values(), materialize_grads=True)
    for name, grad in zip(params, got):
        if name not in voting:
            assert not grad.any(), name
    torch.testing.assert_close([g for n, g in zip(params, got) if n in voting], list(want))
    assert T < 24 or all(grad.any() for grad in want)


@every_flag
def test_causality(flags):
    gpt = make(dtype=torch.float32, block_size=150, **flags)
    idx = tokens(2, 150)
    changed = idx.clone()
    changed[:, 70:] = (changed[:, 70:] + 1) % 17
    before, after = gpt(idx, idx)[0], gpt(changed, idx)[0]
    assert torch.equal(before[:, :70], after[:, :70])
    assert not torch.equal(before[:, 70:], after[:, 70:])


def test_parameters():
    count = lambda **kw: GPT(GPTConfig(**{**TINY, **kw})).num_params()
    assert count(selective=True) == count()
    shape = dict(block_size=1024, vocab_size=50304, n_layer=12, n_head=12, n_embd=768)
    smollm = dict(n_layer=30, n_head=9, n_kv_head=3, n_embd=576, n_inner=1536, vocab_size=49152)
    with torch.device('meta'):
        standard, ssa = count(**shape), count(**shape, ssa='qv')
        assert count(**smollm, llama=True, rope=True) == 134_515_008
    assert standard == 124_373_760
    assert 0 < ssa - standard < 0.005 * standard


def test_fresh_ssa_is_close_to_standard():
    """Within a fraction of a percent, and with alpha at -8 far closer."""
    idx = tokens(4, 24)
    losses = []
    for flags in {}, dict(ssa='qv'), dict(ssa='qv', ssa_alpha=-8):
        torch.manual_seed(0)
        losses.append(GPT(GPTConfig(**TINY, **flags)).double()(idx, idx)[1])
    near, nearer = (abs(loss / losses[0] - 1) for loss in losses[1:])
    assert 0.003 > near > 20 * nearer > 0


NANOGPT = """transformer.wte.weight 17x8, transformer.wpe.weight 24x8, transformer.ln_f.weight 8,
transformer.ln_f.bias 8, lm_head.weight 17x8"""
NANOGPT_LAYER = """ln_1.weight 8, ln_1.bias 8, attn.c_attn.weight 24x8, attn.c_attn.bias 24,
attn.c_proj.weight 8x8, attn.c_proj.bias 8, ln_2.weight 8, ln_2.bias 8, mlp.c_fc.weight 32x8,
mlp.c_fc.bias 32, mlp.c_proj.weight 8x32, mlp.c_proj.bias 8"""


def test_nanogpt_state_dict():
    """Names and shapes of nanoGPT's parameters, written out: such a state dict loads."""
    text = NANOGPT
    for l in range(2):
        for entry in NANOGPT_LAYER.split(','):
            text += f', transformer.h.{l}.{entry.strip()}'
    torch.manual_seed(0)
    state = {}
    for entry in text.split(','):
        name, shape = entry.split()
        state[name] = torch.randn([int(n) for n in shape.split('x')], dtype=torch.float64)
    state['lm_head.weight'] = state['transformer.wte.weight']
    gpt = make(bias=True)
    gpt.load_state_dict(state, strict=True)
    idx = tokens(2, 24)
    torch.testing.assert_close(gpt(idx, idx)[0], naive_gpt(gpt, idx)[0])


@pytest.mark.parametrize(
    'wrong, word',
    [
        (dict(n_embd=10, n_head=4), 'n_head'),
        (dict(ssa='qx'), 'ssa'),
        (dict(ssa='qq'), 'ssa'),
        (dict(n_layer=0), 'n_layer'),
        (dict(dropout=1.0), 'dropout'),
        (dict(vote_scale=True), 'vote_scale'),
        (dict(gelu='relu'), 'gelu'),
        (dict(n_kv_head=3), 'n_head 2 is not divisible by n_kv_head 3'),
        (dict(n_kv_head=-1), 'n_kv_head'),
        (dict(n_inner=-1), 'n_inner'),
        (dict(voter=3), 'voter needs selective'),
        (dict(voter=-1, selective=True), 'voter is -1'),
        (dict(rope=True, n_embd=6), 'rope'),
    ],
)
def test_impossible_configs(wrong, word):
    with pytest.raises(ValueError, match=word):
        GPT(GPTConfig(**{**TINY, **wrong}))


# --------------------------------------------------------------------------------------------------
# The KV cache: generation, and context pruning


@pytest.mark.parametrize('selective', [False, True])
@pytest.mark.parametrize('ssa', ['', 'qkv'])
@pytest.mark.parametrize('prompt', [1, 24])
def test_generate(selective, ssa, prompt):
    """Greedy generation is what the full forward would choose; past block_size learned positions
    start anew by half."""
    gpt = make(selective=selective, ssa=ssa)
    idx = tokens(2, prompt)
    out = gpt.generate(idx, 40, temperature=0)
    assert out.shape == (2, prompt + 40) and torch.equal(out[:, :prompt], idx)
    window = idx
    for t in range(prompt, prompt + 40):
        if window.size(1) > 24:
            window = window[:, -12:]
        assert torch.equal(gpt(window)[0][:, -1].argmax(-1), out[:, t])
        window = torch.cat([window, out[:, [t]]], dim=1)


def test_sampling():
    torch.manual_seed(0)
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).expand(4000, 4)
    assert (m.sample(logits, 0, None) == 3).all()
    assert set(m.sample(logits, 1.0, 2).flatten().tolist()) == {2, 3}
    frequencies = m.sample(logits, 2.0, None).flatten().bincount(minlength=4) / 4000
    torch.testing.assert_close(frequencies, (logits[0] / 2).softmax(-1), atol=0.03, rtol=0)
    assert m.sample(logits, 1.0, 100).shape == (4000, 1)


def blocks_of(T, rows, seed):
    """T split into blocks: all of one length, or, where rows is None, of random lengths."""
    if rows is not None:
        return [min(rows, T - t) for t in range(0, T, rows)]
    g, out = torch.Generator().manual_seed(seed), []
    while sum(out) < T:
        out.append(min(int(torch.randint(1, 9, (1,), generator=g)), T - sum(out)))
    return out


@pytest.mark.parametrize('K', [2, 3, 4, 11, 50])
@pytest.mark.parametrize('votes_of', ['head 0', 'a voter', 'nobody'])
@pytest.mark.parametrize('policy', [*m.POLICIES, 'streaming:2'])
def test_pruned_attention_against_the_rules(K, votes_of, policy):
    """Steps, blocks and the parallel form (one block) keep the tokens that the rules keep, and
    attend to them alone. Keys and values have two heads, which four read."""
    if (policy, votes_of) == ('selective', 'nobody'):
        return
    torch.manual_seed(K)
    B, T, D = 1 + K % 3, 40, 4
    q = torch.randn(B, 4, T, D, dtype=torch.float64)
    k, v = torch.randn(2, B, 2, T, D, dtype=torch.float64).unbind()
    voting = ()
    voting_q, voting_k = q, k
    if votes_of == 'a voter':
        voting_q, voting_k = voting = torch.randn(2, B, 1, T, 3, dtype=torch.float64).unbind()
    voting_q[:2, 0].abs_()
    voting_k[:2, 0].abs_()
    voting_k[0, 0, 7:30:9] *= -1  # in the first sequence nobody masks these
    voting_q[1:2, 0] *= -1  # the second never votes: ties go to the oldest
    rule = Rule(fn.relu, masks=not voting)
    votes = naive_logits(voting_q, voting_k)[:, 0].relu() * (votes_of != 'nobody')
    expected, kept = naive_pruned(q, k, v, votes, K, policy, rule.masks)
    for rows in 1, 4, 40, None:
        cache = rule.make_cache(B, K, policy, voter=3)
        t = 0
        for R in blocks_of(T, rows, seed=K):
            i = torch.arange(t, t + R)
            now = slice(t, t + R)
            args = q[:, :, now], k[:, :, now], v[:, :, now], i
            some = [x[:, :, now] for x in voting]
            y = cache.attend(*args, rule if votes_of != 'nobody' else None, some)
            torch.testing.assert_close(y, expected[:, :, now])
            t += R
            for b in range(B):
                held = kept[b, t - 1].nonzero().flatten()
                assert torch.equal(cache.j[b, : cache.n].sort().values, held)
    if policy == 'selective' and K == 11:  # what nobody masks stays; without votes the newest stay
        assert kept[0, -1, [0, 7, 16, 25]].all()
        assert kept[1, -1, [0, *range(30, 40)]].all()


@every_flag
@pytest.mark.parametrize(
    'B, prompt, budgets',
    [(1, 1, None), (2, 7, None), (3, 29, None), (1, 7, [2, 7]), (2, 1, [5, 3]), (3, 29, [30, 4])],
)
def test_generation_agrees_with_the_parallel_form(flags, B, prompt, budgets):
    gpt, idx = make(block_size=30, **flags), tokens(B, 30)
    policy = 'selective' if flags['selective'] else 'oldest'
    parallel, steps = KVCache(gpt, B, budgets, policy), KVCache(gpt, B, budgets, policy)
    logits, _ = gpt(idx, idx, cache=parallel)
    last = m.prefill(gpt, idx[:, :prompt], steps)
    torch.testing.assert_close(last[:, 0], logits[:, prompt - 1])
    for t in range(prompt, 30):
        torch.testing.assert_close(gpt(idx[:, [t]], cache=steps)[0][:, 0], logits[:, t])
    for a, b in zip(parallel.layers, steps.layers):
        assert torch.equal(a.j.sort().values, b.j.sort().values)
    assert torch.allclose(logits, gpt(idx, idx)[0]) == (budgets is None)  # else they did bite


@pytest.mark.parametrize('selective', [False, True])
@pytest.mark.parametrize('budgets', [None, [4, 9]])
def test_rope_counts_on(selective, budgets):
    """A stream of several block_sizes: the memory stays as it is, and the texts are those of the
    parallel form."""
    gpt = make(selective=selective, rope=True, ssa='q')
    policy = 'selective' if selective else 'oldest'
    budgets = budgets or [24, 24]
    cache = KVCache(gpt, 2, budgets, policy)
    before = cache.bytes()
    out = torch.cat(
        [tokens(2, 5), *m.stream(gpt, tokens(2, 5), 85, temperature=0, cache=cache)], dim=1
    )
    assert out.shape == (2, 90) and cache.bytes() == before and int(cache.position) == 89
    logits, _ = gpt(out, out, cache=KVCache(gpt, 2, budgets, policy))  # one block of 90 rows
    assert torch.equal(logits[:, 4:89].argmax(-1), out[:, 5:])
    assert torch.equal(
        gpt.generate(tokens(2, 40), 30, temperature=0, budgets=budgets, policy=policy)[:, :40],
        tokens(2, 40),
    )


def test_cache_size():
    gpt = make(selective=True, dtype=torch.float32, **SHARED)
    small, full = KVCache(gpt, 2, [3, 6]), KVCache(gpt, 2)
    assert small.bytes() * 48 == full.bytes() * 9
    voter = KVCache(make(selective=True, voter=3, dtype=torch.float32, **SHARED), 2, [3, 6])
    assert voter.bytes() == small.bytes() + 2 * 9 * 3 * 4  # three numbers a token and layer
    pointers = [c.k.data_ptr() for c in small.layers]
    gpt(tokens(2, 20), cache=small)
    gpt(tokens(2, 1), cache=small)
    assert pointers == [c.k.data_ptr() for c in small.layers] and small.layers[0].k.shape == (
        2,
        2,
        3,
        4,
    )


@pytest.mark.parametrize(
    'budgets, policy, word',
    [
        ([3], 'selective', '1 budgets'),
        ([1, 5], 'selective', 'budget of 1'),
        ([5, 25], 'oldest', 'budget of 25'),
        ([5, 2.5], 'oldest', '2.5'),
        (4, 'newest', 'newest'),
        (4, 'streaming:x', 'streaming:x'),
        (4, 'tova:4', 'tova:4'),
    ],
)
def test_wrong_budgets(budgets, policy, word):
    with pytest.raises(ValueError, match=word):
        KVCache(make(selective=True), 1, budgets, policy)
    with pytest.raises(ValueError, match='no F'):
        KVCache(make(), 1, 4)


def test_too_long():
    with pytest.raises(ValueError, match='block_size 24'):
        make()(tokens(1, 25))
    cache = KVCache(make(), 1)
    make()(tokens(1, 20), cache=cache)
    with pytest.raises(ValueError, match='25 tokens do not fit into block_size 24'):
        make()(tokens(1, 5), cache=cache)


def test_what_a_gpu_runs():
    """Away from the CPU kernel: torch.compile takes the training forward whole, and autocast's
    bfloat16 is close."""
    gpt = make(selective=True, ssa='qv', dtype=torch.float32, block_size=150, spread=0.1)
    idx = tokens(2, 150)
    loss = gpt(idx, idx)[1]
    expected = torch.autograd.grad(loss, gpt.transformer.wte.weight)[0]
    compiled = torch.compile(gpt, backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(idx, idx)[1], gpt.transformer.wte.weight)[0], expected
    )
    with torch.autocast('cpu', dtype=torch.bfloat16), torch.no_grad():
        assert abs(gpt(idx, idx)[1] - loss) < 0.01
        cache = KVCache(gpt, 2, dtype=torch.bfloat16)
        m.prefill(gpt, idx[:, :149], cache)
        assert cache.layers[0].F.dtype == torch.float32
        close = gpt(idx[:, [149]], cache=cache)[0][:, 0].float()
    torch.testing.assert_close(close, gpt(idx)[0][:, 0], atol=0.05, rtol=0.05)


def test_autocast_gives_attention_one_dtype():
    """Norms and temperatures are float32 under autocast; a kernel gets q, k and v in bfloat16 all
    the same."""
    gpt, seen = make(selective=True, ssa='qkv', rope=True, qk_norm=True, dtype=torch.float32), []
    for block in gpt.transformer.h:
        block.attn.attention = lambda q, k, v, *more: (
            seen.append((q.dtype, k.dtype, v.dtype)) or (v, None)
        )
    with torch.autocast('cpu', dtype=torch.bfloat16):
        gpt(tokens(2, 24))
    assert set(seen) == {(torch.bfloat16,) * 3}


def test_logits_are_not_rounded():
    """F is subtracted from logits in float32, whatever autocast makes of products."""
    q, k = torch.randn(2, 1, 2, 9, 8).bfloat16()
    exact = (q.float() * 8**-0.5) @ k.float().transpose(2, 3)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(m.logits(q, k), exact)
    assert not torch.equal(exact.bfloat16().float(), exact)


@pytest.mark.parametrize(
    'flags, policy',
    [
        (dict(selective=True), 'selective'),
        (dict(selective=True, voter=3, **LLAMA), 'selective'),
        (dict(rope=True), 'h2o_mean'),
    ],
)
def test_decoding_is_one_graph(flags, policy):
    """Once all layers are full, a step has fixed shapes and never looks at a value: torch.compile
    takes it whole, once for all positions."""
    gpt, idx = make(dtype=torch.float32, **flags), tokens(2, 24)
    cache, whole = KVCache(gpt, 2, [4, 9], policy), KVCache(gpt, 2, [4, 9], policy)
    expected, _ = gpt(idx, idx, cache=whole)
    m.prefill(gpt, idx[:, :9], cache)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(lambda new: gpt(new, cache=cache)[0], fullgraph=True, backend=backend)
    with torch.no_grad():
        for t in range(9, 24):
            found = step(idx[:, [t]])[:, 0]
            torch.testing.assert_close(found, expected[:, t], atol=1e-4, rtol=1e-4)
    assert len(graphs) == 1
