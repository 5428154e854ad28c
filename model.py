"""GPT with standard, selective and SSA attention, and a KV cache smaller than the context.

Selective attention: Leviathan, Kalman, Matias, "Selective Attention Improves Transformer",
arXiv 2410.02703. SSA: Zhang, Chang, Li, Roy-Chowdhury, Chen, Oymak, "Selective Attention: Enhancing
Transformer through Principled Context Control", arXiv 2411.12892. Parameters have the names and
shapes of GPT-2 and nanoGPT.

Symbols, as in the papers. Row i is a query, column j a key, h a head.

    L[h,i,j]    logits of attention, q[h,i].k[h,j] / sqrt(D)
    S[i,j]      vote of token i to mask token j for all later rows, made from L[0]
    F[i,j]      sum of S[r,j] over r < i: how much the rows before i have masked token j
    P[h,i,j]    attention weights, softmax over j of L[h,i,j] - F[i,j]
    M[i]        memory requirement: how many tokens row i still needs
    K           budget: how many tokens a layer may keep
    τ[h,n]      SSA's temperatures of head h at position n; the threshold τ of M is `memory_tau`

Shapes: B batch, T tokens, C = n_embd channels, H heads, D = C/H channels of a head, V vocabulary;
R rows of a block, N columns that they may look at. Outside attention, `pos` is a token's position.
"""

import math
import re
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as fn  # not F, which is the sum of votes


def option(default, help, **limits):
    """A field with its help text and limits, which train.py's --help shows and settings enforce."""
    return field(default=default, metadata={'help': help, **limits})


@dataclass
class GPTConfig:
    block_size: int = option(1024, 'context length in tokens')
    vocab_size: int = option(50304, "GPT-2's 50257, padded for speed")
    n_layer: int = option(12, 'transformer blocks', high=1000)
    n_head: int = option(12, 'attention heads in each')
    n_embd: int = option(768, 'channels; a multiple of n_head')
    dropout: float = option(0.0, 'probability; 0.1 and up for fine-tuning')
    bias: bool = option(False, 'biases in linear layers and layer norms, as GPT-2 has them')
    llama: bool = option(False, 'RMSNorm and SwiGLU, as in Llama; False: LayerNorm and GELU')
    n_kv_head: int = option(0, 'heads of keys and values; 0: n_head')
    n_inner: int = option(0, 'channels inside an MLP; 0: 4 * n_embd')
    tied: bool = option(True, 'the output layer shares weights with the token embedding')
    rope: bool = option(False, 'rotary positions on q and k; False: learned position embeddings')
    rope_base: float = option(10000.0, 'rope: the base of its angles', low=1)
    qk_norm: bool = option(False, 'q and k are RMS-normalised per head, with a learned gain')
    selective: bool = option(False, 'selective attention (2410.02703): tokens mask earlier tokens')
    vote_scale: bool = option(False, "selective: a learned factor on each layer's votes, from 0")
    voter: int = option(0, 'selective: channels of a voter, which only evicts; 0: head 0 votes')
    ssa: str = option('', "SSA (2411.12892): which of q, k, v get a temperature; the paper's: 'qv'")
    ssa_sharing: bool = option(True, 'temperatures read q, k, v; False: their own hidden layer')
    ssa_alpha: float = option(-4.0, 'initial α; use -8 in a trained model', low=-100, high=100)
    gelu: str = option('none', "GELU: exact, or GPT-2's by tanh", choices=('none', 'tanh'))

    @property
    def head_size(self):
        return self.n_embd // self.n_head

    @property
    def kv_heads(self):
        return self.n_kv_head or self.n_head

    @property
    def learned_positions(self):
        """Whether positions are embeddings, which end at block_size."""
        return not self.rope


# ---- Selective attention, 2410.02703 section 3 ---------------------------------------------------
# The selection rule is the attention layer itself, passed as `rule`: rule.vote turns logits into
# votes, and rule.accumulate adds them up. See CausalSelfAttention.


def selective_attention_listing(q, k, v, rule, dropout=0.0, memory_tau=None):
    """The paper's listing, with T x T tensors. See `selective_attention` for less memory."""
    B, H, T, D = q.shape
    i = torch.arange(T, device=q.device)[:, None]  # (T, 1)
    j = i.T  # (1, T)
    L = logits(q, k)  # (B, H, T, T)
    S = votes(rule, L[:, 0], i, j)  # (B, T, T)
    F = rule.accumulate(L.new_zeros(B, T), S)[:, :-1]  # (B, T, T) a vote acts on later rows
    P = (L - F[:, None]).masked_fill(j > i, -math.inf).softmax(dim=-1)  # all heads read the same F
    P = fn.dropout(P, dropout, training=dropout > 0)
    y = weighted_sum(P, v)
    if memory_tau is None:
        return y, None
    return y, memory_requirement(F, i[:, 0], memory_tau)


