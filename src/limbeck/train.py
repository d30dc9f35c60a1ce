"""The one training loop: a model, rows, a teacher that may be stored, an objective.

Batch, teacher signal, student signal, terms, total, backward, clip, step, schedule, log, save.
The order of the rows follows from the seed alone, and there is no dropout, so a run that was killed
continues from its last checkpoint to the same weights.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from limbeck.balance import Balance
from limbeck.errors import RecipeError
from limbeck.models import no_dropout
from limbeck.progress import Progress
from limbeck.recipe import TrainingSpec
from limbeck.run import file_sha256, read_index, replaced, require_sha256, write_json
from limbeck.step import Found, Step, Training, start_balance, start_features, start_head

_LOG_EVERY = 10  # steps
_LOOKS = 20  # times in a training that the terms' gradients are held against each other
_BALANCE_RATE = 0.02  # learning rate of what a balance learns
_SAVE_EVERY = 20.0  # seconds; what a kill can cost at most
LOG = "training.jsonl"


def train(model: nn.Module, training: Training, folder: Path, progress: Progress) -> None:
    """Train `model` in place; checkpoints and the log lie in `folder`, the former only meanwhile.

    Dropout is switched off: a few epochs have little to gain from it, its random numbers are slow
    on a CPU, and threads that draw them side by side would not draw the same twice.

    Raises DamagedError if a checkpoint lost its checksum, RecipeError if the loss is not finite.
    """
    spec, objective = training.spec, training.objective
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    no_dropout(model)
    model.eval()
    step_of = Step(model, training, [*trainable.values()])
    start_features(step_of)
    if (said := start_head(step_of)) is not None:
        progress.say(f"{training.title}: {said}")
    model.train()
    step_of.balance = balance = start_balance(step_of, folder)
    groups = _groups(trainable, spec)
    projectors = {
        f"{feature.name}.{name}": p
        for feature in objective.features for name, p in feature.named_parameters()
    }  # fmt: skip
    if projectors:
        rate = spec.learning_rate * spec.head_factor
        groups.append({"params": [*projectors.values()], "peak": rate, "weight_decay": 0.0})
    learnt = dict(balance.named_parameters())
    if learnt:
        groups.append({"params": [*learnt.values()], "peak": _BALANCE_RATE, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    first_rank = step_of.ranks.first
    log = _Log(folder / LOG)
    checkpoint = _Checkpoint(folder, trainable | projectors | learnt, optimizer)
    first = checkpoint.load()
    if first_rank:
        log.rewind(first)
    saved = shown = time.monotonic()
    logged = first
    quarters = {math.ceil(training.steps * k / 4) for k in (1, 2, 3, 4)}
    with progress.bar(training.title, training.steps, "steps", done=first) as bar:
        for step in range(first, training.steps):
            done = step + 1
            look = len(objective.weights) > 1 and done % max(1, training.steps // _LOOKS) == 0
            found = step_of(step, look=look)
            for parameter, gradient in zip(step_of.parameters, found.gradient, strict=True):
                parameter.grad = gradient
            torch.nn.utils.clip_grad_norm_(trainable.values(), spec.max_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * _schedule(step, training.steps, spec)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            bar.advance(1)
            if look or done % _LOG_EVERY == 0 or done in quarters:
                point = _point(training, done, found, balance)
                now = time.monotonic()
                rate = (done - logged) * spec.batch_size / (now - shown)
                point["examples_per_s"] = round(rate, 1)
                logged = done
                if done in quarters and training.validate is not None:
                    model.eval()
                    point["validation"] = training.validate(model)
                    model.train()
                if first_rank:
                    log.write(point)
                shown = time.monotonic()
            if first_rank and time.monotonic() - saved > _SAVE_EVERY and done < training.steps:
                checkpoint.save(done)
                saved = time.monotonic()
    model.eval()
    step_of.observe.close()
    step_of.ranks.barrier()
    if first_rank:
        checkpoint.remove()


def _point(training: Training, step: int, found: Found, balance: Balance) -> dict[str, Any]:
    """A line of the log: the loss and each of its terms, means over the step."""
    terms = {name: float(term) for name, term in found.terms.items()}
    loss = sum(terms.values())
    if not math.isfinite(loss):
        raise RecipeError(
            f"{training.title}, step {step}", f"the loss is {loss}", allowed="a finite number",
            fix=f"give a smaller learning_rate than {training.spec.learning_rate:g}",
        )  # fmt: skip
    point: dict[str, Any] = {"step": step, "loss": loss, "terms": terms}
    if found.norms:
        point["gradients"] = found.norms
        point["cosines"] = {f"{a}, {b}": cosine for (a, b), cosine in found.cosines.items()}
    if training.balance != "fixed":
        point["weights"] = balance.weights([*terms])
    return point


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

    def write(self, point: Mapping[str, Any]) -> None:
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
