"""The line between two networks: its ends are the networks, everything between is the weighted mean."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from after_cases import hf_fnl
from torch import nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from hf_fnl import FactorizationConfig, FactorizedGPT2Config, FactorizedGPT2LMHeadModel, factorize_, load
from hf_fnl.scripts import interpolate as script
from hf_fnl.tasks.clm import build_blocks
from hf_fnl.tasks.documents import load_documents
from hf_fnl.tasks.tokenization import load_tokenizer, train_byte_bpe
from hf_fnl.vision.image_batches import ImageOptions, ImageTensors, load_image_sets
from hf_fnl.vision.interpolation import interpolate, loss_along_line
from hf_fnl.vision.models import CifarResNetConfig, CifarResNetForImageClassification, inner_convolutions
from hf_fnl.vision.transforms import BatchTransform

TEXT = "".join(f"A line of text, number {number}, and more of it.\n\n" for number in range(40))


class Network(nn.Module):
    """A convolution with BatchNorm and dropout."""

    def __init__(self, channels: int = 5):
        super().__init__()
        self.convolution, self.normalization = nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(0.5)

    def forward(self, images):
        return self.dropout(self.normalization(self.convolution(images)))


@pytest.fixture
def pair() -> tuple[Network, Network]:
    """Two networks whose statistics are those of different data."""
    networks = []
    for seed, batches in ((0, 2), (1, 7)):
        torch.manual_seed(seed)
        network = Network()
        for _ in range(batches):
            network(images=torch.randn(4, 3, 6, 6) + seed)
        networks.append(network)
    return networks[0], networks[1]


@pytest.mark.parametrize("t", [0.3, 0.5])
def test_a_point_of_the_line_is_the_weighted_mean(pair, t):
    first, second = (network.state_dict() for network in pair)
    for name, value in interpolate(first, second, t).items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (1 - t) * first[name] + t * second[name])
    assert int(interpolate(first, second, t)["normalization.num_batches_tracked"]) == (2 if t < 0.5 else 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_ends_are_the_networks_to_the_last_bit(pair, dtype):
    states = [network.to(dtype).state_dict() for network in pair]
    for t, state in zip((0, 1), states, strict=True):
        found = interpolate(*states, t)
        assert all(
            torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in state.items()
        )


def test_evaluation_sees_the_networks_in_order_and_in_evaluation_mode(pair):
    states = [copy.deepcopy(network.state_dict()) for network in pair]
    seen = []

    def evaluate(network):
        assert not any(module.training for module in network.modules())
        seen.append(network.convolution.weight.clone())
        return {"norm": float(network.convolution.weight.norm())}

    points = loss_along_line(*pair, evaluate, steps=5)
    assert [point["t"] for point in points] == [0, 0.25, 0.5, 0.75, 1]
    for point, weight in zip(points, seen, strict=True):
        expected = torch.lerp(*(state["convolution.weight"] for state in states), point["t"])
        assert torch.equal(weight, expected)
        assert point["norm"] == float(expected.norm())
    for network, state in zip(pair, states, strict=True):
        assert network.training, "left as it was"
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_statistics_are_estimated_at_every_point(pair):
    batches = [torch.randn(8, 3, 6, 6), torch.randn(5, 3, 6, 6)]

    def deviation(network):
        assert not any(module.training for module in network.modules())
        means = [network.convolution(images).detach().mean((0, 2, 3)) for images in batches]
        return {"error": float((network.normalization.running_mean - sum(means) / 2).abs().max())}

    assert max(point["error"] for point in loss_along_line(*pair, deviation, batches=batches)) < 1e-6
    assert min(point["error"] for point in loss_along_line(*pair, deviation)) > 1e-3


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda a, b: interpolate(a.state_dict(), b.state_dict(), 1.1), r"t must be in \[0, 1\], got 1.1"),
        (
            lambda a, b: interpolate(a.state_dict(), {}, 0),
            r"convolution.bias is \(5,\) in the baseline and None in the other network",
        ),
        (
            lambda a, b: interpolate(a.state_dict(), {**b.state_dict(), "z.U": torch.ones(1)}, 0),
            r"z.U is None in the baseline and \(1,\) in the other network.* multiply the factors",
        ),
        (
            lambda a, b: interpolate(a.state_dict(), Network(7).state_dict(), 0),
            r"convolution.bias is \(5,\) in the baseline and \(7,\) in the other",
        ),
        (lambda a, b: loss_along_line(a, b, dict, steps=1), "steps must be at least 2.* got 1"),
    ],
    ids=["t", "names", "factors", "shapes", "steps"],
)
def test_what_has_no_line(pair, attempt, message):
    with pytest.raises(ValueError, match=message):
        attempt(*pair)


def write_run(folder: Path, model: PreTrainedModel, **settings: Any) -> str:
    """The folder of a run, as a script leaves it."""
    model.save_pretrained(folder)
    (folder / "run_config.json").write_text(json.dumps(settings))
    return str(folder)


def classifier(seed: int) -> CifarResNetForImageClassification:
    torch.manual_seed(seed)
    sizes = {"depth": 8, "width": 3, "image_size": 8, "num_channels": 1, "num_labels": 10}
    return CifarResNetForImageClassification(CifarResNetConfig(**sizes)).eval()


def low_rank_classifier() -> CifarResNetForImageClassification:
    model = classifier(1)
    factorize_(model, FactorizationConfig(rank=2, kinds=("conv",), include=inner_convolutions(model)))
    return model


@pytest.fixture(scope="module")
def image_runs(tmp_path_factory) -> tuple[str, str]:
    """A dense classifier of digits and a low-rank one, as they are drawn."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("images")
    settings = {"dataset": "digits", "max_train_images": 150, "max_eval_images": 53, "learning_rate": 0.1}
    return write_run(folder / "dense", classifier(0), **settings), write_run(folder / "low", low_rank_classifier())


