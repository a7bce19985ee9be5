"""Folders that strangers made: nothing of the user's is lost, followed out of the folder, run, or shown as markup."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from cli_cases import cli, llama
from safetensors.torch import load_file, save_file

from hf_fnl import FactorizationConfig, factorize_, load
from hf_fnl.cli.terminal import printable


@pytest.fixture
def model(tmp_path) -> Path:
    llama().save_pretrained(tmp_path / "p" / "model")
    return tmp_path / "p" / "model"


@pytest.fixture
def low_rank(tmp_path) -> Path:
    made = llama()
    factorize_(made, FactorizationConfig(rank=2, include=["*mlp*"]))
    made.save_pretrained(tmp_path / "low")
    return tmp_path / "low"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# Links and names that lead out of a folder


@pytest.mark.parametrize("name", ["tokenizer_x", "spiece.model"])
def test_what_a_link_leads_to_outside_is_not_copied(low_rank, tmp_path, name):
    (tmp_path / "secret").write_text("secret")
    (low_rank / name).symlink_to(tmp_path / "secret")
    (low_rank / "special_tokens_map.json").symlink_to("vocab.json")
    (low_rank / "vocab.json").write_text("{}")
    result = cli("merge", low_rank, "--out", tmp_path / "out")
    assert f"{name} is a link that leaves the folder: what it leads to is not copied" in result.stderr.replace("\n", "")
    assert b"secret" not in files(tmp_path / "out").values()
    assert (tmp_path / "out" / "special_tokens_map.json").read_text() == "{}"


def test_a_part_of_a_sentence_model_is_followed_no_further(low_rank, tmp_path):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text("secret")
    (low_rank / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]))
    (low_rank / "1_Pooling").symlink_to(tmp_path / "private", target_is_directory=True)
    (low_rank / "2_Dense").mkdir()
    (low_rank / "2_Dense" / "config.json").write_text("{}")
    (low_rank / "2_Dense" / "key").symlink_to(tmp_path / "private" / "key")
    cli("merge", low_rank, "--out", tmp_path / "out")
    copied = [path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*_*/*")]
    assert copied == ["2_Dense/config.json"]


@pytest.mark.parametrize("name", ["config.json", "metrics.json"])
def test_what_has_to_be_read_is_refused_where_a_link_leads_out(low_rank, tmp_path, name):
    content = low_rank / name
    content.rename(tmp_path / "outside") if content.exists() else (tmp_path / "outside").write_text('{"f1": 1}')
    content.symlink_to(tmp_path / "outside")
    result = cli("merge", low_rank, "--out", tmp_path / "out", code=1)
    assert f"{name} is a link that leaves its folder" in result.stderr.replace("\n", "")
    assert not (tmp_path / "out").exists()


def test_a_snapshot_of_the_hubs_cache_is_read_through_its_links(low_rank, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (low_rank / "vocab.txt").write_text("a")
    for number, path in enumerate(low_rank.iterdir()):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(number)))
    cli("merge", snapshot, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "vocab.txt").read_text() == "a"
    assert not (tmp_path / "out" / "vocab.txt").is_symlink()


@pytest.mark.parametrize("kind", ["absolute", "folder", "parent", "backslash", "number", "link"])
def test_shards_stay_in_their_folder(model, tmp_path, kind):
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    save_file(weights, tmp_path / "secret.safetensors", metadata={"format": "pt"})
    names = {
        "absolute": str(tmp_path / "secret.safetensors"),
        "folder": "inner/../../../secret.safetensors",
        "parent": "..",
        "backslash": "..\\secret.safetensors",
        "number": 7,
        "link": "model-1.safetensors",
    }
    if kind == "link":
        (model / names[kind]).symlink_to(tmp_path / "secret.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, names[kind])}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names weights outside of its folder|is a link that leaves its folder"):
        load(model)
    assert "outside" in (message := cli("inspect", model, code=1).stderr) or "leaves its folder" in message


@pytest.mark.parametrize("content", ['{"weight_map": []}', "[" * 100_000, "\xff"], ids=range(3))
def test_a_damaged_index_is_named(model, content):
    (model / "model.safetensors.index.json").write_bytes(content.encode("latin-1"))
    assert "model.safetensors.index.json is damaged" in cli("inspect", model, code=1).stderr.replace("\n", "")


# What config.json may name


@pytest.mark.parametrize(
    "name",
    ["pipeline", "AutoModel", "FactorizedPreTrainedModel.merge", "os", 7],
    ids=str,
)
def test_only_classes_of_models_are_called(model, name):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": [name]}))
    with pytest.raises(ValueError, match="names no model class of transformers or hf_fnl in architectures"):
        load(model)


@pytest.mark.parametrize(
    "command", [["inspect"], ["plan"], ["factorize", "--rank", "2", "--out", "o"]], ids=lambda c: c[0]
)
def test_code_in_a_folder_is_not_run(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "code.py").write_text("import pathlib\npathlib.Path('ran').touch()\nclass C: pass\n")
    config = {"model_type": "own", "architectures": ["C"], "auto_map": {"AutoConfig": "code.C", "AutoModel": "code.C"}}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    result = cli(command[0], "m", *command[1:], code=1)
    assert "code of its own" in result.stderr
    assert not (tmp_path / "ran").exists()


def test_a_pickle_is_not_read(model):
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        load(model)


def test_float8_weights_are_read_as_bfloat16_before_any_work(model, tmp_path):
    weights = load_file(model / "model.safetensors")
    eighth = {name: w.to(torch.float8_e4m3fn if w.ndim == 2 else torch.bfloat16) for name, w in weights.items()}
    save_file(eighth, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"dtype": "float8_e4m3fn"}))
    result = cli("factorize", model, "--rank-scale", 1, "--out", tmp_path / "out")
    assert "holds float8 weights, which are read as bfloat16" in result.stderr.replace("\n", " ")
    with pytest.warns(UserWarning, match="float8"):
        loaded = load(model)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded.lm_head.weight.float(), eighth["lm_head.weight"].float())


# Cards


@pytest.mark.parametrize(
    "head",
    [
        "---\ntitle: a: b\n---\n",
        "---\n- a\n---\n",
        "---\n1: 2\n---\n",
        "---\nlicense: \xe9\n---\n",
        "---\nlicense: [\n",
        "---\nlicense: &a [*a]\n---\n",
        "---\ntags: {a: b}\nlanguage: 7\n---\n",
    ],
    ids=["colons", "list", "number", "bytes", "no end", "recursion", "types"],
)
def test_a_card_with_a_broken_head_is_no_reason_to_lose_the_model(model, tmp_path, head):
    (model / "README.md").write_bytes(head.encode("latin-1"))
    cli("factorize", model, "--rank", 2, "--out", tmp_path / "out")
    result = cli("merge", tmp_path / "out", "--out", tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").is_file(), result.stderr


def test_a_warning_names_the_card(model, tmp_path):
    (model / "README.md").write_text("---\ntitle: a: b\n---\n")
    result = cli("factorize", model, "--rank", 2, "--out", tmp_path / "out")
    assert f"note: what {model}/README.md says in its head is left out" in result.stderr.replace("\n", "")


# What a terminal is shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mred", "a\\x1b[31mred"),
        ("\x9b2J\x07", "\\x9b2J\\x07"),
        ("model.[bold]x[/bold]", "model.[bold]x[/bold]"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("Straße :smile:\n", "Straße :smile:\n"),
        ("\udc80", "\\udc80"),
    ],
    ids=["escape", "c1", "brackets", "direction", "plain", "surrogate"],
)
def test_control_characters_are_written_out(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize("folder", ["a[/red]b", "m :smile:"])
def test_names_with_brackets_and_dollars_are_text(model, tmp_path, folder):
    shutil.copytree(model, tmp_path / folder)
    out = tmp_path / f"out {folder}"
    assert cli("factorize", tmp_path / folder, "--rank", 2, "--out", out).stdout.splitlines()[-1] == str(out)
    missing = cli("inspect", tmp_path / folder / "none", code=1)
    assert f"there is no folder {tmp_path / folder / 'none'}" in missing.stderr


def test_the_name_of_a_layer_cannot_write_to_the_terminal(model):
    names = "model.layers.0.mlp.up_proj.weight", "\x1b]0;owned\x07"
    weights = load_file(model / "model.safetensors")
    weights[names[1]] = weights.pop(names[0])
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    result = cli("inspect", model)
    assert "\x1b" not in result.stdout + result.stderr
    assert "drawn at random here" in result.stderr


@pytest.mark.parametrize(
    "content", ["[" * 100_000, "{", "[]", '{"architectures": ["X"]}'], ids=["deep", "cut", "list", "type"]
)
def test_a_damaged_configuration_is_one_line(model, content):
    (model / "config.json").write_text(content)
    error = cli("inspect", model, code=1).stderr
    assert error.startswith("error: ")
    assert error.count("\n") == 1


# What a strange config.json says


@pytest.mark.parametrize("changes", [{"model_type": ["llama"]}, {"hidden_size": "16"}, {"hidden_size": None}], ids=str)
def test_a_configuration_of_wrong_types_is_named(model, changes):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))
    error = cli("inspect", model, code=1).stderr.replace("\n", "")
    assert f"error: the config.json of {model} is damaged" in error


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "BertModel"])
def test_weights_of_another_architecture_are_refused(model, name):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": [name], "n_head": 2}))
    assert "the checkpoint holds no parameter of the model" in cli("inspect", model, code=1).stderr.replace("\n", " ")


# Names


@pytest.mark.parametrize("name", ["a\x1b[31mred", "b\x07ell", "c\x9b2Jsi"], ids=repr)
def test_no_escape_sequence_gets_into_a_card_or_a_report(model, tmp_path, name):
    out = tmp_path / name
    cli("factorize", model, "--out", out, "--rank", 2)
    cli("report", out, "--out", tmp_path / "report.html")
    for text in ((out / "README.md").read_text(), (tmp_path / "report.html").read_text()):
        assert repr(name)[1:-1] in text.replace("<wbr>", "").replace("\\[", "[")
        assert all(c.isprintable() or c == "\n" for c in text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("factorize", "{model}", "--rank", "2", "--out", "{file}/sub"), "--out {file}/sub: {file} is a file"),
        (("merge", "{low}", "--out", "{file}/a/b"), "--out {file}/a/b: {file} is a file"),
        (("report", "{model}", "--out", "{low}"), "{low} is a folder, and a report is a file"),
        (("report", "{model}", "--out", "{file}/r.html"), "{file} is a file"),
    ],
)
def test_an_out_that_cannot_be_written_is_named_before_the_work(model, low_rank, tmp_path, arguments, message):
    (tmp_path / "file").write_text("mine")
    names = {"model": model, "low": low_rank, "file": tmp_path / "file"}
    before = sorted(tmp_path.rglob("*"))
    error = cli(*(word.format(**names) for word in arguments), code=1).stderr
    assert message.format(**names) in error
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == "mine"