def attend(q, k, v, F, i, j, rule=None, forget=None, dropout=0.0, voting=()):
    """One block of rows: the core of training, prefill (many rows) and decoding (one row).

    q (B, H, R, D): queries of the tokens at positions i (R,).
    k, v (B, H, N, D): keys and values of the tokens at positions j (B or 1, N), in any order. They
        may have fewer heads, each of which then serves as many heads of q (arXiv 2305.13245).
    F (B, N): how much the rows before this block have masked each column.
    rule: the layer whose votes mask tokens. None: standard attention, which leaves F as it is. With
        rule.masks False the votes are added up for eviction alone.
    forget: (F of each row (B, R, N), i, j) -> which columns each row has lost (B, R, N).
    voting: queries (B, 1, R, W) and keys (B, 1, N, W) of a Voter, which votes in place of head 0.

    Returns y (B, H, R, D); F (B, R+1, N) for each row and, last, for the row after the block; which
    columns are hidden from each row (B or 1, R, N); and the attention weights P (B, H, R, N).
    """
    i = i[:, None]  # (R, 1)
    j = j[:, None, :]  # (B or 1, 1, N)
    L = logits(q, k)  # (B, H, R, N)
    if rule is None:
        F = F[:, None].expand(-1, len(i) + 1, -1)  # (B, R+1, N)
    else:
        L0 = L[:, 0]
        if voting:
            L0 = logits(*voting)[:, 0]
        S = votes(rule, L0, i, j)  # (B, R, N)
        F = rule.accumulate(F, S)  # (B, R+1, N)
        expect_shape('accumulate(F, S)', F, (len(S), len(i) + 1, S.size(2)))
    hidden = j > i  # nobody sees the future
    if forget is not None:
        hidden = hidden | forget(F[:, :-1], i, j)
    if rule and rule.masks:
        L = L - F[:, None, :-1]  # all heads read the same F
    P = L.masked_fill(hidden[:, None], -math.inf).softmax(dim=-1)
    P = fn.dropout(P, dropout, training=dropout > 0)
    return weighted_sum(P, v), F, hidden, P


def selective_attention(q, k, v, rule, dropout=0.0, memory_tau=None, rows=128):
    """Causal selective attention in blocks of rows: F is a state, carried down the rows.

    No T x T tensor is built, and blocks end at the diagonal, so the upper triangle is never
    computed. F only grows, so what is masked beyond recovery stays so, and need not be computed
    again:

        P[h,i,j] <= exp(|q[h,i]| |k[h,j]| / sqrt(D) - F[i,j] - L[h,i,i])

    as a row never masks itself, and its own logit L[h,i,i] bounds the softmax's denominator. Once
    this is below rounding for all heads and all later rows, column j is dead. kernels/cpu.py drops
    dead columns; here they are kept.

    q, k, v (B, H, T, D); rule: see `attend`. Returns y (B, H, T, D), and M (B, T) if memory_tau is
    given, else None.
    """
    B, _, T, _ = q.shape
    pos = torch.arange(T, device=q.device)
    F = q.new_zeros(B, 0, dtype=F_dtype(q.dtype))
    ys, Ms = [], []
    for a in range(0, T, rows):
        b = min(a + rows, T)
        F = fn.pad(F, (0, b - a))  # (B, b) nobody has voted on the new columns yet
        block = q[:, :, a:b], k[:, :, :b], v[:, :, :b]
        y, F, _, _ = attend(*block, F, pos[a:b], pos[None, :b], rule, dropout=dropout)
        ys.append(y)
        if memory_tau is not None:
            Ms.append(memory_requirement(F[:, :-1], pos[a:b], memory_tau))
        F = F[:, -1]
    y = torch.cat(ys, dim=2)
    if memory_tau is None:
        return y, None
    return y, torch.cat(Ms, dim=1)


