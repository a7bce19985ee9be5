"""The mean of checkpoints: its values, which checkpoints, and what is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint import save
from translation_cases import tiny_marian, tiny_tokenizer

from hf_fnl.training.averaging import average_checkpoints, load_average_, newest_checkpoints
from hf_fnl.training.stored import FSDP_SHARDS


def write(folder, **tensors):
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 5, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_mean_of_every_tensor_in_its_dtype(tmp_path, weights, dtype):
    weights = [weight.to(dtype) for weight in weights]
    count = torch.tensor([7])
    folders = [write(tmp_path / str(i), weight=weight, count=count) for i, weight in enumerate(weights)]
    mean = average_checkpoints(folders)
    assert mean["weight"].dtype == dtype
    torch.testing.assert_close(mean["weight"], torch.stack(weights).double().mean(0).to(dtype), rtol=0, atol=0)
    assert torch.equal(mean["count"], count)


def test_one_checkpoint_is_its_own_mean_and_stays_as_it_is(tmp_path, weights):
    folder = write(tmp_path / "one", weight=weights[0])
    assert torch.equal(average_checkpoints([folder])["weight"], weights[0])
    average_checkpoints([folder, write(tmp_path / "two", weight=weights[1])])
    assert torch.equal(average_checkpoints([folder])["weight"], weights[0])


def test_checkpoints_in_several_files(tmp_path):
    model = tiny_marian(tiny_tokenizer())
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "split", max_shard_size="20KB")
    assert not (tmp_path / "split" / "model.safetensors").exists()
    mean = average_checkpoints([tmp_path / "whole", tmp_path / "split"])
    for name, weight in average_checkpoints([tmp_path / "whole"]).items():
        assert torch.equal(mean[name], weight), name


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_shards_as_accelerate_writes_them_under_fsdp2(tmp_path, weights):
    folders = [tmp_path / str(number) for number in range(2)]
    for folder, weight in zip(folders, weights, strict=False):
        save({"model": {"layer.weight": weight}}, checkpoint_id=folder / FSDP_SHARDS, no_dist=True)
    mean = average_checkpoints(folders)
    torch.testing.assert_close(mean, {"layer.weight": (weights[0] + weights[1]) / 2})


def trained_parameters(model):
    # Marian's sinusoidal positions are parameters too, but constant and in no checkpoint.
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_a_model_with_tied_weights_takes_the_mean(tmp_path):
    model = tiny_marian(tiny_tokenizer())
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.save_pretrained(tmp_path / "checkpoint-1")
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.mul_(3)
    model.save_pretrained(tmp_path / "checkpoint-2")
    load_average_(model, newest_checkpoints(tmp_path, 2))
    assert model.lm_head.weight is model.model.shared.weight
    for name, parameter in trained_parameters(model).items():
        torch.testing.assert_close(parameter, 2 * before[name])


def test_the_newest_checkpoints_are_the_last_by_number(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-100", "checkpoint-old", "other-1000"):
        (tmp_path / name).mkdir()
    assert [path.name for path in newest_checkpoints(tmp_path, 2)] == ["checkpoint-10", "checkpoint-100"]
    with pytest.raises(
        ValueError, match=r"4 checkpoints are to be averaged, but .* holds 3: average fewer, or keep more"
    ):
        newest_checkpoints(tmp_path, 4)
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        newest_checkpoints(tmp_path, 0)


OTHERS = [
    ({"weight": torch.zeros(5, 3)}, r"weight has shape \(3, 5\) in .*one and \(5, 3\) in .*two"),
    ({"bias": torch.zeros(3)}, "bias is in one of .*one and .*two only"),
    ({"weight": torch.zeros(3, 5), "count": torch.tensor(2)}, "count, which is not floating point, differs between"),
]  # fmt: skip


@pytest.mark.parametrize(("other", "message"), OTHERS, ids=["shape", "name", "whole number"])
def test_unlike_checkpoints_are_refused(tmp_path, other, message):
    first = {"weight": torch.zeros(3, 5)} | ({"count": torch.tensor(1)} if "count" in other else {})
    folders = [write(tmp_path / "one", **first), write(tmp_path / "two", **other)]
    with pytest.raises(ValueError, match=message):
        average_checkpoints(folders)


def test_unreadable_missing_and_foreign_weights(tmp_path, weights):
    folder = write(tmp_path / "cut", weight=weights[0])
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-7])
    with pytest.raises(ValueError, match=r"cannot read .*model.safetensors"):
        average_checkpoints([folder])
    with pytest.raises(FileNotFoundError, match=r"no model.safetensors in .*nowhere"):
        average_checkpoints([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="no checkpoints to average"):
        average_checkpoints([])
    with pytest.raises(ValueError, match="hold weights that the model lacks: surplus"):
        load_average_(nn.Linear(2, 2), [write(tmp_path / "foreign", surplus=weights[0])])


def test_other_shapes_are_refused(tmp_path, weights):
    with pytest.raises(ValueError, match=r"weight has shape \(3, 5\) in the checkpoints and \(3, 2\) in the model"):
        load_average_(nn.Linear(2, 3), [write(tmp_path / "wide", weight=weights[0])])
