"""The variants of `lm_step.py`: each trains the same student on the same tokens, in this process.

How the peers were set up, where the obvious call does not do it (trl 1.16, nvidia-modelopt 0.47,
liger-kernel 0.8):
- GKDTrainer: lmbda 0 and seq_kd off, so that it learns from the given text; beta 0 is forward KL.
- DistillationTrainer samples its completions from the student in every step and has no switch for
  text that is there already: `TRL Distillation` is as it comes (end tokens suppressed, so that 192
  tokens are written each time), `replay` overrides the private `_generate_single_turn`. Its bf16
  leaves autocast off in a single process, so that is fp32 work.
- ModelOpt's KDTrainer is imported with `--no-deps` and needs omegaconf, pulp and nvidia-ml-py.
- Liger's chunked JSD is the one in pure torch, not compiled; alone it is a loss, so it stands in a
  plain loop with both models' bodies.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

_SIZES = {  # rows of a step, tokens of a row, of which the first do not count
    "cpu": (4, 256, 64), "cuda": (16, 1024, 256),
}  # fmt: skip
_BIG = {"vocab": 49_152, "teacher": (576, 1536, 30, 9, 3), "student": (384, 1024, 12, 6, 3)}
_SMALL = {"vocab": 8_192, "teacher": (512, 1280, 10, 8, 4), "student": (256, 704, 7, 4, 2)}
_GPU = {"vocab": 49_152, "teacher": (2048, 8192, 24, 32, 32), "student": (960, 2560, 32, 15, 5)}
_RATE, _CLIP = 1e-4, 1.0


class MissingError(Exception):
    """A peer that cannot be imported."""


def run(case: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    variant = case["variant"]
    if variant == "capture":
        capture(case)
        print("{}")
        return
    try:
        path = PATHS[variant]
        IMPORTS.get(variant, lambda: None)()
        before = status("VmRSS")
        clock = Clock(case["warm"], case["steps"], case["device"])
        losses = path(case, clock)
    except (ImportError, MissingError) as error:
        print(json.dumps({"missing": f"not here ({error})"}))
        return
    rows, length, _ = sizes_of(case)
    found = clock.found(before) | {"tokens": rows * length}
    print(json.dumps(found | {"loss": [round(float(one), 5) for one in losses[:3]]}))


class Clock:
    """Times at the ends of steps; memory from the training's start on, on a GPU what torch took."""

    def __init__(self, warm: int, steps: int, device: str = "cpu") -> None:
        self.warm, self.total, self.device = warm, warm + steps, device
        self.ends: list[tuple[float, float]] = []

    def start(self) -> None:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM = VmRSS

    def end(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.ends.append((time.perf_counter(), time.process_time()))

    def found(self, before: int) -> dict[str, Any]:
        measured = self.ends[self.warm - 1 : self.total]
        pairs = [*itertools.pairwise(measured)]
        return {
            "wall": [b[0] - a[0] for a, b in pairs], "cpu": [b[1] - a[1] for a, b in pairs],
            "mib": torch.cuda.max_memory_allocated() / 2**20 if self.device == "cuda"
            else (status("VmHWM") - before) / 1024,
        }  # fmt: skip


def status(name: str) -> int:
    """kB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(name + ":")).split()[1])


def model_of(case: dict[str, Any], which: str) -> LlamaForCausalLM:
    sizes = shapes_of(case)
    hidden, ffn, layers, heads, groups = sizes[which]  # type: ignore[misc]
    torch.manual_seed(0 if which == "teacher" else 1)
    config = LlamaConfig(
        vocab_size=sizes["vocab"], hidden_size=hidden, intermediate_size=ffn, use_cache=False,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=groups,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        max_position_embeddings=2048,
    )  # fmt: skip
    with torch.device(case["device"]):
        return LlamaForCausalLM(config)


def shapes_of(case: dict[str, Any]) -> dict[str, Any]:
    return _SMALL if case["quick"] else _GPU if case["device"] == "cuda" else _BIG


def sizes_of(case: dict[str, Any]) -> tuple[int, int, int]:
    return _SIZES["cpu" if case["quick"] else case["device"]]


def tokens_of(case: dict[str, Any]) -> Tensor:
    """(steps x rows, length): all steps' rows, in the order that they are learnt in."""
    random, (rows, length, _) = torch.Generator().manual_seed(2), sizes_of(case)
    shape = ((case["warm"] + case["steps"]) * rows, length)
    return torch.randint(3, shapes_of(case)["vocab"], shape, generator=random)


def batches(case: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids, labels), (rows, length) each; -100 where a token does not count."""
    rows, _, prompt = sizes_of(case)
    for ids in tokens_of(case).split(rows):
        labels = ids.clone()
        labels[:, :prompt] = -100
        yield ids.to(case["device"]), labels.to(case["device"])


# -- ours ---------------------------------------------------------------------------------------


def rows_of(case: dict[str, Any]) -> Any:
    import numpy as np

    from limbeck.tasks.causal_rows import Rows

    tokens = tokens_of(case).numpy().astype(np.int32)
    _, length, prompt = sizes_of(case)
    counted = np.ones(length, bool)
    counted[:prompt] = False
    n = len(tokens)
    return Rows(
        ids=np.arange(n), tokens=tuple(tokens), counted=(counted,) * n,
        starts=(np.zeros(1, np.int32),) * n, documents=(np.zeros(1, np.int64),) * n, pad_id=0,
        layout="pad",
    )  # fmt: skip


def store_of(case: dict[str, Any]) -> Path:
    return Path(case["stores"]) / case["codec"]


def capture(case: dict[str, Any]) -> None:
    from limbeck.progress import Silent
    from limbeck.signals.capture import capture as captured
    from limbeck.signals.codecs import Sampled, TopK
    from limbeck.teachers.live import LiveTeacher

    codec = Sampled(24) if case["codec"] == "sampled" else TopK(64)
    teacher = LiveTeacher(model_of(case, "teacher"), "benchmark")
    captured(teacher, rows_of(case), {store_of(case): codec}, made_from={}, progress=Silent(),
             batch_size=4)  # fmt: skip


def import_ours() -> None:
    import limbeck.teachers.live
    import limbeck.teachers.stored
    import limbeck.train  # noqa: F401


def ours(case: dict[str, Any], clock: Clock) -> list[float]:
    from limbeck import train as training_loop
    from limbeck.objective import Objective
    from limbeck.progress import Silent
    from limbeck.recipe_teaching import TrainingSpec
    from limbeck.signals.store import open_store
    from limbeck.step import Step, Training
    from limbeck.teachers.live import LiveTeacher
    from limbeck.teachers.stored import NoTeacher, StoredTeacher

    precision, variant = case["precision"], case["variant"]
    soft, hard = {"ours, stored + labels": (0.5, 0.5), "ours, hard labels": (0.0, 1.0)}.get(
        variant, (1.0, 0.0)
    )
    teacher: Any = NoTeacher()
    if case["codec"]:
        teacher = StoredTeacher(store=open_store(store_of(case)), fingerprint="", temperature=1.0)
    elif soft:
        teacher = LiveTeacher(model_of(case, "teacher"), "benchmark", precision=precision)
    training = Training(
        rows=rows_of(case), teacher=teacher,
        objective=Objective(soft_weight=soft, hard_weight=hard),
        spec=TrainingSpec(
            epochs=1, batch_size=sizes_of(case)[0], learning_rate=_RATE, precision=precision
        ),
        seed=0, title="", looks=0,
    )  # fmt: skip
    losses: list[float] = []
    stepped = training_loop.SharedAdamW.step
    looked = Step.__call__

    def step(*args: Any, **kwargs: Any) -> None:
        stepped(*args, **kwargs)
        clock.end()

    def look(self: Step, *args: Any, **kwargs: Any) -> Any:
        found = looked(self, *args, **kwargs)
        losses.append(float(sum(found.terms.values())))
        return found

    training_loop.SharedAdamW.step = step  # type: ignore[method-assign]
    Step.__call__ = look  # type: ignore[method-assign]
    training_loop._SAVE_EVERY = 1e9  # no checkpoints: nobody else writes any
    model = model_of(case, "student")
    clock.start()
    with tempfile.TemporaryDirectory() as folder:
        training_loop.train(model, training, Path(folder), Silent())
    return losses


# -- plain loops --------------------------------------------------------------------------------


def plain(
    case: dict[str, Any], clock: Clock, loss_of: Callable[[Any, Any, Tensor, Tensor], Tensor], *,
    live: bool,
) -> list[float]:  # fmt: skip
    student, teacher = model_of(case, "student"), None
    if live:
        teacher = model_of(case, "teacher").eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=_RATE, fused=True)
    student.train()
    losses = []
    clock.start()
    for ids, labels in batches(case):
        with torch.autocast(case["device"], torch.bfloat16, enabled=case["precision"] == "bf16"):
            loss = loss_of(student, teacher, ids, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(student.parameters(), _CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        clock.end()
    return losses


def loop(case: dict[str, Any], clock: Clock) -> list[float]:
    def loss(student: Any, _teacher: Any, ids: Tensor, labels: Tensor) -> Tensor:
        found: Tensor = student(input_ids=ids, labels=labels).loss
        return found

    return plain(case, clock, loss, live=False)


def loop_kept(case: dict[str, Any], clock: Clock) -> list[float]:
    from limbeck._startup import keep_memory

    keep_memory()
    return loop(case, clock)


def live_kl(case: dict[str, Any], clock: Clock) -> list[float]:
    def loss(student: Any, teacher: Any, ids: Tensor, labels: Tensor) -> Tensor:
        kept = labels[:, 1:] != -100
        mine = student(input_ids=ids).logits[:, :-1][kept].float().log_softmax(-1)
        with torch.no_grad():
            theirs = teacher(input_ids=ids).logits[:, :-1][kept].float().log_softmax(-1)
        return nn.functional.kl_div(mine, theirs, reduction="batchmean", log_target=True)

    return plain(case, clock, loss, live=True)


def liger(case: dict[str, Any], clock: Clock) -> list[float]:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    jsd = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False, chunk_size=256
    )

    def loss(student: Any, teacher: Any, ids: Tensor, labels: Tensor) -> Tensor:
        kept = labels[:, 1:] != -100
        mine = student.model(input_ids=ids).last_hidden_state[:, :-1][kept]
        with torch.no_grad():
            theirs = teacher.model(input_ids=ids).last_hidden_state[:, :-1][kept]
        found: Tensor = jsd(
            mine, student.lm_head.weight, theirs, teacher.lm_head.weight, labels[:, 1:][kept]
        )
        return found

    return plain(case, clock, loss, live=True)


# -- trainers -----------------------------------------------------------------------------------


def arguments(case: dict[str, Any], folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder, "per_device_train_batch_size": sizes_of(case)[0],
        "learning_rate": _RATE, "max_steps": case["warm"] + case["steps"],
        "use_cpu": case["device"] == "cpu", "report_to": [],
        "bf16": case["precision"] == "bf16", "gradient_checkpointing": False,
        "save_strategy": "no", "logging_steps": 1, "optim": "adamw_torch_fused",
        "max_grad_norm": _CLIP, "lr_scheduler_type": "constant", "disable_tqdm": True,
        "dataloader_num_workers": 0, "dataloader_pin_memory": False,
    }  # fmt: skip


def trained(trainer: Any, clock: Clock) -> list[float]:
    from transformers import TrainerCallback

    class Ends(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end()

    trainer.add_callback(Ends())
    clock.start()
    trainer.train()
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def word(i: int) -> str:
    """None is the beginning of another: special ones would be found within it."""
    return f"w{i:06d}"


def tokenizer_of(case: dict[str, Any]) -> Any:
    """A word for each token: prompts can be given as text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab: Any = shapes_of(case)["vocab"]
    words = {word(i): i for i in range(vocab)}
    backend = Tokenizer(models.WordLevel(words, unk_token=word(0)))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=word(0), bos_token=word(1), eos_token=word(2),
        padding_side="left",
    )  # fmt: skip