def logits(q, k):
    """L (B, H, R, N) = q.k / sqrt(D), in the dtype of F, which is subtracted from it."""
    B, H, R, D = q.shape
    dtype = F_dtype(q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        q = q.to(dtype) * D**-0.5
        q = q.reshape(B, k.size(1), -1, D)  # queries that share a key head lie side by side
        return (q @ k.to(dtype).transpose(-2, -1)).view(B, H, R, -1)


def weighted_sum(P, v):
    """y (B, H, R, D) = P v, of P (B, H, R, N) and v (B, H or fewer, N, D)."""
    B, H, R, N = P.shape
    P = P.to(v.dtype).reshape(B, v.size(1), -1, N)
    return (P @ v).view(B, H, R, -1)


def votes(rule, L0, i, j):
    """S (B, R, N): votes on tokens before the row, but not on token 0 (BOS)."""
    S = rule.vote(L0)
    expect_shape('vote(L0)', S, L0.shape)
    return torch.where((0 < j) & (j < i), S, 0.0)


def expect_shape(name, x, shape):
    """Raise ValueError if x has another shape, as broadcasting it could give wrong numbers."""
    if x.shape != shape:
        raise ValueError(f'{name} has the shape {tuple(x.shape)}, it must be {tuple(shape)}')


def F_dtype(dtype):
    """The dtype of F, a running sum: float32, whatever autocast makes of q; float64 if q is."""
    return torch.promote_types(dtype, torch.float32)


def memory_requirement(F, i, memory_tau):
    """M[i] = i - sum over j of min(F[i,j], τ) / τ: how many earlier tokens row i still needs.

    2410.02703 section 6. F (B, R, N), i (R,) -> M (B, R). memory_tau is the paper's τ, the F at
    which a token counts as masked.
    """
    return i - (F.clamp(max=memory_tau) / memory_tau).sum(dim=-1)


def foresight_loss(voting_q, voting_k, q, k, v, rule):
    """How badly the votes of a layer foretell which tokens its attention needs. Ours.

    need[i,j] is the sum of P[r,j] |v[j]| over the rows r from i on, and the mean over heads. With a
    budget of K = T/16, row i keeps the K tokens with the smallest F, and should keep those with the
    largest need. A logistic loss says whether a token is on its side of the first that goes, and
    counts as much as its need differs from that of the first that should.

    voting_q, voting_k (B, 1, T, W): see Voter; q, k, v (B, H, T, D), which get no gradient; rule:
    the layer.
    """
    T = q.size(2)
    K = T // 16
    i = torch.arange(T, device=q.device)[:, None]  # (T, 1)
    j = i.T  # (1, T)
    S = votes(rule, logits(voting_q, voting_k)[:, 0], i, j)  # (B, T, T)
    F = rule.accumulate(torch.zeros_like(S[:, 0]), S)[:, :-1]
    P = logits(q, k).detach().masked_fill(j > i, -math.inf).softmax(dim=-1)
    used = (P * v.detach().norm(dim=3)[:, :, None]).mean(dim=1)  # (B, T, T)
    need = used.flip(1).cumsum(dim=1).flip(1)
    stays = (j == 0) | (j >= i)
    least_need = need.masked_fill(stays, -1.0).kthvalue(T - K, keepdim=True).values  # (B, T, 1)
    most_F = F.detach().masked_fill(stays, 1e9).kthvalue(K + 1, keepdim=True).values
    margin = (need - least_need).masked_fill(stays | (i < K + 2), 0.0)  # earlier rows keep all
    cost = margin.abs()
    wrong = cost * fn.softplus((F - most_F) * margin.sign())
    return wrong.sum() / (cost.sum() + 1e-9)


# ---- SSA's temperatures, and rotary positions ----------------------------------------------------


class Temperature(nn.Module):
    """SSA's temperatures of the queries, keys or values of a layer, one per head and token.

        τ[h,n] = 1 + tanh(f(x_n))[h] + σ(α[h]) * log(n)         n = 1, 2, ... the position

    2411.12892 section 3. The tanh is the token-aware part. The last term, the position-aware part,
    is for queries only: later queries see more keys and need a sharper softmax. With weight
    sharing f(x) = w . gelu(W x), where W x are the activations that the layer computes anyway;
    else W is a layer of its own. One temperature per head, rows w of zeros and α = -4 are our
    choice: a fresh layer is close to standard attention. In a trained model α = -8 is closer.
    """

    def __init__(self, config, heads, position_aware):
        super().__init__()
        width = heads * config.head_size
        self.hidden = None
        if not config.ssa_sharing:
            self.hidden = nn.Linear(config.n_embd, width, bias=config.bias)
            nn.init.normal_(self.hidden.weight, std=0.02)
        self.w = nn.Linear(width, heads, bias=False)
        nn.init.zeros_(self.w.weight)
        self.alpha = None
        if position_aware:
            self.alpha = nn.Parameter(torch.full((heads,), float(config.ssa_alpha)))

    def forward(self, x, activations, pos):
        """x (B, T, C): the layer's input; activations (B, T, H*D): its q, k or v; pos (T,).

        Returns τ (B, T, H).
        """
        hidden = activations.contiguous()  # GELU takes half the time on a copy
        if self.hidden is not None:
            hidden = self.hidden(x)
        tau = 1 + torch.tanh(self.w(fn.gelu(hidden)))
        if self.alpha is not None:
            tau = tau + torch.sigmoid(self.alpha) * torch.log(pos + 1.0)[:, None]
        return tau


def rotation(pos, D, base, dtype):
    """Cosine and sine (T, 1, D/2) by which `rotate` turns tokens at positions pos (T,).

    Channels c and c + D/2 of a head are turned by the angle pos * base^(-2c/D).
    """
    channel = torch.arange(0, D, 2, device=pos.device, dtype=dtype)
    angle = pos[:, None].to(dtype) * base ** (-channel / D)  # (T, D/2)
    return angle.cos()[:, None], angle.sin()[:, None]


def rotate(x, turn):
    """Rotary positions (arXiv 2104.09864) of queries or keys x (B, T, H, D); turn: see `rotation`.

    q.k then depends only on the difference of positions.
    """
    cos, sin = turn
    a, b = x.chunk(2, dim=-1)  # (B, T, H, D/2) each
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


# ---- The model -----------------------------------------------------------------------------------


class Voter(nn.Module):
    """Queries and keys that vote in place of head 0. Ours, for models that are already trained.

    A trained head 0 has large logits where it looks, so its votes would mask what it needs. These
    votes mask nothing: they decide what a full cache evicts, and learn by `foresight_loss`.
    """

    def __init__(self, config):
        super().__init__()
        self.q = nn.Linear(config.n_embd, config.voter, bias=False)
        self.k = nn.Linear(config.n_embd, config.voter, bias=False)
        nn.init.normal_(self.q.weight, std=0.02)
        nn.init.normal_(self.k.weight, std=0.02)

    def forward(self, x):
        """Queries and keys (B, 1, T, voter) of the layer's input x (B, T, C).

        Learning to vote does not change the layers before.
        """
        x = x.detach()[:, None]
        return self.q(x), self.k(x)


class CausalSelfAttention(nn.Module):
    """Attention of H heads, standard or selective. SSA scales q, k and v before either."""

    # Computes selective attention without a cache. kernels.install replaces it with a faster
    # function in a layer that gives the same numbers with it.
    attention = staticmethod(selective_attention)

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.selects = config.selective
        self.masks = not config.voter  # False: votes only evict
        C, D = config.n_embd, config.head_size
        self.heads = {'q': config.n_head, 'k': config.kv_heads, 'v': config.kv_heads}
        self.c_attn = nn.Linear(C, sum(self.heads.values()) * D, bias=config.bias)  # q, k, v
        self.c_proj = nn.Linear(C, C, bias=config.bias)
        self.q_norm = nn.Identity()
        self.k_norm = nn.Identity()
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(D, eps=1e-5)
            self.k_norm = nn.RMSNorm(D, eps=1e-5)
        self.ssa = nn.ModuleDict()
        for name in config.ssa:
            self.ssa[name] = Temperature(config, self.heads[name], position_aware=name == 'q')
        self.vote_scale = None
        if config.vote_scale:
            self.vote_scale = nn.Parameter(torch.zeros(()))
        self.voter = None
        if config.voter:
            self.voter = Voter(config)
        self.resid_dropout = nn.Dropout(config.dropout)

    def vote(self, L0):
        """S[i,j] = max(0, L[0,i,j]). Change the rule here; training and the cache both use it.

        L0 (B, R, N): logits of head 0, in float32 or wider. Column 0 is token 0; the others may be
        any tokens, in any order, with empty slots among them. So a vote may depend on its own
        logit and on column 0, on nothing else. Votes on token 0, on the row itself and on the
        future do not count.
        """
        S = L0.relu()
        if self.vote_scale is not None:
            S = S * self.vote_scale.to(S.dtype)
        return S

    def accumulate(self, F, S):
        """F[i,j] = sum of S[r,j] over r < i. This is the other place to change the rule.

        F (B, N): its value before a block of R rows. S (B, R, N): the votes of these rows. Returns
        F for each row and, last, for the row after the block (B, R+1, N): a row's own vote acts
        later.
        """
        return torch.cat([F[:, None], S], dim=1).cumsum(dim=1)

    def make_cache(self, B, K, policy, dtype=None):
        """The memory of B sequences in this layer, of at most K tokens; see LayerCache."""
        w = self.c_attn.weight
        return LayerCache(self.config, B, K, policy, w.device, dtype or w.dtype)

    def forward(self, x, pos, turn=None, cache=None, memory_tau=None):
        """x (B, T, C) at positions pos (T,). Returns y (B, T, C), and M (B, T) with memory_tau.

        In place of M a voter has its foresight_loss. turn: rotary positions, see `rotation`.
        """
        B, T, _ = x.shape
        H, D = self.config.n_head, self.config.head_size
        widths = [heads * D for heads in self.heads.values()]
        q_in, k_in, v_in = self.c_attn(x).split(widths, dim=2)  # (B, T, heads * D) each
        q = self.q_norm(q_in.view(B, T, -1, D))
        k = self.k_norm(k_in.view(B, T, -1, D))
        v = v_in.view(B, T, -1, D)
        if turn is not None:
            q = rotate(q, turn)
            k = rotate(k, turn)
        if 'q' in self.ssa:
            q = q * self.ssa['q'](x, q_in, pos)[..., None]
        if 'k' in self.ssa:
            k = k * self.ssa['k'](x, k_in, pos)[..., None]
        if 'v' in self.ssa:
            v = v * self.ssa['v'](x, v_in, pos)[..., None]
        # under autocast norms and temperatures may be wider; attention has the dtype of c_attn's
        # output
        q = q.to(q_in.dtype).transpose(1, 2)  # (B, H, T, D)
        k = k.to(k_in.dtype).transpose(1, 2)
        v = v.to(v_in.dtype).transpose(1, 2)

        rule = self if self.selects else None
        dropout = self.config.dropout if self.training else 0.0
        if cache is None and self.config.kv_heads < H:  # kernels want as many of k and v as of q
            k = k.repeat_interleave(H // self.config.kv_heads, dim=1)
            v = v.repeat_interleave(H // self.config.kv_heads, dim=1)
        M = None
        if cache is not None:
            voting = ()
            if self.voter:
                voting = self.voter(x)
            y = cache.attend(q, k, v, pos, rule, voting)
        elif self.selects and self.masks:
            y, M = self.attention(q, k, v, rule, dropout, memory_tau)
        else:
            y = fn.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
            if self.voter and memory_tau is not None:
                M = foresight_loss(*self.voter(x), q, k, v, rule)
            elif memory_tau is not None:
                M = pos.to(F_dtype(q.dtype)).expand(B, T)  # without votes a row needs all tokens
        y = y.transpose(1, 2).reshape(B, T, H * D)  # heads side by side
        return self.resid_dropout(self.c_proj(y)), M


class MLP(nn.Module):
    """GPT-2's MLP, or Llama's, in which one more layer gates the hidden channels (SwiGLU)."""

    def __init__(self, config):
        super().__init__()
        width = config.n_inner or 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, width, bias=config.bias)
        self.c_gate = None
        if config.llama:
            self.c_gate = nn.Linear(config.n_embd, width, bias=config.bias)
        self.c_proj = nn.Linear(width, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.gelu = config.gelu

    def forward(self, x):
        hidden = self.c_fc(x)
        if self.c_gate is None:
            hidden = fn.gelu(hidden, approximate=self.gelu)
        else:
            hidden = fn.silu(self.c_gate(x)) * hidden
        return self.dropout(self.c_proj(hidden))


def make_norm(config):
    if config.llama:
        return nn.RMSNorm(config.n_embd, eps=1e-5)
    return nn.LayerNorm(config.n_embd, bias=config.bias)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, pos, turn=None, cache=None, memory_tau=None):
        y, M = self.attn(self.ln_1(x), pos, turn, cache, memory_tau)
        x = x + y
        return x + self.mlp(self.ln_2(x)), M


class GPT(nn.Module):
    """A GPT-2 or Llama whose attention is standard, selective, SSA or both.

    Raises ValueError for a bad config.
    """

    def __init__(self, config):
        super().__init__()
        check_config(config)
        self.config = config
        # Seeded before any layer draws numbers, so that a seed gives models with and without
        # selection, SSA or parameters of a variant the same weights.
        g = torch.Generator().manual_seed(torch.randint(2**31, (1,), device='cpu').item())
        self.transformer = nn.ModuleDict()
        self.transformer.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.learned_positions:
            self.transformer.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.transformer.drop = nn.Dropout(config.dropout)
        self.transformer.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.transformer.ln_f = make_norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.transformer.wte.weight = self.lm_head.weight
        # GPT-2's initialisation of its own parameters; others keep what their module chose
        for name, p in self.named_parameters():
            if not is_gpt2(name):
                continue
            if name.endswith('bias'):
                nn.init.zeros_(p)
            elif name.endswith('c_proj.weight'):  # residual projections
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer), generator=g)
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02, generator=g)

    def forward(self, idx, targets=None, cache=None, memory_tau=None):
        """Logits of the next tokens, and the mean cross-entropy in nats where targets are given.

        idx, targets: int64 (B, T); a target of -1 is ignored. Without targets: logits of the last
        position only, (B, 1, V), and loss None. cache: a KVCache; idx continues the text that it
        holds. memory_tau, with targets and no cache: a third result, the memory requirement as a
        fraction of the context, which training adds to the loss; of voters, their mean
        foresight_loss. Raises ValueError where learned positions end before the tokens do.
        Single-token steps are not checked: reading the position would synchronise the GPU.
        """
        c = self.config
        B, T = idx.shape
        pos = torch.arange(T, device=idx.device)
        end = T
        if cache is not None:
            pos = pos + cache.position
            if T > 1 and c.learned_positions:
                end += int(cache.position)
        if c.learned_positions and end > c.block_size:
            raise ValueError(f'{end} tokens do not fit into block_size {c.block_size}')
        x = self.transformer.wte(idx)  # (B, T, C)
        if c.learned_positions:
            x = x + self.transformer.wpe(pos)
        x = self.transformer.drop(x)
        turn = None
        if c.rope:
            turn = rotation(pos, c.head_size, c.rope_base, F_dtype(self.lm_head.weight.dtype))
        Ms = []
        for l, block in enumerate(self.transformer.h):
            layer_cache = cache.layers[l] if cache is not None else None
            x, M = block(x, pos, turn, layer_cache, memory_tau)
            Ms.append(M)
        x = self.transformer.ln_f(x)
        if cache is not None:
            cache.position += T
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        logits = self.lm_head(x)  # (B, T, V)
        flat = logits.view(-1, logits.size(-1))
        loss = fn.cross_entropy(flat, targets.reshape(-1), ignore_index=-1)
        if memory_tau is None:
            return logits, loss
        if not c.selective:
            raise ValueError('memory_tau needs selective=True: only votes mask tokens')
        if c.voter:
            return logits, loss, torch.stack(Ms).mean()
        # 2410.02703 section 6: the mean over the batch and layers of the largest M of a row, as a
        # fraction of the context
        most = torch.stack([M.max(dim=1).values for M in Ms])  # (n_layer, B)
        return logits, loss, most.mean() / T

    def generate(
        self, idx, max_new_tokens, temperature=1.0, top_k=None, budgets=None, policy='selective'
    ):
        """idx (B, T) followed by max_new_tokens generated tokens: (B, T + max_new_tokens).

        budgets, policy: see KVCache below; the others: see `stream`.
        """
        cache = KVCache(self, len(idx), budgets, policy)
        new = stream(self, idx, max_new_tokens, temperature, top_k, cache)
        return torch.cat([idx, *new], dim=1)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type, ssa_lr=1.0):
        """A list of optimizers: AdamW, which decays matrices and embeddings, not vectors.

        A group's 'initial_lr' is the peak of its schedule. If ssa_lr is not 1, the parameters that
        the methods add (temperatures, voters, vote_scale) get their own group, without decay and
        at ssa_lr * learning_rate.
        """
        params = {}  # (weight decay, learning rate) -> parameters
        for name, p in self.named_parameters():
            if not p.requires_grad:
                continue
            kind = weight_decay, learning_rate
            added = {'ssa', 'voter', 'vote_scale'} & set(name.split('.'))
            if added and ssa_lr != 1:
                kind = 0.0, learning_rate * ssa_lr
            elif p.dim() < 2:
                kind = 0.0, learning_rate
            params.setdefault(kind, []).append(p)
        groups = []
        for (decay, lr), some in params.items():
            groups.append(dict(params=some, weight_decay=decay, lr=lr, initial_lr=lr))
        return [torch.optim.AdamW(groups, betas=betas, fused=device_type == 'cuda')]

    def num_params(self):
        """Number of parameters, embeddings included."""
        return sum(p.numel() for p in self.parameters())


