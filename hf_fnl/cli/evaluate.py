"""``hf-fnl evaluate``: perplexity, speed, memory and size of language models, side by side."""

from __future__ import annotations

import itertools
import statistics
import sys
import time
import warnings
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from hf_fnl.cli.options import Debug, Json
from hf_fnl.cli.tables import new_table
from hf_fnl.cli.terminal import session

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedModel

_BATCHES = (1, 16)
_PROMPT, _NEW, _REPEATS = 64, 64, 3


class Settings(NamedTuple):
    """How models are evaluated: the options of the command, ``int8`` of the one model that is measured."""

    texts: str
    column: str
    tokens: int
    length: int
    stride: int
    dtype: str
    device: str
    int8: bool = False


def evaluate(
    context: typer.Context,
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Folders of models, or ids on the Hub.")],
    texts: Annotated[str, typer.Option(metavar="TEXTS", help="A .txt, .json(l) or .parquet file, or a data set.")],
    text_column: Annotated[str, typer.Option(help="Column of the texts.")] = "text",
    tokens: Annotated[int, typer.Option(help="Evaluate on the first N tokens.", min=2, metavar="N")] = 32768,
    length: Annotated[int, typer.Option(help="Tokens of a window.", min=2)] = 1024,
    stride: Annotated[int, typer.Option(help="By how many tokens the window moves on.", min=1)] = 512,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...; auto takes a GPU where there is one.")] = "auto",
    int8: Annotated[
        bool, typer.Option("--int8", help="Each model a second time, its linear layers in torch's dynamic int8.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure causal language models on a text: perplexity, speed of generation, peak memory and size.

    Each model runs in a process of its own, so that its memory is its own. Perplexity per word compares models of
    different tokenizers. Tokens per second are those of greedy generation, 64 tokens after a prompt of 64, at batch 1
    and 16: the median of three.
    """
    with session(context, as_json=as_json, debug=debug, sources=models) as terminal:
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor

        settings = Settings(texts, text_column, tokens, length, stride, dtype, device, int8)
        _check(settings)
        rows = []
        for model, quantized in itertools.product(models, (False, True) if int8 else (False,)):
            # A process for each: what one model has held does not count for the next.
            apart = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
            with terminal.step(f"evaluating {model}{' in int8' if quantized else ''}"), apart as pool:
                rows.append(pool.submit(measure, model, settings._replace(int8=quantized)).result())
        terminal.show({"settings": settings._asdict(), "models": rows}, _table(rows))


def _check(settings: Settings) -> None:
    if settings.stride >= settings.length:
        raise typer.BadParameter(f"--stride must be below --length, {settings.length}, got {settings.stride}")
    if settings.dtype not in ("float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"--dtype must be float32, bfloat16 or float16, got {settings.dtype}")
    if settings.int8 and settings.dtype != "float32":
        raise typer.BadParameter(f"--int8 quantizes --dtype float32, got {settings.dtype}")
    if settings.int8 and settings.device not in ("auto", "cpu"):
        raise typer.BadParameter(f"--int8 runs on --device cpu, got {settings.device}")


def measure(source: str, settings: Settings) -> dict[str, Any]:
    """Load a model and measure it; windows are as long as its positions allow, memory is the GPU's or the process's.

    Raises:
        OSError: If files are missing or damaged.
        ValueError: If the model is no causal language model, or the text is empty or another tokenizer's.
    """
    import torch
    from transformers import GenerationMixin
    from transformers.utils import logging

    from hf_fnl.cli.texts import longest_input
    from hf_fnl.models.surgery_loading import load
    from hf_fnl.tasks.perplexity import first_tokens, text_perplexity
    from hf_fnl.tasks.tokenization import load_tokenizer

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() and not settings.int8 else "cpu"
    model: Any = load(source, dtype=getattr(torch, settings.dtype), use_safetensors=True)
    if not isinstance(model, GenerationMixin) or model.config.is_encoder_decoder:
        raise ValueError(f"{source} is a {type(model).__name__}, which is no causal language model")
    model.eval().to(device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if settings.int8:
        model = _in_int8(model)
    ids, words = first_tokens(load_tokenizer(source), _text(settings), settings.tokens)
    if ids.numel() and (largest := int(ids.max())) >= (known := model.get_input_embeddings().num_embeddings):
        raise ValueError(f"the tokenizer in {source} gives the token {largest}, and the model knows {known:,}")
    length = longest_input(model, settings.length)
    stride = min(settings.stride, length - 1)
    found = text_perplexity(model, ids, words, length=length, stride=stride)
    return {
        "model": source,
        "class": type(model).__name__,
        "int8": settings.int8,
        "parameters": parameters,
        "bytes": _bytes_of_weights(model),
        "cache_bytes_per_token": _cache_bytes(model, ids),
        "perplexity": found.per_token,
        "perplexity_per_word": found.per_word,
        "length": length,
        "stride": stride,
        "tokens": found.tokens,
        "words": found.words,
        "tokens_per_second": {str(batch): _speed(model, ids, batch) for batch in _BATCHES},
        "peak_memory": torch.cuda.max_memory_allocated() if device.startswith("cuda") else _resident(),
        "device": device,
    }


def _text(settings: Settings) -> str:
    """As much of the text as its first tokens can be, read as calibration reads it."""
    from hf_fnl.cli.texts import Texts

    return "\n\n".join(Texts(settings.texts, settings.column, samples=1, length=settings.tokens).documents())


def _in_int8(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its linear layers, factors too, in int8; what goes into them is quantized as it comes."""
    import torch
    from transformers.pytorch_utils import Conv1D

    from hf_fnl.surgery.to_linear import layers_with_own_factors, to_linear_

    if layers_with_own_factors(model):
        to_linear_(model)
    for name, layer in list(model.named_modules()):
        if type(layer) is Conv1D:  # a linear layer of GPT-2, which holds its weight transposed
            linear = torch.nn.Linear(layer.nx, layer.nf)
            linear.weight, linear.bias = torch.nn.Parameter(layer.weight.mT.contiguous()), layer.bias
            model.set_submodule(name, linear)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it will move to torchao
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)


def _bytes_of_weights(model: PreTrainedModel) -> int:
    """Bytes of parameters, those that share memory once, and of what int8 layers hold in their place."""
    import torch

    tensors = {parameter.data_ptr(): parameter for parameter in model.parameters()}
    packed = [module for module in model.modules() if isinstance(module, torch.ao.nn.quantized.dynamic.Linear)]
    for module in packed:
        for tensor in filter(None.__ne__, module._weight_bias()):
            tensors[tensor.data_ptr()] = tensor
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _cache_bytes(model: PreTrainedModel, ids: Any) -> float | None:
    """Bytes of keys and values that a token leaves in the cache of a prompt; ``None`` of a model without."""
    import torch
    from transformers import Cache

    prompt = ids[:_PROMPT].unsqueeze(0).to(model.device)
    with torch.inference_mode():
        outputs = model(input_ids=prompt, use_cache=True)
    cache: Any = next((value for value in outputs.values() if isinstance(value, Cache)), None)
    if cache is None:
        return None
    held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in held) / prompt.numel()


def _speed(model: PreTrainedModel, ids: Any, batch: int) -> float:
    """Tokens per second of greedy generation."""
    import torch

    prompt = ids[: min(_PROMPT, len(ids) // 2)].to(model.device).expand(batch, -1)
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}

    def generate(new: int) -> float:
        start = time.perf_counter()
        model.generate(prompt, min_new_tokens=new, max_new_tokens=new, **options)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    generate(2)
    return batch * _NEW / statistics.median(generate(_NEW) for _ in range(_REPEATS))


def _resident() -> int | None:
    """Largest memory that this process has had, in bytes; ``None`` where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _table(rows: list[dict[str, Any]]) -> Table:
    """One line for each model."""
    speeds = (f"tokens/s, batch {n}" for n in _BATCHES)
    columns = ("parameters", "weights", "cache/token", "windows", "perplexity", "per word", *speeds, "memory")
    table = new_table("model", *columns)
    for row in rows:
        speeds = (f"{row['tokens_per_second'][str(batch)]:,.1f}" for batch in _BATCHES)
        memory = "-" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**20:,.0f} MiB"
        weights = f"{row['bytes'] / 2**20:,.0f} MiB"
        cache = "-" if (size := row["cache_bytes_per_token"]) is None else f"{size / 2**10:,.1f} KiB"
        name = f"{row['model']}, int8" if row["int8"] else row["model"]
        losses = f"{row['perplexity']:.2f}", f"{row['perplexity_per_word']:.2f}"
        windows = f"{row['length']} by {row['stride']}"
        table.add_row(name, f"{row['parameters']:,}", weights, cache, windows, *losses, *speeds, memory)
    return table
