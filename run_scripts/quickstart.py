"""The main job in small, without any network: from raw text to a question-answering model that any Transformers loads.

Trains a tokenizer and a factorized BERT with FLAMBe on the Python language reference, fine-tunes it on questions made
from that text, evaluates, multiplies the factors back, and checks that the merged model gives the same answers.
"""

from __future__ import annotations

import before_imports  # noqa: F401

# isort: split
import argparse
import contextlib
import importlib.util
import json
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import evaluate_squad
import finetune_squad
import pretrain_bert
from transformers import AutoModelForQuestionAnswering, BertForQuestionAnswering

from hf_fnl.optim.diagnostics import parameter_count
from hf_fnl.report import write_report
from hf_fnl.tasks.tokenization import load_tokenizer
from hf_fnl.training.command_line import UsageError, parse_flags, run_script
from hf_fnl.utils.files import check_writable, write_json

PRETRAINING = """
    --dataset embedded --vocab_size 4000 --phases 128:{steps} 512:{long_steps}:1e-3
    --hidden_size 128 --num_hidden_layers 4 --num_attention_heads 4
    --qk_rank 16 --ov_rank 16 --ffn_rank 64 --embedding_rank 64
    --optim flambe --learning_rate 4e-3 --weight_decay 0.01 --warmup_steps 0.1
    --per_device_train_batch_size 16 --logging_steps 10 --diagnostics_steps 10
    --save_strategy no --report_to {report_to} --use_cpu --output_dir {folder}/pretrained
"""
FINE_TUNING = """
    --model {folder}/pretrained --train_dataset embedded --max_seq_length 256 --doc_stride 64
    --learning_rate 1e-3 --num_train_epochs {epochs}
    --per_device_train_batch_size 16 --per_device_eval_batch_size 32 --logging_steps 10 --diagnostics_steps 10
    --save_strategy no --report_to {report_to} --use_cpu --output_dir {folder}/squad
"""
EVALUATION = """
    --model {folder}/merged --dataset embedded --max_seq_length 256 --doc_stride 64
    --output_dir {folder}/merged_evaluation
"""


@contextlib.contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Announce a part of the job and note how long it took."""
    print(f"\n=== {name}", flush=True)
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


def merge(source: Path, target: Path) -> None:
    """Write the stock model that computes the same as the factorized one in ``source``."""
    AutoModelForQuestionAnswering.from_pretrained(source).merge().save_pretrained(target)
    load_tokenizer(source).save_pretrained(target)


def same_answers(first: Path, second: Path) -> float:
    """Share of questions to which two evaluations gave the same answer."""
    answers = [json.loads((folder / "predictions.json").read_text()) for folder in (first, second)]
    return sum(answers[0][key] == answers[1][key] for key in answers[0]) / len(answers[0])


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run everything, print a table, and return the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("quickstart_run"), help="where everything goes")
    parser.add_argument("--steps", type=int, default=500, help="pretraining steps at length 128")
    parser.add_argument("--long_steps", type=int, default=20, help="pretraining steps at length 512")
    parser.add_argument("--epochs", type=float, default=3, help="fine-tuning epochs")
    options = parse_flags(parser, argv)
    folder = options.output_dir
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"--output_dir {folder} exists and is not empty: move it away, or give another one")
    check_writable("output_dir", folder)
    has_plots, has_tensorboard = (importlib.util.find_spec(name) is not None for name in ("matplotlib", "tensorboard"))
    if not (has_plots and has_tensorboard):
        print('no reports or TensorBoard logs will be made without: pip install "hf_fnl[plots]"')
    names = {"folder": shlex.quote(str(folder)), "report_to": "tensorboard" if has_tensorboard else "none"}
    seconds: dict[str, float] = {}
    with timed(seconds, "pretraining with FLAMBe"):
        pretrained = pretrain_bert.main(shlex.split(PRETRAINING.format(**vars(options), **names)))
    with timed(seconds, "fine-tuning for questions"):
        squad = finetune_squad.main(shlex.split(FINE_TUNING.format(**vars(options), **names)))
    with timed(seconds, "merging and evaluating the stock model"):
        merge(folder / "squad", folder / "merged")
        merged = evaluate_squad.main(shlex.split(EVALUATION.format(**names)))
        agreement = same_answers(folder / "squad", folder / "merged_evaluation")
    if agreement < 1:
        raise SystemExit(f"the merged model gave other answers to {1 - agreement:.1%} of the questions")
    pages = [write_report([folder / run], folder / f"{run}.html") for run in ("pretrained", "squad") if has_plots]
    stock = BertForQuestionAnswering.from_pretrained(folder / "merged")
    figures = {
        "parameters, factorized": squad["parameters"]["total"],
        "parameters, merged": parameter_count(stock)["total"],
        "pretraining loss, length 128": pretrained["phase-1"]["train_loss"],
        "exact match, factorized": squad["exact_match"],
        "exact match, merged": merged["exact_match"],
        "F1, factorized": squad["f1"],
        "F1, merged": merged["f1"],
        "same answers": agreement,
        **{f"seconds, {name}": value for name, value in seconds.items()},
    }
    write_json(folder / "summary.json", figures)
    print_summary(folder, figures, pages)
    return figures


def print_summary(folder: Path, figures: dict[str, Any], pages: list[Path]) -> None:
    """Print the figures as a table, and where everything lies."""
    width = max(map(len, figures))
    print("\n" + "\n".join(f"{name:<{width}}  {value:>12,.4g}" for name, value in figures.items()))
    places = {
        "factorized BERT": folder / "pretrained",
        "question answering": folder / "squad",
        "merged stock model": folder / "merged",
        "figures": folder / "summary.json",
        **({"reports": ", ".join(map(str, pages)), "TensorBoard": f"tensorboard --logdir {folder}"} if pages else {}),
    }
    print("\n" + "\n".join(f"{name:<{width}}  {place}" for name, place in places.items()))


if __name__ == "__main__":
    run_script(main)
