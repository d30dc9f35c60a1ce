"""The one training loop: a model, rows, a teacher that may be stored, an objective.

Batch, teacher signal, student signal, terms, total, backward, clip, step, schedule, log, save.
The order of the rows follows from the seed alone, and there is no dropout, so a run that was killed
continues from its last checkpoint to the same weights.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from limbeck.cores import on_each, shares
from limbeck.errors import RecipeError
from limbeck.models import no_dropout
from limbeck.objective import Objective
from limbeck.progress import Progress
from limbeck.recipe import TrainingSpec
from limbeck.run import file_sha256, read_index, replaced, require_sha256, write_json
from limbeck.tasks.text_classification import Rows, order
from limbeck.types import Batch, LossTerm, Signal, Teacher

_LOG_EVERY = 10  # steps
_SAVE_EVERY = 20.0  # seconds; what a kill can cost at most
LOG = "training.jsonl"


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a training run is, apart from the model."""

    rows: Rows
    teacher: Teacher
    objective: Objective
    spec: TrainingSpec
    seed: int
    title: str
    validate: Callable[[nn.Module], float] | None = None  # quality, a fraction; at each quarter

    @property
    def steps(self) -> int:
        return max(1, round(self.spec.epochs * len(self.rows) / self.spec.batch_size))

    def positions(self, step: int) -> list[int]:
        """Rows of this optimizer step: epoch after epoch, each in its own order."""
        n, size = len(self.rows), self.spec.batch_size
        found: list[int] = []
        at = step * size
        while len(found) < size:
            epoch, offset = divmod(at + len(found), n)
            take = min(size - len(found), n - offset)
            found += order(n, seed=self.seed, epoch=epoch)[offset : offset + take].tolist()
        return found

    def batches(self, step: int) -> list[Batch]:
        """The step's rows in shares that are worked on side by side."""
        at = self.positions(step)
        return [self.rows.batch(at[s.start : s.stop]) for s in shares(len(at))]


