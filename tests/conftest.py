"""What all tests share: few threads, no network, and no file outside temporary folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before any library is imported: these are read once.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["NO_COLOR"] = "1"
# Subprocesses run the tree that is tested, installed or not.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).parents[1] / "src"), os.environ.get("PYTHONPATH")])
)


@pytest.fixture(scope="session", autouse=True)
def lamina_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The place of stores and small models of a test run, shared by its tests."""
    home = tmp_path_factory.mktemp("lamina-home")
    os.environ["LAMINA_HOME"] = str(home)
    return home
