"""All adapters of a model: what they sit on, their parameters, and PEFT's format on disk.

In memory factors are `a [R, in]`, `b [out, R]` (`[E, R, in]`, `[E, out, R]` for experts), in fp32.
PEFT keeps those of stacked expert parameters as two matrices, and takes Llama 4's stacks, which lie
transposed, for `[E, out, in]`: there its A is our `b` transposed, and its B our `a`.

Shapes: E = experts, R = rank.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lamina.errors import AdapterError, RecipeError
from lamina.lora.experts import StackedPair
from lamina.lora.targets import ALL_LINEAR, matches, matches_experts
from lamina.models.common import Family
from lamina.models.spec import Block, Experts

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."


class DenseWeights(Protocol):
    """Something that has the weights of the base model."""

    def dense(self, block: Block) -> AbstractContextManager[Mapping[str, Tensor]]: ...


@dataclass(frozen=True)
class LoraSettings:
    """What PEFT's `LoraConfig` calls by the same names.

    Args:
        train_router: also train the routers' weights themselves (PEFT: `modules_to_save`).
    """

    r: int
    lora_alpha: float
    target_modules: tuple[str, ...]
    lora_dropout: float = 0.0
    use_rslora: bool = False
    train_router: bool = False

    @property
    def scaling(self) -> float:
        """rsLoRA (arXiv 2312.03732) divides by the root of the rank."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


@dataclass(frozen=True)
class Factors:
    """The parameters of one adapter."""

    a: nn.Parameter
    b: nn.Parameter


@dataclass
class BlockAdapter:
    """What is trained in one block: factors by linear name, those of the experts, the router."""

    linears: dict[str, Factors] = field(default_factory=dict)
    gate_up: Factors | None = None
    down: Factors | None = None
    router: nn.Parameter | None = None

    def factors(self) -> Iterator[Factors]:
        yield from self.linears.values()
        yield from (pair for pair in (self.gate_up, self.down) if pair is not None)

    def parameters(self) -> Iterator[nn.Parameter]:
        for pair in self.factors():
            yield pair.a
            yield pair.b
        if self.router is not None:
            yield self.router

    def stacked(
        self, settings: LoraSettings, *, training: bool
    ) -> tuple[StackedPair | None, StackedPair | None]:
        """The experts' factors as the expert loop takes them: gate_up, down.

        Args:
            training: whether LoRA dropout applies.
        """
        dropout = settings.lora_dropout if training else 0.0

        def pair(factors: Factors | None) -> StackedPair | None:
            if factors is None:
                return None
            return StackedPair(factors.a, factors.b, settings.scaling, dropout)

        return pair(self.gate_up), pair(self.down)


