"""Translate sentences, one a line, by beam search with a model of any encoder-decoder architecture.

python run_scripts/translate.py --model runs/phrases < sentences.de > sentences.en
python run_scripts/translate.py --model Helsinki-NLP/opus-mt-de-en --input sentences.de --output sentences.en
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from transformers import AutoModelForSeq2SeqLM

import hf_fnl  # noqa: F401  registers the factorized models
from hf_fnl.processes import leave
from hf_fnl.training.files import write_text
from hf_fnl.training.runs import parse_arguments
from hf_fnl.training.tasks.beam_search import translate
from hf_fnl.training.tasks.tokenization import load_tokenizer
from hf_fnl.training.tasks.translation import read_lines


@dataclass
class TranslateOptions:
    """What translates, what, and how."""

    model: str = field(metadata={"help": "Hub id or folder of a translation model, factorized or stock."})
    input: str | None = field(default=None, metadata={"help": "Text with a sentence a line. Default: standard input."})
    output: str | None = field(default=None, metadata={"help": "File to write. Default: standard output."})
    num_beams: int = field(default=5, metadata={"help": "Width of the beam search."})
    length_penalty: float = field(default=1.0, metadata={"help": "Above 1 favours long translations."})
    max_tokens: int = field(default=4096, metadata={"help": "Source tokens of a batch at most, padding included."})
    use_cpu: bool = field(default=False, metadata={"help": "Leave an accelerator alone."})


def main(argv: list[str] | None = None) -> dict[str, int]:
    """Parse, build, run; returns how many sentences there were."""
    (options,) = parse_arguments(argv, TranslateOptions)
    if options.input and not Path(options.input).is_file():
        raise FileNotFoundError(f"no such file: {options.input}")
    sentences = read_lines(Path(options.input)) if options.input else [line.rstrip("\n") for line in sys.stdin]
    model = AutoModelForSeq2SeqLM.from_pretrained(options.model).to(PartialState(cpu=options.use_cpu).device)
    translations = translate(
        model,
        load_tokenizer(options.model),
        sentences,
        num_beams=options.num_beams,
        length_penalty=options.length_penalty,
        max_tokens=options.max_tokens,
    )
    lines = "".join(f"{translation}\n" for translation in translations)
    if options.output:
        write_text(options.output, lines)
    else:
        sys.stdout.write(lines)
    return {"sentences": len(sentences)}


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    main()
    leave()