@pytest.fixture(scope="module")
def digits() -> tuple[ImageTensors, torch.Tensor]:
    """What the runs evaluate on: labeled images, and these as the networks take them."""
    options = ImageOptions(dataset="digits", max_train_images=150, max_eval_images=53)
    training, evaluation = load_image_sets(options)
    return evaluation, BatchTransform(*training.statistics())(evaluation.pixel_values, training=False)


def test_lines_between_classifiers_end_in_the_networks(image_runs, digits):
    dense, low = image_runs
    argv = ["--baseline", dense, "--low_rank", low, dense, "--steps", "3", "--batch_size", "20"]
    lines = script.main([*argv, "--use_cpu"])
    images, pixels = digits
    for folder, point in ((dense, lines[low][0]), (low, lines[low][-1]), (dense, lines[dense][1])):
        with torch.no_grad():
            outputs = load(folder)(pixel_values=pixels, labels=images.labels)
        assert point["loss"] == pytest.approx(float(outputs.loss), rel=1e-4)
        assert point["accuracy"] == pytest.approx(float((outputs.logits.argmax(-1) == images.labels).float().mean()))
    record = json.loads((Path(low) / "interpolation.json").read_text())
    assert record["points"] == lines[low]
    assert (record["baseline"], record["batch_norm_images"]) == (dense, 0)
    assert record["command"].startswith(f"hf-fnl interpolate --baseline {dense}")


def test_statistics_of_the_training_images_change_the_line(image_runs):
    dense, low = image_runs
    argv = ["--baseline", dense, "--low_rank", low, "--steps", "2", "--use_cpu"]
    stale, fresh, again = (script.main([*argv, "--batch_norm_images", n])[low] for n in ("0", "100", "100"))
    assert fresh == again
    assert all(abs(a["loss"] - b["loss"]) > 1e-3 for a, b in zip(stale, fresh, strict=True))


