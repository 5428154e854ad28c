"""GPT with standard, selective and SSA attention, and a KV cache that may be smaller than the context.

Selective attention: Leviathan, Kalman, Matias, "Selective Attention Improves Transformer", arXiv 2410.02703.
SSA: Zhang et al., "Selective Attention: Enhancing Transformer through Principled Context Control",
arXiv 2411.12892. Names and shapes of the parameters are those of GPT-2 and nanoGPT.

In shapes: B batch, T tokens, C = n_embd channels, H heads, D = C/H channels of a head, V vocabulary;
R rows (queries) of a block, N columns (keys) that they may look at. Row i is a query, column j a key.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as fn

import kernels      # kernels.Linear is nn.Linear, faster where generation on a CPU gives it a single row


@dataclass
class GPTConfig:
    # model
    block_size: int = 1024          # context length in tokens
    vocab_size: int = 50304         # GPT-2's 50257, padded to a multiple of 64 for speed
    n_layer: int = 12               # transformer blocks
    n_head: int = 12                # attention heads in each
    n_embd: int = 768               # channels; a multiple of n_head
    dropout: float = 0.0            # probability; 0 for pre-training, 0.1 and up for fine-tuning
    bias: bool = False              # biases in linear layers and layer norms, as GPT-2 has them
    selective: bool = False         # selective attention (2410.02703): tokens mask earlier tokens
    vote_scale: bool = False        # selective: a learned factor on each layer's votes, from 0; for a trained model
    ssa: str = ''                   # SSA (2411.12892): which of q, k, v get a temperature; 'qv' is the paper's
    ssa_sharing: bool = True        # temperatures read the activations of q, k, v; False: a hidden layer of their own
    gelu: str = 'none'              # GELU of the MLP: 'none', exact, or 'tanh', the approximation that GPT-2 has
    kernel: str = 'auto'            # selective attention in training: 'auto', 'rows' (the plain code here), 'triton'


# ----------------------------------------------------------------------------------------------------------------------
# Selective attention, 2410.02703 section 3


def attend(q, k, v, F, i, j, budget=None, policy='selective', dropout=0.0, scale=None):
    """One block of rows: the attention core of training, prefill (many rows) and decoding (one row).

    Only standard attention without a cache does not come here: it is torch's scaled_dot_product_attention.

    q (B, H, R, D): queries of the tokens at positions i (R,).
    k, v (B, H, N, D): keys and values of the tokens at positions j (B or 1, N); those after a row are hidden from it.
    F (B, N): how much the rows before this block have masked each column, in float32; None: standard attention.
    budget: how many tokens a row may look at, by the rules of context pruning; None: all. It wants the columns in the
    order of age, the last R being the rows' own tokens (see `forget`).
    scale: a factor on the votes, a scalar tensor; None: 1, as the paper has it.

    Returns y (B, H, R, D); F for each row and, last, for the row after the block (B, R+1, N), or None; and
    which columns are hidden from each row (B or 1, R, N).
    """
    L = (q * q.size(-1)**-0.5) @ k.transpose(-2, -1)            # (B, H, R, N) logits
    hidden = j[:, None, :] > i[:, None]                         # (B or 1, R, N) nobody sees the future
    if F is not None:
        # S[i,j] = max(0, L[0,i,j]): row i votes to mask column j. Nobody votes on itself, the future or token 0.
        S = L[:, 0].to(F.dtype).relu() * ((j[:, None, :] < i[:, None]) & (j[:, None, :] > 0))       # (B, R, N)
        S = S if scale is None else S * scale.to(S.dtype)
        # F[i,j] = sum of S[k,j] over k < i. A row's own vote acts only on later rows, hence R+1 sums from R votes.
        F = torch.cat([F[:, None], S], dim=1).cumsum(dim=1)     # (B, R+1, N)
    if budget is not None:
        hidden = hidden | forget(F, i, j, budget, policy)
    if F is not None:
        L = L - F[:, None, :-1]                                 # every head reads the same F, head 0 too
    P = L.masked_fill(hidden[:, None], float('-inf')).softmax(dim=-1)
    P = fn.dropout(P, dropout, training=dropout > 0)
    return P.to(v.dtype) @ v, F, hidden


def selective_attention(q, k, v, dropout=0.0, tau=None, block=128, scale=None):
    """Causal selective attention in blocks of rows: F is a state of T numbers that is carried down the rows.

    No T x T tensor is built, and blocks end at the diagonal, so the upper triangle is never computed. Autograd does
    keep the P of every block, T^2/2 numbers a head in all; the functions that kernels.py picks instead do not.
    q, k, v (B, H, T, D); scale: see `attend`. Returns y (B, H, T, D) and, where tau is given, the memory requirement
    (B, T), else None.
    """
    B, _, T, _ = q.shape
    positions = torch.arange(T, device=q.device)
    F = q.new_zeros(B, 0, dtype=F_dtype(q.dtype))
    ys, Ms = [], []
    for a in range(0, T, block):
        b = min(a + block, T)
        F = fn.pad(F, (0, b - a))                               # (B, b) nobody has voted on the new columns yet
        y, F, _ = attend(q[:, :, a:b], k[:, :, :b], v[:, :, :b], F, positions[a:b], positions[None, :b],
                         dropout=dropout, scale=scale)
        ys.append(y)
        if tau is not None:
            Ms.append(memory_requirement(F[:, :-1], positions[a:b], tau))
        F = F[:, -1]
    return torch.cat(ys, dim=2), torch.cat(Ms, dim=1) if Ms else None


def F_dtype(dtype):
    """F is a running sum: float32, whatever autocast makes of the rest; float64 only where all is float64."""
    return torch.promote_types(dtype, torch.float32)


def memory_requirement(F, i, tau):
    """M[i] = i - sum over j of min(F[i,j], tau)/tau: how many tokens row i still needs. F (B, R, N) -> (B, R)."""
    return i - (F.clamp(max=tau) / tau).sum(dim=-1)


# ----------------------------------------------------------------------------------------------------------------------
# Context pruning, 2410.02703 section 5: a layer remembers at most K tokens

EMPTY = 2**30   # the position of a slot that holds no token: after every row, so it is hidden without a rule of its own


def drop_score(F, i, j, policy):
    """The case against each column, seen from rows i; the highest is dropped first. Broadcasts to (B, R, N)."""
    i, j = i[:, None], j[:, None, :]
    if policy == 'selective':
        score = F
    elif policy == 'oldest':        # local attention: what remains is token 0 and the newest
        score = -j.float()
    else:                           # 'random': a hash of (row, column), so that every way of computing agrees
        x = i * 1_000_003 + j
        for _ in range(2):
            x = ((x >> 16) ^ x) * 0x45D9F3B & 0xFFFFFFFF
        score = (x & 0xFFFFFF).float()                          # 24 bits, which float32 holds exactly
    return score.masked_fill(j == 0, float('-inf'))             # the first token stays for ever


def forget(F, i, j, budget, policy):
    """Walk down the rows of a block and drop a column whenever the buffer is full: which are gone, (B, R, N).

    The last R columns are the rows' own tokens, those before them the buffer; both in the order of age, so that
    the first of equal scores is the oldest. F (B, R+1, N) as in `attend`; of its rows each decides before it votes.
    """
    R, N = len(i), j.size(1)
    B = len(j) if F is None else len(F)
    score = drop_score(F if F is None else F[:, :-1], i, j, policy).masked_fill(j[:, None, :] >= i[:, None], -math.inf)
    score = score.expand(B, R, N)
    out = score.new_zeros(B, N)                                 # -inf where a column was dropped
    dropped_at = torch.full((B, N), R, device=score.device)     # the row that dropped it
    for r in range(max(0, budget - (N - R)), R):                # before that the buffer has room
        worst = (score[:, r] + out).argmax(dim=1, keepdim=True)
        out.scatter_(1, worst, -math.inf)
        dropped_at.scatter_(1, worst, r)
    return dropped_at[:, None] <= torch.arange(R, device=score.device)[:, None]


class LayerCache:
    """What one layer remembers: K slots of keys, values, F and positions, allocated once and written in place."""

    def __init__(self, B, H, K, D, policy, device, dtype):
        self.k = torch.zeros(B, H, K, D, device=device, dtype=dtype)
        self.v = torch.zeros(B, H, K, D, device=device, dtype=dtype)
        self.F = torch.zeros(B, K, device=device, dtype=F_dtype(dtype))
        self.j = torch.full((B, K), EMPTY, device=device)
        self.K, self.policy = K, policy

    def attend(self, q, k, v, i, selective, scale=None):
        """The next tokens, at positions i (R,): make room, store, attend, vote (2410.02703 section 5).

        q, k, v (B, H, R, D). Returns y (B, H, R, D).
        """
        return (self._decode if q.size(2) == 1 else self._prefill)(q, k, v, i, selective, scale)

    def _decode(self, q, k, v, i, selective, scale):
        # One row. Fixed shapes and no look at a value from the host, so that a step can be captured as a CUDA graph.
        score = drop_score(self.F[:, None], i, self.j, self.policy)[:, 0]
        score = score.masked_fill(self.j == EMPTY, math.inf)    # an empty slot goes first
        worst = score == score.amax(dim=1, keepdim=True)
        slot = self.j.masked_fill(~worst, EMPTY + 1).argmin(dim=1)      # (B,) of equal scores, the oldest token's
        b = torch.arange(len(slot), device=slot.device)         # every sequence of the batch drops its own
        self.k[b, :, slot] = k[:, :, 0].to(self.k.dtype)
        self.v[b, :, slot] = v[:, :, 0].to(self.v.dtype)
        self.F[b, slot] = 0.0
        self.j[b, slot] = i
        y, F, _ = attend(q, self.k, self.v, self.F if selective else None, i, self.j, scale=scale)
        if selective:
            self.F.copy_(F[:, -1])
        return y

    def _prefill(self, q, k, v, i, selective, scale):
        # A block of R rows over what is remembered and the block itself: n + R columns, in the order of age.
        B, R, n = q.size(0), q.size(2), min(int(i[0]), self.K)
        age = self.j[:, :n].argsort(dim=1)                      # decoding fills slots in any order
        k = torch.cat([_take(self.k, age), k.to(self.k.dtype)], dim=2)
        v = torch.cat([_take(self.v, age), v.to(self.v.dtype)], dim=2)
        j = torch.cat([self.j.gather(1, age), i.expand(B, R)], dim=1)           # (B, n+R)
        F = fn.pad(self.F.gather(1, age), (0, R))                               # (B, n+R)
        y, F, hidden = attend(q, k, v, F if selective else None, i, j, self.K, self.policy, scale=scale)
        m = min(n + R, self.K)                                  # as many are left in every sequence
        left = hidden[:, -1].int().argsort(dim=1, stable=True)[:, :m]           # (B, m) still in the order of age
        self.k[:, :, :m], self.v[:, :, :m] = _take(k, left), _take(v, left)
        self.j[:, :m] = j.gather(1, left)
        if selective:
            self.F[:, :m] = F[:, -1].gather(1, left)
        return y


def _take(x, columns):
    """x (B, H, N, D), columns (B, M) -> (B, H, M, D)."""
    return x.gather(2, columns[:, None, :, None].expand(-1, x.size(1), -1, x.size(3)))


class KVCache:
    """The memory of one generation: for each layer l at most budgets[l] tokens, whatever the length of the text.

    budgets: one number for all layers, a list of one for each, or None: block_size, so that nothing is forgotten.
    policy: what is dropped from a full layer: 'selective' (the largest F), 'oldest' or 'random'.
    dtype: of keys and values; None: that of the weights. Another one goes with autocast.
    Raises ValueError where the budgets or the policy do not fit the model.
    """

    def __init__(self, model, batch_size, budgets=None, policy='selective', dtype=None):
        c = model.config
        self.budgets = check_budgets(c, budgets, policy)
        if not c.selective and budgets is None:
            policy = 'oldest'                                   # there is no F to score by, and nothing is ever dropped
        wte = model.transformer.wte.weight
        self.layers = [LayerCache(batch_size, c.n_head, K, c.n_embd // c.n_head, policy, wte.device, dtype or wte.dtype)
                       for K in self.budgets]
        self.position = torch.zeros(1, dtype=torch.long, device=wte.device)     # of the next token; on the device

    def bytes(self):
        """Bytes of keys and values, and of F and positions, over all layers."""
        return sum(t.numel() * t.element_size() for c in self.layers for t in (c.k, c.v, c.F, c.j))


def check_budgets(config, budgets, policy='selective'):
    """budgets as a list of one number for each layer; raises ValueError where they cannot be this model's."""
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


