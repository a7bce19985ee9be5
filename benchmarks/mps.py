"""NVIDIA's Multi-Process Service, under which processes compute on a GPU at the same time instead of in turns."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

logger = logging.getLogger("benchmarks.grid")

CONTROL = "nvidia-cuda-mps-control"
SECONDS_TO_PROBE = 20
PROBE = "import torch; a = torch.ones(64, 64, device='cuda'); assert (a @ a).sum().item() == 64**3"


class MultiProcessService:
    """A running control daemon, with folders of its own.

    Attributes:
        environment: Variables under which a process uses it; empty once it has been stopped.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            "CUDA_MPS_PIPE_DIRECTORY": str(folder / "pipe"),
            "CUDA_MPS_LOG_DIRECTORY": str(folder / "log"),
        }

    @property
    def active(self) -> bool:
        """Whether it runs."""
        return bool(self.environment)

    @classmethod
    def start(cls) -> MultiProcessService | None:
        """Start the daemon and see that a process computes under it; ``None``, and a line in the log, if not."""
        if shutil.which(CONTROL) is None:
            logger.info("no %s here: processes take turns on the GPU", CONTROL)
            return None
        service = cls(Path(tempfile.mkdtemp(prefix="mps-")))
        for folder in service.environment.values():
            Path(folder).mkdir()
        try:
            service._run([CONTROL, "-d"])
            service._run([sys.executable, "-c", PROBE])
        except (OSError, subprocess.SubprocessError) as error:
            said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip().splitlines()[-3:]
            logger.info("MPS does not work here (%s %s): processes take turns on the GPU", error, " | ".join(said))
            service.stop()
            return None
        logger.info("MPS runs: processes share the GPU")
        return service

    def stop(self) -> None:
        """Quit the daemon and remove its folders; nothing if it was stopped before."""
        if not self.active:
            return
        try:
            self._run([CONTROL], b"quit\n", seconds=5)
        except (OSError, subprocess.SubprocessError) as error:
            logger.info("MPS could not be ended: %s", error)
        self.environment = {}
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, command: list[str], text: bytes = b"", seconds: float = SECONDS_TO_PROBE) -> None:
        environment = {**os.environ, **self.environment}
        subprocess.run(command, input=text, env=environment, capture_output=True, timeout=seconds, check=True)