def train(model: nn.Module, training: Training, folder: Path, progress: Progress) -> None:
    """Train `model` in place; checkpoints and the log lie in `folder`, the former only meanwhile.

    Dropout is switched off: a few epochs have little to gain from it, its random numbers are slow
    on a CPU, and threads that draw them side by side would not draw the same twice.

    Raises DamagedError if a checkpoint lost its checksum, RecipeError if the loss is not finite.
    """
    spec, objective = training.spec, training.objective
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(_groups(trainable, spec), betas=(0.9, 0.98), fused=True)
    log = _Log(folder / LOG)
    checkpoint = _Checkpoint(folder, trainable, optimizer)
    first = checkpoint.load()
    log.rewind(first)
    no_dropout(model)
    model.train()
    saved = shown = time.monotonic()
    quarters = {math.ceil(training.steps * k / 4) for k in (1, 2, 3, 4)}
    with progress.bar(training.title, training.steps, "steps", done=first) as bar:
        for step in range(first, training.steps):
            batches = training.batches(step)
            count = objective.count(batches)
            backward = partial(_backward, model, list(trainable.values()), training, count)
            gradients, terms = zip(*on_each(backward, batches), strict=True)
            _add_up(trainable.values(), gradients)
            torch.nn.utils.clip_grad_norm_(trainable.values(), spec.max_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * _schedule(step, training.steps, spec)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            bar.advance(1)
            done = step + 1
            if done % _LOG_EVERY == 0 or done in quarters:
                point = _point(training, done, terms, int(count))
                now = time.monotonic()
                point["examples_per_s"] = round(_LOG_EVERY * spec.batch_size / (now - shown), 1)
                if done in quarters and training.validate is not None:
                    model.eval()
                    point["validation"] = training.validate(model)
                    model.train()
                log.write(point)
                shown = time.monotonic()
            if time.monotonic() - saved > _SAVE_EVERY and done < training.steps:
                checkpoint.save(done)
                saved = time.monotonic()
    model.eval()
    checkpoint.remove()


def _backward(
    model: nn.Module, parameters: list[Tensor], training: Training, count: Tensor, batch: Batch
) -> tuple[tuple[Tensor | None, ...], dict[str, LossTerm]]:
    """One share of a step: gradients of its part of the mean, and the terms it is made of."""
    objective = training.objective
    target = training.teacher.signal(batch, objective.needs)
    output = Signal(logits=model(**batch.inputs).logits)
    terms = objective.terms(output, target, batch)
    loss = objective.total(terms, count)
    return torch.autograd.grad(loss, parameters, allow_unused=True), terms


def _add_up(parameters: Iterable[Tensor], shares: Sequence[Sequence[Tensor | None]]) -> None:
    """Sums in the order of the shares, so that the same step gives the same bytes."""
    for parameter, *parts in zip(parameters, *shares, strict=True):
        if parts[0] is not None:
            # never in place, and a copy where there is one share: autograd may hand out one tensor
            # as the gradient of two parameters
            parameter.grad = reduce(torch.add, parts) if len(parts) > 1 else parts[0].clone()


def _point(
    training: Training, step: int, shares: Sequence[Mapping[str, LossTerm]], count: int
) -> dict[str, float]:
    """A line of the log: the loss and each of its terms, means over the step."""
    terms = {name: sum(s[name].total.item() for s in shares) / count for name in shares[0]}
    loss = sum(terms.values())
    if not math.isfinite(loss):
        raise RecipeError(
            f"{training.title}, step {step}", f"the loss is {loss}", allowed="a finite number",
            fix=f"give a smaller learning_rate than {training.spec.learning_rate:g}",
        )  # fmt: skip
    return {"step": step, "loss": loss, **terms}


def _schedule(step: int, steps: int, spec: TrainingSpec) -> float:
    """Linear up over the warm-up, then linear down to zero."""
    warmup = spec.warmup_fraction * steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (steps - step) / max(1.0, steps - warmup)


def _groups(trainable: Mapping[str, Tensor], spec: TrainingSpec) -> list[dict[str, object]]:
    """By learning rate and decay: deeper layers learn faster, biases and norms do not decay.

    Layer-wise decay: ULMFiT's discriminative fine-tuning (Howard & Ruder 2018, sec. 3.2).
    """
    depths = _depths(list(trainable))
    top = max(depths.values())
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in trainable.items():
        peak = spec.learning_rate * spec.layer_decay ** (top - depths[name])
        if depths[name] == top:
            peak *= spec.head_factor
        decay = spec.weight_decay if parameter.dim() > 1 else 0.0
        groups.setdefault((peak, decay), []).append(parameter)
    return [
        {"params": same, "lr": peak, "peak": peak, "weight_decay": decay}
        for (peak, decay), same in groups.items()
    ]


def _depths(names: list[str]) -> dict[str, int]:
    """0 for what stands before the first numbered block, then one more a block, the head last."""
    depths: dict[str, int] = {}
    deepest = 0
    for name in names:
        number = next((int(part) for part in name.split(".") if part.isdigit()), None)
        if number is not None:
            depths[name] = number + 1
            deepest = max(deepest, number + 1)
        else:
            depths[name] = deepest + 1 if deepest else 0
    return depths


class _Log:
    """One JSON object a line. Timings in it are not part of the stage's digest."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, step: int) -> None:
        """Forget lines behind the step that training continues from, and a torn last one."""
        lines = []
        if self.path.exists() and step:
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    point = json.loads(line)
                except json.JSONDecodeError:
                    continue
                if point["step"] <= step:
                    lines.append(line + "\n")
        self.path.write_text("".join(lines), encoding="utf-8")

    def write(self, point: Mapping[str, float]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(point) + "\n")


class _Checkpoint:
    """Weights and optimizer moments of the trainable parameters; nothing else has state."""

    def __init__(
        self, folder: Path, trainable: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
    ) -> None:
        self.folder, self.trainable, self.optimizer = folder, trainable, optimizer
        self.index = folder / "checkpoint.json"

    def save(self, step: int) -> None:
        tensors = {}
        for name, parameter in self.trainable.items():
            state = self.optimizer.state[parameter]
            tensors[f"weight.{name}"] = parameter.detach()
            tensors[f"first.{name}"] = state["exp_avg"]
            tensors[f"second.{name}"] = state["exp_avg_sq"]
        path = self.folder / f"checkpoint-{step}.safetensors"
        with replaced(path) as aside:
            save_file(tensors, aside)
        old = self._read()
        write_json(self.index, {"file": path.name, "step": step, "sha256": file_sha256(path)})
        if old is not None and old["file"] != path.name:
            (self.folder / old["file"]).unlink(missing_ok=True)

    def load(self) -> int:
        """Puts the last checkpoint in place and returns its step; 0 without one."""
        saved = self._read()
        if saved is None:
            return 0
        path = self.folder / saved["file"]
        require_sha256(path, saved["sha256"])
        tensors = load_file(path)
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(tensors[f"weight.{name}"])
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(saved["step"])),
                    "exp_avg": tensors[f"first.{name}"],
                    "exp_avg_sq": tensors[f"second.{name}"],
                }
        return int(saved["step"])

    def remove(self) -> None:
        for path in self.folder.glob("*checkpoint*"):
            path.unlink()

    def _read(self) -> dict | None:
        return read_index(self.index, {"file", "step", "sha256"})
