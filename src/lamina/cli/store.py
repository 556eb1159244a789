"""`lamina store`: what is in a store, and whether it is whole."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lamina.cli.inputs import did_you_mean
from lamina.cli.options import AsJson
from lamina.cli.terminal import byte_progress, note, print_json, print_table, size
from lamina.errors import StoreError

if TYPE_CHECKING:
    from lamina.store.layout import Store

__all__ = ["app"]

app = typer.Typer(help="Prepared weights: look into them, verify them.", no_args_is_help=True)

Folder = Annotated[
    str,
    typer.Argument(
        metavar="STORE", help="A store's folder, or the name of one in $LAMINA_HOME/stores."
    ),
]


@app.command()
def verify(folder: Folder) -> None:
    """Read all of a store and compare every checksum."""
    path = _find(folder)

    from lamina.store.layout import HINT_BLOCK, Store
    from lamina.store.reader import verify as run_verify

    with byte_progress(f"verifying {path.name}") as progress:
        problems = run_verify(Store.open(path), progress=progress)
    if problems:
        raise StoreError(f"{path}: the store is damaged", problems=problems, hint=HINT_BLOCK)
    note(f"{path}: every byte is as it was written")


@app.command()
def show(folder: Folder, as_json: AsJson = False) -> None:
    """Print what a store holds and how much of it."""
    path = _find(folder)

    from lamina.store.layout import Store

    store = Store.open(path)
    summary = _summary(store)
    if as_json:
        print_json(summary)
        return
    for name in ("path", "model_type", "codec", "fingerprint"):
        sys.stdout.write(f"{name:<12} {summary[name]}\n")
    sys.stdout.write("\n")
    rows = [
        (
            kind,
            str(of_kind["blocks"]),
            str(of_kind["experts"] or ""),
            size(of_kind["dense_bytes"]),
            size(of_kind["expert_bytes"]) if of_kind["experts"] else "",
        )
        for kind, of_kind in summary["kinds"].items()
    ]
    print_table(("BLOCKS", "NUMBER", "EXPERTS", "DENSE PART", "EXPERTS' PART"), rows)
    sys.stdout.write(f"\n{size(summary['total_bytes'])} in all")
    if summary["extra_bytes"]:
        sys.stdout.write(f", and {size(summary['extra_bytes'])} that training doesn't use")
    sys.stdout.write("\n")
    for text in summary["notes"]:
        sys.stdout.write(f"note: {text}\n")


def _summary(store: Store) -> dict[str, Any]:
    kinds: dict[str, dict[str, int]] = {}
    for block in store.blocks:
        of_kind = kinds.setdefault(
            block.kind, {"blocks": 0, "experts": 0, "dense_bytes": 0, "expert_bytes": 0}
        )
        of_kind["blocks"] += 1
        of_kind["experts"] += len(block.experts)
        of_kind["dense_bytes"] += block.dense.nbytes
        of_kind["expert_bytes"] += sum(expert.nbytes for expert in block.experts)
    return {
        "path": str(store.path),
        "model_type": store.model_type,
        "codec": store.codec,
        "fingerprint": store.fingerprint,
        "kinds": kinds,
        "total_bytes": store.total_bytes,
        "extra_bytes": sum(extra.nbytes for extra in store.extra),
        "notes": list(store.notes),
    }


def _find(folder: str) -> Path:
    """A store's folder, by path or by name.

    Raises:
        StoreError: there is no such folder.
    """
    from lamina.recipe.places import home

    path = Path(folder).expanduser()
    named = home() / "stores" / folder
    for candidate in (path, named):
        if candidate.is_dir():
            return candidate
    raise StoreError(
        f"{path}: there is no such store{did_you_mean(named) or did_you_mean(path)}",
        hint="`lamina prepare MODEL` makes one, and prints its folder.",
    )
