"""GPT-2 at low rank: initialization, decay, learning rate and dense pretraining (Kamalakara et al. 2022, Tables 4, 7).

The matrix of queries, keys and values and both feed-forward matrices have 62.5 % of full rank, as in the paper; all
else is dense. ``L2`` is AdamW's decay of every matrix and factor, ``FD`` the decoupled Frobenius decay of the products
with the same coefficient. ``--form dense_first`` is dense for a sixth of the updates, then truncated, and goes on with
half the learning rate. Windows lie at random places of the articles behind one another, ``<|endoftext|>`` between them.
The perplexities, per token, are those of plain blocks of ``length`` tokens that do not overlap, on held-out Wikipedia
articles and on the test set of WikiText-2 as it is, with its spaces and ``<unk>``. The rate rises for a tenth of the
updates and falls by a cosine to a tenth. A run that was broken off goes on.

    python -m benchmarks.training.gpt2 --form low_rank --init spectral --decay FD --out runs/spectral --data gpu_data
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from transformers import AttentionInterface
from transformers.utils import logging

from benchmarks.training.common import Broken, RepeatedStep, Run, TextTraining, precision, run_parser, run_program
from benchmarks.training.text_data import TextData, Tokens
from hf_fnl import (
    FactorizedGPT2Config,
    FactorizedGPT2LMHeadModel,
    FrobeniusDecay,
    Product,
    diagnose,
    find_products,
    parameter_groups,
)
from hf_fnl.optim.transfer import transfer_

PROGRAM = "benchmarks.training.gpt2"
FORMS = ("low_rank", "dense", "dense_first")
DECAYS = ("L2", "FD")
RANK_SCALE = 0.625
ATTENTION = "causal_without_mask"


def causal_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention of each token to those before it.

    Under a name of its own Transformers makes no mask, which on a GPU it first waits for and then hands to a slower
    kernel.
    """
    scale = options.get("scaling")
    context = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    return context.transpose(1, 2), None


AttentionInterface.register(ATTENTION, causal_attention)


def build_model(options: argparse.Namespace, vocab_size: int, *, dense: bool) -> FactorizedGPT2LMHeadModel:
    """Return the model, its products drawn as ``--init`` says."""
    torch.manual_seed(options.seed)
    rank = None if dense else products_rank(options)
    config = FactorizedGPT2Config(
        vocab_size=vocab_size,
        n_positions=options.length,
        n_embd=options.hidden_size,
        n_layer=options.layers,
        n_head=options.heads,
        qkv_rank=rank,
        ffn_rank=rank,
        factor_init=options.init,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation=ATTENTION,
    )
    return FactorizedGPT2LMHeadModel(config)


def products_rank(options: argparse.Namespace) -> int:
    """The paper's 62.5 % of full rank, which is the width for every product."""
    return round(RANK_SCALE * options.hidden_size)


def linear_products(model: nn.Module) -> list[Product]:
    """The products that are decayed and measured: those of linear layers, none in a dense model."""
    return [product for product in find_products(model) if product.kind == "linear"]


def build_optimizer(
    model: nn.Module, rate: Tensor, weight_decay: float, *, frobenius: bool
) -> tuple[Optimizer, FrobeniusDecay | None]:
    """Return AdamW, and the decay of products in its steps where they are not decayed as matrices.

    Args:
        model: The model.
        rate: Learning rate, a tensor.
        weight_decay: Of matrices, and of products if ``frobenius``.
        frobenius: Whether products are decayed, in the place of their factors.
    """
    products = linear_products(model) if frobenius else []
    groups = parameter_groups(model, weight_decay=weight_decay, products=products, frobenius_decay=0.0)
    on_gpu = rate.is_cuda
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True, capturable=on_gpu)
    return optimizer, FrobeniusDecay(optimizer, products, weight_decay) if products else None


