"""The engine against transformers + PEFT in fp32: logits, loss and every gradient, to 1e-5.

The reference sees the whole step as one padded batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests import reference

import lamina.engine.step
import lamina.lora.experts
from lamina.engine.step import Engine
from lamina.lora.adapter import Adapter, LoraSettings

# PEFT 0.21 calls what transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

LENGTHS = (23, 5, 17, 17, 1, 11)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
DENSE = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
MODELS: dict[str, Any] = {
    "mixtral": reference.tiny_mixtral,
    "mixtral-top1": lambda: reference.tiny_mixtral(num_experts_per_tok=1),
    "mixtral-top3": lambda: reference.tiny_mixtral(num_experts_per_tok=3),
    "mixtral-idle-expert": lambda: _without_expert(reference.tiny_mixtral()),
    "mixtral-tied": lambda: reference.tiny_mixtral(tie_word_embeddings=True),
    "llama4": reference.tiny_llama4,
    "llama4-top2": lambda: reference.tiny_llama4(num_experts_per_tok=2),
    "llama4-all-moe": lambda: reference.tiny_llama4(interleave_moe_layer_step=1, use_qk_norm=False),
}


def _without_expert(model: Any) -> Any:
    """Expert 3 of layer 1 is never chosen: its score is 0, and two of +a, -a, +b, -b are larger."""
    with torch.no_grad():
        gate = model.model.layers[1].mlp.gate.weight
        gate[1], gate[4], gate[3] = -gate[0], -gate[2], 0
    return model


class Case:
    """A tiny model, its PEFT twin with the same adapter, and the engine over it."""

    def __init__(
        self, name: str, targets: tuple[str, ...], tmp_path: Path, **settings: Any
    ) -> None:
        self.model = MODELS[name]()
        folder = reference.save(self.model, tmp_path / "model")
        self.family = reference.family_of(folder)
        self.source = reference.resident_source(self.family, folder)
        lora = LoraSettings(r=3, lora_alpha=6, target_modules=targets, **settings)
        self.adapter = Adapter(self.family, lora, seed=0, device="cpu")
        self.adapter.init_routers(self.source)
        reference.randomize(self.adapter, self.source)
        self.adapter.save(tmp_path / "adapter", base_model="tiny")
        self.peft = PeftModel.from_pretrained(
            self.model, tmp_path / "adapter", is_trainable=True
        ).eval()
        self.sequences = reference.random_sequences(LENGTHS)
        self.batch = reference.batch_of(self.sequences)

    def engine(self, **settings: Any) -> Engine:
        return Engine(self.family, self.source, self.adapter, **settings)

    def reference_grads(self, aux_coef: float = 0.0) -> tuple[float, dict[str, torch.Tensor]]:
        inputs = reference.padded(self.sequences)
        if aux_coef:
            self.peft.base_model.model.router_aux_loss_coef = aux_coef
            inputs["output_router_logits"] = True  # type: ignore[assignment]
        out = self.peft(**inputs)
        out.loss.backward()
        grads = {}
        for key, parameter in self.peft.named_parameters():
            if parameter.requires_grad:
                name = key.replace(".default", "").replace(".modules_to_save", "")
                grads[name] = parameter.grad
        return float(out.loss.detach()), grads


def check(case: Case, aux_coef: float = 0.0, **settings: Any) -> None:
    engine = case.engine(router_aux_loss_coef=aux_coef, **settings)
    result = engine.forward_backward(case.batch)
    loss, grads = case.reference_grads(aux_coef)
    ours = result.loss + aux_coef * (result.aux_loss or 0.0)
    assert ours == pytest.approx(loss, rel=1e-6)
    mine = dict(case.adapter.tensors(grads=True))
    assert mine.keys() == grads.keys()
    for key, grad in mine.items():
        if grads[key].norm() == 0:
            assert grad.norm() == 0, key
        else:
            assert reference.distance(grad, grads[key]) < 1e-5, key


@pytest.mark.parametrize("name", MODELS)
def test_logits(name: str, tmp_path: Path) -> None:
    targets = ATTENTION
    case = Case(name, targets, tmp_path)
    engine = case.engine(group_tokens=20)
    with torch.no_grad():
        inputs = reference.padded(case.sequences)
        logits = case.peft(inputs["input_ids"], inputs["attention_mask"]).logits
        theirs = torch.cat([logits[row, : len(ids)] for row, (ids, _) in enumerate(case.sequences)])
        ours = engine.logits(case.batch)
    assert reference.distance(ours, theirs) < 1e-5


@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients(name: str, experts: bool, tmp_path: Path) -> None:
    dense = ATTENTION if name.startswith("mixtral") else DENSE
    case = Case(name, (*dense, "experts") if experts else dense, tmp_path)
    check(case, group_tokens=20)


@pytest.mark.parametrize("targets", [("experts.gate_up_proj",), ("experts.down_proj", "q_proj")])
@pytest.mark.parametrize("name", ["mixtral", "llama4"])
def test_gradients_of_single_targets(name: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    check(Case(name, targets, tmp_path))


@pytest.mark.parametrize("name", ["mixtral", "mixtral-top3", "mixtral-idle-expert"])
def test_gradients_with_aux_loss(name: str, tmp_path: Path) -> None:
    # A large coefficient, so that a wrong gradient of the auxiliary loss can't hide.
    check(Case(name, (*ATTENTION, "experts"), tmp_path), aux_coef=2.0, group_tokens=30)


@pytest.mark.parametrize("name", ["mixtral", "mixtral-top1"])
def test_gradients_of_trained_routers(name: str, tmp_path: Path) -> None:
    check(Case(name, ATTENTION, tmp_path, train_router=True), aux_coef=0.5)


def test_gradients_with_rslora(tmp_path: Path) -> None:
    check(Case("mixtral", ("all-linear",), tmp_path, use_rslora=True))


@pytest.mark.parametrize("name", ["mixtral", "llama4"])
@pytest.mark.parametrize("group_tokens", [1, 18, 35, 10_000])
def test_any_grouping_gives_the_same(name: str, group_tokens: int, tmp_path: Path) -> None:
    check(Case(name, ("all-linear",), tmp_path), group_tokens=group_tokens)


@pytest.mark.parametrize("name", ["mixtral", "llama4"])
@pytest.mark.parametrize("group_tokens", [30, 10_000])
def test_filled_up_groups_give_the_same(
    name: str, group_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (lamina.engine.step, lamina.lora.experts):
        monkeypatch.setattr(module, "_ROWS", 8)
    aux_coef = 2.0 if name == "mixtral" else 0.0
    case = Case(name, ("all-linear",), tmp_path)
    assert any(
        group.filling for group in case.engine(group_tokens=group_tokens)._groups(case.batch)
    )
    check(case, aux_coef=aux_coef, group_tokens=group_tokens)


def test_idle_expert_is_idle(tmp_path: Path) -> None:
    """The case above really has an expert without tokens."""
    case = Case("mixtral-idle-expert", ATTENTION, tmp_path)
    visited: set[tuple[str, int]] = set()
    expert = case.source.expert

    def spy(block: Any, e: int) -> Any:
        visited.add((block.name, e))
        return expert(block, e)

    case.source.expert = spy
    case.engine().forward_backward(case.batch)
    assert ("layers.1.mlp", 3) not in visited
    assert ("layers.1.mlp", 2) in visited


@pytest.mark.parametrize("name", ["mixtral", "llama4"])
def test_weights_after_three_steps(name: str, tmp_path: Path) -> None:
    case = Case(name, ("all-linear",), tmp_path)
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.01}
    theirs = {k: p for k, p in case.peft.named_parameters() if p.requires_grad}
    their_optimizer = torch.optim.AdamW(theirs.values(), **settings)
    optimizer = torch.optim.AdamW(case.adapter.parameters(), **settings)
    engine = case.engine(group_tokens=25)
    for step in range(3):
        sequences = reference.random_sequences(LENGTHS, seed=20 + step)
        optimizer.zero_grad()
        engine.forward_backward(reference.batch_of(sequences))
        norm = torch.nn.utils.clip_grad_norm_(case.adapter.parameters(), 0.05)
        optimizer.step()
        their_optimizer.zero_grad()
        case.peft(**reference.padded(sequences)).loss.backward()
        their_norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 0.05)
        assert float(norm) == pytest.approx(float(their_norm), rel=1e-5)
        assert float(norm) > 0.05
        their_optimizer.step()
    ours = dict(case.adapter.tensors())
    for key, parameter in theirs.items():
        assert reference.distance(ours[key.replace(".default", "")], parameter) < 1e-4, key
