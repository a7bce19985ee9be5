"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest
import torch

# Before any library reads it: a test that asks the Hub for something fails at once instead of waiting.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Threads of several test processes would wait for each other; the tensors of the tests are small.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real data sets that lie beside the repository; skips where it is absent."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder}")
    return folder
