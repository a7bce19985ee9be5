"""Labeled images from every kind of source, and what is refused."""

from __future__ import annotations

import sys

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_fnl.vision.image_batches import ImageOptions
from hf_fnl.vision.images import embedded_digits, load_images, resize_and_crop

CLASSES = ["ant", "bee", "cow"]
LABELS = [2, 0, 1, 1, 0, 2, 2]


def picture(seed: int, width: int = 5, height: int = 7, mode: str = "RGB") -> Image.Image:
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def table(labels=LABELS, names=CLASSES, *, image="image", label="label", **columns) -> datasets.Dataset:
    """Pictures 0, 1, ... with labels; classes have names, or are plain integers where ``names`` is ``None``."""
    kind = datasets.Value("int64") if names is None else datasets.ClassLabel(names=names)
    features = datasets.Features({image: datasets.Image(), label: kind})
    pictures = [picture(seed) for seed in range(len(labels))]
    made = datasets.Dataset.from_dict({image: pictures, label: labels}, features=features)
    for name, column in columns.items():
        made = made.add_column(name, column)
    return made


def write(folder, made: datasets.Dataset, name="images.parquet"):
    made.to_parquet(folder / name)
    return folder / name


def write_folder(folder, split="train", labels=LABELS):
    """One folder a class; a file's name sorts it into the order of ``labels`` within its class."""
    for seed, label in enumerate(labels):
        path = folder / split / CLASSES[label] / f"{seed}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(path)
    return folder


def as_parquet(folder):
    return write(folder, table())


def as_text_path(folder):
    return str(write(folder, table(image="img")))


def as_plain_integers(folder):
    return write(folder, table(names=None))


def as_parquet_folder(folder):
    write(folder, table([0, 1], CLASSES[:2]), "test.parquet")
    write(folder, table(), "train.parquet")
    return folder


SOURCES = [as_parquet, as_text_path, as_plain_integers, as_parquet_folder]


@pytest.mark.parametrize("made", SOURCES, ids=lambda made: made.__name__)
def test_every_source_gives_the_same_records(made, tmp_path):
    records = load_images(made(tmp_path))
    assert records.labels.tolist() == LABELS
    assert records.class_names == (["0", "1", "2"] if made is as_plain_integers else CLASSES)
    for seed, image in enumerate(records):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(picture(seed)))
        assert image == records[seed]


def test_a_folder_of_images_has_a_class_a_folder(tmp_path):
    write_folder(tmp_path)
    write_folder(tmp_path, "test", [1])
    records = load_images(tmp_path)
    assert (records.class_names, records.labels.tolist()) == (CLASSES, sorted(LABELS))
    assert records[0] == picture(1)  # the first of the class 0
    held_out = load_images(tmp_path, split="test", class_names=CLASSES)
    assert (held_out.labels.tolist(), held_out[0]) == ([1], picture(0))


def test_digits_hold_each_digit_in_equal_shares():
    train, test = load_images("digits"), load_images("digits", split="test")
    assert (len(train), len(test)) == (1500, 297)
    shares = torch.stack([records.labels.bincount() / len(records) for records in (train, test)])
    torch.testing.assert_close(shares[0], shares[1], atol=1 / 297, rtol=0)
    assert {level for image in train for level in image.tobytes()} == {round(level * 255 / 16) for level in range(17)}
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in test}


def test_real_cifar(shared_data):
    records = load_images(shared_data / "cifar10" / "test.parquet")
    assert records.class_names[:2] == ["airplane", "automobile"]
    assert records.labels.bincount().tolist() == [1000] * 10
    assert (records[0].size, records[0].mode) == ((32, 32), "RGB")


def test_a_limit_takes_a_fixed_draw_in_order(tmp_path):
    path = write(tmp_path, table(sorted(LABELS * 30)))
    whole, some, more = (load_images(path, limit=limit) for limit in (None, 20, 50))
    order = {image.tobytes(): number for number, image in enumerate(whole)}
    rows, others = ([order[image.tobytes()] for image in part] for part in (some, more))
    assert (len(rows), rows) == (20, sorted(rows))
    assert set(rows) < set(others)
    assert torch.equal(some.labels, whole.labels[rows])
    assert some.labels.unique().tolist() == [0, 1, 2]


