"""Scripts of ``run_scripts/`` one after another, as a launcher starts them, also where accelerate is to shard on CPUs.

Takes a JSON file with the flags of each run by the name of its script. The scripts write what there is to look at.
"""

import importlib
import json
import sys
from pathlib import Path

import cpu_fsdp  # noqa: F401
from accelerate.state import AcceleratorState

from hf_fnl.utils.processes import close_process_group


def main(path: str) -> None:
    for script, flags in json.loads(Path(path).read_text()).items():
        importlib.import_module(f"hf_fnl.scripts.{script}").main(flags)
        state = AcceleratorState()
        engine = (str(state.distributed_type), state.num_processes)
        (Path(flags[flags.index("--output_dir") + 1]) / f"engine-{state.process_index}.json").write_text(
            json.dumps(engine)
        )
        if getattr(AcceleratorState(), "deepspeed_plugin", None) is not None:
            AcceleratorState._reset_state()  # as if the next script were started anew


if __name__ == "__main__":
    main(*sys.argv[1:])
    close_process_group()
