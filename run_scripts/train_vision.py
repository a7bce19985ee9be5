"""``hf-fnl train vision`` of a checkout, for launchers that start a file."""

import before_imports  # noqa: F401

# isort: split
from hf_fnl.scripts import PROGRAMS
from hf_fnl.scripts.train_vision import *  # noqa: F403

if __name__ == "__main__":
    PROGRAMS["train vision"].run()
