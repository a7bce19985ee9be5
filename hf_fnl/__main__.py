"""``python -m hf_fnl``, the command line ``hf-fnl``."""

from hf_fnl.cli import main

if __name__ == "__main__":
    main()