def is_gpt2(name):
    """Whether GPT-2 or Llama has such a parameter. The others belong to a method or a variant."""
    module = name.split('.')[-2]
    return module in 'wte wpe ln_1 c_attn c_proj ln_2 c_fc c_gate ln_f lm_head'.split()


def check_config(config):
    """Raise ValueError, in one line, for a config that no model can have."""
    c = config
    least = dict(
        block_size=1, vocab_size=1, n_layer=1, n_head=1, n_embd=1, n_kv_head=0, n_inner=0, voter=0
    )
    for name, limit in least.items():
        if getattr(c, name) < limit:
            raise ValueError(f'{name} is {getattr(c, name)}; it must be at least {limit}')
    if c.n_embd % c.n_head:
        raise ValueError(f'n_embd {c.n_embd} is not divisible by n_head {c.n_head}')
    if c.n_head % c.kv_heads:
        raise ValueError(f'n_head {c.n_head} is not divisible by n_kv_head {c.n_kv_head}')
    if c.rope and c.head_size % 2:
        raise ValueError('rope turns pairs of channels: n_embd / n_head must be even')
    if not 0 <= c.dropout < 1:
        raise ValueError(f'dropout {c.dropout} is not a probability below 1')
    if set(c.ssa) - set('qkv') or len(set(c.ssa)) < len(c.ssa):
        raise ValueError(f"ssa {c.ssa!r}: letters of 'qkv', each once")
    if (c.vote_scale or c.voter) and not c.selective:
        raise ValueError('vote_scale or voter needs selective=True, which lets tokens vote')
    if c.gelu not in ('none', 'tanh'):
        raise ValueError(f"gelu {c.gelu!r}: it is 'none' or 'tanh'")


