"""Cards of models that go to the Hub."""

from __future__ import annotations

import os
from typing import Any

from hf_fnl.models.cards.card import write_upload_card


class UploadsCard:
    """Mixin before a ``PreTrainedModel``: what is uploaded has a card of ours, unless a person wrote one."""

    def _upload_modified_files(self, working_dir: str | os.PathLike, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        # Here `push_to_hub` and `save_pretrained(push_to_hub=True)` meet, with their card already in the folder.
        write_upload_card(working_dir, self, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)  # type: ignore[misc]
