"""``hf-fnl merge``: a folder with a stock model from one with a factorized model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_fnl.cli.factorize import inherited_metadata
from hf_fnl.cli.folders import carry_files, local_files, new_folder
from hf_fnl.cli.sources import load_to_convert, random_inputs
from hf_fnl.cli.terminal import Terminal
from hf_fnl.models.base import FactorizedPreTrainedModel
from hf_fnl.models.cards import CARD_FILE, write_card
from hf_fnl.optim.diagnostics import parameter_count
from hf_fnl.surgery import merge_
from hf_fnl.utils.run_files import FACTORIZATION_FILE


def merge(source: str, target: Path, *, check: bool, terminal: Terminal) -> dict[str, Any]:
    """Load a factorized model, multiply its products out and write what is a stock model then.

    Returns:
        Sizes, and the largest difference between outputs on random inputs before and after, ``None`` without ``check``.

    Raises:
        OSError: If files are missing, damaged or cannot be written.
        ValueError: If the model is not factorized, its outputs change, or it cannot be told how to run it.
    """
    with new_folder(target) as folder:
        model = load_to_convert(source, terminal)
        name, before = type(model).__name__, parameter_count(model)["total"]
        with terminal.step("merging"):
            merged, difference = _merged(model, check)
        with terminal.step("writing"):
            merged.save_pretrained(folder)
            carry_files(source, folder, FACTORIZATION_FILE)
            known = {"record": local_files(source, ["*.json"]), "metadata": inherited_metadata(source)}
            write_card(folder / CARD_FILE, merged, name=target.resolve().name, **known)
    after = parameter_count(merged)["total"]
    return {
        "factorized_class": name,
        "class": type(merged).__name__,
        "parameters_before": int(before),
        "parameters_after": int(after),
        "largest_difference": difference,
    }


@torch.no_grad()
def _merged(model: PreTrainedModel, check: bool) -> tuple[PreTrainedModel, float | None]:
    inputs = random_inputs(model) if check else {}
    try:
        expected = model(**inputs) if check else {}
    except Exception as error:  # whatever a model says that wants other inputs beside these
        name = type(model).__name__
        raise ValueError(f"a {name} does not run on {', '.join(inputs)}: {error}; --no-check skips this") from error
    if isinstance(model, FactorizedPreTrainedModel):
        merged = model.merge()
    else:
        merged = model
        merge_(merged)
    return merged, _largest_difference(merged(**inputs), expected) if check else None


def _largest_difference(outputs: Mapping[str, Any], expected: Mapping[str, Any]) -> float:
    """The largest absolute difference between outputs.

    Raises:
        ValueError: If it is beyond rounding: the square root of the machine epsilon, as a share of the largest output.
    """
    largest = 0.0
    for key, reference in expected.items():
        if isinstance(reference, Tensor) and reference.is_floating_point():
            difference, size = float((outputs[key] - reference).abs().max()), float(reference.abs().max())
            if not difference <= torch.finfo(reference.dtype).eps ** 0.5 * size:
                raise ValueError(f"merging changed {key} by {difference:.3g} where the largest value is {size:.3g}")
            largest = max(largest, difference)
    return largest
