"""Passkey retrieval as a task of lm-evaluation-harness: a number among repeated sentences.

The wording is that of Mohtashami and Jaggi (arXiv 2305.16300). `length` counts characters, so that
models with different tokenizers read the same text. The answer is right when each of its tokens is
the most likely one.
"""

import random

import datasets

INTRO = (
    'There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. '
    'I will quiz you about the important information there.\n'
)
FILLER = (
    'The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. '
)
KEY = '\nThe pass key is {0}. Remember it. {0} is the pass key.\n'
QUESTION = '\nWhat is the pass key? The pass key is'
DEPTHS = 0, 25, 50, 75, 100  # percent of the filler that comes before the number


def docs(length=1000, keys=20, seed=1337, **_):
    """The data set: `keys` numbers at each depth, in prompts of exactly `length` characters."""
    rng = random.Random(seed)
    items = []
    for depth in DEPTHS:
        for _ in range(keys):
            number = str(rng.randint(10_000, 50_000))
            key = KEY.format(number)
            room = length - len(INTRO + key + QUESTION)
            if room < 0:
                raise ValueError(f'length {length}: the prompt alone has {length - room}')
            filler = FILLER * (room // len(FILLER) + 1)
            before = room * depth // 100
            text = INTRO + filler[:before] + key + filler[: room - before] + QUESTION
            items.append({'text': text, 'key': number, 'depth': depth})
    return {'test': datasets.Dataset.from_list(items)}


def results(doc, answers):
    """Accuracy over all prompts, and for each depth."""
    _, right = answers[0]
    return {'acc': right, f'depth_{doc["depth"]}': right}
