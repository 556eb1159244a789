"""A run: from a recipe and data to an adapter."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from lamina.data.batches import Steps, plan_steps
from lamina.data.dataset import Dataset, load_dataset
from lamina.data.formats import Input
from lamina.engine.blocks import seed_of
from lamina.engine.model import Model, open_model
from lamina.engine.planned import limit_device_memory, plan_run
from lamina.engine.prepare import Progress
from lamina.engine.run import RunFolder, RunSummary
from lamina.engine.sources import Walk
from lamina.engine.step import Engine, StepResult
from lamina.errors import DataError, TrainingError
from lamina.lora.adapter import Adapter, LoraSettings, check_targets
from lamina.optim import make_optimizer, make_scheduler
from lamina.recipe.schema import Recipe
from lamina.telemetry.events import EvalEvent, Event, EventWriter, StartEvent, StepEvent

OnEvent = Callable[[Event], None]


def tune(
    recipe: Recipe,
    *,
    data: Sequence[str | Path],
    eval_data: Sequence[str | Path] | None = None,
    out: str | Path | None = None,
    on_event: OnEvent | None = None,
    progress: Progress | None = None,
) -> RunSummary:
    """Tune a model with LoRA. An interrupt (Ctrl-C) ends the run early, with its adapter saved.

    Args:
        data: files to train on.
        eval_data: files whose loss is measured before and after.
        out: the run's folder, new or empty; None for one in `runs/`.
        on_event: told of every event that is written to the run's `events.jsonl`.
        progress: told how far a preparation of the small models is.

    Raises:
        LaminaError: an input can't be used, or the loss is no longer finite.
    """
    # 1. Everything that can be known to be wrong before training.
    model = open_model(recipe, progress)
    check_targets(model.family.blocks, lora_settings(recipe).target_modules)
    train_set = load_samples(model, data)
    eval_set = load_samples(model, eval_data) if eval_data else None
    plan = plan_run(model, train_set)
    steps = plan_steps(
        train_set,
        recipe.tokens_per_step,
        epochs=None if recipe.max_steps else recipe.epochs,
        max_steps=recipe.max_steps,
        seed=recipe.seed,
    )

    # 2. The run's folder.
    run = RunFolder(Path(out) if out is not None else _new_run())
    files = [_lasting(file) for file in data]
    resolved = recipe.model_copy(
        update={
            "store": str(model.store.path.resolve()),
            "data": files,
            "eval_data": [_lasting(file) for file in eval_data] if eval_data else None,
        }
    )
    run.create(resolved, model.store, files)

    # 3. Training, from here on interruptible without loss.
    with EventWriter(run.events_file) as writer, model.streamed() as source, _Interrupts() as stop:

        def emit(event: Event) -> None:
            writer(event)
            if on_event is not None:
                on_event(event)

        limit_device_memory(model.device, plan.budgets.vram)
        adapter = Adapter(
            model.family,
            lora_settings(recipe),
            seed=recipe.seed,
            device=model.device,
            experts_device="cpu" if plan.experts_on_host else None,
        )
        adapter.init_routers(source)
        engine = Engine(
            model.family,
            source,
            adapter,
            device=model.device,
            group_tokens=recipe.group_tokens,
            logits_bytes=model.logits_bytes,
            router_aux_loss_coef=recipe.router_aux_loss_coef,
            float8_boundaries=recipe.float8_boundaries,
            on_block=stop.check,
        )
        trainer = _Trainer(
            recipe,
            engine,
            adapter,
            steps,
            train_set.place,
            run,
            emit,
            plan.vram if model.device.type == "cuda" else plan.ram,
        )
        summary = trainer.run(eval_set)
    summary = replace(
        summary,
        dropped_rows=len(train_set.dropped),
        shortened_rows=len(train_set.shortened),
        notes=train_set.notes,
    )

    # 4. What came of it.
    run.summary_file.write_text(json.dumps(summary.to_dict(), indent=2) + "\n")
    return summary


def _lasting(file: str | Path) -> str:
    """A file's name that holds in any folder; names on the hub and patterns stay as they are."""
    return str(Path(file).resolve()) if Path(file).exists() else str(file)


