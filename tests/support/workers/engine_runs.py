"""One of several processes: does jobs under engines one after another.

Arguments: the folder to write into, and a JSON file with the fields of each job.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import cpu_fsdp  # noqa: F401  lets accelerate shard over CPU processes
import torch

from hf_fnl.utils.processes import close_process_group

sys.path.insert(0, str(Path(__file__).parents[1]))
from engine_cases import Job, do


def main(root: str, plan: str) -> None:
    torch.distributed.init_process_group("gloo")
    for fields in json.loads(Path(plan).read_text()):
        do(Job(*fields), Path(root), torch.distributed.get_world_size())
        gc.collect()


if __name__ == "__main__":
    main(*sys.argv[1:])
    close_process_group()
