"""The command line as a user types it, on tiny models: results equal the library's, and errors leave nothing behind."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from bert_cases import BACKBONE, MASKED_LM, SIZES
from cli_cases import cli, llama
from gpt2_cases import LM
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertModel,
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from hf_fnl import (
    FactorizationConfig,
    FactorizedBertForMaskedLM,
    FactorizedBertModel,
    FactorizedGPT2LMHeadModel,
    RankRule,
)
from hf_fnl.attention import find_products
from hf_fnl.cli.tables import LAYERS_KEY
from hf_fnl.layers.linear import dense_weight
from hf_fnl.models.surgery_loading import load
from hf_fnl.optim.diagnostics import parameter_count
from hf_fnl.report import inspect_model
from hf_fnl.surgery import factorize_

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = [f"word{chr(97 + n // 8)}{chr(97 + n % 8)}" for n in range(SIZES["vocab_size"] - len(SPECIAL))]


def save(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    BertTokenizer(vocab={word: number for number, word in enumerate([*SPECIAL, *WORDS])}).save_pretrained(folder)
    return folder


def assert_same_weights(ours, theirs) -> None:
    # Matrices that lie elsewhere in memory may be multiplied in another order.
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return save(BACKBONE.build_stock(), tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def half(bert, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "half"
    cli("factorize", bert, "--out", folder, "--ratio", "0.5")
    return folder


@pytest.fixture
def texts(tmp_path) -> Path:
    torch.manual_seed(0)
    rows = (" ".join(WORDS[n] for n in torch.randint(len(WORDS), (length,))) for length in (9, 4, 50, 12, 1, 8))
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ("", *rows)))
    return path


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param("--ratio 0.5", {"rule": RankRule(ratio=0.5)}, id="ratio"),
        pytest.param("--budget 0.6 --multiple-of 2", {"rule": RankRule(budget=0.6, multiple_of=2)}, id="budget"),
        pytest.param("--rank-scale 0.4", {"rule": RankRule(rank_scale=0.4)}, id="rank scale"),
        pytest.param("--rank 3 --kinds ov,ffn", {"rule": RankRule(rank=3), "kinds": ("ov", "ffn")}, id="rank, kinds"),
        pytest.param("--energy 0.7 --kinds ffn", {"rule": RankRule(energy=0.7), "kinds": ("ffn",)}, id="energy"),
        pytest.param("--qk-rank 5 --embedding-rank 8", {"qk_rank": 5, "embedding_rank": 8}, id="ranks"),
    ],
)
def test_factorizing_a_bert_is_from_dense(bert, tmp_path, options, expected):
    cli("factorize", bert, "--out", tmp_path / "out", *options.split())
    assert_same_weights(
        FactorizedBertModel.from_pretrained(tmp_path / "out"), FactorizedBertModel.from_dense(bert, **expected)
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param("--qkv-rank 11 --ffn-rank 8", {"qkv_rank": 11, "ffn_rank": 8}, id="ranks"),
        pytest.param("--rank 5 --kinds qkv,ffn", {"rule": RankRule(rank=5), "kinds": ("qkv", "ffn")}, id="kinds"),
        pytest.param("--budget 0.7", {"rule": RankRule(budget=0.7)}, id="heads"),
    ],
)
def test_factorizing_a_gpt2_is_from_dense(tmp_path, options, expected):
    dense = LM.build_stock()
    dense.save_pretrained(tmp_path / "dense")
    cli("factorize", tmp_path / "dense", "--out", tmp_path / "out", *options.split())
    ours = FactorizedGPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert_same_weights(ours, FactorizedGPT2LMHeadModel.from_dense(dense, **expected))
    check_record(record(tmp_path / "out"), dense, ours)
    cli("merge", tmp_path / "out", "--out", tmp_path / "merged")
    assert_same_weights(GPT2LMHeadModel.from_pretrained(tmp_path / "merged"), ours.merge())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param("--rank 4", {"rank": 4}, id="rank"),
        pytest.param("--rank 4 --include *.layers.1.*", {"rank": 4, "include": ("*.layers.1.*",)}, id="include"),
        pytest.param("--rank 2 --exclude *attn*", {"rank": 2, "exclude": ("*attn*",)}, id="exclude"),
        pytest.param("--rank 3 --kinds embedding", {"rank": 3, "kinds": ("embedding",)}, id="kinds"),
    ],
)
def test_other_models_are_factorized_by_surgery(tmp_path, options, expected):
    sizes = {"hidden_size": 20, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    dense = OPTForCausalLM(OPTConfig(vocab_size=SIZES["vocab_size"], word_embed_proj_dim=20, **sizes))
    dense.save_pretrained(tmp_path / "dense")
    cli("factorize", tmp_path / "dense", "--out", tmp_path / "out", *options.split())
    factorize_(dense, FactorizationConfig(**expected))
    assert_same_weights(load(tmp_path / "out"), dense)


def test_surgery_on_a_bert_leaves_its_class(bert, tmp_path):
    cli("factorize", bert, "--out", tmp_path / "out", "--surgery", "--rank", 3, "--include", "*.output.dense")
    assert type(load(tmp_path / "out")) is BertModel


def batch_of(model_folder: Path, texts: Path, samples: int, length: int) -> dict:
    rows = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    options = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}
    batch = tokenizer([row for row in rows if row][:samples], **options)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize(
    ("options", "samples", "length"),
    [
        pytest.param("--calibration-samples 4 --calibration-length 10", 4, 10, id="as asked for"),
        pytest.param("--calibration-samples 6", 6, SIZES["max_position_embeddings"], id="as long as the model reads"),
    ],
)
def test_calibration_takes_the_first_texts_masked_and_cut(bert, texts, tmp_path, options, samples, length):
    given = ("--calibrate", texts, *options.split())
    cli("factorize", bert, "--out", tmp_path / "out", "--ratio", "0.5", *given)
    batch = batch_of(bert, texts, samples, length)
    assert batch["input_ids"].shape == (samples, length)
    by_length: dict[int, list] = {}  # in batches without padding, whose order decides what is drawn for them
    for ids, kept in zip(*batch.values(), strict=True):
        by_length.setdefault(int(kept.sum()), []).append(ids[kept.bool()])
    batches = [{"input_ids": torch.stack(rows)} for rows in by_length.values()]
    expected = FactorizedBertModel.from_dense(bert, rule=RankRule(ratio=0.5), calibration=batches)
    ours = FactorizedBertModel.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(ours.state_dict(), expected.state_dict(), rtol=1e-3, atol=1e-5)


def test_an_encoder_with_a_decoder_reads_the_text_on_both_sides(texts, tmp_path):
    sizes = {"d_model": 20, "d_kv": 5, "d_ff": 24, "num_layers": 1, "num_heads": 4}
    save(T5ForConditionalGeneration(T5Config(vocab_size=SIZES["vocab_size"], **sizes)), tmp_path / "t5")
    cli("factorize", tmp_path / "t5", "--out", tmp_path / "out", "--rank", 3, "--calibrate", texts)
    kinds = {layer["name"].split(".")[0] for layer in record(tmp_path / "out")["layers"]}
    assert kinds == {"encoder", "decoder"}
    cli("merge", tmp_path / "out", "--out", tmp_path / "merged")


def record(folder: Path) -> dict:
    return json.loads((folder / "factorization.json").read_text())


@pytest.mark.parametrize("ranks", ["--ratio 0.5", "--qk-rank 5 --ov-rank 2 --ffn-rank 8 --embedding-rank 13"])
def test_the_record_holds_sizes_and_energies_of_the_matrices_themselves(tmp_path, ranks):
    dense = MASKED_LM.build_stock()
    folder = save(dense, tmp_path / "dense")
    cli("factorize", folder, "--out", tmp_path / "out", *ranks.split())
    check_record(record(tmp_path / "out"), dense, FactorizedBertForMaskedLM.from_pretrained(tmp_path / "out"))


def check_record(found: dict, dense, ours) -> None:
    assert found["parameters_before"] == sum(p.numel() for p in dense.parameters())
    assert found["parameters_after"] == sum(p.numel() for p in ours.parameters())
    assert found["ratio"] == found["parameters_after"] / found["parameters_before"]
    attentions = {product.name: product for product in find_products(dense)}
    products = {p.name: p for p in find_products(ours) if p.name not in attentions or is_cut(p, ours)}
    assert [layer["name"] for layer in found["layers"]] == list(products)
    for layer in found["layers"]:
        name, matrix = layer["name"], products[layer["name"]].matrix(ours)
        exact = attentions[name].matrix(dense) if name in attentions else dense_weight(dense.get_submodule(name))
        energy = 1 - ((exact - matrix).square().sum() / exact.square().sum()).item()
        assert layer["energy"] == pytest.approx(energy, abs=1e-5)
        assert layer["shape"] == list(matrix.shape[-2:])


def is_cut(product, ours) -> bool:
    return product.factors(ours)[0].shape[-1] < SIZES["hidden_size"] // SIZES["num_attention_heads"]


def test_the_recorded_command_makes_the_same_model_again(bert, tmp_path):
    options = ("--rank", 3, "--kinds", "ov,ffn", "--multiple-of", 3)
    cli("factorize", bert, "-o", tmp_path / "a b", *options)
    words = shlex.split(record(tmp_path / "a b")["command"])
    assert words[:2] == ["hf-fnl", "factorize"]
    written = record(tmp_path / "a b")
    shutil.rmtree(tmp_path / "a b")
    cli(*words[1:])
    assert record(tmp_path / "a b") == written


def test_what_makes_a_model_usable_comes_along_and_traces_of_its_training_do_not(bert, tmp_path):
    source = shutil.copytree(bert, tmp_path / "source")
    modules = [{"idx": 0, "path": "", "type": "Transformer"}, {"idx": 1, "path": "1_Dense", "type": "Dense"}]
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "1_Dense").mkdir()
    save_file({"weight": torch.ones(2)}, source / "1_Dense" / "model.safetensors")
    for name in ("LICENSE", "metrics.json", "optimizer.pt", "pytorch_model.bin"):
        (source / name).write_text("{}")
    carried = ("additional_chat_templates/tool.jinja", "target_vocab.json", "normalizer.json")
    (source / "additional_chat_templates").mkdir()
    for name in carried:
        (source / name).write_text("{}")
    (source / "README.md").write_text("---\nlicense: mit\nlanguage: [no, de]\n---\nA model.\n")
    cli("factorize", source, "--out", tmp_path / "out", "--rank-scale", "0.5")
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    expected = {"config.json", "model.safetensors", "README.md", "factorization.json", "modules.json"}
    assert written == expected | {"tokenizer.json", "tokenizer_config.json", "1_Dense/model.safetensors", *carried}
    assert (tmp_path / "out" / "LICENSE").is_file()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in card
    assert "language:\n- 'no'\n- de\n" in card
    text = " ".join(WORDS[:5])
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text) == AutoTokenizer.from_pretrained(bert)(text)


def test_merging_a_bert_gives_the_stock_class_with_the_same_outputs(half, tmp_path):
    result = json.loads(cli("merge", half, "--out", tmp_path / "merged", "--json").stdout)
    ours, merged = FactorizedBertModel.from_pretrained(half), AutoModel.from_pretrained(tmp_path / "merged")
    assert type(merged) is BertModel
    assert_same_weights(merged, ours.merge())
    assert (result["factorized_class"], result["class"]) == ("FactorizedBertModel", "BertModel")
    assert 0 < result["largest_difference"] < 1e-4
    assert record(tmp_path / "merged") == record(half)
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (half / "tokenizer.json").read_bytes()


def test_merging_after_surgery_on_a_model_of_images(tmp_path):
    sizes = {"hidden_size": 20, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    ViTForImageClassification(ViTConfig(**sizes, image_size=12, patch_size=4)).save_pretrained(tmp_path / "vit")
    cli("factorize", tmp_path / "vit", "--out", tmp_path / "out", "--rank", 2, "--kinds", "linear, conv")
    cli("merge", tmp_path / "out", "--out", tmp_path / "merged")
    pixels = torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(load(tmp_path / "merged")(pixels).logits, load(tmp_path / "out")(pixels).logits)


def test_a_merge_that_cannot_be_checked_says_how_to_do_without(tmp_path):
    small = {**SIZES, "num_hidden_layers": 1}
    model = CLIPModel(CLIPConfig(text_config=small, vision_config={**small, "image_size": 16, "patch_size": 8}))
    factorize_(model, FactorizationConfig(rank=3))
    model.save_pretrained(tmp_path / "clip")
    given = ("merge", tmp_path / "clip", "--out", tmp_path / "out")
    assert "CLIPModel does not run on input_ids" in (error := cli(*given, code=1).stderr)
    assert "--no-check skips this" in error
    cli(*given, "--no-check")


def test_a_merge_that_changes_outputs_is_not_written(half, tmp_path, monkeypatch):
    honest = FactorizedBertModel.merge

    def changed(model):
        dense = honest(model)
        dense.pooler.dense.bias.data += 0.1
        return dense

    monkeypatch.setattr(FactorizedBertModel, "merge", changed)
    result = cli("merge", half, "--out", tmp_path / "merged", code=1)
    assert "merging changed pooler_output by" in result.stderr
    assert list(tmp_path.iterdir()) == []
    unchecked = json.loads(cli("merge", half, "--out", tmp_path / "merged", "--no-check", "--json").stdout)
    assert unchecked["largest_difference"] is None


def test_inspect_lists_what_the_library_says_and_energies_that_were_recorded(half):
    result = json.loads(cli("inspect", half, "--json").stdout)
    rows = inspect_model(FactorizedBertModel.from_pretrained(half))
    assert [row["name"] for row in result["matrices"]] == [row.name for row in rows]
    assert [row["nuclear_norm"] for row in result["matrices"]] == [row.nuclear_norm for row in rows]
    energies = {row["name"]: row["energy"] for row in result["matrices"] if row["energy"] is not None}
    assert energies == {layer["name"]: layer["energy"] for layer in record(half)["layers"]}


def test_inspect_has_a_line_for_matrices_alike_and_ends_with_the_total(half):
    lines = cli("inspect", half).stdout.splitlines()
    model = FactorizedBertModel.from_pretrained(half)
    assert lines[0].split()[:5] == ["product", "kind", "shape", "rank", "parameters"]
    found = inspect_model(model)
    alike = [row for row in found if row.name.endswith("intermediate.dense")]
    start = lines.index(next(line for line in lines if line.strip() == f"encoder.layer.0-{len(alike) - 1}"))
    (line,) = [line.split() for line in lines[start:] if line.startswith("  intermediate.dense ")]
    assert line[6] == f"{sum(row.parameters for row in alike):,}"
    assert line[7] == f"{sum(row.frobenius_norm for row in alike) / len(alike):.4g}"
    total = sum(p.numel() for p in model.parameters())
    rest = total - sum(row.parameters for row in found)
    assert lines[-4].split()[-1] == f"{rest:,}"
    assert lines[-3].split() == ["all", str(len(found)), "matrices", f"{total:,}"]
    every = cli("inspect", half, "--all").stdout.splitlines()
    assert len(every) > len(lines)
    assert sum(line.startswith("  intermediate.dense ") for line in every) == len(alike)
    dense = sum(p.numel() for p in model.merge().parameters())
    assert lines[-1].endswith(f"{total:,} parameters, {total / dense:.1%} of the dense model's {dense:,}")


def test_report_replaces_a_report_and_no_other_file(half, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    source = shutil.copytree(half, tmp_path / "model")
    before = (source / "config.json").read_bytes()
    assert "no report" in cli("report", source, "--out", source / "config.json", code=1).stderr
    assert (source / "config.json").read_bytes() == before
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "no report" in cli("report", source, "--out", "~/model/config.json", code=1).stderr
    for _ in range(2):
        cli("report", source, "--out", "~/r.html")
    assert (tmp_path / "r.html").is_file()


def test_one_share_of_the_parameters_stands_everywhere(bert, half, tmp_path):
    pytest.importorskip("matplotlib")
    shown = cli("factorize", bert, "--out", tmp_path / "out", "--ratio", "0.5").stdout
    *_, dense_line, total, key, _, _ = shown.splitlines()
    assert [line.split()[0] for line in (dense_line, total)] == ["dense", "all"]
    assert key == LAYERS_KEY
    dense, ours = (load(folder) for folder in (bert, half))
    before, after = (sum(p.numel() for p in model.parameters()) for model in (dense, ours))
    assert after / before == pytest.approx(0.5, rel=0.01)
    assert f"{before:,}" in shown
    assert f"{after / before:.1%}" in shown
    inspected = json.loads(cli("inspect", half, "--json").stdout)
    assert [inspected[key] for key in ("parameters", "parameters_dense", "ratio")] == [after, before, after / before]
    assert record(half)["ratio"] == after / before
    assert f"of which {after / before:.1%} are left" in (half / "README.md").read_text()
    cli("report", half, "--out", tmp_path / "r.html")
    assert f"{after / before:.1%} of the dense model" in (tmp_path / "r.html").read_text()
    assert parameter_count(ours)["ratio"] == after / before


def test_an_unreachable_share_names_the_closest(tmp_path):
    sizes = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic", "num_labels": 10}
    ResNetForImageClassification(ResNetConfig(**sizes)).save_pretrained(tmp_path / "resnet")
    error = cli("factorize", tmp_path / "resnet", "--ratio", "0.3", "--out", tmp_path / "out", code=1).stderr
    assert "ratio=0.3 cannot be met" in error
    assert "in other layers" in error
    closest = re.search(r"closest ratio is ([0-9.]+[0-9])", error)[1]
    cli("factorize", tmp_path / "resnet", "--ratio", closest, "--out", tmp_path / "out")
    cli("factorize", tmp_path / "resnet", "--ratio", "0.3", "--kinds", "conv", "--out", tmp_path / "convs")
    assert record(tmp_path / "convs")["ratio"] == pytest.approx(0.3, rel=0.02)
    cli("factorize", tmp_path / "resnet", "--layer-ratio", "0.5", "--kinds", "conv", "--out", tmp_path / "layers")
    layers = record(tmp_path / "layers")["layers"]
    counts = [sum(layer[f"parameters_{when}"] for layer in layers) for when in ("before", "after")]
    assert counts[1] / counts[0] <= 0.505


def test_json_is_all_that_a_machine_hears(bert, tmp_path, capfd):
    result = cli("factorize", bert, "--out", tmp_path / "out", "--ratio", "0.5", "--json")
    expected = {**record(tmp_path / "out"), "out": str(tmp_path / "out")}
    assert (json.loads(result.stdout), result.stderr) == (expected, "")
    assert capfd.readouterr() == ("", "")


def test_weights_that_a_checkpoint_lacks_are_named(bert, tmp_path):
    source = shutil.copytree(bert, tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith("pooler")}
    save_file(kept, source / "model.safetensors", metadata={"format": "pt"})
    result = cli("factorize", source, "--out", tmp_path / "out", "--rank-scale", "0.5")
    assert "does not hold pooler.dense.bias, pooler.dense.weight, drawn at random here" in result.stderr


def truncate(source: Path) -> None:
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def spoil(source: Path) -> None:
    weights = load_file(source / "model.safetensors")
    weights["encoder.layer.1.output.dense.weight"][3, 2] = float("nan")
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})


def hide_tokenizer(source: Path) -> None:
    for path in source.glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        pytest.param(truncate, "--ratio 0.5", "source/model.safetensors are truncated or corrupt", id="truncated"),
        pytest.param(spoil, "--ratio 0.5", "NaN or Inf", id="nan"),
        pytest.param(spoil, "--ratio 0.5 --surgery", "encoder.layer.1.output.dense holds NaN", id="nan, surgery"),
        pytest.param(lambda s: (s / "model.safetensors").unlink(), "--rank 3", "model.safetensors", id="no weights"),
        pytest.param(lambda s: (s / "config.json").unlink(), "--rank 3", "holds no config.json", id="no config"),
        pytest.param(lambda s: shutil.rmtree(s), "--rank 3", "there is no folder", id="no folder"),
        pytest.param(None, "--rank 9", "must be in [1, 7], got 9", id="rank"),
        pytest.param(None, "--ffn-rank 22", "--ffn-rank must be in [1, 21], got 22", id="ffn rank"),
        pytest.param(None, "--qkv-rank 5", "has the ranks --qk-rank, --ov-rank, --ffn-rank, --embed", id="qkv rank"),
        pytest.param(None, "--rank 3 --kinds qk,conv", "kinds must be any of qk, ov, ffn, embedding", id="kinds"),
        pytest.param(None, "--rank 3 --include x", "--include and --exclude need --surgery", id="include"),
        pytest.param(None, "--surgery --qk-rank 3", "--qk-rank: a BertModel is factorized layer by", id="qk, surgery"),
        pytest.param(None, "--surgery --rank 3 --include x", "no layer of BertModel matches", id="no match"),
        pytest.param(None, "--rank 3 --calibrate gone.txt", "no such file or folder: gone.txt", id="no texts"),
        pytest.param(None, "--rank 3 --calibrate texts --text-column t", "no column 't'", id="column"),
        pytest.param(hide_tokenizer, "--rank 3 --calibrate texts", "no tokenizer.json", id="no tokenizer"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(bert, texts, tmp_path, damage, options, message):
    source = shutil.copytree(bert, tmp_path / "source")
    if damage is not None:
        damage(source)
    given = options.replace("--calibrate texts", f"--calibrate {texts}").split()
    result = cli("factorize", source, "--out", tmp_path / "new" / "out", *given, code=1)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list((tmp_path / "new").glob("*"))


@pytest.mark.parametrize(
    "options",
    [
        *("", "--ratio 0.5 --rank 3", "--ratio 0.5 --qk-rank 3", "--ratio 2", "--qk-rank 3 --multiple-of 8"),
        *("--ratio half", "--rank 3 --kinds x", "--rank 3 --kinds ffn,[x]", "--rank 3 --conv-scheme spacial"),
        # Options that would do nothing.
        *("--qk-rank 3 --kinds ov", "--rank 3 --heal-steps 5", "--rank 3 --text-column t", "--rank 3 --conv-scheme tt"),
    ],
)
def test_wrong_use_is_told_from_bad_input(bert, tmp_path, options):
    result = cli("factorize", bert, "--out", tmp_path / "out", *options.split(), code=2)
    assert "--help" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["factorize", "merge"])
def test_a_folder_that_holds_files_stays_as_it_is(half, command):
    rule = ("--rank", 3) if command == "factorize" else ()
    assert "holds files already" in cli(command, half, "--out", half, *rule, code=1).stderr


def test_what_was_written_before_a_failure_is_removed_and_an_empty_folder_filled(bert, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()

    def full(self, folder, **kwargs):
        (Path(folder) / "model.safetensors").write_text("half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(FactorizedBertModel, "save_pretrained", full)
        result = cli("factorize", bert, "--out", tmp_path / "out", "--rank", 3, code=1)
    assert "No space left" in result.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]
    cli("factorize", bert, "--out", tmp_path / "out", "--rank", 3)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_what_is_factorized_is_not_factorized_again_nor_what_is_dense_merged(bert, half, tmp_path):
    model = llama()
    factorize_(model, FactorizationConfig(rank=3, kinds=("embedding",)))
    model.save_pretrained(tmp_path / "by-surgery")
    for folder in (half, tmp_path / "by-surgery"):
        assert "factorized already" in cli("factorize", folder, "--out", tmp_path / "x", "--rank", 2, code=1).stderr
    assert "no factorized layer" in cli("merge", bert, "--out", tmp_path / "x", code=1).stderr


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("command", ["factorize", "merge"])
def test_an_adapter_beside_the_model_is_refused_for_it_alone_would_be_saved(command, tmp_path):
    peft = pytest.importorskip("peft")
    model = llama()
    factorize_(model, FactorizationConfig(rank=3, include=("*mlp*",)))
    (model if command == "merge" else llama()).save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    peft.get_peft_model(load(tmp_path / "base"), config).save_pretrained(tmp_path / "base")
    rule = ["--rank", 3] if command == "factorize" else []
    assert "adapter of PEFT" in cli(command, tmp_path / "base", "--out", tmp_path / "out", *rule, code=1).stderr
    assert not (tmp_path / "out").exists()


def test_debug_shows_where_an_error_came_from(tmp_path):
    result = cli("inspect", tmp_path / "gone", "--debug", code=1)
    assert isinstance(result.exception, FileNotFoundError)


def test_a_model_of_the_hub(bert, tmp_path, monkeypatch):
    cache = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(bert, cache / "snapshots" / ("0" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    done = cli("factorize", "someone/tiny", "--out", tmp_path / "out", "--ratio", 0.5, "--json")
    assert json.loads(done.stdout)["base_model"] == "someone/tiny"
    assert "base_model: someone/tiny" in (tmp_path / "out" / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").vocab_size == SIZES["vocab_size"]
