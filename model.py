"""GPT with standard, selective and SSA attention, and a KV cache that may be smaller than the context.

Selective attention: Leviathan, Kalman, Matias, "Selective Attention Improves Transformer", arXiv 2410.02703.
SSA: Zhang, Chang, Li, Roy-Chowdhury, Chen, Oymak, "Selective Attention: Enhancing Transformer through Principled
Context Control", arXiv 2411.12892. Parameters have the names and shapes of GPT-2 and nanoGPT.

Symbols, as in the papers. Row i is a query, column j a key, h a head.

    L[h,i,j]    logits of attention, q[h,i].k[h,j] / sqrt(D)
    S[i,j]      vote of token i to mask token j for all later rows; made from L[0], so it costs no parameters
    F[i,j]      sum of S[r,j] over r < i: how much the rows before i have masked token j; all heads subtract it
    P[h,i,j]    attention weights, softmax over j of L[h,i,j] - F[i,j]
    M[i]        memory requirement: how many tokens row i still needs
    K           budget: how many tokens a layer may keep
    τ[h,n]      SSA's temperatures of head h at position n; the threshold τ of M is `memory_tau` everywhere

Shapes: B batch, T tokens, C = n_embd channels, H heads, D = C/H channels of a head, V vocabulary; R rows of a block,
N columns that they may look at. Outside attention, `pos` is the position of a token.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as fn        # not F: that is the sum of votes


@dataclass
class GPTConfig:
    # model
    block_size: int = 1024          # context length in tokens [1 to 2**20]
    vocab_size: int = 50304         # GPT-2's 50257, padded to a multiple of 64 for speed [1 to 2**20]
    n_layer: int = 12               # transformer blocks [1 to 1000]
    n_head: int = 12                # attention heads in each [1 to 1000]
    n_embd: int = 768               # channels; a multiple of n_head [1 to 2**16]
    dropout: float = 0.0            # probability; 0 for pre-training, 0.1 and up for fine-tuning [0 to below 1]
    bias: bool = False              # biases in linear layers and layer norms, as GPT-2 has them
    rope: bool = False              # rotary positions on queries and keys; False: learned position embeddings
    qk_norm: bool = False           # queries and keys are RMS-normalised per head, with a learned gain
    selective: bool = False         # selective attention (2410.02703): tokens mask earlier tokens
    vote_scale: bool = False        # selective: a learned factor on each layer's votes, from 0; for a trained model
    ssa: str = ''                   # SSA (2411.12892): which of q, k, v get a temperature; 'qv' is the paper's
    ssa_sharing: bool = True        # temperatures read the activations of q, k, v; False: a hidden layer of their own
    gelu: str = 'none'              # GELU of the MLP: exact, or GPT-2's approximation by tanh ['none', 'tanh']


# ---- Selective attention, 2410.02703 section 3 -----------------------------------------------------------------------


def selective_attention_listing(q, k, v, vote, dropout=0.0, memory_tau=None):
    """The paper's listing, with T x T tensors. `selective_attention` below computes the same in less memory."""
    i = torch.arange(q.size(2), device=q.device)[:, None]       # (T, 1)
    j = i.T                                                     # (1, T)
    L = (q @ k.transpose(-2, -1)).to(F_dtype(q.dtype)) / math.sqrt(q.size(3))       # (B, H, T, T)
    S = torch.where((0 < j) & (j < i), vote(L[:, 0]), 0.0)      # nobody votes on token 0 (BOS), itself or the future
    F = fn.pad(S, (0, 0, 1, -1)).cumsum(dim=1)                  # (B, T, T) rows moved down by one: votes act later
    P = (L - F[:, None]).masked_fill(j > i, float('-inf')).softmax(dim=-1)          # every head reads the same F
    P = fn.dropout(P, dropout, training=dropout > 0)
    return P.to(v.dtype) @ v, memory_requirement(F, i[:, 0], memory_tau)


