"""Runs a short set of tests with the lowest Transformers and accelerate that are allowed, and with the newest.

Each is laid beside the environment without its dependencies, in .venv/versions, and comes first on PYTHONPATH; torch is
the same. What is within the bounds of pyproject.toml has to pass. A newer release that does not is a warning.
"""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
NAMES = ("transformers", "accelerate")
# Transformers 5.17 needs an older huggingface_hub than the environment has, and that one another client.
WITH_LOWEST = ("huggingface_hub<2", "httpx", "httpcore")
TESTS = (
    "tests/models/test_forwards.py",
    "tests/models/test_plain_heads.py",
    "tests/models/test_adapters_of_families.py",
    "tests/models/test_continuous_batching.py",
    "tests/models/test_gpt2.py",
    "tests/models/test_generation.py",
    "tests/models/test_bert_loss.py",
    "tests/models/test_marian.py",
    "tests/training/test_trainer.py",
    "tests/training/test_checkpoints.py",
    "tests/test_workarounds.py",
    "tests/surgery/test_surgery.py",
    "tests/surgery/test_surgery_loading.py",
    "tests/surgery/test_families.py",
    "tests/surgery/test_to_linear.py",
)
# What compiles takes long, and most of that is torch. Transformers 5.17 compiles no training step of Marian, and has
# no beams where its vocabularies differ.
EXCEPT = "flex_attention or compiles or (beams and separate)"


def bounds() -> dict[str, Requirement]:
    """The requirements of pyproject.toml, by name."""
    found = re.findall(rf'"((?:{"|".join(NAMES)})>=[^"]*)"', (ROOT / "pyproject.toml").read_text())
    return {requirement.name: requirement for requirement in map(Requirement, found)}


def lowest() -> dict[str, str]:
    """The lowest version that is allowed of each."""
    found = {}
    for name, requirement in bounds().items():
        (found[name],) = (each.version for each in requirement.specifier if each.operator == ">=")
    return found


def newest() -> dict[str, str] | None:
    """The newest version that the registry has of each, if it answers."""
    command = ["install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet", "--report=-", *NAMES]
    asked = subprocess.run([sys.executable, "-m", "pip", *command], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if asked.returncode:
        return None
    metadata = [item["metadata"] for item in json.loads(asked.stdout)["install"]]
    return {each["name"].lower(): each["version"] for each in metadata}


def passes(versions: dict[str, str], *others: str) -> bool:
    """Say what the tests say with these versions, which are laid beside the environment the first time.

    Returns:
        Whether they pass.
    """
    title = " ".join(f"{name}=={versions[name]}" for name in NAMES)
    folder = ROOT / ".venv" / "versions" / title.replace(" ", "_")
    if not (folder / "complete").exists():
        command = ["install", "--no-deps", "--quiet", "--upgrade", f"--target={folder}", *title.split(), *others]
        subprocess.run([sys.executable, "-m", "pip", *command], check=True, cwd=ROOT)
        (folder / "complete").touch()
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    code = f"import accelerate, transformers; print(*(m.__version__ for m in ({', '.join(NAMES)})))"
    run = {"env": environment, "cwd": ROOT}
    seen = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, **run).stdout
    if [Version(each) for each in seen.split()] != [Version(versions[name]) for name in NAMES]:
        raise RuntimeError(f"{title} was laid into {folder}, and {seen.strip()} is imported")
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS, "-k", f"not ({EXCEPT})"]
    done = subprocess.run(pytest, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **run)
    print(f"--- {title}\n{done.stdout}", flush=True)
    return done.returncode == 0


def main() -> int:
    """Test both ends, side by side; returns 1 if a version that is allowed fails."""
    latest = newest()
    ends = [(lowest(), *WITH_LOWEST)]
    if latest is None:
        print("WARNING: the registry cannot be asked for the newest Transformers and accelerate: not tested")
    elif latest == {name: version(name) for name in NAMES}:
        print("The newest Transformers and accelerate are those of the environment.")
    else:
        ends.append((latest,))
    with ThreadPoolExecutor() as pool:
        passed = list(pool.map(lambda end: passes(*end), ends))
    status, rule = 0, "#" * 80
    for versions in [versions for (versions, *_), good in zip(ends, passed, strict=True) if not good]:
        if all(requirement.specifier.contains(versions[name]) for name, requirement in bounds().items()):
            print(f"FAILED with {versions}, which pyproject.toml allows")
            status = 1
        else:
            print(f"{rule}\nWARNING: the tests fail with {versions}, which pyproject.toml does not allow\n{rule}")
    return status


if __name__ == "__main__":
    sys.exit(main())
