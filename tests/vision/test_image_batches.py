"""Batches of images: decoding, random crops, normalization, and a Trainer over all of it."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import (
    AutoImageProcessor,
    EvalPrediction,
)

from hf_fnl.tasks.metrics.accuracy import image_metrics, image_sums
from hf_fnl.vision.image_batches import (
    ImageFiles,
    ImageOptions,
    ImageTensors,
    keep_on_device,
    load_image_sets,
    single_batch,
    write_image_processor,
)
from hf_fnl.vision.images import ImageRecords, resize_and_crop, to_array
from hf_fnl.vision.transforms import BatchTransform, random_box

MEAN, STD = [0.5, 0.25, 0.75], [0.2, 0.3, 0.4]


def picture(seed: int, width: int = 5, height: int = 7, mode: str = "RGB") -> Image.Image:
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def records(pictures, labels=None) -> ImageRecords:
    images = datasets.Dataset.from_dict({"image": pictures}, features=datasets.Features(image=datasets.Image()))
    labels = torch.arange(len(pictures)) % 2 if labels is None else torch.tensor(labels)
    stored = images.cast_column("image", datasets.Image(decode=False))
    return ImageRecords(stored, labels, ["ant", "bee"], "somewhere")


def tensors(count=11, **shape) -> ImageTensors:
    return ImageTensors.decode(records([picture(seed, **shape) for seed in range(count)]))


def raw_batch(batch=13, channels=3, height=7, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, channels, height, width), dtype=torch.uint8, generator=generator)


def test_decoding_keeps_every_pixel():
    images = tensors()
    assert (images.num_channels, images.image_size, images.resized_side) == (3, (7, 5), 5)
    for seed in range(11):
        np.testing.assert_array_equal(images[seed]["pixel_values"].permute(1, 2, 0), np.asarray(picture(seed)))
        assert images[seed]["labels"] == seed % 2


@pytest.mark.parametrize(("mode", "other"), [("L", "RGB"), ("RGB", "L")])
def test_held_out_images_have_the_channels_of_training(mode, other):
    training = ImageTensors.decode(records([picture(0, mode=mode)]))
    held_out = ImageTensors.decode(records([picture(1, mode=other)]), like=training)
    assert held_out.num_channels == training.num_channels
    np.testing.assert_array_equal(
        held_out[0]["pixel_values"], to_array(picture(1, mode=other), num_channels=training.num_channels)
    )


def test_image_size_brings_all_to_one_size():
    pictures = [picture(0, 9, 15), picture(1, 12, 10, "L")]
    images = ImageTensors.decode(records(pictures), image_size=6)
    assert (images.image_size, images.resized_side) == ((6, 6), 6)
    for index, image in enumerate(pictures):
        expected = resize_and_crop(image, shorter_side=6, size=6)
        np.testing.assert_array_equal(images[index]["pixel_values"], to_array(expected, num_channels=3))


def test_images_of_several_sizes_are_refused():
    mixed = records([picture(0), picture(1), picture(2, 6, 4)])
    message = r"record 0 of somewhere has \(7, 5\) pixels .* record 2 of somewhere has \(4, 6\); set image_size"
    with pytest.raises(ValueError, match=message):
        ImageTensors.decode(mixed)
    message = r"a training image has \(7, 5\) pixels .* record 1 of somewhere has \(4, 6\); set image_size"
    with pytest.raises(ValueError, match=message):
        ImageTensors.decode(records([picture(1), picture(2, 6, 4)]), like=tensors())


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loader_goes_through_all_images_once(num_workers):
    images = tensors()
    loader = DataLoader(images, 4, shuffle=True, collate_fn=single_batch, num_workers=num_workers)
    batches = list(loader)
    assert [len(batch["labels"]) for batch in batches] == [4, 4, 3]
    seen = torch.cat([batch["pixel_values"] for batch in batches]).flatten(1)
    assert sorted(seen.tolist()) == sorted(images.pixel_values.flatten(1).tolist())


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_statistics_are_those_of_all_pixels(mode):
    images = tensors(mode=mode)
    values = images.pixel_values.double() / 255
    mean, std = images.statistics()
    torch.testing.assert_close(torch.tensor(mean).double(), values.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.tensor(std).double(), values.std((0, 2, 3), correction=0), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("free", "kept"),
    [pytest.param(4 * 11 * 105, True, id="fits"), pytest.param(4 * 11 * 105 - 1, False, id="too-large")],
)
def test_a_quarter_of_the_free_memory_is_taken(free, kept, monkeypatch):
    images, gpu = tensors(), torch.device("cuda")
    moved = object()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**12))
    monkeypatch.setattr(images, "to", lambda device: moved)
    assert keep_on_device(images, gpu) is (moved if kept else images)


def slow_transform(images, draws, mean, std, margin):
    """One image after another, from the numbers drawn: row, column, mirrored or not."""
    made = []
    for image, top, left, mirrored in zip(images, *draws, strict=True):
        height, width = image.shape[1:]
        padded = np.pad(image.numpy(), ((0, 0), (margin, margin), (margin, margin)))
        cropped = padded[:, top : top + height, left : left + width]
        cropped = cropped[:, :, ::-1] if mirrored else cropped
        made.append((cropped / 255 - np.array(mean)[:, None, None]) / np.array(std)[:, None, None])
    return torch.from_numpy(np.stack(made)).float()


@pytest.mark.parametrize("margin", [0, 3])
@pytest.mark.parametrize("flip", [False, True], ids=["as-is", "mirrored"])
def test_augmentation_equals_one_image_after_another(margin, flip):
    images = raw_batch()
    transform = BatchTransform(MEAN, STD, crop_padding=margin, horizontal_flip=flip)
    torch.manual_seed(3)
    made = transform(images, training=True)
    torch.manual_seed(3)
    draws = [torch.randint(count, (13, 1)).flatten().tolist() for count in (2 * margin + 1, 2 * margin + 1, 1 + flip)]
    torch.testing.assert_close(made, slow_transform(images, draws, MEAN, STD, margin), rtol=1e-5, atol=1e-5)


def test_every_place_and_side_is_drawn_alike():
    pixel = torch.zeros(60_000, 1, 1, 2, dtype=torch.uint8)
    pixel[..., 1] = 255
    torch.manual_seed(0)
    made = BatchTransform([0.0], [1.0], crop_padding=1)(pixel, training=True)
    # The middle one of 3 rows is the image; of 3 windows "-0", "01" and "1-" each is mirrored or not.
    outcomes, counts = made.flatten(1).unique(dim=0, return_counts=True)
    shares = {
        tuple(map(int, outcome)): count / 60_000 for outcome, count in zip(outcomes, counts.tolist(), strict=True)
    }
    assert shares == pytest.approx({(0, 0): 7 / 9, (0, 1): 1 / 9, (1, 0): 1 / 9}, abs=0.01)


@pytest.mark.parametrize(
    ("std", "options", "message"),
    [
        pytest.param([0.1, 0.0, 0.3], {}, r"standard deviation .* positive, got \[0.1, 0.0, 0.3\]", id="constant"),
        pytest.param(STD, {"crop_padding": -1}, "crop_padding must be at least 0 pixels, got -1", id="padding"),
    ],
)
def test_transforms_that_are_refused(std, options, message):
    with pytest.raises(ValueError, match=message):
        BatchTransform(MEAN, std, **options)


def test_images_that_are_no_longer_raw_are_refused():
    with pytest.raises(TypeError, match=r"8-bit images are needed, got torch\.float32"):
        BatchTransform(MEAN, STD)(raw_batch().float(), training=False)


@pytest.mark.parametrize(("width", "height"), [(50, 70), (7, 5), (400, 9), (1, 1), (3, 200)])
def test_random_boxes_lie_inside(width, height):
    rng = np.random.default_rng(0)
    for _ in range(100):
        left, top, right, bottom = random_box(width, height, rng)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height


def test_random_boxes_have_the_areas_and_ratios_asked_for():
    rng = np.random.default_rng(0)
    left, top, right, bottom = torch.tensor([random_box(1000, 1000, rng) for _ in range(2000)]).double().T
    areas, ratios = (right - left) * (bottom - top) / 1e6, (right - left) / (bottom - top)
    assert 0.079 < areas.min() < 0.1
    assert 0.9 < areas.max() <= 1
    assert 0.745 < ratios.min() < 0.76
    assert 1.31 < ratios.max() < 1.34
    assert ratios.log().mean().abs() < 0.02


def test_files_are_cropped_at_random_in_training_only():
    stored = records([picture(seed, 40, 30) for seed in range(3)])
    training, held_out = (ImageFiles(stored, image_size=7, training=training) for training in (True, False))
    first = training[1]["pixel_values"]
    box = random_box(40, 30, np.random.default_rng([0, 0, 1]))
    np.testing.assert_array_equal(
        first, to_array(picture(1, 40, 30).resize((7, 7), Image.Resampling.BILINEAR, box=box))
    )
    assert first.equal(training[1]["pixel_values"])  # in the order of no reader
    training.set_epoch(1)
    assert not first.equal(training[1]["pixel_values"])
    assert not first.equal(ImageFiles(stored, image_size=7, training=True, seed=1)[1]["pixel_values"])
    batch = single_batch(held_out.__getitems__([2, 0]))
    assert batch["labels"].tolist() == [0, 0]
    for place, seed in enumerate([2, 0]):
        expected = resize_and_crop(picture(seed, 40, 30), shorter_side=8, size=7)
        np.testing.assert_array_equal(batch["pixel_values"][place], to_array(expected))


def test_options_choose_between_memory_and_files():
    train, held_out = load_image_sets(ImageOptions(max_train_images=40, max_eval_images=9))
    assert isinstance(train, ImageTensors)
    assert (len(train), len(held_out), train.image_size, held_out.num_channels) == (40, 9, (8, 8), 1)
    train, held_out = load_image_sets(ImageOptions(resized_crops=True, image_size=6))
    assert (train.training, held_out.training) == (True, False)
    assert held_out[0]["pixel_values"].shape == (3, 6, 6)


@pytest.mark.parametrize(
    ("made", "new"),
    [
        pytest.param(lambda: tensors(), picture(1), id="as-stored"),
        pytest.param(lambda: tensors(width=6, height=6), picture(1, 15, 8), id="square"),
        pytest.param(lambda: ImageTensors.decode(records([picture(0)]), image_size=6), picture(1, 14, 9), id="resized"),
        pytest.param(
            lambda: ImageFiles(records([picture(0)]), image_size=7, training=True), picture(1, 50, 31), id="files"
        ),
    ],
)
def test_an_image_processor_does_what_evaluation_does(made, new, tmp_path):
    images = made()
    write_image_processor(tmp_path, images)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    square = images.image_size[0] == images.image_size[1]
    image = resize_and_crop(new, shorter_side=images.resized_side, size=images.image_size[0]) if square else new
    raw = torch.from_numpy(to_array(image).copy())[None]
    expected = BatchTransform(*images.statistics())(raw, training=False)
    torch.testing.assert_close(processor(new, return_tensors="pt")["pixel_values"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("classes", "names"), [(10, ["accuracy"]), (11, ["accuracy", "top5_accuracy"])])
def test_loss_and_accuracies_equal_those_of_all_logits(classes, names):
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(57, classes, generator=generator), torch.arange(57) % classes
    sums = torch.cat([image_sums((logits[rows], None), labels[rows]) for rows in (slice(0, 40), slice(40, 57))])
    found = image_metrics(EvalPrediction(predictions=sums.numpy(), label_ids=labels.numpy()))
    assert found == pytest.approx(image_metrics(EvalPrediction([sums[:2].numpy(), sums[2:].numpy()], labels.numpy())))
    ranked = logits.argsort(-1, descending=True)
    best = {
        name: (ranked[:, :count] == labels[:, None]).any(-1).double().mean().item()
        for name, count in zip(names, (1, 5), strict=False)
    }
    assert found == pytest.approx({"loss": torch.nn.functional.cross_entropy(logits, labels).item(), **best})
