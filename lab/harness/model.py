"""A model of ours as lm-evaluation-harness wants it: log-probabilities of texts, and texts.

The harness knows the tasks and computes the scores; here a text becomes tokens and the tokens go through the model,
in batches, with the whole context or within the budgets of context pruning.
"""
import collections
import json

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from tqdm import tqdm

from model import KVCache, stream
from support import devices
from support.settings import UserError

IGNORED = {'top_p': (1, None), 'num_beams': (1, None)}      # settings of generation that change nothing at these values


class Model(TemplateLM):
    """Answers the harness's three kinds of requests.

    bos: begin every window with <|endoftext|>, as in training. budgets: None, or tokens that each layer keeps; a model
    without selective attention then drops the oldest, which is local attention.
    """

    def __init__(self, name, model, tokenizer, bos=False, budgets=None, batch_size=8, device='cpu', dtype='float32'):
        super().__init__()
        self.name, self.model, self.tokenizer, self.bos, self.budgets = name, model, tokenizer, bos, budgets
        self.batch_size, self._device, self.dtype = batch_size, device, dtype
        self.policy = 'selective' if model.config.selective else 'oldest'
        self.size = model.config.block_size

    @property
    def eot_token_id(self):
        """Stands before a text that has no context."""
        return self.tokenizer.eot_token

    def tok_encode(self, string, add_special_tokens=None, **_):
        return self.tokenizer.encode_ordinary(string)

    def cache(self, batch_size):
        return KVCache(self.model, batch_size, self.budgets, self.policy, getattr(torch, self.dtype))

    def loses_beginning(self, request):
        """Whether a request of the harness has more text than the model reads at once. Rolling ones lose nothing."""
        if request.request_type == 'generate_until':
            context, settings = request.args
            return len(self.tok_encode(context)) > self.room(normalize_gen_kwargs(settings)['max_gen_toks'])
        return request.request_type == 'loglikelihood' and \
            len(self.tok_encode(''.join(request.args))) - 1 + self.bos > self.size

    # ------------------------------------------------------------------------- log-probabilities

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """The log-probability of each whole text. Every token is scored once, in windows of block_size tokens."""
        texts = [(request.args, [self.eot_token_id], self.tok_encode(*request.args)) for request in requests]
        return self._loglikelihood_tokens(texts, kind='loglikelihood_rolling')

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, kind='loglikelihood'):
        """requests: (arguments, context tokens, continuation tokens). For each continuation its log-probability in
        nats and whether greedy decoding gives it; for kind 'loglikelihood_rolling' the log-probability alone."""
        windows = [(r, tokens, n) for r, (_, context, continuation) in enumerate(requests)
                   for tokens, n in self.windows(context, continuation)]
        windows.sort(key=lambda window: -len(window[1]))        # similar lengths in a batch: little padding
        sums, greedy = [0.0] * len(requests), [True] * len(requests)
        left = collections.Counter(r for r, _, _ in windows)
        for start in tqdm(range(0, len(windows), self.batch_size), desc=f'{self.name}: {kind}', disable=None):
            which, tokens, counts = zip(*windows[start:start + self.batch_size])
            for r, log_p, likely in zip(which, *self.score(tokens, counts)):
                sums[r], greedy[r], left[r] = sums[r] + log_p, greedy[r] and likely, left[r] - 1
                if not left[r]:
                    answer = sums[r] if kind == 'loglikelihood_rolling' else (sums[r], greedy[r])
                    self.cache_hook.add_partial(kind, requests[r][0], answer)
        return sums if kind == 'loglikelihood_rolling' else list(zip(sums, greedy))

    def windows(self, context, continuation):
        """(tokens, n) for each piece of at most block_size tokens of the continuation: the last n tokens are scored,
        those before them are the newest that fit. A model trained with BOS reads it at the start of each window."""
        text, size = [*(context or [self.eot_token_id]), *continuation], self.size
        first = self.bos and text[0] == self.eot_token_id
        for start in range(len(text) - len(continuation), len(text), size):
            end = min(start + size, len(text))
            read = text[first:end]
            yield [self.eot_token_id, *read[-size:]] if self.bos else read[-size - 1:], end - start

    @torch.no_grad()
    def score(self, rows, counts):
        """For each row of tokens, of the last `count` of them: the sum of the log-probabilities, whether all are the
        most likely."""
        x = torch.zeros(len(rows), max(map(len, rows)) - 1, dtype=torch.long)
        y = torch.full_like(x, -1)
        for b, (row, n) in enumerate(zip(rows, counts)):
            x[b, :len(row) - 1] = torch.tensor(row[:-1])        # padding comes last: no token sees it
            y[b, len(row) - 1 - n:len(row) - 1] = torch.tensor(row[-n:])
        self.check(x, y)
        x, y = x.to(self._device), y.to(self._device)
        scored = y >= 0
        logits, y = self.logits(x)[scored].float(), y[scored]           # (all n, V), (all n)
        likely = logits.argmax(dim=-1) == y
        log_p = logits.log_softmax(dim=-1).gather(1, y[:, None])[:, 0].double()
        return [part.sum().item() for part in log_p.split(counts)], [part.all().item() for part in likely.split(counts)]

    def logits(self, x):
        """x (B, T) -> logits (B, T, V), under the budgets if there are any."""
        with devices.autocast(self._device, self.dtype):
            if self.budgets is None:
                return self.model(x, x)[0]
            cache = self.cache(len(x))
            return torch.cat([self.model(rows, rows, cache=cache)[0] for rows in x.split(64, dim=1)], dim=1)

    def check(self, *tokens):
        if max(t.max() for t in tokens) >= self.model.config.vocab_size:
            raise UserError(f'{self.name}: its tokenizer has more tokens than its vocabulary of '
                            f'{self.model.config.vocab_size}')

    # ------------------------------------------------------------------------- texts

    @torch.no_grad()
    def generate_until(self, requests, disable_tqdm=False):
        """The text that the model writes after each context, up to a stop sequence. Contexts of the same number of
        tokens make a batch; a context that leaves no room for the text loses its beginning."""
        groups, texts = collections.defaultdict(list), [None] * len(requests)
        for r, (context, settings) in enumerate(request.args for request in requests):
            groups[json.dumps(settings, sort_keys=True), len(self.tok_encode(context))].append(r)
        batches = [group[i:i + self.batch_size] for group in groups.values()
                   for i in range(0, len(group), self.batch_size)]
        for batch in tqdm(batches, desc=f'{self.name}: generate_until', disable=None):
            contexts = [requests[r].args[0] for r in batch]
            for r, text in zip(batch, self.write(contexts, requests[batch[0]].args[1])):
                texts[r] = text
                self.cache_hook.add_partial('generate_until', requests[r].args, text)
        return texts

    def room(self, n):
        """How many tokens of a context are read where n are to be written."""
        room = self.size - n if n < self.size else self.size // 2       # past block_size the window slides by half
        return max(1, room - self.bos)

    def write(self, contexts, settings):
        """Texts after contexts that have the same number of tokens."""
        given = normalize_gen_kwargs(settings)
        stop, n = handle_stop_sequences(given.pop('until'), eos=None), given.pop('max_gen_toks')
        temperature, top_k = given.pop('temperature', 0.0) * given.pop('do_sample'), given.pop('top_k', None)
        for key, value in given.items():
            if value not in IGNORED.get(key, ()):
                raise UserError(f'{self.name}: the task wants generation with {key}={value!r}, which it does not have')
        ids = torch.tensor([self.tok_encode(context) for context in contexts], dtype=torch.long)
        prefix = torch.full((len(ids), 1), self.eot_token_id)
        ids = ids[:, -self.room(n):]
        ids = torch.cat([prefix, ids], dim=1) if self.bos or not ids.size(1) else ids
        self.check(ids)
        tokens, texts = [[] for _ in contexts], [''] * len(contexts)
        done = [False] * len(contexts)
        with devices.autocast(self._device, self.dtype):
            for new in stream(self.model, ids.to(self._device), n, temperature, top_k, cache=self.cache(len(ids))):
                for b, token in enumerate(new[:, 0].tolist()):
                    if not done[b]:
                        if token < self.tokenizer.n_vocab and token != self.eot_token_id:
                            tokens[b].append(token)         # a padded vocabulary has tokens without text
                            texts[b] = self.tokenizer.decode(tokens[b])
                        done[b] = token == self.eot_token_id or any(s and s in texts[b] for s in stop)
                if all(done):
                    break
        for s in filter(None, stop):
            texts = [text.split(s)[0] for text in texts]
        return texts