# ---- You may stop here ---------------------------------------------------------------------------
# That is all of training. Next, generation with context pruning, 2410.02703 section 5: a layer
# keeps at most K tokens. If K are cached, token i first evicts the one with the largest F. Then it
# is stored with F = 0, attends, and votes. The other policies, which need no votes, are the same
# recurrence with another number A per token in place of F.


class Policy:
    """Which token a full cache of K tokens evicts: the one with the highest score, never token 0.

    A (B, N): a number for each cached token. Heads share the decision.
    """

    needs_P = False  # True: eviction needs every row's weights, so rows are read one by one

    def __init__(self, K):
        self.K = K

    def start(self, k):
        """A of new tokens (B, R), from their keys k (B, H, R, D)."""
        return k.new_zeros(len(k), k.size(2))

    def update(self, A, P, v):
        """A (B, N) after a row with the attention weights P (B, H, N).

        v (B, H or fewer, N, D): the values of the tokens.
        """
        return A

    def score(self, A, F, i, j):
        """Scores, seen from rows i, of tokens at positions j; shapes broadcast to that of F."""
        raise NotImplementedError


class Selective(Policy):
    """Evicts the token with the largest F: 2410.02703 section 5."""

    def score(self, A, F, i, j):
        return F


class Oldest(Policy):
    """Evicts the oldest token except the first `sinks`: StreamingLLM, arXiv 2309.17453.

    The paper renumbers positions inside the cache; here a token keeps its own.
    """

    sinks = 1

    def score(self, A, F, i, j):
        sink = j < min(self.sinks, self.K - 1)
        return (-j).to(F.dtype).masked_fill(sink, -math.inf).expand(F.shape)


