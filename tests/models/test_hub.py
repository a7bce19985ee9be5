"""The Hub, whose repositories lie in memory here: our card goes up with the weights, unless a person wrote one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bert_cases import LOW, SIZES
from hub_cards import card_problems
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard, RepoUrl, repocard
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load
from training_cases import tiny_trainer

from hf_fnl import FactorizedBertConfig, FactorizedBertForMaskedLM
from hf_fnl.models import card_files
from hf_fnl.models.card_files import is_automatic
from hf_fnl.models.cards import MARK

WEIGHTS = "model.safetensors"
FILES = {"README.md", "config.json", WEIGHTS}
HAND_WRITTEN = "---\nlicense: mit\n---\n\n# Ours\n\nWritten by hand.\n"
AUTOMATIC = "---\nlicense: mit\n---\n\n<!-- This model card has been generated automatically -->\n"


class Hub:
    """Repositories in memory: files by name, and the tokens and privacy that they were made and written with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repos: dict[str, dict[str, bytes]] = {}
        self.calls: list[tuple[str, Any, Any]] = []

    def create_repo(self, repo_id: str, *, token: Any = None, private: Any = None, **_: Any) -> RepoUrl:
        repo_id = repo_id if "/" in repo_id else f"tester/{repo_id}"
        self.repos.setdefault(repo_id, {})
        self.calls.append(("create", token, private))
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_commit(self, repo_id: str, operations: Any, *, token: Any = None, **_: Any) -> CommitInfo:
        for operation in operations:
            with operation.as_file() as file:
                self.repos[repo_id][operation.path_in_repo] = file.read()
        self.calls.append(("commit", token, None))
        return CommitInfo(f"https://huggingface.co/{repo_id}/commit/0", "", "", "0")

    def upload_folder(self, repo_id: str, folder_path: Path, *, token: Any = None, **_: Any) -> CommitInfo:
        files = [path for path in Path(folder_path).iterdir() if path.is_file()]
        return self.create_commit(repo_id, [CommitOperationAdd(path.name, path) for path in files], token=token)

    def download(self, repo_id: str, filename: str, **_: Any) -> str:
        if filename not in self.repos.get(repo_id, {}):
            raise EntryNotFoundError("there is no such file")
        path = self.folder / filename
        path.write_bytes(self.repos[repo_id][filename])
        return str(path)

    def card(self, repo_id: str) -> ModelCard:
        written = ModelCard(self.repos[repo_id]["README.md"].decode())
        assert card_problems(str(written)) == []
        return written


def in_memory(ours: Callable[..., Any]) -> Callable[..., Any]:
    """What stands for a method of the client, whose own token counts where none is given."""

    def call(api: HfApi, *args: Any, **options: Any) -> Any:
        return ours(*args, **{**options, "token": options.get("token") or api.token})

    return call


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path_factory.mktemp("hub"))
    for name in ("create_repo", "create_commit", "upload_folder"):
        monkeypatch.setattr(HfApi, name, in_memory(getattr(hub, name)))
    monkeypatch.setattr(ModelCard, "validate", lambda card, *_, **__: card_problems(str(card)))
    for module in (card_files, repocard):
        monkeypatch.setattr(module, "hf_hub_download", hub.download)
    return hub


def draw() -> FactorizedBertForMaskedLM:
    torch.manual_seed(0)
    return FactorizedBertForMaskedLM(FactorizedBertConfig(**SIZES, **LOW))


def test_our_card_lies_beside_the_weights_and_goes_up_as_they_do(hub):
    model = draw()
    model.push_to_hub("bert", tags=["tiny"], token="secret", private=True)
    assert set(hub.repos["tester/bert"]) == FILES
    assert {token for _, token, _ in hub.calls} == {"secret"}
    assert {private for call, _, private in hub.calls if call == "create"} == {True}
    weights = load(hub.repos["tester/bert"][WEIGHTS])
    assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())
    written = hub.card("tester/bert")
    assert (written.data.library_name, written.data.pipeline_tag) == ("hf_fnl", "fill-mask")
    assert written.data.tags == ["hf_fnl", "transformers", "low-rank", "tiny"]
    assert "`qk_rank` 5, `ov_rank` 2" in written.text
    assert 'from_pretrained("tester/bert")' in written.text


@pytest.mark.parametrize(("found", "kept"), [(HAND_WRITTEN, True), (AUTOMATIC, False)], ids=["by-hand", "automatic"])
@pytest.mark.parametrize("trains", [False, True], ids=["model", "run"])
def test_only_an_automatic_card_of_the_repository_is_replaced(hub, tmp_path, trains, found, kept):
    hub.repos["tester/bert"] = {"README.md": found.encode()}
    if trains:
        trainer = tiny_trainer(tmp_path, max_steps=1, hub_model_id="tester/bert")
        trainer.train()
        trainer.push_to_hub()
    else:
        draw().push_to_hub("tester/bert")
    written = hub.card("tester/bert")
    assert (str(written) == found) == kept
    assert (MARK in written.text) != kept
    assert written.data.license == "mit"
    assert WEIGHTS in hub.repos["tester/bert"]


def test_saving_writes_a_card_only_if_it_is_to_be_pushed(hub, tmp_path):
    draw().save_pretrained(tmp_path / "kept")
    assert not (tmp_path / "kept" / "README.md").exists()
    draw().save_pretrained(tmp_path / "bert", push_to_hub=True)
    assert is_automatic(tmp_path / "bert" / "README.md")
    assert set(hub.repos["tester/bert"]) == FILES


def test_the_record_of_the_folder_that_a_model_was_loaded_from_is_in_its_card(hub, tmp_path):
    draw().save_pretrained(tmp_path)
    (tmp_path / "metrics.json").write_text('{"phase-1": {"eval_mlm_accuracy": 0.25}}')
    (tmp_path / "run_config.json").write_text('{"optim": "flambe", "validation_dataset": "org/texts"}')
    FactorizedBertForMaskedLM.from_pretrained(tmp_path).push_to_hub("tester/bert")
    written = hub.card("tester/bert")
    assert "flambe" in written.data.tags
    assert "| phase-1 / eval_mlm_accuracy | 0.25 |" in written.text


def test_a_card_by_hand_in_the_folder_goes_up_but_no_file_that_it_links_to(hub, tmp_path):
    draw().save_pretrained(tmp_path / "bert")
    (tmp_path / "secret").write_text("# Nobody's business\n")
    local = tmp_path / "bert" / "README.md"
    local.symlink_to(tmp_path / "secret")
    FactorizedBertForMaskedLM.from_pretrained(tmp_path / "bert").push_to_hub("tester/linked")
    assert MARK in hub.card("tester/linked").text
    local.unlink()
    local.write_text(HAND_WRITTEN)
    FactorizedBertForMaskedLM.from_pretrained(tmp_path / "bert").push_to_hub("tester/bert")
    assert str(hub.card("tester/bert")) == HAND_WRITTEN
