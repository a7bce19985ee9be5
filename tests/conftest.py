"""Fixtures that several test files share."""

import gc
import getpass
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

# Before any library reads it: a test that asks the Hub for something fails at once instead of waiting.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A kernel that torch compiled for one set of vector instructions it takes from its cache for another, which
# ATEN_CPU_CAPABILITY chooses, and computes wrong values (torch 2.13).
_capability = torch.backends.cpu.get_cpu_capability().lower().replace(" ", "-")
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor-{getpass.getuser()}-{_capability}"
)

# Threads of several test processes would wait for each other; the tensors of the tests are small.
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Know the markers of Transformers' own tests, which test_upstream.py runs."""
    for marker in (
        "accelerate_tests",
        "flash_attn_test",
        "flash_attn_3_test",
        "flash_attn_4_test",
        "generate",
        "order",
        "torch_compile_test",
        "torch_export_test",
    ):
        config.addinivalue_line("markers", f"{marker}: of Transformers' own tests")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks for groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let one of pytest's processes run a whole file, so that its fixtures are made once; launches come first."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    items.sort(key=lambda item: item.get_closest_marker("xdist_group").args[0] != "launches")
    if unstable := next((item.nodeid for item in items if " at 0x" in item.nodeid), None):
        raise pytest.UsageError(f"an address is in the id of a test, which is another in each process: {unstable:.200}")


@pytest.fixture(scope="module", autouse=True)
def imported_for_good() -> None:
    """What has been imported is left out of garbage collections, of which every training begins with one.

    Each goes through half a million objects of torch and Transformers otherwise, longer than a small training takes.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same random numbers whenever it runs."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real data sets that lie beside the repository; skips where it is absent."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder}")
    return folder


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """One process that takes itself for a group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory that is not initialized holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty_like(torch.ones(3)).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def all_outputs_count_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrated cuts are those whose outputs are nearest, whatever a loss feels of them."""
    monkeypatch.setattr("hf_fnl.surgery.calibration_data.CalibrationData.sensitivities", lambda self, probes: {})
