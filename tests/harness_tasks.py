"""Task files of lm-evaluation-harness with data that is made here, for tests/test_evaluate.py."""
import json
from pathlib import Path

import lm_eval.tasks

WORDS = 'the old man and sea went over hill to find a small river of stone'.split()
PIECES = [' '.join(WORDS[(n * k) % len(WORDS)] for k in range(1, 4 + n % 5)) for n in range(60)]
ENDS = [PIECES[n:n + 4] for n in range(0, 60, 4)]
LETTERS = list('ABCD')
ROWS = {        # task: the harness's file, and what it reads
    'wikitext': ('wikitext/wikitext.yaml', [{'page': f' = {a} = \n \n {b} @-@ {c} , ( {d} ) . \n' * 3}
                                            for a, b, c, d in ENDS[:4]]),
    'lambada_openai': ('lambada/lambada_openai.yaml', [{'text': f'{p} {"the" if n % 2 else "sea"}'}
                                                       for n, p in enumerate(PIECES[:20])]),
    'hellaswag': ('hellaswag/hellaswag.yaml', [{'activity_label': 'Walk', 'ctx_a': f'{e[0]} [title]', 'ctx_b': 'he',
                                                'endings': e, 'label': str(n % 4)} for n, e in enumerate(ENDS)]),
    'piqa': ('piqa/piqa.yaml', [{'goal': e[0], 'sol1': e[1], 'sol2': e[2], 'label': n % 2}
                                for n, e in enumerate(ENDS)]),
    'winogrande': ('winogrande/default.yaml', [{'sentence': f'{e[0]} _ {e[1]}', 'option1': 'the man', 'option2': 'sea',
                                                'answer': str(1 + n % 2)} for n, e in enumerate(ENDS)]),
    'arc_easy': ('arc/arc_easy.yaml', [{'question': e[0], 'choices': {'text': e, 'label': LETTERS},
                                        'answerKey': LETTERS[n % 4]} for n, e in enumerate(ENDS)]),
    'triviaqa': ('triviaqa/default.yaml', [{'question': p, 'answer': {'aliases': [p, 'sea']}} for p in PIECES[:9]]),
}
OWN = '''task: arc_easy_3
include: arc_easy.yaml
num_fewshot: 3
fewshot_split: test
'''


def make_tasks(folder):
    """The harness's task files with their data from files in the folder; returns the tasks' names."""
    root = Path(lm_eval.tasks.__file__).parent
    for task, (file, rows) in ROWS.items():
        (folder / f'{task}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
        more = 'generation_kwargs: {until: ["e", "."], max_gen_toks: 12, do_sample: false}\n' * (task == 'triviaqa')
        (folder / f'{task}.yaml').write_text(
            f'include: {root / file}\ntask: {task}\ntag: null\ndataset_path: json\ndataset_name: null\n'
            f'dataset_kwargs: {{data_files: {{test: {folder / task}.jsonl}}}}\n'
            f'training_split: null\nvalidation_split: null\ntest_split: test\n{more}')
    (folder / 'own.yaml').write_text(OWN)
    return [*ROWS, 'arc_easy_3']
