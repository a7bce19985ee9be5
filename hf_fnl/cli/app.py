"""The commands of ``hf-fnl`` and their options; what they do is imported when they run, so that ``--help`` is quick."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hf_fnl.cli.evaluate import evaluate
from hf_fnl.cli.options import (
    RANKS,
    Debug,
    EmbeddingRank,
    FfnRank,
    Json,
    Model,
    Out,
    OvRank,
    QkRank,
    QkvRank,
    given,
)
from hf_fnl.cli.plan import plan
from hf_fnl.cli.programs import add_programs
from hf_fnl.cli.tables import LAYERS_KEY, layers_table, matrices_table, share_left, size_change
from hf_fnl.cli.terminal import session
from hf_fnl.utils.suggest import did_you_mean

_EXAMPLES = """\
hf-fnl factorize HuggingFaceTB/SmolLM2-135M --budget 0.85 --calibrate texts.txt --out small

hf-fnl inspect small

hf-fnl train clm --dataset texts.txt --ffn_rank 192 --ov_rank 32 --output_dir runs/gpt2"""


class _Commands(TyperGroup):
    """The list of all commands in plain text: rich, which draws the help of each, takes longer than all else here."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "rich_markup_mode": None})


app = typer.Typer(
    name="hf-fnl",
    cls=_Commands,
    help="Factorized neural layers: make a trained model smaller, or train a low-rank one.",
    epilog=_EXAMPLES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",  # in which asterisks and underscores are text
)


def _version(asked: bool) -> None:
    if asked:
        versions = [f"{name} {metadata.version(name)}" for name in ("hf_fnl", "torch", "transformers", "accelerate")]
        typer.echo("\n".join([*versions, f"python {platform.python_version()}"]))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show versions, and exit.")
    ] = False,
) -> None:
    """Take what comes before a command."""


_COMPARED = 5  # the colours of a report that can be told apart
_RULE, _WHERE = "How far (one of these, or ranks)", "What"
_DATA, _HEAL = "Calibration", "Healing"
_SHARE = (_RULE, "SHARE")
_RULES = ("ratio", "budget", "layer_ratio", "energy", "rank_scale", "rank")
_GOES_WITH = {  # what does nothing unless one of these is given; ranks by kind are taken as they are
    **dict.fromkeys(("multiple_of", "kinds"), _RULES),
    **dict.fromkeys(("calibration_samples", "calibration_length"), ("calibrate",)),
    **dict.fromkeys(("heal_steps", "heal_bf16"), ("heal",)),
    "text_column": ("calibrate", "heal"),
}


def _option(text: str, panel: str, metavar: str | None = None, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, metavar=metavar, **settings)


