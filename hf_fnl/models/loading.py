"""Loading with errors where Transformers has a log entry."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.utils import find_adapter_config_file, is_peft_available


class CheckpointMismatchError(ValueError, RuntimeError):
    """The parameters of a checkpoint are not those of the model; Transformers raises a ``RuntimeError`` for shapes."""


def load_checked(
    from_pretrained: Callable[..., Any],
    source: str | os.PathLike | None,
    *args: Any,
    ignore_mismatched_sizes: bool = False,
    output_loading_info: bool = False,
    **kwargs: Any,
) -> Any:
    """Call a ``from_pretrained`` of Transformers and refuse a checkpoint that is not that of the model.

    Below an adapter Transformers reports how that was loaded: it then checks the shapes of the model itself.

    Returns:
        What ``from_pretrained`` returns.

    Raises:
        OSError: If a weight file is truncated or corrupt.
        CheckpointMismatchError: If the checkpoint holds a parameter in another shape, or a product in another form,
            than the configuration says, unless ``ignore_mismatched_sizes``.
    """
    is_checked = not (ignore_mismatched_sizes or _names_adapter(source, kwargs))
    options = {"ignore_mismatched_sizes": ignore_mismatched_sizes or is_checked, "output_loading_info": True}
    try:
        model, info = from_pretrained(source, *args, **options, **kwargs)
    except SafetensorError as error:
        folder = Path(source or "", kwargs.get("subfolder") or "")
        raise OSError(f"the weights in {_unreadable_file(folder)} are truncated or corrupt: {error}") from error
    if is_checked:
        _check_loaded(model, source, info)
    return (model, info) if output_loading_info else model


def _check_loaded(model: PreTrainedModel, source: object, info: Mapping[str, Any]) -> None:
    """Raise a ``CheckpointMismatchError`` if a checkpoint's parameters are not those of the model for them."""
    faults = [
        f"{name} has shape {tuple(theirs)} in the checkpoint and {tuple(ours)} in the model"
        for name, theirs, ours in info["mismatched_keys"]
    ]

    def holder(name: str) -> str:  # the module, whose name in the checkpoint of a backbone has no prefix
        return name.removeprefix(f"{model.base_model_prefix}.").rpartition(".")[0]

    modules = {holder(f"{name}."): module for name, module in model.named_modules()}
    unexpected = {}
    for name in sorted(info["unexpected_keys"]):
        place = holder(name)  # two layers may stand in the place of one
        unexpected[place if place in modules else re.sub(r"\.[01]$", "", place)] = name
    for missing in info["missing_keys"]:
        if (found := unexpected.pop(holder(missing), None)) is not None:
            faults.append(f"the checkpoint holds {found} where the model holds {missing}")
    for name, found in unexpected.items():
        if name in modules and found.endswith((".weight", ".bias")) and modules[name]._parameters:
            layer = type(modules[name]).__name__
            faults.append(f"the checkpoint holds {found}, for which the {layer} of the model has no place")
    prefix = f"{model.base_model_prefix}."
    names = list(model.state_dict())
    backbone = [name for name in names if name.startswith(prefix)] or names
    if backbone and set(backbone) <= set(info["missing_keys"]):
        faults.append(f"the checkpoint holds no parameter of the model, such as {backbone[0]}")
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        remedy = "Leave the ranks as its config.json has them"
        if info["mismatched_keys"]:
            remedy = "Leave ranks and sizes as its config.json has them"
        elif not callable(getattr(model, "merge", None)):  # nor a class of ours, whose ranks are options
            remedy = (
                "Its config.json does not say what is factorized: that of a model which is put together from "
                "factorized parts does if hf_fnl.surgery.update_records_([model]) is called before saving. Save it anew"
            )
        raise CheckpointMismatchError(
            f"{source} does not fit {type(model).__name__}: {min(faults)}{more}. {remedy}, or pass "
            "ignore_mismatched_sizes=True to start what does not fit anew"
        )


def _names_adapter(source: str | os.PathLike | None, options: Mapping[str, Any]) -> bool:
    """Whether ``from_pretrained`` loads an adapter after the model: ``source`` holds one, or an Auto class saw one."""
    if "_adapter_model_path" in (options.get("adapter_kwargs") or {}):
        return True
    known = ("cache_dir", "revision", "local_files_only", "token", "subfolder")
    found = {name: options[name] for name in known if options.get(name) is not None}
    return is_peft_available() and source is not None and find_adapter_config_file(str(source), **found) is not None


def _unreadable_file(folder: Path) -> Path:
    """The first weight file in a folder that cannot be opened; the folder itself if it is not one on this disk."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError:
            return file
    return folder