def attend(q, k, v, F, i, j, vote=None, forget=None, dropout=0.0):
    """One block of rows: the attention core of training, prefill (many rows) and decoding (one row).

    q (B, H, R, D): queries of the tokens at positions i (R,).
    k, v (B, H, N, D): keys and values of the tokens at positions j (B or 1, N); later ones are hidden from a row.
    F (B, N): how much the rows before this block have masked each column.
    vote: logits of head 0 -> votes. None: standard attention, which leaves F as it is.
    forget: (F of each row (B, R, N), i, j) -> which columns each row has lost (B, R, N), for context pruning.

    Returns y (B, H, R, D); F for each row and, last, for the row after the block (B, R+1, N); and which columns are
    hidden from each row (B or 1, R, N).
    """
    i, j = i[:, None], j[:, None, :]                            # (R, 1) and (B or 1, 1, N)
    L = (q * q.size(-1)**-0.5) @ k.transpose(-2, -1)            # (B, H, R, N)
    S = torch.zeros_like(L[:, 0], dtype=F.dtype)                # (B, R, N)
    if vote is not None:
        S = torch.where((0 < j) & (j < i), vote(L[:, 0].to(F.dtype)), S)        # not on token 0, itself or the future
    # F[i,j] = sum of S[r,j] over r < i. A row's own vote acts only on later rows, hence R+1 sums from R votes.
    F = torch.cat([F[:, None], S], dim=1).cumsum(dim=1)         # (B, R+1, N)
    hidden = j > i                                              # nobody sees the future
    if forget is not None:
        hidden = hidden | forget(F[:, :-1], i, j)
    P = (L - F[:, None, :-1]).masked_fill(hidden[:, None], float('-inf')).softmax(dim=-1)
    P = fn.dropout(P, dropout, training=dropout > 0)
    return P.to(v.dtype) @ v, F, hidden


def selective_attention(q, k, v, vote, dropout=0.0, memory_tau=None, rows=128):
    """Causal selective attention in blocks of rows: F is a state of T numbers that is carried down the rows.

    No T x T tensor is built, and blocks end at the diagonal, so the upper triangle is never computed.
    F only grows, so what is masked beyond recovery stays so, and need not be computed again:

        P[h,i,j] <= exp(|q[h,i]| |k[h,j]| / sqrt(D) - F[i,j] - L[h,i,i])

    as a row never masks itself, and its own logit L[h,i,i] bounds the softmax's denominator. Once this is below
    rounding for all heads and all later rows, column j is dead. kernels/cpu.py drops dead columns; here they are kept.

    q, k, v (B, H, T, D); vote: see `attend`. Returns y (B, H, T, D), and M (B, T) or None, see `memory_requirement`.
    """
    B, _, T, _ = q.shape
    pos = torch.arange(T, device=q.device)
    F = q.new_zeros(B, 0, dtype=F_dtype(q.dtype))
    ys, Ms = [], []
    for a in range(0, T, rows):
        b = min(a + rows, T)
        F = fn.pad(F, (0, b - a))                               # (B, b) nobody has voted on the new columns yet
        y, F, _ = attend(q[:, :, a:b], k[:, :, :b], v[:, :, :b], F, pos[a:b], pos[None, :b], vote, dropout=dropout)
        ys.append(y)
        Ms.append(memory_requirement(F[:, :-1], pos[a:b], memory_tau))
        F = F[:, -1]
    return torch.cat(ys, dim=2), torch.cat(Ms, dim=1) if memory_tau is not None else None


def F_dtype(dtype):
    """The dtype of F, a running sum: float32, whatever autocast makes of q; float64 if q is float64."""
    return torch.promote_types(dtype, torch.float32)


def memory_requirement(F, i, memory_tau):
    """M[i] = i - sum over j of min(F[i,j], τ) / τ, 2410.02703 section 6: how many earlier tokens row i still needs.

    F (B, R, N), i (R,) -> M (B, R). memory_tau is the paper's τ: the F at which a token counts as masked; None: no M.
    """
    return i - (F.clamp(max=memory_tau) / memory_tau).sum(dim=-1) if memory_tau is not None else None


# ---- SSA's temperatures, and rotary positions ------------------------------------------------------------------------


