"""What the READMEs say of results, held against the results and the code."""

from __future__ import annotations

import json
import math
import re
import shlex
import statistics

import pytest
import torch
from transformers import BertConfig, BertModel

from benchmarks.harness.record import ROOT
from hf_fnl import (
    FactorizedBertConfig,
    FactorizedBertModel,
    find_products,
)
from hf_fnl.scripts import evaluate_squad, finetune_squad, pretrain_bert, train_clm, train_translation, train_vision
from hf_fnl.tasks.arguments import SquadTrainingArguments
from hf_fnl.tasks.squad import SquadOptions
from hf_fnl.tasks.translation_training import TranslationArguments
from hf_fnl.training.command_line import parse_arguments
from hf_fnl.vision.image_batches import ImageOptions
from hf_fnl.vision.image_training import ImageTrainingArguments

OPTIONS = {
    "pretrain_bert.py": (pretrain_bert.ModelOptions, pretrain_bert.DataOptions, pretrain_bert.TextTrainingArguments),
    "finetune_squad.py": (finetune_squad.DataOptions, SquadOptions, SquadTrainingArguments),
    "evaluate_squad.py": (evaluate_squad.EvaluationOptions, SquadOptions),
    "train_clm.py": (train_clm.ModelOptions, train_clm.DataOptions, train_clm.LanguageModelArguments),
    "train_translation.py": (train_translation.ModelOptions, train_translation.DataOptions, TranslationArguments),
    "train_vision.py": (train_vision.ModelOptions, ImageOptions, ImageTrainingArguments),
}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
BENCHMARKS = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")


def says(text: str, words: str) -> bool:
    """Whether a text has these words, wherever its lines break."""
    return words in " ".join(text.split())


def commands() -> list[tuple[str, list[str]]]:
    """The README's commands that train, each with its flags; not those that leave something out."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    split = [shlex.split(line, comments=True) for line in lines if "run_scripts/" in line and "..." not in line]
    found = [(words, [word.removeprefix("run_scripts/") for word in words]) for words in split]
    return [
        (script, words[place + 1 :])
        for words, names in found
        for place, script in enumerate(names)
        if script in OPTIONS and words[place] != script
    ]


def command(script: str, *has: str) -> list[str]:
    """Flags of the README's command of a script that has these."""
    (found,) = [flags for name, flags in commands() if name == script and set(has) <= set(flags)]
    return found


@pytest.mark.parametrize(("script", "flags"), commands(), ids=[name for name, _ in commands()])
def test_the_readmes_commands_are_understood(script, flags):
    parse_arguments([*flags, "--use_cpu"] if script != "evaluate_squad.py" else flags, *OPTIONS[script])


def test_the_readme_has_a_command_of_every_script():
    assert {script for script, _ in commands()} == set(OPTIONS)


