"""Pretrain BERT with LAMB, with Frobenius decay or FLAMBe, and fine-tune it on SQuAD (Khodak et al. 2021, Table 4).

Pretraining is masked language modeling alone, without the next sentence: windows ``[CLS] text [SEP]`` at random places
of random articles, none across two articles. Short windows come first, because they leave the plateau of word
frequencies sooner. In each window the same number of tokens is masked, 15 % of them, by BERT's rule of 80/10/10. The
held-out loss is that of the validation articles, in windows of the last phase's length, with one mask for all runs.

The optimizers differ in the decay alone:

- ``lamb``: LAMB, ``ov_decay * p`` in the update of the factors of output-value products.
- ``lamb_fd``: the simple variant of the paper, in which these factors get no such decay, but the gradient of
  ``ov_decay / 2 * ||W||_F^2`` in their gradient. They keep LAMB's trust ratio, which a decay of 0 would switch off.
- ``flambe``: ``ov_decay * F_p`` in the place of ``ov_decay * p``.

All other matrices have ``weight_decay * p`` in their update, so that ``ov_decay`` alone is tuned.

Fine-tuning is BERT's own, with a rate for so small a model, for several seeds after each other; the model that was
pretrained stays in the folder ``pretrained``. A run that was broken off goes on.

    python -m benchmarks.training.bert --optimizer flambe --head_rank 32 --seed 1 --out runs/flambe --data gpu_data
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from transformers.utils import logging

from benchmarks.training.common import Broken, RepeatedStep, Run, TextTraining, precision, run_parser, run_program
from benchmarks.training.squad_data import Windows, best_spans, read_questions, score_answers
from benchmarks.training.text_data import TextData, Tokens
from hf_fnl import (
    FactorizedBertConfig,
    FactorizedBertForMaskedLM,
    FactorizedBertForQuestionAnswering,
    FLAMBe,
    Lamb,
    Product,
    diagnose,
    find_products,
    parameter_groups,
)
from hf_fnl.optim.frobenius_decay import frobenius_penalty

PROGRAM = "benchmarks.training.bert"
OPTIMIZERS = ("lamb", "lamb_fd", "flambe")
CLS, SEP, MASK, FIRST_ORDINARY = 2, 3, 4, 5  # of our word pieces, whose [PAD] is 0 and [UNK] is 1
MASKED_SHARE = 0.15
# A decay so small that no update feels it; LAMB scales an update by its trust ratio only where there is one.
NO_DECAY = 1e-30


def polynomial(warmup: int, steps: int, power: float) -> Callable[[int], float]:
    """Return NVIDIA's schedule for LAMB: update ``n`` has ``n / warmup``, after that ``(1 - n / steps)^power``."""

    def factor(step: int) -> float:
        update = step + 1
        return update / warmup if update < warmup else max(0.0, 1 - update / steps) ** power

    return factor


class Phase(NamedTuple):
    """Updates of one length."""

    length: int
    steps: int
    batch: int

    @classmethod
    def parse(cls, text: str) -> Phase:
        """Read ``length:steps:batch``."""
        try:
            length, steps, batch = map(int, text.split(":"))
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be length:steps:batch, got {text!r}") from None
        return cls(length, steps, batch)


class MaskedBatch(NamedTuple):
    """Windows with masks: tokens ``(batch, length)``; masked positions and what stood there ``(batch, masked)``."""

    ids: Tensor
    positions: Tensor
    labels: Tensor