# ----------------------------------------------------------------------------------------------------------------------
# The model


class LayerNorm(nn.Module):
    """LayerNorm with an optional bias."""

    def __init__(self, ndim, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None

    def forward(self, x):
        return fn.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Temperature(nn.Module):
    """SSA's temperatures of the queries, keys or values of a layer, one per head and token (2411.12892 section 3).

        tau[h,n] = 1 + tanh(f(x_n))[h] + sigmoid(alpha[h]) * log(n)         n = 1, 2, ... the position

    The tanh is the token-aware part. The last term, the position-aware part, is for queries alone: later queries
    see more keys and need a sharper softmax. With weight sharing f(x) = w . gelu(W x), where W x are the
    activations that the layer computes anyway; else W is a layer of its own. One temperature per head, rows w of
    zeros and alpha = -4 are our choice: a fresh layer is close to standard attention.
    """

    def __init__(self, config, position_aware):
        super().__init__()
        self.hidden = None if config.ssa_sharing else nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.w = nn.Linear(config.n_embd, config.n_head, bias=False)
        self.alpha = nn.Parameter(torch.full((config.n_head,), -4.0)) if position_aware else None

    def forward(self, x, activations, i):
        """x, activations (B, T, C), the layer's input and its q, k or v; i (T,) positions from 0. Returns (B, T, H)."""
        tau = 1 + torch.tanh(self.w(fn.gelu(activations if self.hidden is None else self.hidden(x))))
        if self.alpha is not None:
            tau = tau + torch.sigmoid(self.alpha) * torch.log(i + 1.0)[:, None]
        return tau


class CausalSelfAttention(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.c_attn = kernels.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)   # q, k, v of all heads
        self.c_proj = kernels.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.ssa = nn.ModuleDict({name: Temperature(config, position_aware=name == 'q') for name in config.ssa})
        self.vote_scale = nn.Parameter(torch.zeros(())) if config.vote_scale else None
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, i, cache=None, memory_tau=None):
        """x (B, T, C) at positions i (T,). Returns y (B, T, C) and M (B, T), which is None without memory_tau."""
        B, T, C = x.shape
        H, D = self.config.n_head, C // self.config.n_head
        qkv = dict(zip('qkv', self.c_attn(x).split(C, dim=2)))          # (B, T, C) each
        heads = {name: t.view(B, T, H, D) for name, t in qkv.items()}
        for name, temperature in self.ssa.items():
            t = qkv[name].contiguous()                                  # GELU takes half the time on a copy
            heads[name] = t.view(B, T, H, D) * temperature(x, t, i).to(t.dtype)[..., None]
        q, k, v = (heads[name].transpose(1, 2) for name in 'qkv')       # (B, H, T, D)

        dropout, M = self.config.dropout if self.training else 0.0, None
        if cache is not None:
            y = cache.attend(q, k, v, i, self.config.selective, self.vote_scale)
        elif not self.config.selective:
            y = fn.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        elif kernel := kernels.pick(q, dropout, self.config.kernel):
            y, M = kernel(q, k, v, memory_tau, scale=self.vote_scale)
        else:
            y, M = selective_attention(q, k, v, dropout, memory_tau, scale=self.vote_scale)
        y = y.transpose(1, 2).reshape(B, T, C)                          # heads side by side
        return self.resid_dropout(self.c_proj(y)), M


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.c_fc = kernels.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = kernels.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.gelu = config.gelu

    def forward(self, x):
        return self.dropout(self.c_proj(fn.gelu(self.c_fc(x), approximate=self.gelu)))


