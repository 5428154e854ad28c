"""A tokenizer.json of Hugging Face as a tiktoken.Encoding: byte-level BPE, of Llama 3, SmolLM2, …

Data sets and checkpoints keep such a tokenizer whole, as a text, so that they need no other file,
and two of them are the same if the texts are. The text is JSON:

    pattern     a regular expression that cuts text into the pieces to tokenize
    tokens      the tokens in the order of their numbers, spelled as in tokenizer.json; '': special
    special     {name: number} of those that no text becomes, <|endoftext|> among them
"""

import functools
import json

import tiktoken

from support import files
from support.settings import UserError

END_OF_TEXT = '<|endoftext|>'
# The file spells bytes as GPT-2 does. Those that are not printable are letters, too.
LETTERS = dict(zip([*range(33), *range(127, 161), 173], range(256, 324)))
BYTES = {chr(LETTERS.get(b, b)): b for b in range(256)}

# How ByteLevel cuts text, and how it cuts what stays when each digit has been cut out before it.
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"


class Encoding(tiktoken.Encoding):
    """Leaves out bytes that the vocabulary lacks, such as control characters, as transformers does.

    tiktoken needs all bytes, so these have numbers beyond the vocabulary.
    """

    def encode_ordinary(self, text):
        return [token for token in super().encode_ordinary(text) if token < self.n_vocab]


@functools.lru_cache
def encoding(text):
    """The tiktoken.Encoding of a text that `read` returned. UserError where it is damaged."""
    try:
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
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f'the tokenizer of the data set or checkpoint is damaged ({e!r})') from None
    made.max_token_value = size - 1
    return made


def read(folder):
    """The tokenizer.json of a folder as a text that needs no other file.

    Raises UserError if there is none, or one that is no byte-level BPE or cuts text in a way that
    is unknown here. <|endoftext|> is the token of that name, or else the eos_token of
    tokenizer_config.json.
    """
    path = f'{folder}/tokenizer.json'
    hint = 'it must be a byte-level BPE'
    found = files.read_json(path, hint, model=dict, added_tokens=[dict])
    try:
        pattern = pattern_of(found)
        added = {token['content']: token['id'] for token in found['added_tokens']}
        numbers = {**found['model']['vocab'], **added}
        made = [byte for byte in BYTES if byte in numbers]
        last = -1
        for pair in found['model']['merges']:
            left, right = pair.split(' ') if isinstance(pair, str) else pair
            made.append(left + right)
            number = numbers[left + right]
            if number < last:  # tiktoken merges what has the lowest number first
                raise ValueError('its merges are not in the order of their tokens')
            last = number
        tokens = [''] * len(numbers)
        for token in made:
            tokens[numbers[token]] = token
        special = {token: n for token, n in numbers.items() if not tokens[n]}
        if END_OF_TEXT not in special:
            end = files.read_json(f'{folder}/tokenizer_config.json', 'it must name the eos_token')
            end = end['eos_token']
            if isinstance(end, dict):
                end = end['content']
            special[END_OF_TEXT] = special.pop(end)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
        raise UserError(f'{path} cannot be used ({e!r}): {hint}') from None
    return json.dumps({'pattern': pattern, 'tokens': tokens, 'special': special})


def pattern_of(found):
    """The regular expression that cuts text as a tokenizer.json does. ValueError if unknown."""
    model = found['model']
    if model['type'] != 'BPE' or model.get('byte_fallback'):
        raise ValueError('it is no byte-level BPE')
    for name in 'dropout', 'continuing_subword_prefix', 'end_of_word_suffix':
        if model.get(name):
            raise ValueError(f'{name} is unknown here')
    if found.get('normalizer'):
        raise ValueError('it normalizes text, which is unknown here')
    *before, last = found['pre_tokenizer'].get('pretokenizers', [found['pre_tokenizer']])
    if last['type'] == 'ByteLevel' and not last['add_prefix_space']:
        words = last.get('use_regex', True)
        if words and not before:
            return WORDS
        if len(before) == 1:
            first = before[0]
            if words and first == {'type': 'Digits', 'individual_digits': True}:
                return DIGITS
            regex = first.get('pattern', {}).get('Regex')
            if not words and regex and first['behavior'] == 'Isolated' and not first['invert']:
                # what the expression does not match is a piece, too
                return rf'{regex}|(?:(?!{regex})[\s\S])+'
    raise ValueError('how it cuts text is unknown here')
