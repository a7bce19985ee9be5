"""The main job in small, without any network: from raw text to a question-answering model that any Transformers loads.

Trains a tokenizer and a factorized BERT on the Python language reference, first on short sequences: with AdamW and
Frobenius decay of the heads' output-value products, for FLAMBe is made for larger batches. It is then fine-tuned on
questions made from that text, beside a model of the same shape that was not pretrained; the factors are multiplied
back, and the merged model is checked to give the same answers.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForMaskedLM, AutoModelForQuestionAnswering, BertForQuestionAnswering

from hf_fnl import FactorizedBertConfig, FactorizedBertForQuestionAnswering
from hf_fnl.optim.diagnostics import parameter_count
from hf_fnl.report import write_report
from hf_fnl.scripts import evaluate_squad, finetune_squad, pretrain_bert
from hf_fnl.tasks.embedded import embedded_documents
from hf_fnl.tasks.tokenization import load_tokenizer
from hf_fnl.training.command_line import UsageError, run_script
from hf_fnl.utils.files import check_writable, write_json

PRETRAINING = """
    --dataset embedded --max_seq_length {length} --max_steps {steps} --learning_rate 4e-3 --warmup_steps 0.1
    --next_sentence false --mlm_probability 0.3 --dropout 0
    --vocab_size 2000 --hidden_size 128 --num_hidden_layers 4 --num_attention_heads 4
    --qk_rank 16 --ov_rank 16 --ffn_rank 64 --embedding_rank 64
    --optim adamw_torch --adam_beta2 0.98
    --weight_decay 0.01 --frobenius_decay ov --frobenius_mode decoupled
    --per_device_train_batch_size {batch} --logging_steps 50 --diagnostics_steps 50
    --save_strategy no --report_to {report_to} --use_cpu --output_dir {folder}/{run}
"""
FINE_TUNING = """
    --model {folder}/{model} --train_dataset embedded --max_seq_length 160 --doc_stride 32
    --learning_rate 1e-3 --num_train_epochs {epochs}
    --per_device_train_batch_size 16 --per_device_eval_batch_size 32 --logging_steps 25 --diagnostics_steps 25
    --save_strategy no --report_to {report_to} --use_cpu --output_dir {folder}/{run}
"""
SENTENCES = (
    "If the name is not found, a ___ exception is raised.",
    "The for ___ is used to iterate over the elements of a sequence.",
    "A class definition is an executable ___ .",
)
EVALUATION = """
    --model {folder}/merged --dataset embedded --max_seq_length 160 --doc_stride 32
    --output_dir {folder}/merged_evaluation
"""


@contextlib.contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Announce a part of the job and note how long it took."""
    print(f"\n=== {name}", flush=True)
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


def fine_tune(options: argparse.Namespace, names: dict[str, str], model: str, run: str) -> dict[str, Any]:
    """Fine-tune a model on the questions, and return what it scores."""
    flags = FINE_TUNING.format(**vars(options), **names, model=model, run=run)
    return finetune_squad.main(shlex.split(flags))


def untrained(source: Path, target: Path) -> None:
    """Write a model of the same shape and tokenizer with weights that were drawn anew."""
    torch.manual_seed(0)
    FactorizedBertForQuestionAnswering(FactorizedBertConfig.from_pretrained(source)).save_pretrained(target)
    load_tokenizer(source).save_pretrained(target)


