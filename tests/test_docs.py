"""The README and the pages of docs: links lead somewhere, code runs, commands are understood, nothing is missing."""

import ast
import importlib
import importlib.util
import re
import runpy
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import hf_fnl
from hf_fnl.cli import app
from hf_fnl.scripts import PROGRAMS
from hf_fnl.tasks.tokenization import train_wordpiece

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_fnl"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY")]
FOLDERS = ("benchmarks", "examples", "model_cards", "run_scripts/launch")
PAGES += [*(ROOT / folder / "README.md" for folder in FOLDERS), *DOCS]


def names(pages: list[Path]) -> list[str]:
    return [page.relative_to(ROOT).as_posix() for page in pages]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        found = (page.parent / name).resolve() if name else page
        assert found.exists(), f"{target} in {page.name}"
        assert not anchor or anchor in anchors(found), f"{target} in {page.name}"


def test_every_page_is_in_the_sites_navigation_and_in_the_home_page() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    home = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert [page.name for page in DOCS if f": {page.name}\n" not in navigation] == []
    assert [page.name for page in DOCS if page.stem != "index" and f"({page.name})" not in home] == []


# Code. What a page takes for granted, and what is too large for a test, by page.
Prepared = Callable[[], dict[str, Any]]


def word_tokenizer() -> Any:
    return train_wordpiece(["the cat sat on the mat"] * 20, vocab_size=100)


def trained() -> dict[str, Any]:
    """A Llama, a BERT with its tokenizer, and texts, as the page on compression has them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 3, "vocab_size": 100}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2))
    small = LlamaForCausalLM(llama.config)
    hf_fnl.factorize_(small, hf_fnl.FactorizationConfig(rank_scale=0.5))
    small.save_pretrained("small")  # as `hf-fnl factorize` on this page writes it
    bert = BertModel(BertConfig(**sizes | {"num_attention_heads": 1, "hidden_size": 64}, num_hidden_layers=12))
    return {
        "llama": llama,
        "token_ids": torch.randint(100, (8, 40)),
        "bert": bert,
        "tokenizer": word_tokenizer(),
        "texts": ["the cat sat", "on the mat the cat"] * 20,
    }


def for_gpt2() -> dict[str, Any]:
    torch.manual_seed(0)
    sizes = {"n_embd": 128, "n_head": 2, "n_layer": 2, "n_positions": 16, "vocab_size": 40}
    rows = torch.randint(40, (16, 8))
    return {
        **vars(hf_fnl),
        **{name: getattr(hf_fnl, name) for name in hf_fnl.__all__},
        "functools": importlib.import_module("functools"),
        "gpt2": GPT2LMHeadModel(GPT2Config(**sizes)),
        "data": [{"input_ids": row, "labels": row} for row in rows],
    }


SMALL = {
    "README.md": [
        ('AutoTokenizer.from_pretrained("google-bert/bert-base-uncased")', "word_tokenizer()"),
        ("ov_rank=32, ffn_rank=192)", "ov_rank=8, ffn_rank=16, {sizes})"),
        ("qk_rank=32", "qk_rank=8"),
        ("max_steps=1000, diagnostics_steps=100)", "max_steps=2, diagnostics_steps=1, use_cpu=True, report_to='none')"),
        ("BertConfig())", "BertConfig({sizes}))"),
    ],
    "docs/compress.md": [("ffn_rank=192", "ffn_rank=48")],
    "docs/low_rank.md": [
        ("max_steps=6000, dense_steps=1000,", "max_steps=4, dense_steps=2, use_cpu=True, report_to='none',"),
    ],
}
SIZES = "hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=100"
PREPARED: dict[str, Prepared] = {
    "README.md": lambda: {"word_tokenizer": word_tokenizer},
    "docs/compress.md": trained,
    "docs/low_rank.md": for_gpt2,
}
# That of the model cards asks the Hub.
WITH_CODE = [page for page in PAGES if blocks(page, "python") and page.parent.name != "model_cards"]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("page", WITH_CODE, ids=names(WITH_CODE))
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All snippets of a page one after another, as they stand but for sizes."""
    name = page.relative_to(ROOT).as_posix()
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("the cat sat on the mat\n" * 20)
    namespace = PREPARED.get(name, dict)()
    changes = [(old, new.format(sizes=SIZES)) for old, new in SMALL.get(name, [])]
    codes = blocks(page, "python")
    assert all(sum(old in code for code in codes) for old, _ in changes), "a size that is changed is no longer there"
    for code in codes:
        for old, new in changes:
            code = code.replace(old, new)
        if "torchao" in code and importlib.util.find_spec("torchao") is None:
            continue
        exec(compile(code, name, "exec"), namespace)


