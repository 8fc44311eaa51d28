"""`python -m retrain`."""

from __future__ import annotations

import sys

from retrain.cli import main

sys.exit(main())