@app.command(
    short_help="Make a trained model smaller.",
    epilog="Example: hf-fnl factorize bert-base-uncased --ratio 0.5 --calibrate texts.jsonl --out bert-half",
)
def factorize(
    context: typer.Context,
    model: Model,
    out: Out,
    ratio: Annotated[
        float | None, _option("Share of all parameters of the model that stay; one scale of ranks for all.", *_SHARE)
    ] = None,
    budget: Annotated[
        float | None, _option("The same share, given where spectra or the loss need it.", *_SHARE)
    ] = None,
    layer_ratio: Annotated[float | None, _option("As --ratio, of the factorized matrices alone.", *_SHARE)] = None,
    energy: Annotated[
        float | None, _option("Smallest ranks that keep this share of every product's energy.", *_SHARE)
    ] = None,
    rank_scale: Annotated[float | None, _option("Ranks as a share of the largest rank.", *_SHARE)] = None,
    rank: Annotated[int | None, _option("The same rank everywhere.", _RULE, "N")] = None,
    multiple_of: Annotated[int, _option("Make ranks multiples of N; GPUs like 8 or 64.", _RULE, "N")] = 1,
    qk_rank: QkRank = None,
    ov_rank: OvRank = None,
    ffn_rank: FfnRank = None,
    qkv_rank: QkvRank = None,
    embedding_rank: EmbeddingRank = None,
    kinds: Annotated[
        str,
        _option(
            "Kinds, with commas between: qk, ov, ffn, embedding for BERT and GPT-2 (the first three unless "
            "given), also qkv for GPT-2; linear, embedding, conv for other models (linear unless given).",
            _WHERE,
        ),
    ] = "",
    surgery: Annotated[
        bool,
        _option("Factorize layer by layer, as models without a class of ours always are.", _WHERE, None, "--surgery"),
    ] = False,
    include: Annotated[
        list[str] | None, _option("Only layers with such names, as '*.mlp.*'.", _WHERE, "PATTERN")
    ] = None,
    exclude: Annotated[list[str] | None, _option("No layers with such names, as 'lm_head'.", _WHERE, "PATTERN")] = None,
    conv_scheme: Annotated[
        str, _option("How kernels of convolutions are factorized: spatial, channel, tt or tucker.", _WHERE)
    ] = "spatial",
    calibrate: Annotated[
        str | None,
        _option(
            "Keep what matters for these texts: a .txt, .json(l) or .parquet file, a folder of them, or a data "
            "set on the Hub.",
            _DATA,
            "TEXTS",
        ),
    ] = None,
    text_column: Annotated[str, _option("Column of the texts.", _DATA)] = "text",
    calibration_samples: Annotated[
        int, _option("Samples to take; long texts are cut into several.", _DATA, min=1)
    ] = 256,
    calibration_length: Annotated[int, _option("Tokens of each.", _DATA, min=1)] = 128,
    heal: Annotated[
        str | None,
        _option("Train the cut model on these texts to give what the dense one gives.", _HEAL, "TEXTS"),
    ] = None,
    heal_steps: Annotated[int, _option("Steps, of some 1,000 tokens each.", _HEAL, min=1)] = 300,
    heal_bf16: Annotated[
        bool, _option("Compute in bfloat16 where autocast allows.", _HEAL, None, "--heal-bf16")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make a trained model smaller: hold its matrices as products of low rank.

    The folder that is written holds the model, its tokenizer, a model card, and factorization.json with the rank of
    every layer. Say how far with one rule, or give ranks. A calibrated model keeps more of what the dense one
    knows, and a healed one gets more of it back.
    """
    rules, ranks = given(context, _RULES), given(context, RANKS)
    _check_rules(context, rules, ranks)
    with session(context, as_json=as_json, debug=debug, sources=[model]) as terminal:
        from hf_fnl.cli import factorize as work
        from hf_fnl.cli.texts import Texts
        from hf_fnl.surgery.config import KINDS, FactorizationConfig, RankRule

        wanted = tuple(filter(None, kinds.replace(" ", "").split(",")))
        with terminal.usage():
            rule = None if ranks else RankRule(**rules, multiple_of=multiple_of)
            if unknown := [kind for kind in wanted if kind not in KINDS]:
                hint = did_you_mean(unknown[0], KINDS)
                raise ValueError(f"kinds must be any of {', '.join(KINDS)}, got {', '.join(unknown)}{hint}")
            FactorizationConfig(rank=1, kinds=["conv"], conv_scheme=conv_scheme)
        texts = None
        if calibrate is not None:
            texts = Texts(calibrate, column=text_column, samples=calibration_samples, length=calibration_length)
        healing = None if heal is None else work.Healing.on(heal, text_column, heal_steps, bf16=heal_bf16)
        record = work.factorize(
            model,
            out,
            how=work.How(rule, ranks, wanted, tuple(include or ()), tuple(exclude or ()), conv_scheme, surgery),
            texts=texts,
            heal=healing,
            command=_command_line(context),
            terminal=terminal,
        )
        table = layers_table(record["layers"], record["parameters_before"], record["parameters_after"])
        terminal.show(record | {"out": str(out)}, table, "\n".join([LAYERS_KEY, "", *_texts_used(record), str(out)]))


def _texts_used(record: dict[str, Any]) -> Iterator[str]:
    """Say what a model was calibrated and healed with."""
    if (tokens := record["calibration_tokens"]) is not None:
        yield f"calibrated with {tokens:,} tokens"
    if (healed := record["healing"]) is not None:
        losses = f"{healed['held_out_before']:.4g} to {healed['held_out_after']:.4g}"
        yield f"healed with {healed['tokens']:,} tokens: held-out distance from the dense model {losses}"


@app.command(
    short_help="Turn a factorized model into a stock one.",
    epilog="Example: hf-fnl merge bert-half --out bert-half-stock",
)
def merge(
    context: typer.Context,
    model: Model,
    out: Out,
    check: Annotated[bool, typer.Option(help="Compare outputs on random inputs before anything is written.")] = True,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Turn a factorized model into a stock one with the same outputs, which needs no hf_fnl to run.

    Products are multiplied out, so the model has the size of the dense one again.
    """
    with session(context, as_json=as_json, debug=debug, sources=[model]) as terminal:
        from hf_fnl.cli import merge as work

        result = work.merge(model, out, check=check, terminal=terminal)
        difference = result["largest_difference"]
        checked = "outputs were not compared" if difference is None else f"outputs differ by at most {difference:.2g}"
        sizes = size_change(result["parameters_before"], result["parameters_after"])
        classes = f"{result['factorized_class']} -> {result['class']}"
        terminal.show(result | {"out": str(out)}, f"{classes}: {sizes}\n{checked}\n{out}")


@app.command(
    short_help="Show the matrices of a model.",
    epilog="Example: hf-fnl inspect bert-half",
)
def inspect(
    context: typer.Context,
    model: Model,
    every: Annotated[bool, typer.Option("--all", help="A line for each matrix, and not for those alike.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the matrices of a model: shape, rank, parameters, Frobenius norm, effective rank, energy kept.

    Those of one shape in one place are a line: parameters are their sum, norms, effective ranks and energies their
    means, for the heads of an attention over the heads, too. The effective rank is the nuclear norm divided by the
    largest singular value. The energy is the share of the squared Frobenius norm that factorizing kept. With --json
    every matrix has its own figures, among them FLOPs and nuclear norms.
    """
    with session(context, as_json=as_json, debug=debug, sources=[model]) as terminal:
        from hf_fnl.cli.sources import load_model
        from hf_fnl.optim.diagnostics import parameter_count
        from hf_fnl.report import inspect_model, read_energies

        loaded = load_model(model, terminal)
        with terminal.step("decomposing"):
            found, energies = inspect_model(loaded), read_energies(model)
        rows = [matrix.figures(energies.get(matrix.name)) for matrix in found]
        count = parameter_count(loaded)
        total, dense = int(count["total"]), int(count["dense_equivalent"])
        sizes = {"parameters": total, "parameters_dense": dense, "ratio": count["ratio"]}
        result = {"model": model, "class": type(loaded).__name__, **sizes, "matrices": rows}
        share = "" if total == dense else f", {share_left(count['ratio'])} of the dense model's {dense:,}"
        summary = f"\n{type(loaded).__name__}: {total:,} parameters{share}"
        terminal.show(result, matrices_table(rows, total, every=every), summary)


@app.command(
    short_help="Write an HTML page about runs or models.",
    epilog="Example: hf-fnl report runs/decay-* --out report.html",
)
def report(
    context: typer.Context,
    sources: Annotated[
        list[str],
        typer.Argument(metavar="RUN_OR_MODEL", help="Folders of runs or models, or models' ids on the Hub; up to 5."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="HTML file to write.")] = Path("report.html"),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write one HTML page: losses, metrics, norms, spectra, effective ranks, step sizes, lines to a dense baseline.

    About one run or model, or with several in comparison.
    """
    if len(sources) > _COMPARED:
        raise typer.BadParameter(f"up to {_COMPARED} runs or models are compared, got {len(sources)}")
    with session(context, as_json=as_json, debug=debug, sources=sources) as terminal:
        from hf_fnl.report import write_report

        out = out.expanduser()
        if out.is_file() and not out.read_bytes()[:100].lstrip().lower().startswith(b"<!doctype html"):
            raise FileExistsError(f"--out {out} is a file, and no report: name another")
        with terminal.step("decomposing"):
            written = write_report(sources, out)
        terminal.show({"sources": sources, "out": str(written)}, str(written))


app.command(
    short_help="Measure language models on a text.",
    epilog="Example: hf-fnl evaluate gpt2 gpt2-small --texts held-out.txt",
)(evaluate)
app.command(
    short_help="Say what training a model costs.",
    epilog="Example: hf-fnl plan bert-large --ffn-rank 256 --ov-rank 32 --gpus 64 --memory 24",
)(plan)
add_programs(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``hf-fnl``; ends with ``SystemExit``."""
    app(arguments, prog_name="hf-fnl")


def _check_rules(context: typer.Context, rules: dict[str, Any], ranks: dict[str, int]) -> None:
    if len(rules) + bool(ranks) != 1:
        raise typer.BadParameter(
            f"say how far with exactly one of {_flags(_RULES)}; or with ranks: any of {_flags(RANKS)}; "
            f"got {_flags((*rules, *ranks)) or 'none'}"
        )
    for option in filter(_GOES_WITH.__contains__, _typed(context)):
        if not given(context, _GOES_WITH[option]):
            raise typer.BadParameter(f"{_flags([option])} goes with {_flags(_GOES_WITH[option])}")
    if "conv_scheme" in _typed(context) and "conv" not in context.params["kinds"]:
        raise typer.BadParameter("--conv-scheme goes with --kinds conv")


def _typed(context: typer.Context) -> list[str]:
    """The parameters that stood on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]


def _flags(names: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def _command_line(context: typer.Context) -> str:
    """The command with the options that were given."""
    words = ["hf-fnl", str(context.info_name)]
    typed = _typed(context)
    for parameter in (parameter for parameter in context.command.params if parameter.name in typed):
        value = context.params[str(parameter.name)]
        option = [] if parameter.param_type_name == "argument" else [parameter.opts[0]]
        for each in value if isinstance(value, list | tuple) else [value]:
            words += option if each is True else [*option, str(each)]
    return shlex.join(words)