def test_columns_are_chosen_by_name(tmp_path):
    bytes_of = [cell["bytes"] for cell in table().cast_column("image", datasets.Image(decode=False))["image"]]
    path = write(tmp_path, table(image="thumbnail", coarse_label=[0, 1, 0, 1, 0, 1, 0], raw=bytes_of))
    records = load_images(path, image_column="raw", label_column="coarse_label")
    assert records.labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert records[3] == picture(3)


@pytest.mark.parametrize(
    ("training", "held_out", "labels"),
    [
        pytest.param(CLASSES, ["ant", "cow"], [0, 2, 2], id="by-name"),
        pytest.param(CLASSES, ["bee", "yak", "cow"], [1, 2, 2], id="unused-name"),
        pytest.param(CLASSES, None, [0, 2, 2], id="as-they-are"),
        pytest.param(["0", "1", "2"], None, [0, 2, 2], id="never-named"),
    ],
)
def test_held_out_classes_get_the_numbers_of_training(training, held_out, labels, tmp_path):
    stored = labels if held_out is None else [held_out.index(training[label]) for label in labels]
    records = load_images(write(tmp_path, table(stored, held_out)), class_names=training)
    assert (records.labels.tolist(), records.class_names) == (labels, training)


@pytest.mark.parametrize(("mode", "decoded"), [("1", "L"), ("LA", "L"), ("P", "RGB"), ("RGBA", "RGB"), ("CMYK", "RGB")])
def test_all_modes_become_gray_or_color(mode, decoded, tmp_path):
    path = tmp_path / "train" / "ant" / ("0.tiff" if mode == "CMYK" else "0.png")
    write_folder(tmp_path, labels=[1])
    path.parent.mkdir(parents=True)
    picture(0).convert(mode).save(path)
    records = load_images(tmp_path)
    image = records[records.labels.tolist().index(0)]
    assert image.mode == decoded
    assert image.tobytes() == picture(0).convert(mode).convert(decoded).tobytes()


