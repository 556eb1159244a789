"""Reading a store from its disk, beside `dd` with direct I/O on the same files.

    python bench/reads.py [STORE] [--pairs 3] [--ring 64]

Reads every unit in the order of a forward pass through the stream that training uses (4 threads,
without and with checksums), and the same files with `dd bs=4M iflag=direct`; alternating,
the median of the pairs. Without a store, mini-mixtral's in bf16 (1.4 GB). Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import time
from pathlib import Path

from lamina.engine.prepare import prepare
from lamina.store.layout import Store
from lamina.store.stream import Stream


def streamed(store: Store, ring_bytes: int, *, verify: bool) -> float:
    """Bytes/s through the stream."""
    units = list(store.units())
    with Stream(store, ring_bytes=ring_bytes, verify=verify) as stream:
        start = time.monotonic()
        stream.schedule(units)
        for unit in units:
            stream.take(unit).release()
        seconds = time.monotonic() - start
    return sum(unit.nbytes for unit in units) / seconds


def dd(store: Store) -> float:
    """Bytes/s of `dd`, file after file."""
    total = seconds = 0.0
    for block in store.blocks:
        path = store.path / block.file
        start = time.monotonic()
        command = ["dd", f"if={path}", "of=/dev/null", "bs=4M", "iflag=direct"]
        subprocess.run(command, check=True, capture_output=True)
        seconds += time.monotonic() - start
        total += block.nbytes
    return total / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", nargs="?", type=Path)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--ring", type=int, default=64, help="MiB")
    args = parser.parse_args()
    store = Store.open(args.store) if args.store else prepare("mini-mixtral", codec="bf16")
    print(f"{store.total_bytes / 1e9:.2f} GB in {len(store.blocks)} files\n")
    print("| | GB/s | of dd |\n|---|---|---|")
    theirs, plain, verified = [], [], []
    for _ in range(args.pairs):
        theirs.append(dd(store))
        plain.append(streamed(store, args.ring << 20, verify=False))
        verified.append(streamed(store, args.ring << 20, verify=True))
    base = statistics.median(theirs)
    for name, rates in (("dd", theirs), ("stream", plain), ("stream, checksums", verified)):
        rate = statistics.median(rates)
        print(f"| {name} | {rate / 1e9:.2f} | {rate / base:.2f} |")


if __name__ == "__main__":
    main()