def dataset_of(case: dict[str, Any]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": tokens_of(case).tolist()})


def collator_of(case: dict[str, Any]) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = torch.tensor([row["input_ids"] for row in rows])
        labels = ids.clone()
        labels[:, : sizes_of(case)[2]] = -100
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    return collate


def gkd(case: dict[str, Any], clock: Clock) -> list[float]:
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    with tempfile.TemporaryDirectory() as folder:
        trainer = GKDTrainer(
            model=model_of(case, "student"), teacher_model=model_of(case, "teacher"),
            args=GKDConfig(lmbda=0.0, beta=0.0, seq_kd=False, **arguments(case, folder)),
            data_collator=collator_of(case), train_dataset=dataset_of(case),
            processing_class=tokenizer_of(case),
        )  # fmt: skip
        return trained(trainer, clock)


def distillation(case: dict[str, Any], clock: Clock) -> list[float]:
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    tokens = tokens_of(case).tolist()
    _, whole, prompt = sizes_of(case)
    prompts = [" ".join(map(word, row[:prompt])) for row in tokens]
    completions = {tuple(row[:prompt]): row[prompt:] for row in tokens}
    length = whole - prompt

    class Replay(DistillationTrainer):  # type: ignore[misc]
        def _generate_single_turn(self, prompt_ids: Any, *_: Any, **__: Any) -> Any:
            return [completions[tuple(ids)] for ids in prompt_ids]

    made = Replay if case["variant"].endswith("replay") else DistillationTrainer
    with tempfile.TemporaryDirectory() as folder:
        trainer = made(
            model=model_of(case, "student"), teacher_model=model_of(case, "teacher"),
            args=DistillationConfig(
                beta=0.0, temperature=1.0, max_completion_length=length, shuffle_dataset=False,
                generation_kwargs={"min_new_tokens": length}, use_vllm=False,
                **arguments(case, folder),
            ),
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer_of(case),
        )  # fmt: skip
        return trained(trainer, clock)


def modelopt(case: dict[str, Any], clock: Clock) -> list[float]:
    from modelopt.torch.distill.plugins.huggingface import KDTrainer
    from transformers import TrainingArguments

    with tempfile.TemporaryDirectory() as folder:
        trainer = KDTrainer(
            model=model_of(case, "student"),
            args=TrainingArguments(remove_unused_columns=False, **arguments(case, folder)),
            data_collator=collator_of(case), train_dataset=dataset_of(case),
            distill_args={"teacher_model": model_of(case, "teacher"), "distill": True},
        )  # fmt: skip
        return trained(trainer, clock)


def _importing(*names: str) -> Callable[[], None]:
    def found() -> None:
        for name in names:
            __import__(name)

    return found


PATHS: dict[str, Callable[[dict[str, Any], Clock], list[float]]] = {
    "ours, stored": ours, "ours, stored top-64": ours, "ours, stored + labels": ours,
    "ours, live": ours, "ours, hard labels": ours, "plain loop": loop,
    "plain loop, kept": loop_kept, "plain live KL": live_kl, "TRL GKD": gkd,
    "TRL Distillation, replay": distillation, "TRL Distillation": distillation,
    "ModelOpt KD": modelopt, "Liger chunked JSD": liger,
}  # fmt: skip
IMPORTS: dict[str, Callable[[], None]] = {
    **{name: import_ours for name in PATHS if name.startswith("ours")},
    "TRL GKD": _importing("trl.experimental.gkd", "datasets"),
    "TRL Distillation": _importing("trl.trainer.distillation_trainer", "datasets"),
    "TRL Distillation, replay": _importing("trl.trainer.distillation_trainer", "datasets"),
    "ModelOpt KD": _importing("modelopt.torch.distill.plugins.huggingface", "datasets"),
    "Liger chunked JSD": _importing("liger_kernel.chunked_loss"),
}