class Block(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, config.bias)
        self.mlp = MLP(config)

    def forward(self, x, i, cache=None, memory_tau=None):
        y, M = self.attn(self.ln_1(x), i, cache, memory_tau)
        x = x + y
        return x + self.mlp(self.ln_2(x)), M


class GPT(nn.Module):
    """A GPT-2 whose attention is standard, selective, SSA or both. Raises ValueError for a config that cannot be."""

    prefill_rows = 64       # rows of a block when a prompt is read into a cache

    def __init__(self, config):
        super().__init__()
        check_config(config)
        self.config = config
        # drawn before any layer is made, so that a seed gives models with and without SSA the same weights
        g = torch.Generator().manual_seed(torch.randint(2**31, (1,), device='cpu').item())
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=LayerNorm(config.n_embd, config.bias),
        ))
        self.lm_head = kernels.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight       # weight tying
        for name, p in sorted(self.named_parameters(), key=lambda item: '.ssa.' in item[0]):    # GPT-2's initialisation
            if name.endswith('bias') or name.endswith('.w.weight'):         # w: SSA's output rows
                nn.init.zeros_(p)
            elif name.endswith('c_proj.weight'):                            # residual projections
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer), generator=g)
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02, generator=g)

    def num_params(self, non_embedding=True):
        """Number of parameters; the position embeddings are left out, the token embeddings serve as last layer."""
        n = sum(p.numel() for p in self.parameters())
        return n - self.transformer.wpe.weight.numel() if non_embedding else n

    def forward(self, idx, targets=None, cache=None, memory_tau=None):
        """Logits of the next tokens, and the mean cross-entropy in nats where targets are given.

        idx, targets: int64 (B, T); a target of -1 is ignored. Without targets: logits of the last position only,
        (B, 1, V), and loss None. cache: a KVCache; idx then goes on where the cache ends. memory_tau, with targets and
        no cache: return, third, the memory requirement (see `memory`), which training adds to the loss.
        Raises ValueError for more than block_size tokens, but for a single token after a full cache: asking the cache
        how full it is would wait for the GPU at every step, so there the caller counts, as `stream` does.
        """
        B, T = idx.shape
        seen = int(cache.position) if cache is not None and T > 1 else 0
        if seen + T > self.config.block_size:
            raise ValueError(f'{seen + T} tokens do not fit into block_size {self.config.block_size}')
        i = torch.arange(T, device=idx.device)
        if cache is not None:
            i = i + cache.position
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(i))          # (B, T, C)
        Ms = []
        for l, block in enumerate(self.transformer.h):
            x, M = block(x, i, cache.layers[l] if cache is not None else None, memory_tau)
            Ms.append(M)
        x = self.transformer.ln_f(x)
        if cache is not None:
            cache.position += T
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        logits = self.lm_head(x)
        loss = fn.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=-1)
        return (logits, loss) if memory_tau is None else (logits, loss, self.memory(Ms))

    def memory(self, Ms):
        """2410.02703 section 6: mean over the batch of (sum over layers of max over rows of M) / (n_layer * T).

        The fraction of the context that a layer needs, on average; Ms: M (B, T) of each layer.
        """
        if Ms[0] is None:
            raise ValueError('the memory loss needs selective attention')
        return torch.stack([M.max(dim=1).values for M in Ms]).mean() / Ms[0].size(1)

    @torch.no_grad()
    def prefill(self, idx, cache):
        """Read idx (B, T) into the cache in blocks of rows; returns the logits of the last position (B, 1, V)."""
        for block in idx.split(self.prefill_rows, dim=1):
            logits, _ = self(block, cache=cache)
        return logits

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, budgets=None, policy='selective', cache=None):
        """Yield max_new_tokens times the next tokens (B, 1) after idx (B, T): prefill, then one row at a time.

        temperature 0 takes the most likely token; top_k keeps the k most likely. budgets and policy: see KVCache.
        At the end of block_size the window slides by half: the newest block_size/2 tokens become a fresh prompt, as
        their positions are learned and cannot be shifted in the cache. A longer prompt is cut to its newest
        block_size tokens.
        """
        size = self.config.block_size
        idx = idx[:, -size:]
        cache = cache or KVCache(self, len(idx), budgets, policy)
        new, seen = idx, int(cache.position)
        for _ in range(max_new_tokens):
            if seen + new.size(1) > size:
                new = idx = idx[:, -max(1, size // 2):]
                old = cache.layers[0]
                cache, seen = KVCache(self, len(idx), cache.budgets, old.policy, old.k.dtype), 0
            seen += new.size(1)
            logits = self.prefill(new, cache)[:, -1]            # (B, V)
            new = sample(logits, temperature, top_k)
            idx = torch.cat([idx[:, 1 - size:], new], dim=1)
            yield new

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, budgets=None, policy='selective'):
        """idx (B, T) and max_new_tokens more (B, T + max_new_tokens); the arguments are those of `stream`."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, temperature, top_k, budgets, policy)], dim=1)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """AdamW that decays matrices and embeddings, not biases, norms and other vectors."""
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [{'params': [p for p in params if p.dim() >= 2], 'weight_decay': weight_decay},
                  {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0}]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=device_type == 'cuda')

    def flops_per_token(self):
        """Floating-point operations of forward and backward for a token, by the PaLM paper's appendix B."""
        c = self.config
        return 6 * self.num_params() + 12 * c.n_layer * c.n_embd * c.block_size


def sample(logits, temperature, top_k):
    """Next tokens (B, 1) from logits (B, V)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float('-inf'))
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1)


def check_config(c):
    """Raises ValueError, in one line, for a config that no model can have."""
    for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
        if getattr(c, name) < 1:
            raise ValueError(f'{name} is {getattr(c, name)}; it must be at least 1')
    if c.n_embd % c.n_head:
        raise ValueError(f'n_embd {c.n_embd} is not divisible by n_head {c.n_head}')
    if not 0 <= c.dropout < 1:
        raise ValueError(f'dropout {c.dropout} is not a probability below 1')
    if set(c.ssa) - set('qkv') or len(set(c.ssa)) < len(c.ssa):
        raise ValueError(f"ssa {c.ssa!r}: letters of 'qkv', each at most once")
    if c.vote_scale and not c.selective:
        raise ValueError('vote_scale needs selective=True: there are no votes to scale')
    if c.gelu not in ('none', 'tanh'):
        raise ValueError(f"gelu {c.gelu!r}: it is 'none' or 'tanh'")
    if c.kernel not in ('auto', 'rows', 'triton'):
        raise ValueError(f"kernel {c.kernel!r}: it is 'auto', 'rows' or 'triton'")
