# Sourced by the other scripts: makes .venv in the repository's root if it is missing or out of date, and enters it.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ ! -d .venv ]; then
    "${PYTHON:-python3}" -m venv .venv
fi
. .venv/bin/activate
if [ ! -f .venv/installed ] || [ -n "$(find pyproject.toml constraints.txt -newer .venv/installed)" ]; then
    echo "Installing into $PWD/.venv ..."
    python -m pip install --quiet --upgrade pip
    # torch first and by itself: the pinned version is the one that has a CPU build where there is no GPU.
    python -m pip install --quiet torch==2.13.0
    python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
    touch .venv/installed
fi
