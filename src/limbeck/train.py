"""The one training loop: a model, rows, a teacher that may be stored, an objective.

Batch, teacher signal, student signal, terms, total, backward, clip, step, schedule, log, save.
The order of the rows follows from the seed alone, and there is no dropout, so a run that was killed
continues from its last checkpoint to the same weights.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from limbeck.balance import Balance
from limbeck.device import compute_device, products_in, repeatable
from limbeck.elastic import ElasticStep, FoundOfSizes, Sampling
from limbeck.errors import RecipeError
from limbeck.family import Family, Size
from limbeck.lora import adapted
from limbeck.models import depths, no_dropout
from limbeck.on_policy import TERM, Writer
from limbeck.progress import Progress
from limbeck.quantization import Rounding
from limbeck.recipe import TrainingSpec
from limbeck.run import file_sha256, read_index, replaced, require_sha256, write_json
from limbeck.shared_adamw import SharedAdamW, clip
from limbeck.statistics import forget, measure_statistics
from limbeck.step import Training, start_balance, start_features, start_head, start_matrices

_LOG_EVERY = 10  # steps
_BALANCE_RATE = 0.02  # learning rate of what a balance learns
_SAVE_EVERY = 20.0  # seconds; what a kill can cost, or more where saving takes long:
_SAVE_LESS = 1.5  # times as rarely for each second of it, so that it has a thirtieth of the time
LOG = "training.jsonl"


def train(
    model: nn.Module | Family, training: Training, folder: Path, progress: Progress,
    sampling: Sampling | None = None,
) -> None:  # fmt: skip
    """Train `model` in place; checkpoints and the log lie in `folder`, the former only meanwhile.

    Of a family those sizes learn in a step that `sampling` says; without it, each in its turn.

    BatchNorm's running statistics are measured at the end, on training rows (`statistics`).

    Dropout is switched off: a few epochs have little to gain from it, its random numbers are slow
    on a CPU, and threads that draw them side by side would not draw the same twice.

    Raises DamagedError if a checkpoint lost its checksum, RecipeError if the loss is not finite.
    """
    if isinstance(model, Family):
        assert training.spec.lora is None, "the recipe refused it"
        with repeatable():
            _train(model, training, folder, progress, sampling or Sampling())
        return
    with adapted(model, training.spec.lora, seed=training.seed) as said, repeatable():
        if said is not None:
            progress.say(f"{training.title}: {said}")
        _train(Family.of_one(model), training, folder, progress, Sampling())


def _train(
    family: Family, training: Training, folder: Path, progress: Progress, sampling: Sampling
) -> None:
    spec, objective = training.spec, training.objective
    family.to(compute_device())
    one_size_only = (objective.features, training.quantization)  # a projector fits one width
    assert len(family.sizes) == 1 or not any(one_size_only)
    step_of = ElasticStep(family, training, sampling)
    sizes = [family.sizes[name] for name in step_of.steps]
    for size, one in zip(sizes, step_of.steps.values(), strict=True):
        no_dropout(size.model)
        size.model.eval()
        if (said := start_head(one)) is not None:
            progress.say(f"{training.title}: {said}")
        start_matrices(one)
        forget(size.model)
        size.model.train()
        start_features(one)  # of states as they will be: a random start has no statistics yet
    if training.on_policy is not None and training.on_policy.note is not None:
        progress.say(f"{training.title}: {training.on_policy.note}")
    step_one = next(iter(step_of.steps.values()))
    balance = start_balance(step_one, folder)
    learnt = step_of.balanced(balance)
    peaks = _peaks([*family.weights], spec)
    for name in learnt:
        of_balance = name.startswith("balance.")
        peaks[name] = _BALANCE_RATE if of_balance else spec.learning_rate * spec.head_factor
    optimizer = SharedAdamW(
        family.weights | learnt, peaks, spec.weight_decay, sorted(family.tables)
    )
    ranks = step_one.ranks
    log = _Log(folder / LOG)
    writers = {name: one.writer for name, one in step_of.steps.items() if one.writer}
    checkpoint = _Checkpoint(folder, optimizer, writers)
    first = checkpoint.load()
    if ranks.first:
        log.rewind(first)
    begun = saved = shown = time.monotonic()
    wait = _SAVE_EVERY
    logged, wrote = first, 0.0
    every = training.look_every
    rounding = Rounding(sizes[0].model, training.quantization, training.steps)
    quarters = {math.ceil(training.steps * k / 4) for k in (1, 2, 3, 4)}
    with progress.bar(training.title, training.steps, "steps", done=first) as bar:
        for step in range(first, training.steps):
            done = step + 1
            look = every > 0 and done % every == 0
            with rounding.at(step), products_in(spec.precision):
                found = step_of(step, look=look)
            clip(found.pieces, spec.max_grad_norm)
            factor = _schedule(step, training.steps, spec)
            pieces = found.pieces + found.learnt
            optimizer.step(pieces, number=done, factor=factor * found.rate)
            bar.advance(1)
            if look or done % _LOG_EVERY == 0 or done in quarters:
                point = _point(training, done, found, balance)
                now = time.monotonic()
                rate = (done - logged) * spec.batch_size / (now - shown)
                point["examples_per_s"] = round(rate, 1)
                if training.on_policy is not None:
                    spent = sum(writer.seconds for writer in writers.values())
                    point["writing"] = round((spent - wrote) / (now - shown), 4)
                    wrote = spent
                logged = done
                if done in quarters and training.validate is not None:
                    optimizer.settle(done)
                    with rounding.at(step):
                        point |= _validated(family, sizes, training)
                if ranks.first:
                    log.write(point)
                shown = time.monotonic()
            now = time.monotonic()
            if ranks.first and now - saved > wait and done < training.steps:
                checkpoint.save(done)
                saved = time.monotonic()
                wait = _SAVE_EVERY * max(1.0, _SAVE_LESS * (saved - now))
    if training.on_policy is not None and ranks.first:
        progress.say(f"{training.title}: {_written(writers, time.monotonic() - begun)}")
    optimizer.settle(training.steps)
    for size in sizes:
        size.refresh(family.weights)
        measure_statistics(size.model, training.rows, seed=training.seed)
    for one in step_of.steps.values():
        one.observe.close()
    family.to(torch.device("cpu"))
    ranks.barrier()
    if ranks.first:
        checkpoint.remove()


def _written(writers: Mapping[str, Writer], seconds: float) -> str:
    """Of this process."""
    texts, ended = (sum(getattr(w, n) for w in writers.values()) for n in ("texts", "ended"))
    spent = sum(writer.seconds for writer in writers.values())
    return (
        f"{texts:,} texts of its own, of which {ended:,} came to their end; writing them took "
        f"{spent:.1f} s, {spent / seconds:.0%} of its training"
    )


def _validated(family: Family, sizes: Sequence[Size], training: Training) -> dict[str, Any]:
    """The mean of those that are trained, and of several each one's own."""
    assert training.validate is not None
    found = {}
    for size in sizes:
        size.refresh(family.weights)
        measure_statistics(size.model, training.rows, seed=training.seed)
        found[size.name] = training.validate(size.model)
        forget(size.model)
        size.model.train()
    mean = {"validation": sum(found.values()) / len(found)}
    return mean | {"validations": found} if len(found) > 1 else mean


