"""A model by its name on the hub, and the command, killed and repeated."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants as hub_constants
import pytest
import torch
from safetensors.torch import save_file
from tests.store.hub_server import REPO, HubServer, contents, serving

from lamina.errors import CheckpointError
from lamina.models import load_family

CONFIG = {
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "vocab_size": 128,
    "sliding_window": None,
    "tie_word_embeddings": False,
}

#: Runs the command in a child that is killed at that call of its progress, for each number given;
#: at last without.
KILLED = """
import os, signal, sys
import lamina.engine.prepare, lamina.store.hub  # once, not in each child
from lamina.cli.main import main

def killed_at(when):
    from lamina.store.files import Meter
    plain, calls = Meter.add, 0
    def add(self, nbytes):
        nonlocal calls
        calls += 1
        if calls == when:
            os.kill(os.getpid(), signal.SIGKILL)
        plain(self, nbytes)
    Meter.add = add

for when in (*map(int, sys.argv[2:]), None):
    if (child := os.fork()) == 0:
        if when is not None:
            killed_at(when)
        code = main(["prepare", "owner/model", "--discard-source", "--store", sys.argv[1]])
        sys.stdout.flush()
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(f"exit {code}", flush=True)
"""


def write_mixtral(path: Path) -> None:
    """A checkpoint with the names of Mixtral's releases, in three files."""
    from lamina.store.convert import prepare as prepare_folder

    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    tensors = {}
    for block in load_family(CONFIG).blocks:
        for t in (*block.plain, *block.linears):
            tensors[t.sources[0][0].key] = torch.randn(t.shape).bfloat16()
        for e in range(block.experts.num_experts if block.experts else 0):
            assert block.experts is not None
            (gate, up), (down,) = (
                block.experts.gate_up_sources(e)[0],
                block.experts.down_sources(e)[0],
            )
            for part, shape in ((gate, (32, 64)), (up, (32, 64)), (down, (64, 32))):
                tensors[part.key] = torch.randn(shape).bfloat16()
    weight_map = {}
    for i, names in enumerate((list(tensors)[:9], list(tensors)[9:20], list(tensors)[20:])):
        file = f"model-{i}.safetensors"
        save_file({name: tensors[name] for name in names}, path / file)
        weight_map.update(dict.fromkeys(names, file))
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    family = load_family(CONFIG)
    prepare_folder(
        path, path.parent / "whole", model_type="mixtral", config=CONFIG, blocks=family.blocks
    )


def test_a_model_by_its_name(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lamina.engine.prepare import prepare as prepare_model

    write_mixtral(tmp_path / "checkpoint")
    store = prepare_model(REPO, store=tmp_path / "store")
    assert contents(store.path) == contents(tmp_path / "whole")
    again = prepare_model(str(server.folder), store=store.path)  # the same weights, in a folder
    assert again.fingerprint == store.fingerprint
    # Without a connection a finished store is opened, and a new one made from the hub's cache.
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    assert prepare_model(REPO, store=store.path).fingerprint == store.fingerprint
    other = prepare_model(REPO, store=tmp_path / "other")
    assert contents(other.path) == contents(store.path)
    with pytest.raises(CheckpointError, match="isn't downloaded from the hub"):
        prepare_model(str(server.folder), store=tmp_path / "third", discard_source=True)
    assert len(list(server.folder.glob("*.safetensors"))) == 3


def test_the_command_killed_and_repeated(tmp_path: Path) -> None:
    write_mixtral(tmp_path / "checkpoint")
    out = tmp_path / "store"
    with serving(HubServer(tmp_path / "checkpoint")) as server:
        env = {
            **os.environ,
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "LAMINA_HOME": str(tmp_path / "lamina"),
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(out), "2", "10", "15", "25"],
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
            env=env,
        )
    killed = f"exit {-signal.SIGKILL}"
    assert done.stdout.splitlines() == [killed] * 4 + [str(out), "exit 0"], done.stderr
    assert done.stderr == ""
    assert contents(out) == contents(tmp_path / "whole")
    assert not (tmp_path / "store.source").exists()