# Commands
def commands(page: Path) -> list[list[str]]:
    """The words of each command of ``hf-fnl`` in a page; not of those that leave something out."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    split = [shlex.split(line, comments=True) for line in lines if "hf-fnl " in line and "..." not in line]
    return [words[words.index("hf-fnl") + 1 :] for words in split if "hf-fnl" in words]


def options_of(name: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    with pytest.raises(SystemExit):
        importlib.import_module(f"hf_fnl.scripts.{PROGRAMS[name].module}").main(["--help"])
    return set(re.findall(r"--\w+", capsys.readouterr().out))


WITH_COMMANDS = [page for page in PAGES if commands(page)]


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=names(WITH_COMMANDS))
def test_commands_are_understood(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    group: Any = typer.main.get_command(app)
    for words in commands(page):
        if name := next((name for name in PROGRAMS if words[: len(name.split())] == name.split()), None):
            given = {word.partition("=")[0] for word in words if word.startswith("--")}
            assert given <= options_of(name, capsys), words
        elif words[0] != "--version":
            group.commands[words[0]].make_context(words[0], words[1:])


# What a page has to have
def test_the_api_page_has_every_public_name() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    found = {line.rpartition(".")[2] for line in re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE)}
    found |= set(re.findall(r"`(\w+)`", text))
    assert set(hf_fnl.__all__) - found == set()
    for path in re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE):
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name), path


def test_the_design_names_files_and_functions_that_exist() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .* \| (.*) \|$", text.partition("## To change X")[2], flags=re.MULTILINE)
    assert len(rows) >= 20
    for row in rows:
        folder, source = "", ""
        for name in re.findall(r"`([^`]+)`", row):
            if name.endswith((".py", ".md")):
                folder = name.rpartition("/")[0] or folder
                places = [PACKAGE / name, PACKAGE / folder / name]
                source += next(file for file in places if file.is_file()).read_text(encoding="utf-8")
            elif "/" not in name and " " not in name:
                assert all(re.search(rf"\b{part}\b", source) for part in name.split(".")), f"{name}: {row}"


def texts_of_sources() -> str:
    """All texts in the package, formatted ones with a mark in the place of their values."""
    found: list[str] = []
    for path in (ROOT / "hf_fnl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_every_message_of_the_troubleshooting_page_is_one_of_the_program() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`.*?`) \|", text, flags=re.MULTILINE)
    messages = [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    assert len(messages) >= 40
    sources = texts_of_sources()
    unknown = [m for m in messages if not re.search(r"[^\n]*?".join(map(re.escape, m.split("…"))), sources)]
    assert unknown == []


def test_the_figures_are_those_that_their_script_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib").use("agg")
    files = runpy.run_path(str(ROOT / "docs" / "figures.py"))["main"](["--out", str(tmp_path)])
    assert all((ROOT / "docs" / "figures" / file.name).is_file() for file in files)
    used = set(re.findall(r"figures/(\w+\.svg)", "".join(page.read_text(encoding="utf-8") for page in PAGES)))
    drawn_by_results = {"k21_fig3_digits.svg", "k21_fig3_resnet20.svg"}
    assert used - drawn_by_results == {file.name for file in files}
