"""Minutes to a masked-language-modelling loss on Wikipedia: stock BERT with AdamW and with LAMB, ours with FLAMBe.

Each is trained once on the same sequences, by ``run_scripts/pretrain_bert.py``, and evaluated on held-out articles as
it goes. What else a machine does meanwhile, it does to one of them; so the time of a whole update (forward, backward,
clipping, optimizer) is measured apart from that, for all of them in turns, and minutes are updates times its median.

    python -m benchmarks.time_to_loss --data ../shared/data --runs runs/time_to_loss
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.harness.grids import run_once
from benchmarks.harness.machine import machine
from benchmarks.harness.record import command_line, write_result
from benchmarks.harness.tables import write_table
from benchmarks.harness.timing import interleave, ratio
from hf_fnl.report.drawing import draw
from hf_fnl.report.sections import PALETTE, Line, Panel
from hf_fnl.utils.files import write_bytes

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "time_to_loss.json"
LOW_RANK = "--qk_rank 32 --ov_rank 32 --ffn_rank 64"
ADAMW, LAMB = "--learning_rate 1e-3", "--learning_rate 1e-2"  # at twice these rates the factorized models do not train
CELLS = {
    "stock BERT, AdamW": f"--stock true --optim adamw_torch_fused {ADAMW}",
    "stock BERT, LAMB": f"--stock true --optim lamb {LAMB}",
    "factorized BERT, AdamW": f"{LOW_RANK} --optim adamw_torch_fused {ADAMW}",
    "factorized BERT, FLAMBe": f"{LOW_RANK} --optim flambe --frobenius_decay qk ov linear {LAMB}",
}
REFERENCE = "stock BERT, AdamW"
LENGTH, BATCH, WARMUP = 32, 128, 100  # short: where positions are few, attention soon finds its neighbours

Curve = list[tuple[int, float]]


def flags(cell: str, options: argparse.Namespace, run: Path) -> list[str]:
    """Options of ``pretrain_bert.py`` for a cell."""
    data = options.data
    text = f"""
        --dataset {data}/wikipedia/train.parquet --validation_dataset {data}/wikipedia/validation.parquet
        --max_validation_documents 20 --vocab_size 8192
        --max_seq_length {LENGTH} --max_steps {options.steps} --next_sentence false
        --hidden_size 256 --num_hidden_layers 4 --num_attention_heads 4 --dropout 0 {CELLS[cell]}
        --warmup_steps {WARMUP} --lr_scheduler_type constant_with_warmup
        --weight_decay 0.01 --per_device_train_batch_size {BATCH} --per_device_eval_batch_size {BATCH}
        --logging_steps 50 --eval_strategy steps --eval_steps 100 --save_steps 500 --save_total_limit 1
        --bf16 --use_cpu --seed 42 --report_to none --disable_tqdm true
        --output_dir {run} --resume_from_checkpoint true
    """
    return text.split()


def slug(cell: str) -> str:
    """Name of a cell's folder."""
    return cell.lower().replace(",", "").replace(" ", "-")


def train(cell: str, options: argparse.Namespace) -> tuple[Curve, dict[str, Any]]:
    """Train a cell, or go on with it; its losses on held-out articles by update, its command and commit."""
    run = options.runs / slug(cell)
    metrics = run_once(["run_scripts/pretrain_bert.py", *flags(cell, options, run)], run / "metrics.json")
    state = json.loads((run / "trainer_state.json").read_text())
    curve = [(entry["step"], entry["eval_mlm_loss"]) for entry in state["log_history"] if "eval_mlm_loss" in entry]
    return curve, {key: metrics[key] for key in ("command", "commit")}