class Temperature(nn.Module):
    """SSA's temperatures of the queries, keys or values of a layer, one per head and token (2411.12892 section 3).

        τ[h,n] = 1 + tanh(f(x_n))[h] + σ(α[h]) * log(n)         n = 1, 2, ... the position

    The tanh is the token-aware part. The last term, the position-aware part, is for queries alone: later queries
    see more keys and need a sharper softmax. With weight sharing f(x) = w . gelu(W x), where W x are the
    activations that the layer computes anyway; else W is a layer of its own. One temperature per head, rows w of
    zeros and α = -4 are our choice: a fresh layer is close to standard attention.
    """

    def __init__(self, config, position_aware):
        super().__init__()
        self.hidden = None if config.ssa_sharing else nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.w = nn.Linear(config.n_embd, config.n_head, bias=False)
        self.alpha = nn.Parameter(torch.full((config.n_head,), -4.0)) if position_aware else None

    def forward(self, x, activations, pos):
        """x, activations (B, T, C), the layer's input and its q, k or v; pos (T,) from 0. Returns τ (B, T, H)."""
        activations = activations.contiguous()                  # GELU takes half the time on a copy
        tau = 1 + torch.tanh(self.w(fn.gelu(activations if self.hidden is None else self.hidden(x))))
        if self.alpha is not None:
            tau = tau + torch.sigmoid(self.alpha) * torch.log(pos + 1.0)[:, None]
        return tau


def rotate(q, k, pos):
    """Rotary positions (arXiv 2104.09864): channels c and c + D/2 are turned by the angle pos * 10000^(-2c/D).

    q.k then depends on positions by their difference alone. q, k (B, T, H, D), pos (T,); returns q and k.
    """
    D, dtype = q.size(-1), F_dtype(q.dtype)
    angle = pos[:, None].to(dtype) * 10000 ** (-torch.arange(0, D, 2, device=q.device, dtype=dtype) / D)    # (T, D/2)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]       # (T, 1, D/2)
    pairs = (x.chunk(2, dim=-1) for x in (q, k))
    return (torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(q.dtype) for a, b in pairs)


# ---- The model -------------------------------------------------------------------------------------------------------


