"""What the vision script refuses, before anything is written."""

from __future__ import annotations

import pytest
from vision_script_cases import parquet, picture, stock, train


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "resnet21"}, "one of resnet20, .*, resnet50, got 'resnet21'"),
        ({"model": "vgg19"}, "image_size must be at least 16, got 8"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"init_from": "./nowhere"}, "nowhere"),
        ({"init_from": "./nowhere", "width": 3}, "model and width are for a fresh network: leave them out"),
        ({"rank_scale": 0}, r"rank_scale must be above 0 and at most 1, got 0\.0"),
        ({"rank_scale": 1.5}, r"rank_scale must be above 0 and at most 1, got 1\.5"),
        ({"rank_scale": 0.3, "ratio": 0.3}, r"exactly one of .*; got rank_scale=0\.3, ratio=0\.3"),
        ({"rank_scale": 0.3, "conv_scheme": "svd"}, "conv_scheme must be one of spatial, .*, got 'svd'"),
        ({"rank_scale": 0.3, "factor_init": "svd"}, "factor_init must be one of spectral, .*, got 'svd'"),
        ({"ratio": 0.01}, r"ratio=0\.01 cannot be met: .* of 9,811 parameters .*; the closest ratio is 0\.11"),
        ({"overcomplete": "tall"}, "overcomplete must be one of full, deep, wide, do_conv, got 'tall'"),
        ({"overcomplete": "full", "ratio": 0.3}, "overcomplete=full has more parameters, .*: leave ratio out"),
        ({"overcomplete": "full", "conv_scheme": "tt"}, "conv_scheme='tt' .* does not go with overcomplete"),
        ({"pruning": "best", "ratio": 0.4}, "pruning must be one of random, .*, lottery, got 'best'"),
        ({"pruning": "snip"}, "pruning=snip takes ratio"),
        ({"pruning": "snip", "ratio": 0.4, "rank_scale": 0.3}, "pruning=snip takes ratio, and neither rank_scale"),
        ({"pruning": "snip", "ratio": 0.01}, r"ratio must be in \[.* of 9,811 parameters .*; got 0\.01"),
        ({"pruning": "random", "ratio": 0.029}, "keeps 36 weights of classifier alone, more than keep=17"),
        ({"pruning": "lottery", "ratio": 0.4, "pruning_rounds": 0}, "pruning_rounds must be at least 1, got 0"),
        ({"decay": "l1"}, "decay must be one of weight, frobenius, crs, none, normalized, got 'l1'"),
        ({"rank_scale": 0.3, "decay": "normalized"}, "decay=normalized and norms_from"),
        ({"rank_scale": 0.3, "decay": "normalized", "norms_from": "./nowhere"}, "nowhere holds no .*--record_norms"),
        ({"dataset": "./nowhere"}, r"--dataset \./nowhere: no such file or folder: nowhere"),
        ({"eval_dataset": "./nowhere"}, r"--eval_dataset \./nowhere: no such file or folder: nowhere"),
        ({"dataset": "nosuch"}, "--dataset nosuch: there is no file or folder nosuch, and the Hub could not be asked"),
        ({"init_from": "nosuch"}, "--init_from nosuch: there is no folder nosuch, and the Hub could not be asked"),
        ({"dataset": __file__, "eval_dataset": __file__}, r"test_vision_script_errors\.py is no parquet file"),
        ({"dataset": __file__}, "is one file, which is one split: set eval_dataset"),
        ({"eval_split": "validation"}, 'split of the embedded digits must be "train" or "test"'),
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"crop_padding": -1}, "crop_padding must be at least 0 pixels, got -1"),
        ({"decay": "frobenius"}, "decay=frobenius needs factorized layers: give rank_scale, ratio"),
        ({"conv_scheme": "tt"}, "conv_scheme says how factors are made: give rank_scale or ratio"),
        ({"factor_init": "svd"}, "factor_init must be one of spectral, spectral_ones, default, he, got 'svd'"),
        ({"overcomplete": "do_conv", "rank_scale": 0.5}, "do_conv has no ranks"),
        ({"overcomplete": "do_conv", "decay": "frobenius"}, "decay=frobenius needs factorized layers"),
        ({"overcomplete": "full", "factor_init": "spectral"}, "factor_init must be default or he, got 'spectral'"),
        ({"pruning": "snip", "ratio": 0.4, "decay": "frobenius"}, "decay=frobenius needs factorized layers"),
        ({"pruning": "snip", "ratio": 0.4, "dense_epochs": 1}, "dense_epochs needs factorized layers"),
        ({"pruning": "snip", "ratio": 0.4, "pruning_images": 0}, "pruning_images must be at least 1, got 0"),
        ({"pruning": "snip", "ratio": 0.4, "pruning_rounds": 3}, "pruning_rounds=3 needs .*, got pruning=snip"),
        ({"pruning": "random", "ratio": 0.4, "pruning_images": 9}, "pruning_images=9 needs pruning=snip or grasp"),
        ({"pruning": "snip", "ratio": 0.4, "conv_scheme": "tt"}, "conv_scheme says how factors are made: .*no pruning"),
        ({"pruning_rounds": 3}, "pruning_rounds=3 needs pruning=magnitude or lottery"),
        ({"dense_epochs": 2, "rank_scale": 0.3}, r"dense_epochs must be in \[0, num_train_epochs=2\), got 2"),
        (
            {"dense_epochs": 1, "overcomplete": "full"},
            "dense_epochs trains weights that factor_init=default would draw",
        ),
        ({"dense_epochs": 1, "rank_scale": 0.3, "record_norms": True}, "record_norms and .*: leave dense_epochs out"),
        ({"record_norms": True}, "record_norms needs factorized layers"),
        ({"diagnostics_steps": 5}, "diagnostics_steps needs factorized layers"),
        ({"num_train_epochs": 0}, "num_train_epochs must be positive"),
        ({"max_train_images": 0}, "max_train_images must be at least 1, got 0"),
        ({"ratio": 1.0}, "ratio=1.0 leaves every matrix dense"),
        ({"resume_from_checkpoint": "no/such/folder"}, "resume_from_checkpoint: there is no folder no/such/folder"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises((ValueError, OSError), match=message):
        train(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_bad_images_are_refused_before_anything_is_written(tmp_path):
    train_file = parquet(tmp_path / "train.parquet", [picture()] * 6)
    unknown = parquet(tmp_path / "unknown.parquet", [picture()] * 4, ("ant", "bee", "cow", "doe"))
    mixed = parquet(tmp_path / "mixed.parquet", [picture(), picture(11)] * 3)
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(train_file.read_bytes()[:-9])
    cases = [
        (train_file, unknown, r"class doe in record 3 of .*unknown\.parquet is not among the 3 classes"),
        (mixed, train_file, r"has \(24, 24\) pixels .* record 1 of .* has \(11, 11\); set image_size"),
        (train_file, mixed, r"a training image has \(24, 24\) pixels .* has \(11, 11\); set image_size"),
        (broken, train_file, r"cannot read the train split of .*broken\.parquet as parquet"),
    ]
    for dataset, eval_dataset, message in cases:
        with pytest.raises(ValueError, match=message):
            train(tmp_path / "run", dataset=dataset, eval_dataset=eval_dataset)
    assert not (tmp_path / "run").exists()


def test_images_of_other_channels_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"init_from=.* takes images of 3 channels, got 1"):
        train(tmp_path / "run", init_from=stock(tmp_path / "stock", num_channels=3))
    assert not (tmp_path / "run").exists()