class Corpus:
    """A split on the device.

    Args:
        tokens: Of the split.
        device: Where.
    """

    def __init__(self, tokens: Tokens, device: torch.device) -> None:
        self.begins = tokens.begins
        # 8,192 pieces fit into int16, and gathering does not know uint16.
        self.ids = torch.from_numpy(tokens.ids.astype(np.int16)).to(device)

    def window_begins(self, length: int) -> Tensor:
        """All positions at which a window of ``length`` tokens lies in one document."""
        counts = np.maximum(np.diff(self.begins) - length + 1, 0)
        first = np.repeat(self.begins[:-1] - np.cumsum(counts) + counts, counts)
        if not len(first):
            raise ValueError(f"no document has the {length} tokens of a window; lower --phases")
        return torch.from_numpy((first + np.arange(len(first))).astype(np.int32)).to(self.ids.device)

    def even_begins(self, length: int, count: int) -> Tensor:
        """Positions of ``count`` windows at most that do not overlap, spread over all documents."""
        each = [
            np.arange(begin, end - length + 1, length) for begin, end in zip(self.begins, self.begins[1:], strict=False)
        ]
        begins: NDArray[np.int64] = np.concatenate(each)
        kept = np.linspace(0, len(begins) - 1, min(count, len(begins))).round().astype(np.int64)
        return torch.from_numpy(begins[kept]).to(self.ids.device)

    def windows(self, begins: Tensor, length: int) -> Tensor:
        """Tokens of windows, ``(windows, length + 2)``, between ``[CLS]`` and ``[SEP]``."""
        text = self.ids[begins.long()[:, None] + torch.arange(length, device=begins.device)]
        return F.pad(F.pad(text.long(), (1, 0), value=CLS), (0, 1), value=SEP)


def mask_tokens(ids: Tensor, vocab_size: int, generator: torch.Generator | None = None) -> MaskedBatch:
    """Mask 15 % of the tokens of each window: 80 % of them by ``[MASK]``, 10 % by any piece, 10 % stay.

    Args:
        ids: Windows from ``[CLS]`` to ``[SEP]``, which are not masked.
        vocab_size: Pieces.
        generator: Of random numbers; the device's own unless given.
    """
    batch, length = ids.shape
    masked = max(1, round(MASKED_SHARE * (length - 2)))
    order = torch.rand(batch, length - 2, device=ids.device, generator=generator)
    positions = order.topk(masked, dim=1).indices + 1
    labels = ids.gather(1, positions)
    chance = torch.rand(batch, masked, device=ids.device, generator=generator)
    other = torch.randint(FIRST_ORDINARY, vocab_size, (batch, masked), device=ids.device, generator=generator)
    shown = torch.where(chance < 0.8, MASK, torch.where(chance < 0.9, other, labels))
    return MaskedBatch(ids.scatter(1, positions, shown), positions, labels)


def masked_logits(model: Any, batch: MaskedBatch) -> Tensor:
    """Logits at masked positions, ``(batch * masked, vocab)``."""
    hidden = model.bert(input_ids=batch.ids).last_hidden_state
    chosen = hidden.gather(1, batch.positions[:, :, None].expand(-1, -1, hidden.shape[-1]))
    return model.cls(chosen).flatten(0, 1).float()