def _point(
    training: Training, step: int, found: FoundOfSizes, balance: Balance
) -> dict[str, Any]:
    """A line of the log: the loss and each of its terms, means over the step's active sizes."""
    by_size = {n: {k: float(term) for k, term in f.terms.items()} for n, f in found.sizes.items()}
    losses = {name: sum(terms.values()) for name, terms in by_size.items()}
    for name, loss in losses.items():
        if not math.isfinite(loss):
            which = f", {name}" if found.of_family else ""
            raise RecipeError(
                f"{training.title}{which}, step {step}", f"the loss is {loss}",
                allowed="a finite number",
                fix=f"give a smaller learning_rate than {training.spec.learning_rate:g}",
            )  # fmt: skip
    first = next(iter(found.sizes.values()))
    means = {k: sum(terms[k] for terms in by_size.values()) / len(by_size) for k in first.terms}
    point: dict[str, Any] = {"step": step, "terms": means}
    if TERM not in means:  # that of on-policy steps is another
        point["loss"] = sum(means.values())
    if found.of_family:
        point["sizes"] = losses
    if first.norms:
        point["gradients"] = first.norms
        point["cosines"] = {f"{a}, {b}": cosine for (a, b), cosine in first.cosines.items()}
    if training.balance != "fixed":
        point["weights"] = balance.weights([*means])
    return point


def _schedule(step: int, steps: int, spec: TrainingSpec) -> float:
    """Linear up over the warm-up, then linear down to zero."""
    warmup = spec.warmup_fraction * steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (steps - step) / max(1.0, steps - warmup)


def _peaks(names: list[str], spec: TrainingSpec) -> dict[str, float]:
    """Highest learning rates: deeper layers learn faster.

    Layer-wise decay: ULMFiT's discriminative fine-tuning (Howard & Ruder 2018, sec. 3.2).
    """
    of_depth = depths(names)
    top = max(of_depth.values())
    return {
        name: spec.learning_rate
        * spec.layer_decay ** (top - depth)
        * (spec.head_factor if depth == top else 1.0)
        for name, depth in of_depth.items()
    }


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
    """Weights, the optimizer's moments, and texts that are still to be learnt from; nothing else
    has state (`statistics` says why)."""

    def __init__(
        self, folder: Path, optimizer: SharedAdamW, writers: Mapping[str, Writer]
    ) -> None:
        self.folder, self.index, self.writers = folder, folder / "checkpoint.json", writers
        self.kinds: dict[str, Mapping[str, Tensor]] = {
            "weight": optimizer.weights, "first": optimizer.first, "second": optimizer.second,
            **{f"table.{kind}": {name: getattr(table, kind)
                                 for name, table in optimizer.tables.items()}
               for kind in ("live", "since", "missed")},
        }  # fmt: skip

    def save(self, step: int) -> None:
        tensors = {
            f"{kind}.{name}": tensor.detach()
            for kind, held in self.kinds.items()
            for name, tensor in held.items()
        }
        for name, writer in self.writers.items():
            tensors |= {f"texts.{name}/{kind}": found for kind, found in writer.state().items()}
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
            for kind, held in self.kinds.items():
                for name, tensor in held.items():
                    tensor.copy_(tensors[f"{kind}.{name}"])
        for name, writer in self.writers.items():
            writer.load_state({kind: tensors[f"texts.{name}/{kind}"] for kind in writer.state()})
        return int(saved["step"])

    def remove(self) -> None:
        for path in self.folder.glob("*checkpoint*"):
            path.unlink()

    def _read(self) -> dict | None:
        return read_index(self.index, {"file", "step", "sha256"})
