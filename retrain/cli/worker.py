"""`python -m retrain.cli.worker`: the command line, bound to the life of the process that holds its stdin's other end.

A run can go on from its checkpoint; an orphan would write to a folder that somebody else continues.
"""

from __future__ import annotations

import sys

from retrain.cli import main
from retrain.process import end_with_parent

if __name__ == "__main__":
    end_with_parent()
    sys.exit(main())
