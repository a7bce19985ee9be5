"""Pictures of runs: written where there is something to draw, refused where there is not."""

from __future__ import annotations

import pytest
from training_cases import tiny_trainer

from hf_fnl.report import plot_diagnostics, plot_loss


def test_pictures_of_a_run(tmp_path):
    trainer = tiny_trainer(tmp_path, diagnostics_steps=2)
    trainer.train()
    trainer.save_state()
    for plot in (plot_loss, plot_diagnostics):
        picture = plot(tmp_path, tmp_path / "plots" / f"{plot.__name__}.png")
        assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("plot", "missing"),
    [(plot_loss, "trainer_state.json"), (plot_diagnostics, "diagnostics.jsonl")],
    ids=["loss", "products"],
)
def test_a_folder_without_a_run_is_named(tmp_path, plot, missing):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} holds no {missing}"):
        plot(tmp_path, tmp_path / "picture.png")
    assert not (tmp_path / "picture.png").exists()