def lora_settings(recipe: Recipe) -> LoraSettings:
    """The recipe's part that LoRA needs."""
    targets = recipe.target_modules
    return LoraSettings(
        r=recipe.r,
        lora_alpha=recipe.lora_alpha,
        target_modules=(targets,) if isinstance(targets, str) else tuple(targets),
        lora_dropout=recipe.lora_dropout,
        use_rslora=recipe.use_rslora,
        train_router=recipe.train_router,
    )


def load_samples(model: Model, files: Sequence[str | Path]) -> Dataset:
    """Tokenized samples of data files.

    Raises:
        DataError: they can't be used, or every row of them is too long.
    """
    recipe = model.recipe
    dataset = load_dataset(
        # As text: a name on the hub looks like a path, and isn't one.
        Input(
            map(str, files),
            shape=recipe.data_format,
            columns=recipe.data_columns,
            text_rows=recipe.text_rows,
        ),
        model.tokenizer,
        recipe.max_length,
        too_long=recipe.too_long,
        renderer=model.renderer,
    )
    if not dataset.num_loss_tokens:
        raise DataError(
            "the data has nothing to learn from",
            hint="Chats need an assistant turn; a text needs at least two tokens.",
        )
    return dataset


def mean_loss(
    engine: Engine, samples: Dataset, tokens_per_step: int, *, then: Walk | None = None
) -> tuple[float, int]:
    """The loss over all loss-carrying tokens of a dataset, and their number; forward only."""
    longest = int(samples.lengths.max())
    batches = plan_steps(samples, max(tokens_per_step, longest), epochs=1, shuffle=False)
    total, count = 0.0, 0
    for place in range(len(batches)):
        batch = batches[place]
        follows: Walk | None = "forward" if place + 1 < len(batches) else then
        total -= float(engine.logprobs(batch, then=follows).double().sum())
        count += batch.num_loss_tokens
    return total / count, count


