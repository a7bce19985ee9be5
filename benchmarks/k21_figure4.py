"""Figure 4 of Khodak et al. 2021 in small: rank scale, decay and initialization of a Transformer on IWSLT'14.

Each cell trains a Transformer of 2 + 2 layers, 256 wide, pre-norm, on the German-English pairs, for the same number of
updates, and translates the first sentences of the test set. All linear layers, the embedding and the heads have
``rank_scale`` of their full ranks. Decay is none, ordinary on all matrices, or Frobenius on the output-value products
alone. The paper trains much longer, with a coefficient tuned for each decay. A run that was broken off goes on.

    python -m benchmarks.k21_figure4 --data ../shared/data --runs runs/k21_figure4
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness.grids import add_cell, run_once

SCALES = (1.0, 0.5, 0.25)
DECAYS = {
    "none": "--weight_decay 0",
    "weight decay": "--weight_decay 0.1",
    "Frobenius decay of ov": "--weight_decay 0 --frobenius_decay ov --frobenius_coefficient 0.1",
}
INITS = ("spectral", "default")
RESULT = Path(__file__).parent / "results" / "k21_figure4_small.json"


def command(scale: float, decay: str, init: str, seed: int, options: argparse.Namespace, run: Path) -> list[str]:
    """The command that trains and scores one cell."""
    flags = f"""
        --dataset {options.data}/iwslt14_de_en --languages de en --moses true --vocab_size 4000 --max_length 100
        --drop_long true --max_validation_pairs 500 --max_test_pairs {options.sentences} --num_beams 4
        --normalize_before true --rank_scale {scale} --factor_init {init} {DECAYS[decay]}
        --optim adamw_torch --learning_rate 2e-3 --lr_scheduler_type inverse_sqrt --warmup_steps {options.steps // 5}
        --max_grad_norm 1.0 --label_smoothing_factor 0.1 --max_tokens 1000 --max_steps {options.steps}
        --logging_steps 50 --save_steps 400 --save_total_limit 1 --bf16 --use_cpu --seed {seed} --report_to none
        --disable_tqdm true
        --output_dir {run} --resume_from_checkpoint true
    """
    return ["run_scripts/train_translation.py", *flags.split()]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the grid, seed by seed, and write every cell that is finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the real data sets")
    parser.add_argument("--runs", type=Path, default=Path("runs/k21_figure4"), help="where models and logs go")
    parser.add_argument("--steps", type=int, default=800, help="updates of every cell")
    parser.add_argument("--sentences", type=int, default=300, help="sentences of the test set to translate")
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES, help="rank scales to run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="seeds to run")
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    result: dict[str, Any] = {}
    for seed, init, scale, decay in itertools.product(options.seeds, INITS, options.scales, DECAYS):
        name = f"{scale:g}-{decay.replace(' ', '_')}-{init}-{seed}"
        run = options.runs / name
        metrics = run_once(command(scale, decay, init, seed, options, run), run / "metrics.json")
        cell = {
            "rank scale": scale,
            "decay": decay,
            "init": init,
            "seed": seed,
            "updates": options.steps,
            "parameters": metrics["parameters"]["total"],
            "validation perplexity": metrics["eval_perplexity"],
            "BLEU (tokens)": metrics["test"]["tokenized_bleu"],
            "BLEU (detokenized)": metrics["test"]["bleu"],
            "command": metrics["command"],
            "commit": metrics["commit"],
        }
        result = add_cell(RESULT, name, cell, shlex.join(["python", "-m", "benchmarks.k21_figure4", *arguments]))
    return result


if __name__ == "__main__":
    print(json.dumps(main(), indent=2))
