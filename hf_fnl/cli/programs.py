"""``hf-fnl train ...`` and the other programs, whose options are their own."""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer

from hf_fnl.scripts import PROGRAMS, Program

# All that follows the name of a program goes to it, --help included.
_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}


def add_programs(app: typer.Typer) -> None:
    """Add every program to ``hf-fnl``, those that train below ``hf-fnl train``."""
    train = typer.Typer(name="train", no_args_is_help=True, pretty_exceptions_enable=False)
    app.add_typer(
        train,
        short_help="Train a BERT, GPT-2, Marian or vision model.",
        help="Train a model. `hf-fnl train NAME --help` lists the options of each.",
        epilog="\n\n".join(f"hf-fnl {name} {each.example}" for name, each in PROGRAMS.items() if " " in name),
    )
    for name, program in PROGRAMS.items():
        group, _, command = name.rpartition(" ")
        add = (train if group else app).command(
            command,
            short_help=program.summary,
            context_settings=_PASSED_ON,
            add_help_option=False,
        )
        add(_command(name, program))


def _command(name: str, program: Program) -> Callable[[typer.Context], None]:
    def run(context: typer.Context) -> None:
        sys.argv = [f"hf-fnl {name}", *context.args]  # as the file in run_scripts would have it
        program.run()

    return run
