"""Translate sentences, one a line, by beam search with a model of any encoder-decoder architecture.

hf-fnl translate --model runs/phrases < sentences.de > sentences.en
hf-fnl translate --model Helsinki-NLP/opus-mt-de-en --input sentences.de --output sentences.en
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from transformers import AutoModelForSeq2SeqLM

from hf_fnl.tasks.beam_search import translate
from hf_fnl.tasks.pretrained import load_pretrained
from hf_fnl.tasks.tokenization import load_tokenizer
from hf_fnl.tasks.translation import lines_of
from hf_fnl.training.command_line import check_at_least, named, parse_arguments
from hf_fnl.utils.files import check_writable, write_text


@dataclass
class TranslateOptions:
    """The model, its input and output, and the search."""

    model: str = field(metadata={"help": "Hub id or folder of a translation model, factorized or stock."})
    input: str | None = field(default=None, metadata={"help": "Text with a sentence a line. Default: standard input."})
    output: str | None = field(default=None, metadata={"help": "File to write. Default: standard output."})
    num_beams: int = field(default=5, metadata={"help": "Width of the beam search."})
    length_penalty: float = field(default=1.0, metadata={"help": "Above 1 favours long translations."})
    max_tokens: int = field(default=4096, metadata={"help": "Source tokens of a batch at most, padding included."})
    use_cpu: bool = field(default=False, metadata={"help": "Leave an accelerator alone."})

    def __post_init__(self) -> None:
        check_at_least(1, self, "num_beams", "max_tokens")

    def sentences(self) -> list[str]:
        """The lines of the input."""
        if self.input is None:
            if sys.stdin.isatty():
                print("reading sentences from the terminal, one a line; Ctrl-D ends them", file=sys.stderr)
            return lines_of(sys.stdin.buffer.read(), "standard input")
        if not Path(self.input).is_file():
            raise FileNotFoundError(f"--input {self.input}: there is no such file")
        with named("input", self.input):
            return lines_of(Path(self.input).read_bytes(), self.input)


def main(argv: list[str] | None = None) -> dict[str, int]:
    """Parse, build, run; returns how many sentences there were."""
    (options,) = parse_arguments(argv, TranslateOptions, description=__doc__)
    if options.output:
        check_writable("output", Path(options.output).parent)
    with named("model", options.model):
        tokenizer = load_tokenizer(options.model)
    sentences = options.sentences()
    if not any(sentence.strip() for sentence in sentences):
        print("note: there is nothing to translate: the input has no text", file=sys.stderr)
    model = load_pretrained("model", options.model, AutoModelForSeq2SeqLM, is_trained=True)
    model.to(PartialState(cpu=options.use_cpu).device)
    translations = translate(
        model,
        tokenizer,
        sentences,
        num_beams=options.num_beams,
        length_penalty=options.length_penalty,
        max_tokens=options.max_tokens,
    )
    lines = "".join(f"{translation}\n" for translation in translations)
    if options.output:
        write_text(options.output, lines)
    else:
        sys.stdout.buffer.write(lines.encode("utf-8"))
        sys.stdout.flush()
    return {"sentences": len(sentences)}
