"""``hf-fnl evaluate-squad`` of a checkout, for launchers that start a file."""

import before_imports  # noqa: F401

# isort: split
from hf_fnl.scripts import PROGRAMS
from hf_fnl.scripts.evaluate_squad import *  # noqa: F403

if __name__ == "__main__":
    PROGRAMS["evaluate-squad"].run()
