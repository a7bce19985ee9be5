"""The model card of a run, written by its Trainer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from huggingface_hub import ModelCardData
from transformers import Trainer

from hf_fnl.models.cards import CARD_FILE, Record, write_card
from hf_fnl.training.runs import run_settings
from hf_fnl.utils.run_files import last_figures


def write_trainer_card(
    trainer: Trainer,
    *,
    language: str | list[str] | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    tasks: str | None = None,
    dataset_tags: str | list[str] | None = None,
    dataset: str | None = None,
) -> None:
    """Write the card of a run into its ``output_dir``, with all that the folder and the Trainer know of the run.

    A card that a person wrote into that folder is left as it is.
    Options are those of Transformers' ``create_model_card``; ``dataset`` says in words what the model was trained on.
    """
    folder = Path(trainer.args.output_dir)
    found = Record.read(folder) if folder.is_dir() else Record()
    record = dataclasses.replace(
        found,
        metrics={**found.metrics, **last_figures(trainer.state.log_history)},
        settings={**found.settings, **run_settings(trainer.args)},
        steps=trainer.state.global_step or found.steps,
    )
    metadata = ModelCardData(
        language=language,
        license=license,
        tags=[tags] if isinstance(tags, str) else tags,
        base_model=finetuned_from,
        pipeline_tag=tasks,
        datasets=[dataset_tags] if isinstance(dataset_tags, str) else dataset_tags,
    )
    name = trainer.hub_model_id or model_name or folder.resolve().name
    model = trainer.accelerator.unwrap_model(trainer.model)
    write_card(folder / CARD_FILE, model, name=name, record=record, data=dataset, metadata=metadata)
