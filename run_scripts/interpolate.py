"""``hf-fnl interpolate`` of a checkout, for launchers that start a file."""

import before_imports  # noqa: F401

# isort: split
from hf_fnl.scripts import PROGRAMS
from hf_fnl.scripts.interpolate import *  # noqa: F403

if __name__ == "__main__":
    PROGRAMS["interpolate"].run()
