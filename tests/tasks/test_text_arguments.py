"""How many processes prepare data beside a training."""

import pytest

from hf_fnl.tasks.arguments import default_workers


@pytest.mark.parametrize(
    ("gpu", "cores", "processes", "workers"),
    [(False, 16, 1, 0), (True, 16, 1, 2), (True, 16, 8, 1), (True, 8, 8, 0)],
    ids=["cpu", "gpu", "few cores", "no core to spare"],
)
def test_data_is_prepared_beside_the_training_where_a_gpu_would_wait(monkeypatch, gpu, cores, processes, workers):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert default_workers(use_cpu=False) == workers
    assert default_workers(use_cpu=True) == 0