class Adapter:
    """The trainable parameters of a model.

    Args:
        seed: draws the `a` factors (PEFT's Kaiming-uniform initialization); every `b` is zero.
        device: where the parameters are, with their gradients and optimizer states.
        experts_device: where those of routed experts are, if elsewhere: in host memory they are
            copied to the device with their expert, and their gradients back.

    Raises:
        RecipeError: a target matches nothing in the model.
    """

    def __init__(
        self,
        family: Family,
        settings: LoraSettings,
        *,
        seed: int,
        device: torch.device | str,
        experts_device: torch.device | str | None = None,
    ):
        self.settings = settings
        self.family = family
        self.blocks: dict[str, BlockAdapter] = {}
        check_targets(family.blocks, settings.target_modules)
        generator = torch.Generator().manual_seed(seed)

        def factors(out: int, in_: int, stack: tuple[int, ...] = ()) -> Factors:
            a = torch.empty(*stack, settings.r, in_)
            a.uniform_(-1 / math.sqrt(in_), 1 / math.sqrt(in_), generator=generator)
            b = torch.zeros(*stack, out, settings.r)
            place = (experts_device or device) if stack else device
            return Factors(nn.Parameter(a.to(place)), nn.Parameter(b.to(place)))

        for block in family.blocks:
            adapter = BlockAdapter()
            for linear in block.linears:
                if matches(linear.module, settings.target_modules):
                    adapter.linears[linear.name] = factors(*linear.shape)
            if block.experts is not None:
                stack = (block.experts.num_experts,)
                if matches_experts(block.experts.module, "gate_up_proj", settings.target_modules):
                    adapter.gate_up = factors(*block.experts.gate_up_shape, stack)
                if matches_experts(block.experts.module, "down_proj", settings.target_modules):
                    adapter.down = factors(*block.experts.down_shape, stack)
                if settings.train_router:
                    router = next(p for p in block.plain if p.name == block.experts.router)
                    adapter.router = nn.Parameter(torch.zeros(router.shape, device=device))
            self.blocks[block.name] = adapter

    def parameters(self) -> list[nn.Parameter]:
        """In the order of the blocks."""
        return [p for adapter in self.blocks.values() for p in adapter.parameters()]

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def zero_grad(self) -> None:
        """Set all gradients to zero, in place: they are allocated once, so that they don't lie
        between the temporaries of the blocks."""
        for parameter in self.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            else:
                parameter.grad.zero_()

    def init_routers(self, source: DenseWeights) -> None:
        """Start trained routers from the base model's weights."""
        for block in self.family.blocks:
            router = self.blocks[block.name].router
            if router is not None and block.experts is not None:
                with source.dense(block) as tensors:
                    _copy(router, tensors[block.experts.router])

    # --- PEFT's format

    def tensors(self, *, grads: bool = False) -> Iterator[tuple[str, Tensor]]:
        """PEFT's keys with the tensors that belong under them, as views or copies.

        Args:
            grads: the gradients of the tensors instead (zeros where there is none yet).
        """

        def value(parameter: nn.Parameter) -> Tensor:
            if not grads:
                return parameter.detach()
            return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

        for block in self.family.blocks:
            adapter = self.blocks[block.name]
            for name, pair in adapter.linears.items():
                module = _PREFIX + block.linear(name).module
                yield f"{module}.lora_A.weight", value(pair.a)
                yield f"{module}.lora_B.weight", value(pair.b)
            experts = block.experts
            if experts is None:
                continue
            module = _PREFIX + experts.module
            # PEFT wraps the first target parameter, then the wrapper: only with both are there two.
            both = adapter.gate_up is not None and adapter.down is not None
            inner = f"{module}.base_layer" if both else module
            if adapter.gate_up is not None:
                a, b = value(adapter.gate_up.a), value(adapter.gate_up.b)
                yield from _stacked_tensors(inner, a, b, experts.transposed)
            if adapter.down is not None:
                a, b = value(adapter.down.a), value(adapter.down.b)
                yield from _stacked_tensors(module, a, b, experts.transposed)
            if adapter.router is not None:
                yield f"{_PREFIX}{experts.router_module}.weight", value(adapter.router)

    def peft_config(self, base_model: str) -> dict[str, Any]:
        """The contents of `adapter_config.json`."""
        settings = self.settings
        modules, parameters, routers = set(), set(), set()
        for block in self.family.blocks:
            adapter = self.blocks[block.name]
            modules |= {_in_layer(block.linear(name).module) for name in adapter.linears}
            if block.experts is not None:
                experts = _in_layer(block.experts.module)
                if adapter.gate_up is not None:
                    parameters.add(f"{experts}.gate_up_proj")
                if adapter.down is not None:
                    parameters.add(f"{experts}.down_proj")
                if adapter.router is not None:
                    routers.add(_in_layer(block.experts.router_module))
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "inference_mode": True,
            "r": settings.r,
            "lora_alpha": settings.lora_alpha,
            "lora_dropout": settings.lora_dropout,
            "use_rslora": settings.use_rslora,
            "bias": "none",
            "target_modules": sorted(modules),
            # PEFT nests its wrappers in this order, and the keys follow the nesting.
            "target_parameters": sorted(parameters, reverse=True) or None,
            "modules_to_save": sorted(routers) or None,
        }

    def save(self, folder: Path, *, base_model: str) -> None:
        """Write `adapter_model.safetensors` and `adapter_config.json`, each atomically."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {key: tensor.cpu().contiguous() for key, tensor in self.tensors()}
        weights = folder / f".{WEIGHTS}.tmp"
        save_file(tensors, weights, metadata={"format": "pt"})
        config = folder / f".{CONFIG}.tmp"
        config.write_text(json.dumps(self.peft_config(base_model), indent=2) + "\n")
        for path in (weights, config):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        weights.replace(folder / WEIGHTS)
        config.replace(folder / CONFIG)

    @classmethod
    def load(cls, family: Family, folder: Path, *, device: torch.device | str) -> Adapter:
        """Read an adapter in PEFT's format.

        Raises:
            AdapterError: it is missing, damaged, or doesn't fit the model; all mismatches at once.
        """
        settings = read_settings(folder, family)
        try:
            stored = load_file(folder / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise AdapterError(f"{folder / WEIGHTS} can't be read: {error}") from error
        try:
            adapter = cls(family, settings, seed=0, device=device)
        except RecipeError as error:
            raise AdapterError(
                f"{folder / CONFIG} targets what the model doesn't have", problems=error.problems
            ) from error
        adapter._fill(stored, folder)
        return adapter

    def _fill(self, stored: dict[str, Tensor], folder: Path) -> None:
        problems = []
        expected = dict(self.tensors())
        for key, tensor in expected.items():
            if key not in stored:
                problems.append(f"{key} is missing")
            elif stored[key].shape != tensor.shape:
                have, need = list(stored[key].shape), list(tensor.shape)
                problems.append(f"{key} has shape {have}, the model needs {need}")
            elif not torch.isfinite(stored[key]).all():
                problems.append(f"{key} holds values that aren't finite")
        problems += [f"{key} belongs to nothing in the model" for key in stored.keys() - expected]
        if problems:
            shown = [*problems[:8], f"and {len(problems) - 8} more"][: min(len(problems), 9)]
            raise AdapterError(
                f"the adapter in {folder} doesn't fit the model",
                problems=shown,
                hint="An adapter fits only the model it was tuned on.",
            )
        for block in self.family.blocks:
            adapter = self.blocks[block.name]
            for name, pair in adapter.linears.items():
                module = _PREFIX + block.linear(name).module
                _copy(pair.a, stored[f"{module}.lora_A.weight"])
                _copy(pair.b, stored[f"{module}.lora_B.weight"])
            experts = block.experts
            if experts is None:
                continue
            module = _PREFIX + experts.module
            both = adapter.gate_up is not None and adapter.down is not None
            inner = f"{module}.base_layer" if both else module
            for name, stacked in ((inner, adapter.gate_up), (module, adapter.down)):
                if stacked is not None:
                    a, b = stored[f"{name}.lora_A.weight"], stored[f"{name}.lora_B.weight"]
                    _fill_stacked(stacked, a, b, experts)
            if adapter.router is not None:
                _copy(adapter.router, stored[f"{_PREFIX}{experts.router_module}.weight"])


def _copy(parameter: nn.Parameter, tensor: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(tensor)


def _stacked_tensors(
    module: str, a: Tensor, b: Tensor, transposed: bool
) -> Iterator[tuple[str, Tensor]]:
    # PEFT: row e*R + k of A and column k*E + e of B belong to expert e, component k.
    if transposed:
        a, b = b.transpose(1, 2), a.transpose(1, 2)
    yield f"{module}.lora_A.weight", a.flatten(0, 1)
    yield f"{module}.lora_B.weight", b.permute(1, 2, 0).flatten(1)


def _fill_stacked(factors: Factors, a: Tensor, b: Tensor, experts: Experts) -> None:
    e = experts.num_experts
    a, b = a.unflatten(0, (e, -1)), b.unflatten(1, (-1, e)).permute(2, 0, 1)
    if experts.transposed:
        a, b = b.transpose(1, 2), a.transpose(1, 2)
    _copy(factors.a, a)
    _copy(factors.b, b)


def _in_layer(module: str) -> str:
    """A module's name below its layer, which PEFT matches as a suffix in every layer."""
    return module.split(".layers.", 1)[1].split(".", 1)[1]