class _Trainer:
    """The steps of a run, and its evaluations."""

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        adapter: Adapter,
        steps: Steps,
        place: Callable[[int], str],
        run: RunFolder,
        emit: OnEvent,
        planned_memory: int,
    ):
        self.recipe = recipe
        self.engine = engine
        self.adapter = adapter
        self.steps = steps
        self.place = place
        self.folder = run
        self.emit = emit
        self.done = 0
        self.tokens = 0
        self.seconds = 0.0
        self.bytes_read = 0
        self.waited = 0.0
        self.last_loss: float | None = None
        self.planned_memory = planned_memory
        self.parameters = adapter.parameters()
        self.optimizer = make_optimizer(
            self.parameters,
            optim=recipe.optim,
            learning_rate=recipe.learning_rate,
            betas=(recipe.adam_beta1, recipe.adam_beta2),
            epsilon=recipe.adam_epsilon,
            weight_decay=recipe.weight_decay,
        )
        warmup = recipe.warmup_steps
        self.scheduler = make_scheduler(
            self.optimizer,
            scheduler_type=recipe.lr_scheduler_type,
            warmup_steps=math.ceil(recipe.warmup_ratio * len(steps)) if warmup is None else warmup,
            total_steps=len(steps),
        )

    def run(self, eval_set: Dataset | None) -> RunSummary:
        before = after = None
        interrupted = False
        self.emit(
            StartEvent(
                total_steps=len(self.steps),
                trainable_parameters=self.adapter.num_parameters,
                store_bytes=self.engine.source.store_bytes,
                planned_memory_bytes=self.planned_memory,
            )
        )
        try:
            if eval_set is not None:
                before = self._evaluate(eval_set, then="step")
            for number in range(len(self.steps)):
                last = number + 1 == len(self.steps)
                then: Walk | None = "step" if not last else "forward" if eval_set else None
                self._step(number, then)
            if eval_set is not None:
                after = self._evaluate(eval_set)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            # Also when the loss is no longer finite: the state is that of the last good step.
            self.adapter.save(self.folder.adapter, base_model=self.recipe.model)
        return RunSummary(
            run=self.folder.path,
            steps=self.done,
            final_loss=self.last_loss,
            eval_loss_before=before,
            eval_loss_after=after,
            tokens=self.tokens,
            seconds=self.seconds,
            store_bytes_read=self.bytes_read,
            seconds_waited=self.waited,
            peak_memory_bytes=peak_memory(self.engine.device),
            planned_memory_bytes=self.planned_memory,
            dropped_rows=0,
            interrupted=interrupted,
        )

    def _evaluate(self, samples: Dataset, then: Walk | None = None) -> float:
        start = time.monotonic()
        loss, count = mean_loss(self.engine, samples, self.recipe.tokens_per_step, then=then)
        self.engine.source.take_stats()
        seconds = time.monotonic() - start
        self.emit(EvalEvent(step=self.done, loss=loss, loss_tokens=count, seconds=seconds))
        return loss

    def _step(self, number: int, then: Walk | None) -> None:
        start = time.monotonic()
        batch = self.steps[number]
        self.adapter.zero_grad()
        seed = seed_of(self.recipe.seed, number)
        result = self.engine.forward_backward(batch, seed=seed, then=then)
        grad_norm = self._clip(number, result, batch.rows)
        learning_rate = float(self.scheduler.get_last_lr()[0])
        with _uninterrupted():
            self.optimizer.step()
            self.scheduler.step()
            self.done += 1
        seconds = time.monotonic() - start
        stats = self.engine.source.take_stats()
        self.tokens += batch.num_tokens
        self.seconds += seconds
        self.bytes_read += stats.bytes_read
        self.waited += stats.seconds_waited
        self.last_loss = result.loss
        left = (len(self.steps) - self.done) * self.seconds / self.done
        self.emit(
            StepEvent(
                step=self.done,
                total_steps=len(self.steps),
                epoch=self.steps.progress(number),
                loss=result.loss,
                learning_rate=learning_rate,
                grad_norm=grad_norm,
                tokens=batch.num_tokens,
                loss_tokens=batch.num_loss_tokens,
                tokens_per_second=batch.num_tokens / seconds,
                store_bytes_read=stats.bytes_read,
                seconds_waited=stats.seconds_waited,
                seconds=seconds,
                peak_memory_bytes=peak_memory(self.engine.device),
                predicted_end=(datetime.now().astimezone() + timedelta(seconds=left)).isoformat(
                    timespec="seconds"
                ),
            )
        )

    def _clip(self, number: int, result: StepResult, rows: Sequence[int]) -> float:
        """The global norm of all gradients, which are scaled down to `max_grad_norm`.

        Raises:
            TrainingError: the loss or the norm isn't finite; nothing has been updated.
        """
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = get_total_norm(grads)
        if not (math.isfinite(result.loss) and math.isfinite(float(norm))):
            places = [self.place(row) for row in sorted(set(rows))]
            shown = ", ".join(places[:10]) + (", ..." if len(places) > 10 else "")
            raise TrainingError(
                f"step {number + 1}: the loss is {result.loss} and the norm of the gradients "
                f"{float(norm)}; the step held {shown}",
                hint=f"The adapter of the steps before is in {self.folder.adapter}; lower "
                "learning_rate, or look at these rows.",
            )
        clip_grads_with_norm_(self.parameters, self.recipe.max_grad_norm, norm)
        return float(norm)


class _Interrupts:
    """Turns the first Ctrl-C into a KeyboardInterrupt between two blocks, where the engine can be
    left; the second one interrupts at once. Only in the main thread: signals reach no other."""

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None

    def __enter__(self) -> _Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.getsignal(signal.SIGINT)
            signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True

    def check(self) -> None:
        """
        Raises:
            KeyboardInterrupt: one was asked for.
        """
        if self._asked:
            raise KeyboardInterrupt


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Signals wait until the context ends: an update is done whole or not at all."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def peak_memory(device: torch.device) -> int:
    """Bytes: of the device on CUDA, of this process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _new_run() -> Path:
    return Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"
