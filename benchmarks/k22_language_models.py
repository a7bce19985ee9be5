"""Tables 4 and 7 of Kamalakara et al. 2022 in small: initialization, decay and learning rate of a low-rank GPT-2.

Each cell trains a GPT-2 of 4 layers on Wikipedia articles for the same number of updates and measures its perplexity on
held-out ones. The matrix of queries, keys and values and both feed-forward matrices have 62.5 % of full rank, as in the
paper. Decay is L2, ordinary decay of every matrix and factor, or Frobenius decay of the products with the same
coefficient. Beside them stand the dense model, and one that is dense for the first sixth of the updates and then goes
on at low rank with half the learning rate. The paper trains 240,000 steps on LM1B, with models of 1,024 and wider. The
effective rank is the mean over the products. A run that was broken off goes on.

    python -m benchmarks.k22_language_models --data ../shared/data --runs runs/k22
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

from datasets import load_dataset

from benchmarks.harness.grids import add_cell, run_once
from hf_fnl import FactorizedGPT2LMHeadModel, diagnose, find_products
from hf_fnl.tasks.tokenization import train_byte_bpe

RANK_SCALE = 0.625
LEARNING_RATE = 4e-3
DECAYS = {"L2": "", "Frobenius": "--frobenius_decay linear"}
INITS = ("he", "spectral", "spectral_ones")
VOCAB_SIZE, DOCUMENTS, LENGTH = 4000, 1200, 256
RESULT = Path(__file__).parent / "results" / "k22_language_models_small.json"


class Cell(NamedTuple):
    """One training of the grid."""

    width: int
    form: str  # "low-rank", "dense" or "dense, then low-rank"
    init: str
    decay: str
    lr_scale: float
    seed: int

    @property
    def name(self) -> str:
        """What its folder is called."""
        words = (self.width, self.form, self.init, self.decay, f"{self.lr_scale:g}", self.seed)
        return "-".join(str(word).replace(", ", "_").replace(" ", "_") for word in words)

    def flags(self, steps: int) -> str:
        """The flags that make it what it is."""
        flags = f"--learning_rate {LEARNING_RATE * self.lr_scale} --n_embd {self.width} --n_head {self.width // 32} "
        flags += f"--factor_init {self.init} "
        if self.form != "dense":
            flags += f"--rank_scale {RANK_SCALE} {DECAYS[self.decay]} "
        if self.form == "dense, then low-rank":
            flags += f"--dense_steps {steps // 6} --low_rank_lr_scale 0.5"
        return flags


def grid(widths: list[int], seeds: list[int]) -> list[Cell]:
    """All cells, those of one width and seed after each other."""
    cells = []
    for seed, width in itertools.product(seeds, widths):
        cells.append(Cell(width, "dense", "spectral", "L2", 1.0, seed))
        factors = itertools.product(("low-rank",), INITS, DECAYS, (1.0, 0.5))
        cells += [Cell(width, *factor, seed) for factor in factors]
        cells += [Cell(width, "dense, then low-rank", "spectral", decay, 1.0, seed) for decay in DECAYS]
    return cells


def command(cell: Cell, data: Path, runs: Path, steps: int) -> list[str]:
    """The command that trains and evaluates one cell."""
    flags = f"""
        --dataset {data}/wikipedia/train.parquet --max_documents {DOCUMENTS}
        --validation_dataset {data}/wikipedia/validation.parquet --max_validation_documents 10
        --tokenizer {runs}/tokenizer --n_layer 4 --n_positions {LENGTH} --dropout 0 {cell.flags(steps)}
        --optim adamw_torch --weight_decay 0.1 --lr_scheduler_type cosine --warmup_steps {steps // 10}
        --max_grad_norm 1.0 --per_device_train_batch_size 8 --per_device_eval_batch_size 16 --max_steps {steps}
        --logging_steps 50 --save_steps 200 --save_total_limit 1 --bf16 --use_cpu --seed {cell.seed}
        --report_to none --disable_tqdm true --output_dir {runs}/{cell.name} --resume_from_checkpoint true
    """
    return ["run_scripts/train_clm.py", *flags.split()]


def train_tokenizer(data: Path, folder: Path) -> None:
    """Train the tokenizer of all cells, unless it is there."""
    if not (folder / "tokenizer.json").exists():
        documents = load_dataset("parquet", data_files=str(data / "wikipedia" / "train.parquet"), split="train")
        texts = documents.select(range(DOCUMENTS))["text"]
        train_byte_bpe(texts, vocab_size=VOCAB_SIZE).save_pretrained(folder)


def effective_rank(run: Path) -> float | None:
    """Mean of ``||W||_* / ||W||_op`` over the products of a trained model; ``None`` for a dense one."""
    model = FactorizedGPT2LMHeadModel.from_pretrained(run)
    products = [product for product in find_products(model) if product.kind == "linear"]
    if not products:
        return None
    figures = diagnose(model, products).values()
    return sum(figure["effective_rank"] for figure in figures) / len(products)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the grid and write every cell that is finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the real data sets")
    parser.add_argument("--runs", type=Path, default=Path("runs/k22"), help="where models and logs go")
    parser.add_argument("--steps", type=int, default=300, help="updates of every cell")
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256], help="widths of the model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="seeds to run")
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    train_tokenizer(options.data, options.runs / "tokenizer")
    result: dict[str, Any] = {}
    for cell in grid(options.widths, options.seeds):
        run = options.runs / cell.name
        metrics = run_once(command(cell, options.data, options.runs, options.steps), run / "metrics.json")
        row = {
            "width": cell.width,
            "form": cell.form,
            "init": None if cell.form == "dense" else cell.init,
            "decay": cell.decay,
            "lr scaling": cell.lr_scale,
            "seed": cell.seed,
            "updates": options.steps,
            "parameters": metrics["parameters"]["total"],
            "perplexity per token": metrics["eval_perplexity_per_token"],
            "perplexity per word": metrics["eval_perplexity_per_word"],
            "mean effective rank": effective_rank(run),
            "command": metrics["command"],
            "commit": metrics["commit"],
        }
        invocation = shlex.join(["python", "-m", "benchmarks.k22_language_models", *arguments])
        result = add_cell(RESULT, cell.name, row, invocation)
    return result


if __name__ == "__main__":
    print(json.dumps(main(), indent=2))
