"""``hf-fnl train clm`` of a checkout, for launchers that start a file."""

from hf_fnl.scripts import PROGRAMS

if __name__ == "__main__":
    PROGRAMS["train clm"].run()
