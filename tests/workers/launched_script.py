"""A script of ``run_scripts/`` as launchers start it, also where accelerate is to shard over CPU processes.

Takes the name of the script and its flags. Writes ``engine.json`` into the folder of the run: what accelerate made of
the launcher's configuration.
"""

import importlib
import json
import sys
from pathlib import Path

import cpu_fsdp  # noqa: F401
from accelerate.state import AcceleratorState

sys.path.insert(0, str(Path(__file__).parents[2] / "run_scripts"))


def main(script: str, *flags: str) -> None:
    importlib.import_module(script).main(list(flags))
    state = AcceleratorState()
    if state.is_main_process:
        folder = Path(flags[flags.index("--output_dir") + 1])
        (folder / "engine.json").write_text(json.dumps(str(state.distributed_type)))


if __name__ == "__main__":
    main(*sys.argv[1:])
