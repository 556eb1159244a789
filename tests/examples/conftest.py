"""Examples are scripts beside each other, not a package."""

from __future__ import annotations

import sys
from pathlib import Path

DOCSTRINGS = Path(__file__).parents[2] / "examples" / "docstrings"
sys.path.insert(0, str(DOCSTRINGS))
