"""Steps on texts that the student writes itself and a live teacher scores, token by token.

On-policy distillation (GKD, Agarwal et al. 2024, 2306.13649): a student that only ever reads the
data's texts meets its own mistakes for the first time when it is used.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from limbeck.device import on_device
from limbeck.errors import RecipeError
from limbeck.generating import Completions, Sampling, completion_batch, end_ids, generate
from limbeck.objective import Objective
from limbeck.ranks import ranks
from limbeck.recipe_teaching import OnPolicySpec
from limbeck.tasks.task import Task, order
from limbeck.types import Batch, Teacher

TERM = "on_policy"  # the loss of such a step, in the log
_TOGETHER = {"cpu": 16}  # prompts that share a forward: on one core more are no faster
_ON_A_GPU = 128
_STEP = 2**0.5 - 1  # apart from the golden ratio that sizes are drawn by (`elastic`)


@dataclass(frozen=True, kw_only=True)
class OnPolicy:
    """What such steps are. Whose texts, a `Writer` says."""

    spec: OnPolicySpec
    teacher: Teacher
    objective: Objective
    prompts: Sequence[np.ndarray]
    """Each leaves room for `max_new_tokens` in the student's context."""
    pad_id: int
    end_id: int
    """Of the data. Where a model's own config names others, they end a text too."""
    note: str | None = None
    """What a person should know."""

    def steps(self, total: int, *, seed: int) -> np.ndarray:
        """(total,) bool: which optimizer steps are on-policy, `share` of any stretch of them."""
        at = np.arange(total)
        start = np.random.default_rng((seed, total)).random()
        return ((start + at * _STEP) % 1.0 < self.spec.share) & (at >= self.spec.after * total)


def on_policy(spec: OnPolicySpec, task: Task, teacher: Any, objective: Objective) -> OnPolicy:
    """Of a language-modeling task and a `LiveTeacher`. The objective is the run's: what it says of
    labels and hidden states is left out, and the divergence is `spec`'s if it has one.

    Raises RecipeError where no prompt leaves room for an answer.
    """
    rows: Any = task.rows("train")
    about: Mapping[str, Any] = task.about  # type: ignore[attr-defined]
    found = rows.prompts(spec.prompt_tokens, plain=about["kind"] == "text")
    context = getattr(teacher.model.config, "max_position_embeddings", None)
    fits = [p for p in found if context is None or len(p) + spec.max_new_tokens <= context]
    if not fits:
        raise RecipeError(
            "recipe.distill.on_policy.max_new_tokens",
            f"{spec.max_new_tokens} behind prompts of {min(map(len, found), default=0)} and more",
            allowed=f"what leaves room for a prompt in a context of {context}",
            fix="set fewer, or shorten the prompts",
        )  # fmt: skip
    left_out = len(found) - len(fits)
    own = replace(objective, hard_weight=0.0, features=())
    if spec.divergence is not None:
        settings = spec.divergence.settings()
        own = replace(own, divergence=spec.divergence.kind, settings=settings)
    return OnPolicy(
        spec=spec, teacher=teacher, objective=own, prompts=fits, pad_id=about["pad_id"],
        end_id=about["end_id"],
        note=f"{left_out} of {len(found)} prompts leave no room for {spec.max_new_tokens} tokens "
        f"in a context of {context}, and are not used" if left_out else None,
    )  # fmt: skip


class Writer:
    """One student's texts: some steps' worth of them are written when they are due, and each is
    learnt from `reuse` times.

    Which prompts, which draws and which order follow from the seed and from how many texts came
    before; what is held is part of a checkpoint.
    """

    def __init__(self, how: OnPolicy, model: nn.Module, *, batch_size: int, seed: int) -> None:
        self.how, self.model, self.batch_size, self.seed = how, model, batch_size, seed
        self.ends = tuple({how.end_id, *end_ids(model)})
        self.written = 0  # texts, ever
        self.texts, self.ended, self.seconds = 0, 0, 0.0  # of this process; how many came to an end
        self.served = 0  # steps, of the texts that are held
        self.held: tuple[np.ndarray, ...] = ()

    def next(self, left: int) -> list[int]:
        """Places of a step's texts among those held, which are written first where none are left.

        `left`: the on-policy steps that the training still has, this one included.
        """
        if self.served == self.how.spec.reuse * (len(self.held) // self.batch_size):
            self._write(min(self.how.spec.batches, left) * self.batch_size)
            self.served = 0
        again, part = divmod(self.served, len(self.held) // self.batch_size)
        self.served += 1
        shuffled = np.random.default_rng((self.seed, self.written, again)).permutation(
            len(self.held)
        )
        return shuffled[part * self.batch_size :][: self.batch_size].tolist()

    def batch(self, places: Sequence[int]) -> Batch:
        """Of held texts: prompt and completion, of which the completion alone counts."""
        first = self.written - len(self.held)
        return completion_batch(
            [self._prompt(first + i) for i in places], [self.held[i] for i in places],
            pad_id=self.how.pad_id, numbers=[first + i for i in places],
        )  # fmt: skip

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {
            "place": torch.tensor([self.written, self.served]),
            "lengths": torch.tensor([len(text) for text in self.held], dtype=torch.int64),
            "tokens": torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *self.held])),
        }  # fmt: skip

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.written, self.served = state["place"].tolist()
        parts = state["tokens"].split(state["lengths"].tolist())
        self.held = tuple(part.numpy() for part in parts) if len(state["lengths"]) else ()

    def _prompt(self, number: int) -> np.ndarray:
        epoch, place = divmod(number, len(self.how.prompts))
        return self.how.prompts[order(len(self.how.prompts), seed=self.seed, epoch=epoch)[place]]

    def _write(self, count: int) -> None:
        start, spec = time.monotonic(), self.how.spec
        numbers = range(self.written, self.written + count)
        prompts = [self._prompt(number) for number in numbers]
        by_length = sorted(range(count), key=lambda i: (len(prompts[i]), i))
        most = _TOGETHER.get(next(self.model.parameters()).device.type, _ON_A_GPU)
        groups = [by_length[at : at + most] for at in range(0, count, most)]
        sampling = Sampling(
            max_new_tokens=spec.max_new_tokens, sampling_temperature=spec.sampling_temperature,
            top_p=spec.top_p, seed=self.seed,
        )  # fmt: skip

        def write(group: list[int]) -> Completions:
            return generate(
                self.model, [prompts[i] for i in group], sampling, ends=self.ends,
                numbers=[numbers[i] for i in group], batch_size=most,
            )  # fmt: skip

        world, was_training = ranks(), self.model.training
        mine = groups[world.rank :: world.world]
        tokens = torch.zeros(count, spec.max_new_tokens, dtype=torch.int64)
        lengths = torch.zeros(count, dtype=torch.int64)
        ended = torch.zeros(count, dtype=torch.int64)
        self.model.eval()
        try:
            for group, found in zip(mine, on_device(write, mine), strict=True):
                for i, said, over in zip(group, found.tokens, found.ended, strict=True):
                    tokens[i, : len(said)] = torch.from_numpy(said)
                    lengths[i], ended[i] = len(said), int(over)
        finally:
            self.model.train(was_training)
        world.add([tokens, lengths, ended])
        self.held = tuple(tokens[i, : lengths[i]].numpy() for i in range(count))
        self.written += count
        self.texts += count
        self.ended += int(ended.sum())
        self.seconds += time.monotonic() - start