@pytest.mark.parametrize(
    ("width", "layers", "saved", "blog"), [(768, 12, "14.17 M", "14.3 M"), (1024, 24, "50.37 M", "44.2 M")]
)
def test_what_heads_of_half_the_width_save(width, layers, saved, blog):
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 64}
    sizes["intermediate_size"] = 4 * width
    with torch.device("meta"):
        dense = BertModel(BertConfig(**sizes))
        halved = FactorizedBertModel(FactorizedBertConfig(**sizes, qk_rank=32, ov_rank=32))
    difference = dense.num_parameters() - halved.num_parameters()
    assert difference == layers * (4 * width * width // 2 + 3 * width // 2)  # matrices; biases of queries, keys, values
    assert f"{difference / 1e6:.2f} M" == saved
    assert says(README, saved)
    assert says(README, blog)


def test_heads_of_full_rank_are_balanced_products_of_the_stock_ones():
    """Asking for the width of a dense head gives what the authors' code does: the same product, balanced."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 40}
    models = []
    for config in (FactorizedBertConfig(**sizes), FactorizedBertConfig(**sizes, qk_rank=8, ov_rank=8)):
        torch.manual_seed(0)
        models.append(FactorizedBertModel(config).double())
    for kind in ("qk", "ov"):
        stock, balanced = (find_products(model, [kind])[0] for model in models)
        assert torch.dist(stock.matrix(models[0]), balanced.matrix(models[1])) < 1e-5 * stock.matrix(models[0]).norm()
        left, right = balanced.factors(models[1])
        for gram, other in zip(left.mT @ left, right.mT @ right, strict=True):
            assert torch.dist(gram, other) < 1e-5 * gram.norm()


def test_the_readmes_pretraining_is_nvidias_recipe_for_lamb(tmp_path):
    """Transformers' polynomial decay is NVIDIA's times (1 - warm-up)^-0.5, by which the rates are lower."""
    found = []
    for option, highest in (("--tokenizer", 6e-3), ("--init_from", 4e-3)):
        words = command("pretrain_bert.py", option)
        words.remove("--bf16")
        words[words.index("--output_dir") + 1] = str(tmp_path)
        options, data, args = parse_arguments([*words, "--use_cpu"], *OPTIONS["pretrain_bert.py"])
        batch = 8 * args.train_batch_size * args.gradient_accumulation_steps
        found.append((data.max_seq_length, args.max_steps, args.warmup_steps, batch))
        assert args.learning_rate == pytest.approx(highest * (1 - args.warmup_steps) ** 0.5, rel=1e-3)
        assert (args.lr_scheduler_type.value, args.lr_scheduler_kwargs) == ("polynomial", {"power": 0.5})
        assert (args.weight_decay, args.optim) == (0.01, "flambe")
        ranks = (options.qk_rank, options.ov_rank, options.ffn_rank)
        assert ranks == ((32, 32, None) if option == "--tokenizer" else (None,) * 3)
    assert found == [(128, 7038, 0.2843, 65536), (512, 1563, 0.128, 32768)]
    assert says(README, "65,536 sequences are 8 GPUs # x 64 x 128 accumulated, 32,768 are 8 x 64 x 64")


def test_the_readmes_translation_is_that_of_khodak_et_al(tmp_path):
    flags = command("train_translation.py", "--warmup_start")
    options, data, args = parse_arguments([*flags, "--use_cpu"], *OPTIONS["train_translation.py"])
    assert (options.normalize_before, options.dropout, data.vocab_size, args.max_tokens) == (True, 0.2, 10000, 4000)
    assert (args.learning_rate, args.warmup_start, args.warmup_steps, args.max_steps) == (0.25, 1.0, 4000, 100000)
    assert (args.optim, args.optim_args, args.max_grad_norm) == ("sgd", "momentum=0.99,nesterov=True", 0.1)
    assert (args.frobenius_decay, args.frobenius_mode, args.weight_decay) == (["ov"], "coupled", 0)


def test_the_readmes_fine_tuning_leaves_the_routine_as_it_is():
    given = {word for word in command("finetune_squad.py") if word.startswith("--")}
    known = {*finetune_squad.DataOptions.__dataclass_fields__, *SquadOptions.__dataclass_fields__} | {"output_dir"}
    assert {word.removeprefix("--") for word in given} <= known


def test_calibrated_truncation():
    rows = json.loads((ROOT / "benchmarks" / "results" / "minilm.json").read_text(encoding="utf-8"))["rows"]
    for share in {row["share"] for row in rows.values()}:
        plain, heads, layers = (rows[f"{share} {cut}"] for cut in ("plain", "heads", "layers"))
        assert min(heads["cosine"], layers["cosine"]) > plain["cosine"]
    before, plain, healed = rows["0.5 layers"], rows["0.5 plain"], rows["0.5 layers healed 800"]
    assert says(README, f"a cosine of {before['cosine']:.3f} at half")
    assert says(README, f"where plain truncation keeps {plain['cosine']:.3f}; 800 steps")
    assert says(README, f"cosine {before['cosine']:.3f} to the dense model's embeddings of other sentences without any")
    near = [row["same neighbours"] for row in (before, healed)]
    assert says(README, f"bring it to {healed['cosine']:.3f}, and the share of its ten nearest neighbours")
    assert says(README, f"from {near[0]:.3f} to {near[1]:.3f}")


def test_every_table_of_experiments_is_listed():
    tables = {path.name for path in (ROOT / "run_scripts" / "experiments").iterdir() if path.is_dir()}
    assert {name for name in tables if f"`{name}`" not in BENCHMARKS} == set()


def test_what_a_cut_language_model_loses():
    folder = ROOT / "benchmarks" / "results" / "llm"
    names = ("dense", *(f"{share}-{method}" for share in (0.8, 0.6, 0.4) for method in ("whitening", "ours")))
    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in names}
    both = {name: [row[text]["perplexity"] for text in ("wikitext2", "wikipedia")] for name, row in found.items()}
    dense = both["dense"][0]
    assert says(README, f"perplexity {both['0.8-ours'][0]:.1f} on WikiText-2")
    assert says(README, f"SVD-LLM's whitening has {both['0.8-whitening'][0]:.1f} on the same data")
    assert says(README, f"at 0.6 {both['0.6-ours'][0]:.1f} and {both['0.6-whitening'][0]:.1f}")
    assert says(README, f"the dense model has {dense:.1f} (n = 1)")
    for share in (0.8, 0.6, 0.4):
        lost = {}
        for method, name in (("whitening", "SVD-LLM's whitening"), ("ours", "`--budget` with `--calibrate`")):
            own, other = both[f"{share}-{method}"]
            lost[method] = math.log(own / dense)
            assert says(README, f"| {share} | {name} | {own:.1f} | {other:.1f} | {lost[method]:.2f} |")
        assert lost["ours"] <= 0.8 * lost["whitening"]
    for method, name in (
        ("sequential", "whitening by the inputs of the cut model"),
        ("anchored", "AA-SVD's anchored fit"),
    ):
        row = json.loads((folder / f"0.6-{method}.json").read_text())
        own, other = (row[text]["perplexity"] for text in ("wikitext2", "wikipedia"))
        assert says(README, f"| 0.6 | {name} | {own:.1f} | {other:.1f} | {math.log(own / dense):.2f} |")


def test_other_calibration_data_of_a_language_model():
    folder = ROOT / "benchmarks" / "results" / "llm"
    for method, name in (("ours", "`--budget`"), ("whitening", "whitening")):
        files = (f"0.8-{method}{end}.json" for end in ("", "-skip-16384", "-skip-32768"))
        rows = [json.loads((folder / file).read_text()) for file in files]
        assert [row.get("skip", 0) for row in rows] == [0, 16384, 32768]
        spread = {
            text: [f"{f([row[text]['perplexity'] for row in rows]):.1f}" for f in (statistics.mean, statistics.stdev)]
            for text in ("wikitext2", "wikipedia")
        }
        shown = " and ".join(" ± ".join(spread[text]) for text in ("wikitext2", "wikipedia"))
        assert says(README, f"{shown} with {name}")


def test_what_the_quickstart_learns():
    found = json.loads((ROOT / "benchmarks" / "results" / "quickstart.json").read_text())["figures"]
    pretrained, scratch = (f"{found[f'exact match, {which}']:.0f} %" for which in ("pretrained", "not pretrained"))
    assert says(README, f"answers {pretrained} exactly, one of its shape that was not pretrained {scratch}")
    loss, entropy = (
        f"{found[f'{name}, nats']:.2f}" for name in ("loss of masked word pieces", "entropy of word pieces")
    )
    assert says(README, f"has a loss of {loss} after 1,900 updates and four minutes, where frequencies give {entropy}")


def test_speeds_of_a_cut_language_model():
    for row in json.loads((ROOT / "benchmarks" / "results" / "llm" / "speed.json").read_text())["models"]:
        share, number = row["model"].removesuffix("-healed-150"), "torch's int8" if row["int8"] else "float32"
        speeds = " | ".join(f"{row['tokens_per_second'][batch]:.1f}" for batch in ("1", "16"))
        assert says(README, f"| {share} | {number} | {row['perplexity']:.1f} | {speeds} | {row['bytes'] / 2**20:.0f} |")


@pytest.mark.parametrize(
    ("title", "cut", "healed", "steps"),
    [
        ("dense, and trained on the same tokens", "dense", "dense-trained", 150),
        ("0.8", "0.8-ours-wikipedia", "0.8-healed", 150),
        ("0.6", "0.6-ours-wikipedia", "0.6-healed", 150),
        ("0.6, 300 steps, an hour", "0.6-ours-wikipedia", "0.6-healed", 300),
        ("0.4", "0.4-ours-wikipedia", "0.4-healed", 150),
    ],
)
def test_what_healing_gives_back(title, cut, healed, steps):
    folder = ROOT / "benchmarks" / "results" / "llm"
    before, after = (json.loads((folder / f"{name}.json").read_text()) for name in (cut, f"{healed}-{steps}"))
    there, here = ([row[text]["perplexity"] for row in (before, after)] for text in ("wikipedia", "wikitext2"))
    assert says(README, f"| {title} | {there[0]:.1f} | {there[1]:.1f} | {here[0]:.1f} | {here[1]:.1f} |")
    assert after["training"]["steps"] == steps
    assert after["training"]["tokens"] == steps * 1024
