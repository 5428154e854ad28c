"""Passkey retrieval as a task of lm-evaluation-harness: a number among repeated sentences.

The wording is that of Mohtashami and Jaggi (arXiv 2305.16300). `length` counts characters, so that
models with different tokenizers read the same text. The answer is right when each of its tokens is
the most likely one.
"""

import random

INTRO = (
    'There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. '
    'I will quiz you about the important information there.\n'
)
FILLER = (
    'The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. '
)
KEY = '\nThe pass key is {0}. Remember it. {0} is the pass key.\n'
QUESTION = '\nWhat is the pass key? The pass key is'


def prompts(length, keys):
    """Prompts of exactly `length` characters, with `keys` numbers at each depth, as dictionaries.

    The depth is how many percent of the filler come before the number: 0, 25, 50, 75 or 100.
    """
    rng = random.Random(1337)
    filler = FILLER * length
    items = []
    for depth in range(0, 101, 25):
        for _ in range(keys):
            number = rng.randint(10_000, 50_000)
            key = KEY.format(number)
            room = length - len(INTRO + key + QUESTION)
            if room < 0:
                raise ValueError(f'length {length} is too short for the prompt')
            before = room * depth // 100
            text = INTRO + filler[:before] + key + filler[: room - before] + QUESTION
            items.append({'text': text, 'key': number, 'depth': depth})
    return items


def docs(length=1000, keys=20, **_):
    """The data set of the harness; see `prompts`."""
    import datasets

    return {'test': datasets.Dataset.from_list(prompts(length, keys))}


def results(doc, answers):
    """Accuracy over all prompts, and for each depth."""
    _, right = answers[0]
    return {'acc': right, f'depth_{doc["depth"]}': right}