class CausalSelfAttention(nn.Module):
    """Attention of H heads: standard, or selective where the config says so; SSA scales q, k, v before either."""

    # Selective attention without a cache. kernels.install puts a faster function here, if its numbers are the same.
    attention = staticmethod(selective_attention)

    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.n_embd // config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)     # q, k, v of all heads
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.q_norm, self.k_norm = [nn.RMSNorm(D, eps=1e-5) if config.qk_norm else nn.Identity() for _ in range(2)]
        self.ssa = nn.ModuleDict({name: Temperature(config, position_aware=name == 'q') for name in config.ssa})
        self.vote_scale = nn.Parameter(torch.zeros(())) if config.vote_scale else None
        self.resid_dropout = nn.Dropout(config.dropout)

    def vote(self, L0):
        """S[i,j] = max(0, L[0,i,j]): the place to change the rule. Training, cache and pruning all come here.

        L0 (B, R, N): logits of head 0, in float32 or wider. Column 0 is token 0; the others may be any tokens, in any
        order, with empty slots among them. So a vote may depend on its own logit and on column 0, on nothing else.
        Votes on token 0, on the row itself and on the future are discarded by the caller.
        """
        S = L0.relu()
        return S if self.vote_scale is None else S * self.vote_scale.to(S.dtype)

    def forward(self, x, pos, cache=None, memory_tau=None):
        """x (B, T, C) at positions pos (T,). Returns y (B, T, C), and M (B, T) if memory_tau is given, else None."""
        B, T, C = x.shape
        H, D = self.config.n_head, C // self.config.n_head
        qkv = dict(zip('qkv', self.c_attn(x).split(C, dim=2)))          # (B, T, C) each
        heads = {name: t.view(B, T, H, D) for name, t in qkv.items()}
        heads['q'], heads['k'] = self.q_norm(heads['q']), self.k_norm(heads['k'])
        if self.config.rope:
            heads['q'], heads['k'] = rotate(heads['q'], heads['k'], pos)
        for name, temperature in self.ssa.items():
            tau = temperature(x, qkv[name], pos)                        # (B, T, H)
            heads[name] = heads[name] * tau[..., None]
        # under autocast norms and temperatures may be wider; attention has the dtype of c_attn's output
        q, k, v = (heads[name].to(qkv[name].dtype).transpose(1, 2) for name in 'qkv')       # (B, H, T, D)

        dropout = self.config.dropout if self.training else 0.0
        vote, M = self.vote if self.config.selective else None, None
        if cache is not None:
            y = cache.attend(q, k, v, pos, vote)
        elif vote is None:
            y = fn.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        else:
            y, M = self.attention(q, k, v, vote, dropout, memory_tau)
        y = y.transpose(1, 2).reshape(B, T, C)                          # heads side by side
        return self.resid_dropout(self.c_proj(y)), M


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.gelu = config.gelu

    def forward(self, x):
        return self.dropout(self.c_proj(fn.gelu(self.c_fc(x), approximate=self.gelu)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, pos, cache=None, memory_tau=None):
        y, M = self.attn(self.ln_1(x), pos, cache, memory_tau)
        x = x + y
        return x + self.mlp(self.ln_2(x)), M


class GPT(nn.Module):
    """A GPT-2 whose attention is standard, selective, SSA or both. Raises ValueError for an invalid config."""

    def __init__(self, config):
        super().__init__()
        check_config(config)
        self.config = config
        g = torch.Generator().manual_seed(torch.randint(2**31, (1,), device='cpu').item())
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            **({} if config.rope else {'wpe': nn.Embedding(config.block_size, config.n_embd)}),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight       # weight tying
        # GPT-2's initialisation. As g is seeded before any layer draws numbers, and SSA's parameters come last, a seed
        # gives models with and without SSA the same weights.
        for name, p in sorted(self.named_parameters(), key=lambda item: '.ssa.' in item[0]):
            if name.endswith('bias') or name.endswith('.w.weight'):         # w: SSA's output rows
                nn.init.zeros_(p)
            elif name.endswith('c_proj.weight'):                            # residual projections
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer), generator=g)
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02, generator=g)

    def embed(self, idx, pos):
        """The input of the first block: tokens idx (B, T) at positions pos (T,) -> (B, T, C)."""
        x = self.transformer.wte(idx)
        return self.transformer.drop(x if self.config.rope else x + self.transformer.wpe(pos))

    def forward(self, idx, targets=None, cache=None, memory_tau=None):
        """Logits of the next tokens, and the mean cross-entropy in nats where targets are given.

        idx, targets: int64 (B, T); a target of -1 is ignored. Without targets: logits of the last position only,
        (B, 1, V), and loss None. cache: a KVCache; idx continues the text that it holds. memory_tau, with targets and
        no cache: a third result, the memory requirement as a fraction of the context, which training adds to the loss.
        Raises ValueError where learned positions end before the tokens do. Single-token steps are not checked: reading
        the position would synchronise the GPU.
        """
        B, T = idx.shape
        if not self.config.rope and (cache is None or T > 1):
            seen = int(cache.position) if cache is not None else 0
            if seen + T > self.config.block_size:
                raise ValueError(f'{seen + T} tokens do not fit into block_size {self.config.block_size}')
        pos = torch.arange(T, device=idx.device)
        if cache is not None:
            pos = pos + cache.position
        x = self.embed(idx, pos)                                                # (B, T, C)
        Ms = []
        for l, block in enumerate(self.transformer.h):
            x, M = block(x, pos, cache.layers[l] if cache is not None else None, memory_tau)
            Ms.append(M)
        x = self.transformer.ln_f(x)
        if cache is not None:
            cache.position += T
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        logits = self.lm_head(x)                                                # (B, T, V)
        loss = fn.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=-1)
        if memory_tau is None:
            return logits, loss
        if not self.config.selective:
            raise ValueError('memory_tau needs selective=True: only votes mask tokens')
        # 2410.02703 section 6: mean over the batch of (sum over layers of max over rows of M) / (n_layer * T)
        return logits, loss, torch.stack([M.max(dim=1).values for M in Ms]).mean() / T

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, **options):
        """idx (B, T) and max_new_tokens more: (B * num_samples, T + max_new_tokens). options: see `stream` below."""
        new = list(stream(self, idx, max_new_tokens, temperature, top_k, **options))
        return torch.cat([idx.repeat_interleave(len(new[0]) // len(idx), dim=0), *new], dim=1) if new else idx

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type, ssa_lr=1.0):
        """AdamW that decays matrices and embeddings, not vectors. A group's 'initial_lr' is the top of its schedule.

        ssa_lr: if it is not 1, SSA's temperatures get their own group, at ssa_lr * learning_rate and without decay.
        """
        groups = [{'params': [], 'weight_decay': decay, 'lr': lr, 'initial_lr': lr} for decay, lr in
                  [(weight_decay, learning_rate), (0.0, learning_rate), (0.0, learning_rate * ssa_lr)]]
        for name, p in self.named_parameters():
            if p.requires_grad:
                groups[2 if '.ssa.' in name and ssa_lr != 1 else int(p.dim() < 2)]['params'].append(p)
        groups = groups if groups[2]['params'] else groups[:2]
        return torch.optim.AdamW(groups, betas=betas, fused=device_type == 'cuda')

    def num_params(self, non_embedding=True):
        """Number of parameters; learned positions are left out, the token embeddings serve as last layer."""
        return sum(p.numel() for name, p in self.named_parameters() if not (non_embedding and '.wpe.' in name))


def check_config(c):
    """Raises ValueError, in one line, for an invalid config."""
    sizes = {name: getattr(c, name) for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd')}
    for wrong, why in [
            *((size < 1, f'{name} is {size}; it must be at least 1') for name, size in sizes.items()),
            (c.n_embd % max(1, c.n_head), f'n_embd {c.n_embd} is not divisible by n_head {c.n_head}'),
            (c.rope and c.n_embd // max(1, c.n_head) % 2, 'rope turns pairs of channels: n_embd / n_head must be even'),
            (not 0 <= c.dropout < 1, f'dropout {c.dropout} is not a probability below 1'),
            (set(c.ssa) - set('qkv') or len(set(c.ssa)) < len(c.ssa), f"ssa {c.ssa!r}: letters of 'qkv', each once"),
            (c.vote_scale and not c.selective, 'vote_scale needs selective=True: there are no votes to scale'),
            (c.gelu not in ('none', 'tanh'), f"gelu {c.gelu!r}: it is 'none' or 'tanh'")]:
        if wrong:
            raise ValueError(why)


# ---- You may stop here -----------------------------------------------------------------------------------------------
# That is all of training. Next, generation with context pruning, 2410.02703 section 5: a layer remembers at most K
# tokens. Token i first drops the token of largest F if K are held, then is stored with F = 0, attends, and votes.

EMPTY = 2**30   # position of an empty slot: later than any row, so the causal mask hides it


class LayerCache:
    """What one layer remembers: K slots of keys, values, F and positions, allocated once and written in place.

    policy: which token a full layer drops, never token 0: 'selective', that of largest F; 'oldest'; 'random'.
    """

    def __init__(self, B, H, K, D, policy, device, dtype):
        self.k = torch.zeros(B, H, K, D, device=device, dtype=dtype)
        self.v = torch.zeros(B, H, K, D, device=device, dtype=dtype)
        self.F = torch.zeros(B, K, device=device, dtype=F_dtype(dtype))
        self.j = torch.full((B, K), EMPTY, device=device)
        self.K, self.policy = K, policy

    def attend(self, q, k, v, i, vote):
        """The next tokens, at positions i (R,), with q, k, v (B, H, R, D); vote None: standard attention. Returns y."""
        if q.size(2) > 1:
            return self._prefill(q, k, v, i, vote)
        # One row. Shapes are fixed and the host reads no value, so that a step can be captured as a CUDA graph.
        score = self.score(self.F, i, self.j)
        score = score.masked_fill(self.j == EMPTY, math.inf)    # an empty slot goes first
        worst = score == score.amax(dim=1, keepdim=True)
        slot = self.j.masked_fill(~worst, EMPTY + 1).argmin(dim=1)      # (B,) of equal scores, the oldest token's
        b = torch.arange(len(slot), device=slot.device)         # every sequence of the batch drops its own
        self.k[b, :, slot] = k[:, :, 0].to(self.k.dtype)        # (B, H, D)
        self.v[b, :, slot] = v[:, :, 0].to(self.v.dtype)
        self.F[b, slot] = 0.0
        self.j[b, slot] = i
        y, F, _ = attend(q, self.k, self.v, self.F, i, self.j, vote)
        self.F.copy_(F[:, -1])
        return y

    def _prefill(self, q, k, v, i, vote):
        # A block of R rows over the n tokens remembered and the block itself: n + R columns, in the order of age.
        B, R, n = q.size(0), q.size(2), min(int(i[0]), self.K)
        age = self.j[:, :n].argsort(dim=1)                      # decoding fills slots in any order
        k = torch.cat([self.k.take_along_dim(age[:, None, :, None], 2), k.to(self.k.dtype)], dim=2)     # (B, H, n+R, D)
        v = torch.cat([self.v.take_along_dim(age[:, None, :, None], 2), v.to(self.v.dtype)], dim=2)
        j = torch.cat([self.j.gather(1, age), i.expand(B, R)], dim=1)           # (B, n+R)
        F = fn.pad(self.F.gather(1, age), (0, R))                               # (B, n+R)
        y, F, hidden = attend(q, k, v, F, i, j, vote, self.forget)
        m = min(n + R, self.K)                                  # the same number is left in every sequence
        left = hidden[:, -1].int().argsort(dim=1, stable=True)[:, :m]           # (B, m) still in the order of age
        self.k[:, :, :m] = k.take_along_dim(left[:, None, :, None], 2)
        self.v[:, :, :m] = v.take_along_dim(left[:, None, :, None], 2)
        self.j[:, :m] = j.gather(1, left)
        self.F[:, :m] = F[:, -1].gather(1, left)
        return y

    def score(self, F, i, j):
        """Eviction score of each column, seen from rows i; the highest is dropped first. Shapes may broadcast."""
        if self.policy == 'selective':
            score = F
        elif self.policy == 'oldest':
            score = -j.to(F.dtype)
        else:                           # a hash of (row, column), so that every way of computing agrees
            x = i * 1_000_003 + j
            for _ in range(2):
                x = ((x >> 16) ^ x) * 0x45D9F3B & 0xFFFFFFFF
            score = (x & 0xFFFFFF).to(F.dtype)                          # 24 bits, which float32 holds exactly
        return score.masked_fill(j == 0, float('-inf'))                 # the first token stays for ever

    def forget(self, F, i, j):
        """Simulates eviction row by row; returns the mask of the columns that each row has lost, (B, R, N).

        F (B, R, N); i (R, 1); j (B, 1, N), sorted by age: the buffer, then the R rows' own tokens.
        """
        B, R, N = F.shape
        score = self.score(F, i, j).masked_fill(j >= i, -math.inf).expand(B, R, N)
        out = score.new_zeros(B, N)                             # -inf where a column was dropped
        dropped_at = torch.full((B, N), R, device=F.device)     # the row of the block that dropped it; R: none
        for r in range(max(0, self.K - (N - R)), R):            # before that the buffer has room
            worst = (score[:, r] + out).argmax(dim=1, keepdim=True)     # of equal scores the first, which is the oldest
            out.scatter_(1, worst, -math.inf)
            dropped_at.scatter_(1, worst, r)
        return dropped_at[:, None] <= torch.arange(R, device=F.device)[:, None]


class KVCache:
    """The memory of one generation: for each layer l at most budgets[l] tokens, whatever the length of the text.

    budgets: one number for all layers, a list of one for each, or None: block_size. policy: see LayerCache. dtype: of
    keys and values; None: that of the weights (another needs autocast). Raises ValueError if they do not fit the model.
    """

    def __init__(self, model, batch_size, budgets=None, policy='selective', dtype=None):
        c = model.config
        self.budgets = check_budgets(c, budgets, policy)
        self.policy = policy if c.selective or policy != 'selective' else 'oldest'      # the same, without votes
        w = model.transformer.wte.weight
        self.layers = [LayerCache(batch_size, c.n_head, K, c.n_embd // c.n_head, self.policy, w.device,
                                  dtype or w.dtype) for K in self.budgets]
        self.position = torch.zeros(1, dtype=torch.long, device=w.device)       # of the next token; on the device

    def repeat(self, n):
        """Repeat each sequence n times: a prompt that was read once then serves n texts."""
        for layer in self.layers:
            for name in ('k', 'v', 'F', 'j'):
                setattr(layer, name, getattr(layer, name).repeat_interleave(n, dim=0))

    def bytes(self):
        """Bytes of keys and values, and of F and positions, over all layers."""
        return sum(t.numel() * t.element_size() for c in self.layers for t in (c.k, c.v, c.F, c.j))


def check_budgets(config, budgets, policy='selective'):
    """budgets as a list of one number for each layer; raises ValueError if they do not fit the model."""
    if policy not in ('selective', 'oldest', 'random'):
        raise ValueError(f"policy {policy!r}: it is 'selective', 'oldest' or 'random'")
    if budgets is None:
        return [config.block_size] * config.n_layer
    if policy == 'selective' and not config.selective:
        raise ValueError("a model without selective attention has no F to prune by: use policy 'oldest' or 'random'")
    budgets = [budgets] * config.n_layer if isinstance(budgets, int) else list(budgets)
    if len(budgets) != config.n_layer:
        raise ValueError(f'{len(budgets)} budgets for a model of {config.n_layer} layers')
    for K in budgets:
        if not isinstance(K, int) or not min(2, config.block_size) <= K <= config.block_size:
            raise ValueError(f'a budget of {K!r} tokens: a layer keeps a whole number from 2 to {config.block_size}')
    return budgets


@torch.no_grad()
def prefill(model, idx, cache, rows=64):
    """Read idx (B, T) into the cache in blocks of rows; returns the logits of the last position (B, 1, V)."""
    for part in idx.split(rows, dim=1):
        logits, _ = model(part, cache=cache)
    return logits


@torch.no_grad()
def stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, budgets=None, policy='selective', cache=None,
           num_samples=1):
    """Yield the next tokens (B * num_samples, 1), max_new_tokens times: prefill idx (B, T), then go row by row.

    temperature 0 takes the most likely token; top_k keeps the k most likely; budgets, policy: see KVCache.
    With rope, positions count on past block_size, and the cache may hold text already. Learned positions end there and
    cannot be shifted: a longer prompt is cut to its newest block_size tokens, and later the newest half is read anew.
    """
    size, ends = model.config.block_size, not model.config.rope
    idx = idx[:, -size:] if ends else idx
    cache = cache or KVCache(model, len(idx), budgets, policy)
    new, seen = idx, int(cache.position)
    for n in range(max_new_tokens):
        if ends and seen + new.size(1) > size:
            new = idx = idx[:, -max(1, size // 2):]
            cache, seen = KVCache(model, len(idx), cache.budgets, cache.policy, cache.layers[0].k.dtype), 0
        seen += new.size(1)
        logits = prefill(model, new, cache)[:, -1]              # (B, V)
        if n == 0 and num_samples > 1:
            cache.repeat(num_samples)
            idx, logits = idx.repeat_interleave(num_samples, dim=0), logits.repeat_interleave(num_samples, dim=0)
        new = sample(logits, temperature, top_k)
        idx = torch.cat([idx[:, 1 - size:], new], dim=1)
        yield new


def sample(logits, temperature, top_k):
    """Next tokens (B, 1) from logits (B, V)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = (logits - logits.amax(dim=-1, keepdim=True)).to(F_dtype(logits.dtype)) / temperature    # never +inf
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float('-inf'))
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1)
