"""``run_scripts/pretrain_bert.py`` as launchers start it, also where accelerate is to shard over CPU processes.

Writes ``engine.json`` into the folder of the run: what accelerate made of the launcher's configuration.
"""

import json
import sys
from pathlib import Path

import cpu_fsdp  # noqa: F401
from accelerate.state import AcceleratorState

from hf_fnl.utils.processes import close_process_group

sys.path.insert(0, str(Path(__file__).parents[3] / "run_scripts"))
import pretrain_bert


def main() -> None:
    pretrain_bert.main()
    state = AcceleratorState()
    if state.is_main_process:
        plugin = getattr(state, "deepspeed_plugin", None)
        facts = {
            "distributed_type": str(state.distributed_type),
            "processes": state.num_processes,
            "zero_stage": None if plugin is None else plugin.zero_stage,
        }
        folder = Path(sys.argv[sys.argv.index("--output_dir") + 1])
        (folder / "engine.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
    close_process_group()
