"""The program that `parallel`'s worker processes run: `python -m lamina.data.worker TASK`."""

from __future__ import annotations

import gc
import sys

from lamina.data.convert import convert_block
from lamina.data.examine import examine_block
from lamina.data.parallel import Message, Task, read_message, write_message
from lamina.errors import DataError

TASKS: dict[str, Task] = {"check": examine_block, "convert": convert_block}


def main() -> None:
    """Answer blocks with results until the input ends."""
    # Rows are trees without cycles: counting references frees them.
    gc.disable()
    task = TASKS[sys.argv[1]]
    options = read_message(sys.stdin.buffer)
    assert options is not None
    while (message := read_message(sys.stdin.buffer)) is not None:
        try:
            result = task(options.values, message.values["first"], message.blobs[0])
        except DataError as error:
            result = Message({"error": error.message, "hint": error.hint})
        write_message(sys.stdout.buffer, result)


if __name__ == "__main__":
    main()
