"""Where things stand when nobody says where."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

__all__ = ["home", "store_folder"]


def home() -> Path:
    """`$LAMINA_HOME`, or `~/.cache/lamina`. It need not exist."""
    given = os.environ.get("LAMINA_HOME")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "lamina"


def store_folder(model: str, codec: str, store: str | os.PathLike[str] | None = None) -> Path:
    """The folder of a model's prepared weights: `store` where it is given, else one under `home()`
    that is named after the model and the codec.

    Two folders of one name hold two models, so a local model's store carries a digest of its path.
    """
    if store is not None:
        return Path(store).expanduser()
    folder = Path(model).expanduser()
    if folder.is_dir():
        path = folder.resolve()
        name = f"{path.name}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"
    else:
        name = model.replace("/", "--")
    return home() / "stores" / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)}-{codec}"