def token_losses(model: Any, ids: Tensor, targets: Tensor) -> Tensor:
    """Mean loss of predicting ``targets``, which are ``ids`` one place on."""
    hidden = model.transformer(input_ids=ids, use_cache=False).last_hidden_state
    return F.cross_entropy(model.lm_head(hidden).flatten(0, 1).float(), targets.flatten())


class Training(TextTraining):
    """The model, optimizer and step of a run.

    Args:
        options: Of the program.
        run: The run.
        text: The data.
    """

    def __init__(self, options: argparse.Namespace, run: Run, text: TextData) -> None:
        super().__init__(options, run)
        vocab_size = text.tokenizer("byte_bpe").get_vocab_size()
        self.model: Any = build_model(options, vocab_size, dense=options.form != "low_rank").to(run.device)
        self.stream = _on_device(text.tokens("byte_bpe", "train"), run.device)
        self.held_out = {
            name: _on_device(text.tokens("byte_bpe", split), run.device)
            for name, split in {"perplexity": "validation", "wikitext2_perplexity": "wikitext2"}.items()
        }
        self.rate = torch.zeros((), device=run.device)
        self.frobenius = options.decay == "FD"
        self.optimizer, self.decay = self._optimizer()
        self.loss = torch.zeros((), device=run.device)  # sum since the last log
        self.dense_steps = max(1, options.steps // 6) if options.form == "dense_first" else 0
        torch.manual_seed(options.seed)  # the same windows whatever the model drew

    def _optimizer(self) -> tuple[Optimizer, FrobeniusDecay | None]:
        return build_optimizer(self.model, self.rate, self.options.weight_decay, frobenius=self.frobenius)

    def train(self, state: dict[str, Any] | None) -> None:
        """Make the updates that are left.

        Raises:
            Broken: If the run has to stop; its checkpoint is written.
        """
        done = 0
        if state is not None:
            if state["is_low_rank"] and self.dense_steps:
                self._become_low_rank()
            done = self.restore(state)
        if self.dense_steps and not linear_products(self.model):
            self._train(done, self.dense_steps, 1.0)
            self._become_low_rank()
            done = self.dense_steps
        self._train(done, self.options.steps, 0.5 if self.dense_steps else 1.0)

    def _become_low_rank(self) -> None:
        """Truncate the dense model; the optimizer follows. Takes no random numbers from the run."""
        before = dict(self.model.named_parameters(remove_duplicate=False))
        rank, optimizer = products_rank(self.options), self.optimizer
        with torch.random.fork_rng([self.run.device] if self.run.device.type == "cuda" else []):
            self.model.factorize_(qkv_rank=rank, ffn_rank=rank, factor_init=self.options.init)
        self.model.to(self.run.device)
        self.optimizer, self.decay = self._optimizer()
        transfer_(optimizer, before, self.model, target=self.optimizer)

    def _train(self, begin: int, end: int, scale: float) -> None:
        options = self.options
        step = RepeatedStep(self._step, self.run.device, capture=not options.eager)
        for number in range(begin, end):
            if number % options.check_steps == 0 and self.must_stop(
                number, is_low_rank=bool(linear_products(self.model))
            ):
                raise Broken(f"after {number} steps")
            self.rate.fill_(scale * options.lr_scale * options.lr * schedule(number, options.steps))
            step()
            if (number + 1) % options.log_steps == 0:
                self._log(number + 1)

    def _step(self) -> None:
        options = self.options
        self.optimizer.zero_grad(set_to_none=True)
        place = torch.arange(options.length + 1, device=self.run.device)
        begins = torch.randint(len(self.stream) - options.length, (options.batch, 1), device=self.run.device)
        windows = self.stream[begins + place].long()
        with precision(self.options, self.run):
            loss = token_losses(self.model, windows[:, :-1], windows[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.loss.add_(loss.detach())

    def _log(self, step: int) -> None:
        figures: dict[str, Any] = {"step": step, "loss": self.take_loss(step)}
        if step % self.options.eval_steps == 0:
            figures |= {"perplexity": self.perplexity("perplexity"), **self.figures()}
        self.run.log(**figures)

    @torch.no_grad()
    def perplexity(self, name: str) -> float:
        """Perplexity per token over blocks that do not overlap; ``name`` is that of the measure."""
        stream, length = self.held_out[name], self.options.length
        blocks = min((len(stream) - 1) // length, self.options.eval_blocks or len(stream))
        if not blocks:
            raise ValueError(f"{name}: the texts have no block of {length} tokens; lower --length")
        ids, targets = (stream[first : first + blocks * length].view(blocks, length) for first in (0, 1))
        total = torch.zeros((), device=self.run.device)
        self.model.eval()
        for first in range(0, blocks, self.options.eval_batch):
            rows = slice(first, first + self.options.eval_batch)
            with precision(self.options, self.run):
                loss = token_losses(self.model, ids[rows].long(), targets[rows].long())
            total += loss * len(ids[rows])
        self.model.train()
        return math.exp(total.item() / blocks)

    def figures(self) -> dict[str, float]:
        """Norms and effective rank of the products, means over layers; none of a dense model."""
        products = linear_products(self.model)
        if not products:
            return {}
        rows = diagnose(self.model, products).values()
        names = ("effective_rank", "frobenius_norm", "nuclear_norm", "operator_norm")
        return {name: statistics.fmean(row[name] for row in rows) for name in names}


def schedule(step: int, steps: int) -> float:
    """Factor of the rate: up in a tenth of the steps, then down to a tenth by a cosine."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def _on_device(tokens: Tokens, device: torch.device) -> Tensor:
    """Tokens as int16, into which 8,192 pieces fit; gathering does not know uint16."""
    return torch.from_numpy(tokens.ids.astype(np.int16)).to(device)


def train(options: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """Train one cell and write the result."""
    run = Run(options, PROGRAM, argv)
    text = TextData.of(options.data, options.cache, vocab_size=options.vocab_size, max_documents=options.max_documents)
    training = Training(options, run, text)
    with run.stopping():
        training.train(run.load())
    measures = {name: training.perplexity(name) for name in training.held_out} | training.figures()
    measures["parameters"] = sum(parameter.numel() for parameter in training.model.parameters())
    run.log(**measures)
    return run.finish(measures)


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the options of the program."""
    parser = run_parser(__doc__)
    add = parser.add_argument
    add("--form", choices=FORMS, default="low_rank", help="low-rank, dense, or dense for a sixth of the updates")
    add("--init", choices=("he", "default", "spectral", "spectral_ones"), default="spectral", help="of the factors")
    add("--decay", choices=DECAYS, default="L2", help="of the factors, or Frobenius decay of their products")
    add("--lr", type=float, default=3e-3, help="highest learning rate")
    add("--lr_scale", type=float, default=1.0, help="multiplies it; the paper halves it at low rank")
    add("--weight_decay", type=float, default=0.1)
    sizes = {"hidden_size": 256, "layers": 4, "heads": 4, "length": 256, "vocab_size": 8192, "batch": 64}
    for name, value in {**sizes, "steps": 6000}.items():
        add(f"--{name}", type=int, default=value)
    for name, value in {"log": 100, "eval": 1000, "check": 25}.items():
        add(f"--{name}_steps", type=int, default=value)
    add("--eval_batch", type=int, default=64)
    add("--eval_blocks", type=int, help="evaluate on the first so many blocks; all unless given")
    add("--max_documents", type=int, help="train on the first so many articles")
    add("--cache", type=Path, help="folder of encoded texts; 'encoded' in the data folder if it can be written to")
    add("--bf16", action=argparse.BooleanOptionalAction, default=None, help="mixed precision; on a GPU unless told not")
    options = parser.parse_args(argv)
    options.bf16 = options.device.startswith("cuda") if options.bf16 is None else options.bf16
    return options


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run one cell with one seed; returns what ``result.json`` holds."""
    arguments = list(argv or [])
    logging.set_verbosity_error()
    return train(parse(arguments), arguments)


if __name__ == "__main__":
    run_program(PROGRAM, main)
