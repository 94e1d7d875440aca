"""`python -m hopescale`: the command line."""

from __future__ import annotations

from hopescale.common import signals

if __name__ == "__main__":
    signals.hold()  # a rank may be told to stop in the seconds that the imports take

    from hopescale.cli.app import main

    main()