# --- targets


def target_names(blocks: Sequence[Block]) -> list[str]:
    """Every target that a model knows, as short as it can be said."""
    names: dict[str, None] = {}
    for block in blocks:
        for linear in block.linears:
            names[_in_layer(linear.module).split(".", 1)[1]] = None
        if block.experts is not None:
            names["experts.gate_up_proj"] = names["experts.down_proj"] = None
    return [*names, "experts", ALL_LINEAR]


def check_targets(blocks: Sequence[Block], targets: Sequence[str]) -> None:
    """Refuse targets that match nothing, all at once.

    Raises:
        RecipeError: with the names that would match.
    """
    problems = []
    known = target_names(blocks)
    for target in targets:
        hit = any(
            any(matches(linear.module, (target,)) for linear in block.linears)
            or (
                block.experts is not None
                and any(
                    matches_experts(block.experts.module, projection, (target,))
                    for projection in ("gate_up_proj", "down_proj")
                )
            )
            for block in blocks
        )
        if not hit:
            close = difflib.get_close_matches(target, known, n=1)
            guess = f"; did you mean {close[0]!r}?" if close else ""
            problems.append(f"target_modules: {target!r} matches nothing in this model{guess}")
    if problems:
        raise RecipeError(
            "target_modules names what the model doesn't have",
            problems=problems,
            hint=f"This model knows {', '.join(known)}.",
        )


def read_settings(folder: Path, family: Family) -> LoraSettings:
    """The settings of an adapter in PEFT's format.

    Raises:
        AdapterError: there is none, or it uses what Lamina can't compute.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
        r, alpha = int(config["r"]), float(config["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(
            f"{path} can't be read as the config of a LoRA adapter: {error!r}",
            hint="An adapter folder holds adapter_config.json and adapter_model.safetensors.",
        ) from error
    problems = []
    if config.get("peft_type", "LORA") != "LORA":
        problems.append(f"peft_type is {config['peft_type']!r}, not 'LORA'")
    problems += [
        f"{key} is set, which Lamina doesn't compute"
        for key in ("use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform", "lora_bias")
        if config.get(key)
    ]
    if config.get("bias", "none") != "none":
        problems.append(f"bias is {config['bias']!r}, not 'none'")
    modules = config.get("target_modules") or []
    if isinstance(modules, str):
        modules = [modules]
    routers = {_in_layer(block.experts.router_module) for block in family.blocks if block.experts}
    saved = config.get("modules_to_save") or []
    problems += [
        f"modules_to_save names {module!r}; only the routers can be trained whole"
        for module in saved
        if not any(router.endswith(module) for router in routers)
    ]
    if problems:
        raise AdapterError(f"the adapter in {folder} can't be used", problems=problems)
    return LoraSettings(
        r=r,
        lora_alpha=alpha,
        target_modules=(*modules, *(config.get("target_parameters") or ())),
        lora_dropout=float(config.get("lora_dropout") or 0.0),
        use_rslora=bool(config.get("use_rslora")),
        train_router=bool(saved),
    )
