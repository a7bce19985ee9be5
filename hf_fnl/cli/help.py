"""The help of ``hf-fnl`` without a command: a line for each, in sections, and examples."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

EXAMPLES = """\
hf-fnl factorize HuggingFaceTB/SmolLM2-135M --budget 0.85 --calibrate texts.txt --out small
hf-fnl inspect small
hf-fnl train clm --dataset texts.txt --ffn_rank 192 --ov_rank 32 --output_dir runs/gpt2"""
_SECTIONS = {
    "Trained models": ("factorize", "inspect", "evaluate", "merge", "report"),
    "Training": ("train", "translate", "evaluate-squad", "interpolate"),
}


class Commands(TyperGroup):
    """Commands, listed without rich: importing that takes as long as all else that ``--help`` does."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "rich_markup_mode": None})

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse; without arguments show the help, as ``--help`` does, which click takes for an error."""
        return super().parse_args(ctx, args or (["--help"] if self.no_args_is_help else []))

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """Write what it is, and a line for each command, in sections where there are any."""
        super().format_help_text(ctx, formatter)
        lines = {name: command.get_short_help_str(80) for name, command in self.commands.items()}
        width = max(map(len, lines))
        for title, names in {**_SECTIONS, "Commands": tuple(lines)}.items():
            if rows := [(f"{name:<{width}}", lines.pop(name)) for name in names if name in lines]:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write nothing below the options: the commands stand above."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples as they stand, a line each."""
        if self.epilog:
            with formatter.section("Examples"):
                formatter.write("".join(f"  {line}\n" for line in self.epilog.splitlines()))
