"""The client of the tests against the Hub's stand-in: does one step for each line it reads, and says how it went.

It is a process of its own because the client reads ``HF_ENDPOINT`` once, when it is imported.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, constants
from transformers import AutoModelForMaskedLM, PreTrainedModel

from hf_fnl import FactorizedBertConfig, FactorizedBertForMaskedLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from bert_cases import LOW, SIZES
from training_cases import tiny_trainer


def digest(model: PreTrainedModel) -> str:
    """One hash of the names and the bits of all weights."""
    hashed = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        hashed.update(name.encode() + weight.numpy().tobytes())
    return hashed.hexdigest()


def draw(seed: int) -> PreTrainedModel:
    """A small factorized BERT, another one for every seed."""
    torch.manual_seed(seed)
    return FactorizedBertForMaskedLM(FactorizedBertConfig(**SIZES, **LOW))


def push(repo: str, seed: int = 0, **options: Any) -> str:
    """Upload a model."""
    drawn = draw(seed)
    drawn.push_to_hub(repo, **options)
    return digest(drawn)


def push_folder(folder: str, repo: str) -> None:
    """Load the model of a run and upload it."""
    FactorizedBertForMaskedLM.from_pretrained(folder).push_to_hub(repo)


def save(folder: str, seed: int = 0, **options: Any) -> str:
    """Save a model into a folder, and upload it if the options say so."""
    drawn = draw(seed)
    drawn.save_pretrained(folder, **options)
    return digest(drawn)


def load(repo: str, auto: bool = False, **options: Any) -> dict[str, str]:
    """Load a model."""
    model_class = AutoModelForMaskedLM if auto else FactorizedBertForMaskedLM
    loaded = model_class.from_pretrained(repo, **options)
    return {"class": type(loaded).__name__, "digest": digest(loaded)}


def train(folder: str, repo: str, **options: Any) -> None:
    """Train a little and upload the run."""
    trainer = tiny_trainer(folder, max_steps=2, hub_model_id=repo)
    trainer.train()
    trainer.push_to_hub(**options)


def validate(content: str) -> None:
    """Have the Hub check a card."""
    ModelCard(content).validate()


def forget() -> None:
    """Empty the cache of downloads."""
    shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)


STEPS: dict[str, Callable[..., Any]] = {
    step.__name__: step for step in (push, push_folder, save, load, train, validate, forget)
}


def main() -> None:
    """Read ``[step, options]`` a line, write ``{"result": ...}`` or ``{"error": ...}`` a line."""
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        step, options = json.loads(line)
        try:
            answer = {"result": STEPS[step](**options)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