class Random(Policy):
    """Evicts a random token, by a hash of row and column, so that all code paths agree."""

    def score(self, A, F, i, j):
        x = i * 1_000_003 + j
        x = ((x >> 16) ^ x) * 0x45D9F3B & 0xFFFFFFFF
        x = ((x >> 16) ^ x) * 0x45D9F3B & 0xFFFFFFFF
        return (x & 0xFFFFFF).to(F.dtype).expand(F.shape)  # 24 bits, which float32 holds exactly


class KNorm(Policy):
    """Evicts the largest |k|: Devoto et al., arXiv 2406.11430, where heads decide separately."""

    def start(self, k):
        return k.norm(dim=-1).mean(dim=1)

    def score(self, A, F, i, j):
        return A.expand(F.shape)


class TOVA(Policy):
    """Evicts the token that the previous row attended to least, maybe its own: arXiv 2401.06104.

    The paper evicts after the row has seen K + 1 tokens; here it is before the row is stored.
    """

    needs_P = True

    def update(self, A, P, v):
        return P.mean(dim=1)

    def score(self, A, F, i, j):
        return -A


class H2O(TOVA):
    """Evicts the token with the least total attention, never the newest K/2: arXiv 2306.14048.

    In the paper each head decides for itself.
    """

    def update(self, A, P, v):
        return A + P.mean(dim=1)

    def score(self, A, F, i, j):
        return (-A).masked_fill(j > i - self.K // 2, -math.inf)


class H2OMean(H2O):
    """As H2O, by the mean over the rows that saw the token: ObservedAttention of kvpress."""

    def score(self, A, F, i, j):
        return super().score(A / (i - j), F, i, j)


class VATP(H2OMean):
    """As H2OMean, with attention times |v|: arXiv 2406.12335, which sums over the rows."""

    def update(self, A, P, v):
        norm = v.abs().sum(dim=3)  # the 1-norm, as in the paper
        norm = norm.repeat_interleave(P.size(1) // v.size(1), dim=1)  # (B, H, N)
        return super().update(A, P * norm, v)


POLICIES = {
    'selective': Selective,
    'oldest': Oldest,
    'random': Random,
    'streaming': Oldest,
    'knorm': KNorm,
    'tova': TOVA,
    'h2o': H2O,
    'h2o_mean': H2OMean,
    'vatp': VATP,
}


def make_policy(name, K):
    """The policy of this name; 'streaming:8' keeps the first 8 tokens, 'streaming' 4."""
    name, _, sinks = name.partition(':')
    policy = POLICIES[name](K)
    if name == 'streaming':
        policy.sinks = int(sinks or 4)
    return policy


class LayerCache:
    """What one layer remembers: K slots of keys, values, F, A and positions, allocated once.

    The first n slots are in use. policy: see POLICIES.
    """

    def __init__(self, config, B, K, policy, device, dtype):
        self.k = torch.zeros(B, config.kv_heads, K, config.head_size, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.voting_k = self.k.new_zeros(B, 1, K, config.voter)  # empty without a voter
        self.F = torch.zeros(B, K, device=device, dtype=F_dtype(dtype))
        self.A = torch.zeros_like(self.F)
        self.j = torch.zeros(B, K, device=device, dtype=torch.long)
        self.n = 0
        self.K = K
        self.policy = make_policy(policy, K)

    def attend(self, q, k, v, i, rule, voting=()):
        """The next tokens, at positions i (R,): q (B, H, R, D), k and v; returns y (B, H, R, D).

        rule: the layer whose votes mask tokens; None: standard attention. voting: queries and keys
        (B, 1, R, W) of a Voter.
        """
        if q.size(2) == 1:
            return self._row(q, k, v, i, rule, voting)
        if not self.policy.needs_P:
            return self._rows(q, k, v, i, rule, voting)
        rows = []
        for r in range(q.size(2)):
            one = slice(r, r + 1)
            row = [x[:, :, one] for x in (q, k, v, *voting)]
            rows.append(self._row(*row[:3], i[one], rule, row[3:]))
        return torch.cat(rows, dim=2)

    def _row(self, q, k, v, i, rule, voting):
        if self.n < self.K:
            b = slice(None)
            slot = self.n
            self.n += 1
        else:
            score = self.score(self.A, self.F, i, self.j)
            worst = score == score.amax(dim=1, keepdim=True)
            slot = self.j.masked_fill(~worst, 2**62).argmin(dim=1)  # (B,) of equals the oldest
            b = torch.arange(len(q), device=i.device)  # every sequence of the batch drops its own
        self.k[b, :, slot] = k[:, :, 0].to(self.k.dtype)  # (B, H, D)
        self.v[b, :, slot] = v[:, :, 0].to(self.v.dtype)
        self.F[b, slot] = 0.0
        self.A[b, slot] = self.policy.start(k)[:, 0].to(self.A.dtype)
        self.j[b, slot] = i
        n = self.n
        if voting:
            voting_q, voting_k = voting
            self.voting_k[b, :, slot] = voting_k[:, :, 0].to(self.k.dtype)
            voting = voting_q, self.voting_k[:, :, :n]
        k, v = self.k[:, :, :n], self.v[:, :, :n]
        y, F, _, P = attend(q, k, v, self.F[:, :n], i, self.j[:, :n], rule, voting=voting)
        self.F[:, :n] = F[:, -1]
        if self.policy.needs_P:
            self.A[:, :n] = self.policy.update(self.A[:, :n], P[:, :, 0], v)
        return y

    def _rows(self, q, k, v, i, rule, voting):
        # A block of R rows attends to the n cached tokens and to itself: n + R columns, in the
        # order of age.
        B, _, R, _ = q.shape
        n = self.n
        age = self.j[:, :n].argsort(dim=1)  # decoding fills slots in any order
        new_A = self.policy.start(k).to(self.A.dtype)
        A = torch.cat([self.A.gather(1, age), new_A], dim=1)  # (B, n+R)
        k = torch.cat([take(self.k, age), k.to(self.k.dtype)], dim=2)  # (B, H, n+R, D)
        v = torch.cat([take(self.v, age), v.to(self.v.dtype)], dim=2)
        j = torch.cat([self.j.gather(1, age), i.expand(B, R)], dim=1)  # (B, n+R)
        F = fn.pad(self.F.gather(1, age), (0, R))  # (B, n+R)
        if voting:
            voting_q, voting_k = voting
            voting_k = torch.cat([take(self.voting_k, age), voting_k.to(self.k.dtype)], dim=2)
            voting = voting_q, voting_k
        forget = partial(self.forget, A)
        y, F, hidden, _ = attend(q, k, v, F, i, j, rule, forget, voting=voting)
        self.n = m = min(n + R, self.K)  # the same number is left in every sequence
        left = hidden[:, -1].int().argsort(dim=1, stable=True)[:, :m]  # (B, m) in the order of age
        self.k[:, :, :m] = take(k, left)
        self.v[:, :, :m] = take(v, left)
        self.j[:, :m] = j.gather(1, left)
        self.A[:, :m] = A.gather(1, left)
        self.F[:, :m] = F[:, -1].gather(1, left)
        if voting:
            self.voting_k[:, :, :m] = take(voting_k, left)
        return y

    def score(self, A, F, i, j):
        """Eviction score of each column, seen from rows i; the highest goes first."""
        score = self.policy.score(A, F, i, j)
        return score.masked_fill(j == 0, -math.inf)  # the first token stays for ever

    @torch.no_grad()
    def forget(self, A, F, i, j):
        """Simulate eviction row by row: which columns each row has lost, (B, R, N).

        A (B, N); F (B, R, N); i (R, 1); j (B, 1, N), sorted by age: the buffer, then the rows' own
        tokens.
        """
        B, R, N = F.shape
        score = self.score(A[:, None], F, i, j).masked_fill(j >= i, -math.inf)
        out = score.new_zeros(B, N)  # -inf where a column was dropped
        dropped_at = torch.full((B, N), R, device=F.device)  # the row that dropped it; R: none
        for r in range(max(0, self.K - (N - R)), R):  # before that the buffer has room
            worst = (score[:, r] + out).argmax(dim=1, keepdim=True)  # of equals the oldest
            out.scatter_(1, worst, -math.inf)
            dropped_at.scatter_(1, worst, r)
        return dropped_at[:, None] <= torch.arange(R, device=F.device)[:, None]


def take(x, columns):
    """x (B, H, N, D), columns (B, M) -> (B, H, M, D)."""
    return x.take_along_dim(columns[:, None, :, None], 2)


class KVCache:
    """The KV cache of one generation: layer l keeps at most budgets[l] tokens.

    budgets: one number for all layers, a list of one for each, or None: block_size. policy: see
    LayerCache. dtype: of keys and values; None: that of the weights (another needs autocast).
    Raises ValueError if they do not fit the model.
    """

    def __init__(self, model, batch_size, budgets=None, policy='selective', dtype=None):
        c = model.config
        self.budgets = check_budgets(c, budgets, policy)
        if policy == 'selective' and not c.selective:
            policy = 'oldest'  # without budgets nothing is dropped
        self.policy = policy
        self.layers = []
        for block, K in zip(model.transformer.h, self.budgets):
            self.layers.append(block.attn.make_cache(batch_size, K, policy, dtype))
        device = model.lm_head.weight.device
        self.position = torch.zeros(1, dtype=torch.long, device=device)  # of the next token

    def bytes(self):
        """Bytes of keys and values, and of F and positions, over all layers."""
        total = 0
        for layer in self.layers:
            for x in layer.k, layer.v, layer.voting_k, layer.F, layer.A, layer.j:
                total += x.nbytes
        return total


def check_budgets(config, budgets, policy='selective'):
    """budgets as a list of one number for each layer; ValueError if they do not fit the model."""
    if policy not in POLICIES and not re.fullmatch('streaming:[0-9]{1,9}', policy):
        raise ValueError(f'policy {policy!r}: it is one of {", ".join(POLICIES)}, or streaming:8')
    if budgets is None:
        return [config.block_size] * config.n_layer
    reads_F = issubclass(POLICIES[policy.partition(':')[0]], Selective)
    if reads_F and not config.selective:
        raise ValueError(
            'a model without selective attention has no F to prune by: '
            'use another policy, such as h2o_mean'
        )
    if isinstance(budgets, int):
        budgets = [budgets] * config.n_layer
    if len(budgets) != config.n_layer:
        raise ValueError(f'{len(budgets)} budgets for a model of {config.n_layer} layers')
    for K in budgets:
        if not isinstance(K, int) or not 2 <= K <= config.block_size:
            raise ValueError(
                f'a budget of {K!r} tokens: a layer keeps a whole number '
                f'from 2 to {config.block_size}'
            )
    return list(budgets)


@torch.no_grad()
def prefill(model, idx, cache, rows=64):
    """Read idx (B, T) into the cache in blocks of rows; logits of the last position (B, 1, V)."""
    for part in idx.split(rows, dim=1):
        logits, _ = model(part, cache=cache)
    return logits


@torch.no_grad()
def stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, cache=None):
    """Yield the next tokens (B, 1), max_new_tokens times, after reading idx (B, T).

    temperature 0 takes the most likely token; top_k keeps the k most likely; cache: a KVCache,
    None: one that keeps block_size tokens. With rope, positions count on past block_size, and the
    cache may hold text already. Learned positions end there and cannot be shifted: a longer prompt
    is cut to its newest block_size tokens, and later the newest half is read anew.
    """
    size = model.config.block_size
    ends = model.config.learned_positions
    if ends:
        idx = idx[:, -size:]
    if cache is None:
        cache = KVCache(model, len(idx))
    new = idx
    seen = int(cache.position)
    for _ in range(max_new_tokens):
        if ends and seen + new.size(1) > size:
            new = idx = idx[:, -max(1, size // 2) :]
            dtype = cache.layers[0].k.dtype
            cache = KVCache(model, len(idx), cache.budgets, cache.policy, dtype)
            seen = 0
        seen += new.size(1)
        logits = prefill(model, new, cache)[:, -1]  # (B, V)
        new = sample(logits, temperature, top_k)
        idx = torch.cat([idx[:, 1 - size :], new], dim=1)
        yield new


def sample(logits, temperature, top_k):
    """Next tokens (B, 1) from logits (B, V)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits - logits.amax(dim=-1, keepdim=True)  # so that the division never gives +inf
    logits = logits.to(F_dtype(logits.dtype)) / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1)
