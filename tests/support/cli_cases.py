"""The command line as tests run it, and a small language model for it."""

from __future__ import annotations

from typing import Any

import torch
from click.testing import Result
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from hf_fnl.cli import app

WORDS = [f"w{number}" for number in range(40)]


def cli(*arguments: object, code: int = 0) -> Result:
    """Run ``hf-fnl`` in this process; it has to end with this exit code."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def llama(**options: Any) -> LlamaForCausalLM:
    """A Llama of one layer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **{"vocab_size": 50, **sizes, **options}))
