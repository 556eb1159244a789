from __future__ import annotations

import subprocess
import sys


def test_what_needs_no_tokenizer_loads_no_heavy_library() -> None:
    modules = "check convert detect split dedup mend preview stats"
    program = (
        "import sys\n"
        + "".join(f"import lamina.data.{name}\n" for name in modules.split())
        + "heavy = {'torch', 'transformers', 'tokenizers', 'pyarrow', 'datasets', 'pydantic'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert done.stdout.strip() == "[]"
