"""The Hub: the real client against a stand-in server; what goes up comes down, and what breaks says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import TOKEN, USER, File, HubServer, Repo
from huggingface_hub import ModelCard

from hf_fnl.models.cards import MARK, is_automatic

# One process launches once for all of these tests.
pytestmark = pytest.mark.xdist_group("hub")

WORKER = Path(__file__).parents[1] / "support" / "workers" / "hub_client.py"
WEIGHTS = "model.safetensors"
FILES = {"README.md", "config.json", WEIGHTS}
HAND_WRITTEN = "---\nlicense: mit\n---\n\n# Ours\n\nWritten by hand.\n"

Do = Callable[..., Any]


class Failed(Exception):
    """A step of the client failed."""


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def client(server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen]:
    settings = {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path_factory.mktemp("hf_home")),
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",  # its chunks go to a service of its own, by a compiled client
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    with subprocess.Popen(
        [sys.executable, str(WORKER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **settings},
    ) as process:
        yield process
        process.kill()


@pytest.fixture
def do(server: HubServer, client: subprocess.Popen) -> Do:
    """Have the client do a step, with an empty cache and an empty Hub when the test starts."""

    def do(step: str, **options: Any) -> Any:
        client.stdin.write(json.dumps([step, options]) + "\n")
        client.stdin.flush()
        answer = json.loads(client.stdout.readline())
        if "error" in answer:
            raise Failed(answer["error"])
        return answer["result"]

    for state in (server.repos, server.storage, server.requests):
        state.clear()
    do("forget")
    return do


def card(server: HubServer, repo: str) -> ModelCard:
    return ModelCard(server.repos[repo].files["README.md"].content.decode())


def put_card(server: HubServer, repo: str, content: str) -> None:
    server.repos.setdefault(repo, Repo()).commit({"README.md": File(content.encode(), lfs=False)})


@pytest.mark.parametrize("auto", [False, True], ids=["our-class", "auto-class"])
def test_what_is_pushed_comes_down_bit_for_bit(server, do, auto):
    pushed = do("push", repo="tester/bert")
    assert set(server.repos["tester/bert"].files) == FILES
    assert server.repos["tester/bert"].files[WEIGHTS].lfs
    assert do("load", repo="tester/bert", auto=auto) == {"class": "FactorizedBertForMaskedLM", "digest": pushed}


def test_a_push_without_a_change_makes_no_commit(server, do):
    do("push", repo="tester/bert")
    commits = len(server.repos["tester/bert"].commits)
    do("push", repo="tester/bert")
    assert len(server.repos["tester/bert"].commits) == commits


def test_our_card_lies_beside_the_weights(server, do):
    do("push", repo="bert", tags=["tiny"])
    written = card(server, f"{USER}/bert")
    assert "POST /api/validate-yaml" in server.requests
    assert do("validate", content=str(written)) is None
    assert written.data.library_name == "transformers"
    assert written.data.pipeline_tag == "fill-mask"
    assert written.data.tags == ["hf_fnl", "low-rank", "tiny"]
    assert "`qk_rank` 5, `ov_rank` 2" in written.text
    assert f'from_pretrained("{USER}/bert")' in written.text


@pytest.mark.parametrize(
    ("found", "kept"),
    [
        (HAND_WRITTEN, True),
        ("---\nlicense: mit\n---\n\n<!-- This model card has been generated automatically -->\n", False),
    ],
    ids=["by-hand", "automatic"],
)
@pytest.mark.parametrize("step", ["push", "train"])
def test_only_an_automatic_card_of_the_repository_is_replaced(server, do, tmp_path, step, found, kept):
    put_card(server, "tester/bert", found)
    do(step, repo="tester/bert", **({"folder": str(tmp_path)} if step == "train" else {}))
    written = card(server, "tester/bert")
    assert (str(written) == found) == kept
    assert (MARK in written.text) != kept
    assert written.data.license == "mit"
    assert WEIGHTS in server.repos["tester/bert"].files


def test_saving_writes_a_card_only_if_it_is_to_be_pushed(server, do, tmp_path):
    do("save", folder=str(tmp_path / "kept"))
    assert not (tmp_path / "kept" / "README.md").exists()
    saved = do("save", folder=str(tmp_path / "bert"), push_to_hub=True)
    assert is_automatic(tmp_path / "bert" / "README.md")
    assert set(server.repos["tester/bert"].files) == FILES
    assert do("load", repo="tester/bert")["digest"] == saved


def test_the_record_of_the_folder_that_a_model_was_loaded_from_is_in_its_card(server, do, tmp_path):
    do("save", folder=str(tmp_path))
    (tmp_path / "metrics.json").write_text('{"phase-1": {"eval_mlm_accuracy": 0.25}}')
    (tmp_path / "run_config.json").write_text('{"optim": "flambe", "validation_dataset": "org/texts"}')
    do("push_folder", folder=str(tmp_path), repo="tester/bert")
    written = card(server, "tester/bert")
    assert "flambe" in written.data.tags
    assert "| phase-1 / eval_mlm_accuracy | 0.25 |" in written.text


def test_a_trainer_pushes_the_card_of_its_run(server, do, tmp_path):
    assert do("train", folder=str(tmp_path), repo="tester/run", license="mit", tags="tiny") is None
    written = card(server, "tester/run")
    assert str(written) == (tmp_path / "README.md").read_text()
    assert written.data.license == "mit"
    assert written.data.tags == ["hf_fnl", "low-rank", "flambe", "tiny"]
    for line in ("| optimizer steps | 2 |", "| `optim` | flambe |", "| `frobenius_decay` | ov |", "| train_loss |"):
        assert line in written.text
    assert WEIGHTS in server.repos["tester/run"].files


def test_a_card_by_hand_in_the_folder_goes_up_but_no_file_that_it_links_to(server, do, tmp_path):
    do("save", folder=str(tmp_path / "bert"))
    (tmp_path / "secret").write_text("# Nobody's business\n")
    local = tmp_path / "bert" / "README.md"
    local.symlink_to(tmp_path / "secret")
    do("push_folder", folder=str(tmp_path / "bert"), repo="tester/linked")
    assert MARK in card(server, "tester/linked").text
    local.unlink()
    local.write_text(HAND_WRITTEN)
    do("push_folder", folder=str(tmp_path / "bert"), repo="tester/bert")
    assert str(card(server, "tester/bert")) == HAND_WRITTEN


def test_a_card_is_pushed_as_the_model_is_with_its_token_and_in_private(server, do):
    with pytest.raises(Failed, match=r"HfHubHTTPError: .*401(.|\n)*Invalid credentials in Authorization header"):
        do("push", repo="tester/bert", token="hf_the_wrong_one")
    assert not server.repos
    pushed = do("push", repo="tester/secret", private=True)
    assert server.repos["tester/secret"].private
    assert do("load", repo="tester/secret")["digest"] == pushed