@torch.inference_mode()
def what_was_learned(folder: Path) -> dict[str, float]:
    """Fill in masked words before the eyes, and compare the loss of word pieces with what their frequencies give.

    Returns:
        The entropy of the corpus's word pieces, which is the loss of a model that knows their frequencies only, and the
        mean loss of every tenth word piece, masked, in nats.
    """
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(folder).eval(), load_tokenizer(folder)
    ids = [
        i
        for text in embedded_documents()
        for i in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    ]
    counts = torch.tensor(ids).bincount().double()
    rates = counts[counts > 0] / counts.sum()
    blocks = torch.tensor(ids[: len(ids) // 126 * 126]).view(-1, 126)
    ends = [torch.full((len(blocks), 1), i) for i in (tokenizer.cls_token_id, tokenizer.sep_token_id)]
    blocks = torch.cat([ends[0], blocks, ends[1]], 1)
    masked = torch.zeros_like(blocks, dtype=torch.bool)
    masked[:, 5:-1:10] = True
    inputs, losses = blocks.masked_fill(masked, tokenizer.mask_token_id), []
    for batch, hidden, wanted in zip(inputs.split(32), masked.split(32), blocks.split(32), strict=True):
        logits = model(input_ids=batch).logits[hidden]
        losses.append(torch.nn.functional.cross_entropy(logits, wanted[hidden], reduction="none"))
    print()
    for sentence in SENTENCES:
        encoded = tokenizer(sentence.replace("___", tokenizer.mask_token), return_tensors="pt")
        (place,) = (encoded["input_ids"][0] == tokenizer.mask_token_id).nonzero()[0]
        best = model(**encoded).logits[0, place].topk(3).indices.tolist()
        print(f"{sentence}   {', '.join(tokenizer.decode([i]).strip() for i in best)}")
    return {"entropy": float(-(rates * rates.log()).sum()), "loss": float(torch.cat(losses).mean())}


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
    parser.add_argument("--steps", type=int, default=1500, help="pretraining steps at length 32")
    parser.add_argument("--long_steps", type=int, default=400, help="pretraining steps at length 128")
    parser.add_argument("--epochs", type=float, default=3, help="fine-tuning epochs")
    options = parser.parse_args(argv)
    folder = options.output_dir
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"--output_dir {folder} exists and is not empty: move it away, or give another one")
    check_writable("output_dir", folder)
    has_plots, has_tensorboard = (importlib.util.find_spec(name) is not None for name in ("matplotlib", "tensorboard"))
    if not (has_plots and has_tensorboard):
        print('no reports or TensorBoard logs will be made without: pip install "hf_fnl[plots]"')
    names = {"folder": shlex.quote(str(folder)), "report_to": "tensorboard" if has_tensorboard else "none"}
    seconds: dict[str, float] = {}
    with timed(seconds, "pretraining"):
        short = {"length": 32, "steps": options.steps, "batch": 32, "run": "short"}
        pretrain_bert.main(shlex.split(PRETRAINING.format(**names, **short)))
        long = {"length": 128, "steps": options.long_steps, "batch": 16, "run": "pretrained"}
        pretrain_bert.main(shlex.split(f"{PRETRAINING} --init_from {{folder}}/short".format(**names, **long)))
    words = what_was_learned(folder / "pretrained")
    with timed(seconds, "fine-tuning for questions"):
        squad = fine_tune(options, names, "pretrained", "squad")
    untrained(folder / "pretrained", folder / "untrained")
    with timed(seconds, "the same without pretraining"):
        scratch = fine_tune(options, names, "untrained", "squad_untrained")
    with timed(seconds, "merging and evaluating the stock model"):
        merge(folder / "squad", folder / "merged")
        merged = evaluate_squad.main(shlex.split(EVALUATION.format(**names)))
        agreement = same_answers(folder / "squad", folder / "merged_evaluation")
    if agreement < 1:
        raise SystemExit(f"the merged model gave other answers to {1 - agreement:.1%} of the questions")
    pages = [write_report([folder / run], folder / f"{run}.html") for run in ("pretrained", "squad") if has_plots]
    stock = BertForQuestionAnswering.from_pretrained(folder / "merged")
    figures = {
        "parameters, factorized": int(squad["parameters"]["total"]),
        "parameters, merged": int(parameter_count(stock)["total"]),
        "entropy of word pieces, nats": words["entropy"],
        "loss of masked word pieces, nats": words["loss"],
        "exact match, not pretrained": scratch["exact_match"],
        "exact match, pretrained": squad["exact_match"],
        "exact match, merged": merged["exact_match"],
        "F1, not pretrained": scratch["f1"],
        "F1, pretrained": squad["f1"],
        "F1, merged": merged["f1"],
        "same answers after merging": agreement,
        **{f"seconds, {name}": value for name, value in seconds.items()},
    }
    write_json(folder / "summary.json", figures)
    print_summary(folder, figures, pages)
    return figures


def print_summary(folder: Path, figures: dict[str, Any], pages: list[Path]) -> None:
    """Print the figures as a table, and where everything lies."""
    width = max(map(len, figures))
    shown = {name: f"{value:,}" if isinstance(value, int) else f"{value:,.2f}" for name, value in figures.items()}
    print("\n" + "\n".join(f"{name:<{width}}  {value:>10}" for name, value in shown.items()))
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