@pytest.mark.parametrize(("width", "height", "left", "top"), [(9, 15, 0, 1), (15, 9, 1, 0), (9, 9, 0, 0)])
def test_resize_and_crop_keeps_proportions(width, height, left, top):
    image = picture(0, width, height)
    resized = image.resize((width // 3, height // 3), Image.Resampling.BILINEAR)
    assert resize_and_crop(image, shorter_side=3, size=3) == resized.crop((left, top, left + 3, top + 3))


def corrupt(folder):
    write_folder(folder)
    path = folder / "train" / "bee" / "3.png"
    path.write_bytes(path.read_bytes()[:60])


def corrupt_bytes(folder):
    write(folder, table(names=None, image="thumbnail", raw=[b"no image"] * len(LABELS)))


def deep(folder):
    write_folder(folder)
    Image.fromarray(np.full((4, 3), 1000, np.uint16)).save(folder / "train" / "bee" / "3.png")


@pytest.mark.parametrize(
    ("damage", "options", "index", "message"),
    [
        pytest.param(corrupt, {}, 3, r"cannot decode the image in record 3 of .*3\.png.*truncated", id="truncated"),
        pytest.param(corrupt_bytes, {"image_column": "raw"}, 2, r"record 2 of .*not a file of its own", id="bytes"),
        pytest.param(deep, {}, 3, r"record 3 of .*3\.png.*mode is I;16, but pixels must have 8 bits", id="16-bits"),
    ],
)
def test_images_that_cannot_be_decoded_are_named(damage, options, index, message, tmp_path):
    damage(tmp_path)
    records = load_images(tmp_path, **options)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        records[index]
    with pytest.raises(ValueError, match=r"(?s)cannot decode the image in record"):
        list(records)


REFUSED = [
    pytest.param(lambda: table([0, 2, 2]), {}, r"1 of 3 classes have no training image.*number 1 \(bee\)", id="class"),
    pytest.param(
        lambda: table([0, 1]), {}, r"1 of 3 classes have no training image.*number 2 \(cow\)", id="last-class"
    ),
    pytest.param(lambda: table([1, 2], None), {}, r"1 of 3 classes.*number 0; .*from 0", id="from-one"),
    pytest.param(lambda: table([0, 0], None), {}, "two classes at least are needed, .* are of one", id="one-class"),
    pytest.param(lambda: table([0, 10**12], None), {}, r"classes.*number 1;", id="huge-label"),
    pytest.param(lambda: table([0, -1], None), {}, r"label -1 in record 1 .*set the split", id="minus-one"),
    pytest.param(lambda: table([0, None]), {}, r"holds ClassLabel.*number of a class", id="empty-label"),
    pytest.param(
        lambda: table(kind=list("abcdefg")), {"label_column": "kind"}, r"holds Value\('string'\).*'a'", id="text-label"
    ),
    pytest.param(
        lambda: table(other=LABELS).cast_column("other", datasets.ClassLabel(names=CLASSES)),
        {},
        r"several label columns .*set label_column to one of \['label', 'other'\]",
        id="several-labels",
    ),
    pytest.param(lambda: table().remove_columns("label"), {}, r"no label column .*\['image'\]", id="no-labels"),
    pytest.param(lambda: table().remove_columns("image"), {}, r"no image column .*\['label'\]", id="no-images"),
    pytest.param(lambda: table(), {"image_column": "img"}, r"no column 'img' .*set image_column", id="absent-image"),
    pytest.param(lambda: table(), {"label_column": "fine"}, r"no column 'fine' .*set label_column", id="absent-label"),
    pytest.param(lambda: table(), {"image_column": "label"}, r"'label' .*no images; set image_column", id="not-images"),
    pytest.param(lambda: table(), {"limit": 0}, "limit must be at least 1 image or None for all, got 0", id="limit"),
    pytest.param(lambda: table([], None), {}, "cannot read the train split of .* no data", id="empty"),
    pytest.param(lambda: table(), {"split": "train[:0]"}, "no data", id="empty-slice"),
    pytest.param(
        lambda: table(),
        {"class_names": ["ant", "bee"]},
        "class cow in record 0 .*the 2 classes",
        id="unknown",
    ),
    pytest.param(
        lambda: table([0, 5], None),
        {"class_names": CLASSES},
        r"class 5 in record 1 .*the 3 classes",
        id="unknown-number",
    ),
]


@pytest.mark.parametrize(("made", "options", "message"), REFUSED)
def test_data_that_are_refused(made, options, message, tmp_path):
    path = write(tmp_path, made())
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_images(path, **options)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param(
            "images.parquet", b"PAR1 but no more", r"cannot read the train split of .*images\.parquet", id="broken"
        ),
        pytest.param("images.zip", b"", r"images\.zip is no parquet file", id="kind"),
    ],
)
def test_files_that_cannot_be_read(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path / name)


def test_an_absent_split(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the test split of .*train"):
        load_images(write_folder(tmp_path), split="test")
    with pytest.raises(ValueError, match=r'split of the embedded digits must be "train" or "test", got \'dev\''):
        embedded_digits("dev")


def test_options_load_both_parts(tmp_path):
    write(tmp_path, table(LABELS * 2), "train.parquet")
    write(tmp_path, table([1, 0]), "test.parquet")
    options = ImageOptions(dataset=str(tmp_path), max_train_images=9, max_eval_images=1)
    training = options.load("train")
    held_out = options.load("eval", training.class_names)
    assert (len(training), len(held_out)) == (9, 1)
    assert held_out.labels.tolist() in ([0], [1])
    assert (options.crop_padding, options.horizontal_flip) == (4, True)


def test_one_file_is_not_evaluated_on_by_default(tmp_path):
    path = write(tmp_path, table())
    with pytest.raises(ValueError, match="one file, which is one split: set eval_dataset"):
        ImageOptions(dataset=str(path))
    assert len(ImageOptions(dataset=str(path), eval_dataset=str(path)).load("eval", CLASSES)) == len(LABELS)


def test_without_pillow_the_extra_is_named(monkeypatch):
    records = load_images("digits", split="test", limit=2)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r'images are decoded by .* PIL: pip install "hf_fnl\[vision\]"'):
        next(iter(records))
