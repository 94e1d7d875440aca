"""`python -m hopescale`: the command line."""

from __future__ import annotations

from hopescale.cli.app import main

if __name__ == "__main__":
    main()
