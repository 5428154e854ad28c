"""A tokenizer.json of Hugging Face as a tiktoken.Encoding: byte-level BPE, of Llama 3, SmolLM2, …

Data sets and checkpoints keep such a tokenizer whole, as a text, so that they need no other file,
and two of them are the same if the texts are. The text is JSON:

    pattern     a regular expression that cuts text into the pieces to tokenize
    tokens      the tokens in the order of their numbers, spelled as in tokenizer.json; '': special
    special     {name: number} of tokens that no text encodes to, <|endoftext|> among them
"""

import functools
import hashlib
import json
import os

import tiktoken

from support import files
from support.settings import UserError

END_OF_TEXT = '<|endoftext|>'
GPT2 = '19c311984db7bc54'  # of the hash of its tokens
# The file spells bytes as GPT-2 does. Those that are not printable are letters, too.
LETTERS = dict(zip([*range(33), *range(127, 161), 173], range(256, 324)))
BYTES = {chr(LETTERS.get(b, b)): b for b in range(256)}

# How ByteLevel cuts text, and how it cuts what stays when each digit has been cut out before it.
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
REST = r'[\s\S])+'


class Encoding(tiktoken.Encoding):
    """Leaves out bytes that the vocabulary lacks, such as control characters, as transformers does.

    tiktoken needs all bytes, so these have numbers beyond the vocabulary.
    """

    def encode_ordinary(self, text):
        return [token for token in super().encode_ordinary(text) if token < self.n_vocab]


@functools.lru_cache
def encoding(text):
    """The tiktoken.Encoding of a text that `read` returned."""
    found = json.loads(text)
    ranks = {}
    for number, token in enumerate(found['tokens']):
        if token:
            ranks[bytes(BYTES[letter] for letter in token)] = number
    size = len(found['tokens'])
    for n in range(256):
        ranks.setdefault(bytes([n]), size + n)
    made = Encoding(
        text, pat_str=found['pattern'], mergeable_ranks=ranks, special_tokens=found['special']
    )
    made.max_token_value = size - 1
    return made


def read(folder):
    """The name of the tokenizer of a folder, and whether it puts <|endoftext|> in front of texts.

    An export of ours has the name in tokenizer_config.json, and GPT-2's table is 'gpt2'. Any other
    tokenizer.json becomes a text that needs no other file. <|endoftext|> is the token of that name,
    or the one that the file puts in front of texts, or the eos_token of tokenizer_config.json.

    Raises UserError if there is none, or one that is no byte-level BPE or that treats text in a way
    that is unknown here.
    """
    path = f'{folder}/tokenizer.json'
    hint = 'it must be a byte-level BPE'
    found = files.read_json(path, hint, model=dict, added_tokens=list)
    config = {}
    if os.path.isfile(f'{folder}/tokenizer_config.json'):
        config = files.read_json(f'{folder}/tokenizer_config.json', hint)
    try:
        pattern = pattern_of(found)
        numbers = dict(found['model']['vocab'])
        for token in found['added_tokens']:
            numbers[token['content']] = token['id']
            if not token['special']:
                raise ValueError(f'it cuts {token["content"]!r} out of texts')
        merged = [''.join(pair).replace(' ', '') for pair in found['model']['merges']]
        order = [numbers[token] for token in merged]
        if order != sorted(order):  # tiktoken merges what has the lowest number first
            raise ValueError('its merges are not in the order of their tokens')
        tokens = [''] * len(numbers)
        for token in [*numbers.keys() & BYTES.keys(), *merged]:
            tokens[numbers[token]] = token
        special = {token: n for token, n in numbers.items() if not tokens[n]}
        first = first_of(found)
        if END_OF_TEXT not in special:
            end = first or config['eos_token']
            if isinstance(end, dict):
                end = end['content']
            special[END_OF_TEXT] = special.pop(end)
        elif first not in (None, END_OF_TEXT):
            raise ValueError(f'it puts {first!r} in front of texts')
        name = json.dumps({'pattern': pattern, 'tokens': tokens, 'special': special})
        encoding(name)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
        raise UserError(f'{path} cannot be used ({e!r}): {hint}') from None
    if hashlib.sha256(json.dumps(tokens).encode()).hexdigest().startswith(GPT2):
        name = 'gpt2'
    return config.get('tiktoken', name), first is not None


def first_of(found):
    """The special token that a tokenizer.json puts in front of each text, or None."""
    step = found.get('post_processor') or {}
    *_, last = step.get('processors', [step])
    first, *_ = last.get('single', [{}])
    return first.get('SpecialToken', {}).get('id')


def pattern_of(found):
    """The regular expression that cuts text as a tokenizer.json does. ValueError if unknown."""
    if found.get('normalizer'):
        raise ValueError('it normalizes text, which is unknown here')
    parts = found['pre_tokenizer'].get('pretokenizers', [found['pre_tokenizer']])
    for part in parts:
        part.pop('trim_offsets', None)  # concerns offsets in the text, which are not used
    last = {'type': 'ByteLevel', 'add_prefix_space': False, 'use_regex': True}
    if parts == [last]:
        return WORDS
    if parts == [{'type': 'Digits', 'individual_digits': True}, last]:
        return DIGITS
    split = parts[0].get('pattern', {})
    regex = split.get('Regex')
    first = {'type': 'Split', 'pattern': split, 'behavior': 'Isolated', 'invert': False}
    if regex and parts == [first, {**last, 'use_regex': False}]:
        if regex in (WORDS, DIGITS) or regex.endswith(REST):  # of an export by lab.export_hf
            return regex
        # what the expression does not match is a piece, too
        return rf'{regex}|(?:(?!{regex}){REST}'
    raise ValueError('how it cuts text is unknown here')