def build_model(options: argparse.Namespace, vocab_size: int) -> FactorizedBertForMaskedLM:
    """Return the model: heads of ``head_rank`` with spectral initialization, everything else dense.

    The dense heads are drawn alike for every rank, and cut to it.
    """
    torch.manual_seed(options.seed)
    config = FactorizedBertConfig(
        vocab_size=vocab_size,
        hidden_size=options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        intermediate_size=4 * options.hidden_size,
        max_position_embeddings=max(options.squad_length, *(phase.length for phase in options.phases)),
        qk_rank=options.head_rank,
        ov_rank=options.head_rank,
        factor_init="spectral",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    return FactorizedBertForMaskedLM(config)


def build_optimizer(name: str, model: nn.Module, rate: Tensor, weight_decay: float, ov_decay: float) -> Lamb:
    """Return the optimizer of a cell; ``lamb_fd`` also needs :func:`frobenius_penalty` in the loss.

    Args:
        name: One of ``OPTIMIZERS``.
        model: Its model.
        rate: Learning rate, a tensor.
        weight_decay: Decay of all matrices but the factors of output-value products.
        ov_decay: Coefficient of the decay of these factors, or of the Frobenius decay of their products.
    """
    shared: dict[str, Any] = {"lr": rate, "betas": (0.9, 0.999)}
    products = find_products(model, ["ov"])
    decay = NO_DECAY if name == "lamb_fd" else ov_decay
    groups = parameter_groups(model, weight_decay=weight_decay, products=products, frobenius_decay=decay)
    if name == "flambe":
        return FLAMBe(groups, products=products, **shared)
    return Lamb(groups, **shared)


class Pretraining(TextTraining):
    """The model, optimizer and step of a run's pretraining.

    Args:
        options: Of the program.
        run: The run.
        text: The data.
    """

    def __init__(self, options: argparse.Namespace, run: Run, text: TextData) -> None:
        super().__init__(options, run)
        self.vocab_size = text.tokenizer("wordpiece").get_vocab_size()
        self.model: Any = build_model(options, self.vocab_size).to(run.device)
        self.corpus = Corpus(text.tokens("wordpiece", "train"), run.device)
        self.held_out = self._held_out(Corpus(text.tokens("wordpiece", "validation"), run.device))
        self.rate = torch.zeros((), device=run.device)
        decays = options.weight_decay, options.ov_decay
        self.optimizer = build_optimizer(options.optimizer, self.model, self.rate, *decays)
        self.products: list[Product] = find_products(self.model, ["ov"])
        self.loss = torch.zeros((), device=run.device)  # sum since the last log
        total = sum(phase.steps for phase in options.phases)
        self.schedule = polynomial(max(1, round(options.warmup * total)), total, options.power)
        torch.manual_seed(options.seed)  # the same windows and masks whatever the model drew

    def _held_out(self, corpus: Corpus) -> MaskedBatch:
        length = self.options.phases[-1].length
        windows = corpus.windows(corpus.even_begins(length - 2, self.options.eval_windows), length - 2)
        batch = mask_tokens(windows.cpu(), self.vocab_size, torch.Generator().manual_seed(0))
        return MaskedBatch(*(tensor.to(windows.device) for tensor in batch))

    def train(self, state: dict[str, Any] | None) -> None:
        """Make the updates that are left.

        Raises:
            Broken: If the run has to stop; its checkpoint is written.
        """
        done = 0 if state is None else self.restore(state)
        begin = 0
        for phase in self.options.phases:
            if done < begin + phase.steps:
                self._train_phase(phase, max(done, begin), begin + phase.steps)
            begin += phase.steps

    def _train_phase(self, phase: Phase, begin: int, end: int) -> None:
        options = self.options
        step = RepeatedStep(self._step_of(phase), self.run.device, capture=not options.eager)
        for number in range(begin, end):
            if number % options.check_steps == 0 and self.must_stop(number):
                raise Broken(f"after {number} steps of pretraining")
            self.rate.fill_(options.lr * self.schedule(number))
            step()
            if (number + 1) % options.log_steps == 0:
                self._log(number + 1, phase.length)

    def _step_of(self, phase: Phase) -> Callable[[], None]:
        begins = self.corpus.window_begins(phase.length - 2)
        penalized = self.options.ov_decay if self.options.optimizer == "lamb_fd" else None

        def step() -> None:
            self.optimizer.zero_grad(set_to_none=True)
            chosen = begins[torch.randint(len(begins), (phase.batch,), device=begins.device)]
            batch = mask_tokens(self.corpus.windows(chosen, phase.length - 2), self.vocab_size)
            with precision(self.options, self.run):
                logits = masked_logits(self.model, batch)
            loss = F.cross_entropy(logits, batch.labels.flatten())
            self.loss.add_(loss.detach())
            if penalized is not None:
                loss = loss + frobenius_penalty(self.products, self.model, penalized)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()

        return step

    def _log(self, step: int, length: int) -> None:
        figures: dict[str, Any] = {"step": step, "length": length, "loss": self.take_loss(step)}
        if step % self.options.eval_steps == 0:
            figures |= self.evaluate()
        self.run.log(**figures)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss and accuracy at the masked positions of the validation articles."""
        self.model.eval()
        sums = torch.zeros(2, device=self.run.device)
        for first in range(0, len(self.held_out.ids), self.options.eval_batch):
            batch = MaskedBatch(*(tensor[first : first + self.options.eval_batch] for tensor in self.held_out))
            with precision(self.options, self.run):
                logits = masked_logits(self.model, batch)
            labels = batch.labels.flatten()
            hits = (logits.argmax(-1) == labels).sum()
            sums += torch.stack([F.cross_entropy(logits, labels, reduction="sum"), hits])
        self.model.train()
        loss, accuracy = (sums / self.held_out.labels.numel()).tolist()
        return {"mlm_loss": loss, "mlm_accuracy": accuracy}

    def figures(self) -> dict[str, float]:
        """Norms and rank of the output-value products, means over layers and heads."""
        rows = diagnose(self.model, self.products).values()
        names = ("frobenius_norm", "nuclear_norm", "effective_rank")
        return {f"ov_{name}": statistics.fmean(row[name] for row in rows) for name in names}


class FineTuning:
    """SQuAD for a pretrained model.

    Args:
        options: Of the program.
        run: The run.
        text: The data.
        pretrained: Folder of the model.
    """

    def __init__(self, options: argparse.Namespace, run: Run, text: TextData, pretrained: Path) -> None:
        self.options, self.run, self.pretrained = options, run, pretrained
        length, stride = options.squad_length, options.squad_stride
        self.train = text.squad("train", length, stride, options.max_questions)
        self.dev = text.squad("dev", length, stride, options.max_questions)
        self.questions = read_questions(text.data / "squad" / "dev-v1.1.json", options.max_questions)

    def score(self, seed: int) -> dict[str, float]:
        """Fine-tune with one seed and score the answers to the questions of the dev set."""
        torch.manual_seed(seed)
        model: Any = FactorizedBertForQuestionAnswering.from_pretrained(self.pretrained, attn_implementation="sdpa")
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = self.options.squad_dropout
        model.to(self.run.device).train()
        loss = self._tune(model)
        scores = self._answer(model.eval())
        return {"seed": seed, "loss": loss, **scores}

    def _tune(self, model: Any) -> float:
        """Train the model; returns the mean loss of the last epoch."""
        options, device = self.options, self.run.device
        count, batch = len(self.train.ids), min(options.squad_batch, len(self.train.ids))
        per_epoch = count // batch
        steps = options.squad_epochs * per_epoch
        order = torch.stack([torch.randperm(count)[: per_epoch * batch] for _ in range(options.squad_epochs)])
        order = order.view(steps, batch).to(device)
        rate, number, total = (torch.zeros((), device=device) for _ in range(3))
        groups = parameter_groups(model, weight_decay=0.01)
        on_gpu = device.type == "cuda"
        optimizer: Optimizer = torch.optim.AdamW(groups, lr=rate, fused=True, capturable=on_gpu)
        data = _on_device(self.train, device)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            rows = order.index_select(0, number.long()[None])[0]
            with precision(self.options, self.run):
                logits = _span_logits(model, *(data[name][rows] for name in ("ids", "context_begins", "lengths")))
            starts, ends = (
                F.cross_entropy(side, data[name][rows]) for side, name in zip(logits, ("starts", "ends"), strict=True)
            )
            loss = (starts + ends) / 2
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total.add_(loss.detach())
            number.add_(1)

        schedule = polynomial(max(1, round(0.1 * steps)), steps, 1.0)
        repeated = RepeatedStep(step, device, capture=not options.eager)
        for n in range(steps):
            if n % per_epoch == 0:
                total.zero_()
            if n % options.check_steps == 0:
                if on_gpu:
                    torch.cuda.synchronize(device)
                if self.run.must_stop():
                    raise Broken(f"after {n} steps of fine-tuning, which is begun again")
            rate.fill_(options.squad_lr * schedule(n))
            repeated()
        return total.item() / per_epoch

    @torch.no_grad()
    def _answer(self, model: Any) -> dict[str, float]:
        data, found = _on_device(self.dev, self.run.device), []
        for first in range(0, len(self.dev.ids), self.options.eval_batch):
            part = {name: tensor[first : first + self.options.eval_batch] for name, tensor in data.items()}
            with precision(self.options, self.run):
                start, end = _span_logits(model, part["ids"], part["context_begins"], part["lengths"])
            found.append(best_spans(start, end, part["in_context"]))
        columns = (torch.cat(column).cpu().numpy() for column in zip(*found, strict=True))
        return score_answers(self.questions, self.dev, *columns)


def _on_device(windows: Windows, device: torch.device) -> dict[str, Tensor]:
    arrays = dataclasses.asdict(windows)
    arrays["ids"] = arrays["ids"].astype(np.int16)
    arrays["in_context"] = arrays.pop("spans")[:, :, 0] >= 0
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


def _span_logits(model: Any, ids: Tensor, context_begins: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the first and the last token of the answer, each ``(windows, length)``."""
    place = torch.arange(ids.shape[1], device=ids.device)
    mask = (place < lengths[:, None])[:, None, None, :].expand(-1, 1, ids.shape[1], -1)
    context = (place >= context_begins[:, None]).long()
    hidden = model.bert(input_ids=ids.long(), attention_mask=mask, token_type_ids=context).last_hidden_state
    start, end = model.qa_outputs(hidden).float().unbind(-1)
    return start, end


def train(options: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """Pretrain, fine-tune and write the result."""
    run = Run(options, PROGRAM, argv)
    text = TextData.of(options.data, options.cache, vocab_size=options.vocab_size, max_documents=options.max_documents)
    state = run.load() or {}
    pretrained = run.folder / "pretrained"
    with run.stopping():
        if "measures" not in state:
            pretraining = Pretraining(options, run, text)
            pretraining.train(state or None)
            measures = {**pretraining.evaluate(), **pretraining.figures()}
            measures["parameters"] = sum(parameter.numel() for parameter in pretraining.model.parameters())
            measures["pretraining_seconds"] = run.seconds()
            run.log(**measures)
            pretraining.model.save_pretrained(pretrained)
            state = {"measures": measures, "fine_tuning": []}
            run.save(state)
            del pretraining
        if options.squad_seeds:
            tuning = FineTuning(options, run, text, pretrained)
            for seed in options.squad_seeds[len(state["fine_tuning"]) :]:
                scores = tuning.score(seed)
                run.log(**{f"squad_{name}": value for name, value in scores.items()})
                state["fine_tuning"].append(scores)
                run.save(state)
    measures, scores = state["measures"], state["fine_tuning"]
    for name in ("f1", "exact_match") if scores else ():
        measures[name] = statistics.fmean(score[name] for score in scores)
    return run.finish(measures, fine_tuning=scores)


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the options of the program."""
    parser = run_parser(__doc__)
    add = parser.add_argument
    add("--optimizer", choices=OPTIMIZERS, default="lamb", help="what trains")
    add("--weight_decay", type=float, default=0.01, help="of all matrices but factors of output-value products")
    add("--ov_decay", type=float, help="of output-value products or their factors; --weight_decay unless given")
    add("--head_rank", type=int, default=64, help="of the products of every head; 64 is full at the default sizes")
    add("--lr", type=float, default=4e-3, help="highest learning rate")
    add("--warmup", type=float, default=0.1, help="share of the updates in which the rate rises")
    add("--power", type=float, default=1.0, help="of the polynomial by which it falls")
    add(
        "--phases",
        type=Phase.parse,
        nargs="+",
        default=[Phase(32, 1000, 512), Phase(128, 3000, 256)],
        help="length:steps:batch of each phase",
    )
    for name, value in {"hidden_size": 256, "layers": 4, "heads": 4, "vocab_size": 8192}.items():
        add(f"--{name}", type=int, default=value)
    add("--squad_seeds", type=int, nargs="*", default=[1, 2, 3], help="seeds of fine-tunings; none: no fine-tuning")
    add("--squad_lr", type=float, default=3e-4)
    add("--squad_dropout", type=float, default=0.1)
    for name, value in {"epochs": 3, "batch": 32, "length": 384, "stride": 128}.items():
        add(f"--squad_{name}", type=int, default=value)
    for name, value in {"log": 100, "eval": 500, "check": 25}.items():
        add(f"--{name}_steps", type=int, default=value)
    add("--eval_windows", type=int, default=2048, help="of the validation articles, at most")
    add("--eval_batch", type=int, default=256)
    add("--max_documents", type=int, help="train on the first so many articles")
    add("--max_questions", type=int, help="take the first so many questions of each set")
    add("--cache", type=Path, help="folder of encoded texts; 'encoded' in the data folder if it can be written to")
    add("--bf16", action=argparse.BooleanOptionalAction, default=None, help="mixed precision; on a GPU unless told not")
    options = parser.parse_args(argv)
    options.bf16 = options.device.startswith("cuda") if options.bf16 is None else options.bf16
    options.ov_decay = options.weight_decay if options.ov_decay is None else options.ov_decay
    return options


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run one cell with one seed; returns what ``result.json`` holds."""
    arguments = list(argv or [])
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return train(parse(arguments), arguments)


if __name__ == "__main__":
    run_program(PROGRAM, main)