@pytest.fixture(scope="module")
def text_runs(tmp_path_factory) -> tuple[str, str, str]:
    """A dense GPT-2, a low-rank one, and text to evaluate on."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "valid.txt").write_text(TEXT)
    tokenizer = train_byte_bpe([TEXT], vocab_size=300)
    sizes = {"vocab_size": len(tokenizer), "n_positions": 17, "n_embd": 12, "n_layer": 1, "n_head": 3}
    torch.manual_seed(0)
    dense = write_run(folder / "dense", GPT2LMHeadModel(GPT2Config(**sizes)), block_size=None)
    tokenizer.save_pretrained(dense)
    low = FactorizedGPT2LMHeadModel(FactorizedGPT2Config(**sizes, ov_rank=2, ffn_rank=5))
    return dense, write_run(folder / "low", low, ov_rank=2), str(folder / "valid.txt")


@pytest.mark.parametrize("eval_block_size", [None, 9])
def test_lines_between_language_models_end_in_the_networks(text_runs, tmp_path, eval_block_size):
    dense, low, text = text_runs
    settings = json.dumps({"block_size": 13, "eval_block_size": eval_block_size})
    (Path(dense) / "run_config.json").write_text(settings)
    argv = ["--baseline", dense, "--low_rank", low, "--eval_dataset", text, "--steps", "3", "--use_cpu"]
    first, middle, last = script.main(argv)[low]
    for folder, point in ((dense, first), (low, last)):
        nats, tokens = whole_text(load(folder), dense, text, eval_block_size or 13)
        assert point["loss"] == pytest.approx(nats / tokens, rel=1e-4)
        assert point["perplexity"] == pytest.approx(torch.tensor(nats / tokens).exp().item(), rel=1e-3)
    assert middle["loss"] not in (first["loss"], last["loss"])
    assert len(script.main([*argv, "--eval_limit", "7"])[low]) == 3
    hf_fnl("report", low, "--out", tmp_path / "line.html")
    assert "From the baseline to the model" in (tmp_path / "line.html").read_text()


def whole_text(model: PreTrainedModel, tokenizer: str, text: str, block_size: int) -> tuple[float, int]:
    """Cross-entropy of all tokens, one block after the other, and their number."""
    nats, count = 0.0, 0
    for block in build_blocks(load_documents(text), load_tokenizer(tokenizer), block_size=block_size):
        with torch.no_grad():
            logits = model(input_ids=block["input_ids"][None]).logits[0, :-1]
        nats += float(nn.functional.cross_entropy(logits, block["labels"][1:], reduction="sum"))
        count += int((block["labels"][1:] != -100).sum())
    return nats, count


def bert(folder: Path) -> str:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 9}
    return write_run(folder, BertForMaskedLM(BertConfig(vocab_size=11, **sizes)), seed=1)


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (["--batch_norm_images", "-1"], ValueError, "batch_norm_images must not be negative, got -1"),
        (["--batch_norm_images", "5"], ValueError, "GPT2LMHeadModel has no BatchNorm: leave out batch_norm_images"),
        ([], ValueError, "was trained without validation_dataset: set eval_dataset"),
        (
            ["--baseline", "{bert}"],
            ValueError,
            "between image classifiers or causal language models; .*BertForMaskedLM",
        ),
        (["--baseline", "{low}", "--eval_dataset", "{text}"], OSError, "tokenizer"),
        (["--baseline", "{image}", "--low_rank", "{text_low}"], ValueError, "None in the other network"),
    ],
    ids=["negative", "no-batchnorm", "no-text", "masked", "no-tokenizer", "other-network"],
)
def test_what_the_script_refuses(text_runs, image_runs, tmp_path, flags, error, message):
    dense, low, text = text_runs
    names = {"bert": bert(tmp_path / "bert"), "low": low, "text": text, "image": image_runs[0], "text_low": low}
    argv = ["--baseline", dense, "--low_rank", low, "--use_cpu", *(flag.format(**names) for flag in flags)]
    with pytest.raises(error, match=message):
        script.main(argv)