def update(cell: str, options: argparse.Namespace) -> Callable[[], object]:
    """A whole update of a cell's trained model, on batches of its own data."""
    from transformers import DataCollatorForTokenClassification

    from hf_fnl.scripts.pretrain_bert import DataOptions, ModelOptions, build_model
    from hf_fnl.tasks.pretraining import build_pretraining_dataset
    from hf_fnl.tasks.pretraining_examples import PretrainingOptions
    from hf_fnl.tasks.tokenization import load_tokenizer
    from hf_fnl.training import FLAMBeTrainingArguments
    from hf_fnl.training.command_line import parse_arguments
    from hf_fnl.training.trainer import build_optimizer

    run = options.runs / slug(cell)
    given = flags(cell, options, run)
    sizes, data, args = parse_arguments(given, ModelOptions, DataOptions, FLAMBeTrainingArguments)
    tokenizer = load_tokenizer(str(run))
    sizes.init_from = str(run)
    model = build_model(sizes, data.next_sentence, tokenizer).train()
    optimizer = build_optimizer(model, args)
    examples = build_pretraining_dataset(
        data.validation(), tokenizer, PretrainingOptions(max_seq_length=LENGTH, next_sentence=False, seed=args.seed)
    )
    loader = torch.utils.data.DataLoader(
        examples, BATCH, collate_fn=DataCollatorForTokenClassification(tokenizer), drop_last=True
    )
    batches = _forever(loader)

    def step() -> None:
        batch = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _forever(loader: Any) -> Iterator[Any]:
    batches = list(loader)
    while True:
        yield from batches


def first_below(curve: Curve, loss: float) -> float | None:
    """The update at which a loss is reached, between two evaluations on the straight line."""
    for (before, high), (after, low) in itertools.pairwise(curve):
        if low <= loss:
            return before if high <= loss else before + (after - before) * (high - loss) / (high - low)
    return None


def draw_curves(rows: Sequence[dict[str, Any]], curves: dict[str, Curve], target: Path) -> None:
    """Losses by updates and by minutes."""

    def panel(xlabel: str, scale: Callable[[dict[str, Any]], float]) -> Panel:
        lines = [
            Line(row["case"], [(step * scale(row), loss) for step, loss in curves[row["case"]]], colour)
            for row, colour in zip(rows, PALETTE, strict=False)
        ]
        return Panel("MLM loss on held-out articles", xlabel, "loss", lines)

    panels = [panel("updates", lambda row: 1), panel("minutes", lambda row: row["seconds_per_update"] / 60)]
    write_bytes(target, draw(panels, "png"))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train what is missing, time updates, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the real data sets")
    parser.add_argument("--runs", type=Path, default=Path("runs/time_to_loss"), help="where models and logs go")
    parser.add_argument("--steps", type=int, default=1500, help="updates of every cell")
    parser.add_argument("--losses", type=float, nargs="+", default=[6.0, 5.5, 5.2], help="losses to reach")
    parser.add_argument("--only", choices=CELLS, help="train this one and stop")
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    trained = {cell: train(cell, options) for cell in ([options.only] if options.only else CELLS)}
    if options.only:
        return {}
    seconds = interleave({cell: update(cell, options) for cell in CELLS}, "cpu", rounds=25, warmup=3)
    rows: list[dict[str, Any]] = []
    for cell, (curve, origin) in trained.items():
        pace = median(seconds[cell])
        row = {"case": cell, "seconds_per_update": pace, "speed_of_an_update": ratio(seconds[REFERENCE], seconds[cell])}
        for loss in options.losses:
            updates = first_below(curve, loss)
            row |= {f"updates to {loss:g}": updates, f"minutes to {loss:g}": updates and updates * pace / 60}
        rows.append(row | {"last_loss": curve[-1][1], **origin})
    curves = {cell: curve for cell, (curve, _) in trained.items()}
    result = {
        "command": command_line("benchmarks.time_to_loss", arguments),
        "machine": machine("cpu"),
        "rows": rows,
        "curves": curves,
    }
    result = write_result(RESULT, result)
    draw_curves(rows, curves, RESULT.with_suffix(".png"))
    write_table(RESULT, rows, result["command"])
    return result


if __name__ == "__main__":
    print(json.dumps(main()["rows"], indent=2))
