"""Learning from the student's own texts against learning from the data's, at equal time.

    python benchmarks/on_policy.py [--seeds 5] [--cpu-s 60] [--jobs 2] [--choose] [--quick]
                                   [--work DIR] [--json FILE]

The task can be checked: chains of three two-digit numbers with their running totals, lowest
digit first, `47+58+12=` -> `501,711` (reasoning-gym's `chain_sum`, spelt for a model that knows
digits alone). A teacher of a third of a million parameters is taught it on 60,000 chains of two to
four. Its student has a tenth of that and 2,000 chains to learn from; it is cut from the teacher as
`limbeck distill` does. All arms have the same start, rows,
batch and processor time: each training has one core, what a step costs there is measured first,
and what each training took in the end is printed (the process's own time: neighbours do not
count). Accuracy is exact match of the last total, greedy, on 1,000 chains that neither has seen; a
seed is an order of the rows and the draws.
`--choose` tries the settings of each arm (`_TRIES`, as many for every arm but the one without a
teacher) on 500 further chains with a seed of its own; what it chose lies in DIR/chosen.json, where
the next call takes it from, or else it is the first of each. `--jobs`
trainings run side by side, each on its core, and neither of them on a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from limbeck import stages, teaching
from limbeck.causal import load_causal, save_causal
from limbeck.energy import NoMeter
from limbeck.generating import Sampling, generate
from limbeck.models import load_tokenizer
from limbeck.pipeline import distill
from limbeck.progress import Silent
from limbeck.recipe import Recipe
from limbeck.recipe_file import load_recipe, validate
from limbeck.tasks import task as tasks

_BATCH = 32
_END = 1
_PLAIN = ("distill.soft_weight=1", "distill.hard_weight=0")
_OWN = "distill.on_policy={{share: {}, after: {}, max_new_tokens: 14, batches: 4, reuse: 4{}}}"
_LR = "distill.training.learning_rate={}"
_TRIES: dict[str, tuple[tuple[str, ...], ...]] = {
    "hard labels": tuple((_LR.format(lr),) for lr in (2e-3, 5e-3, 1e-2)),
    "off-policy": tuple(
        (*_PLAIN, f"distill.temperature={t}", _LR.format(lr))
        for t in (1, 2) for lr in (2e-3, 5e-3, 1e-2)
    ),
    "on-policy": tuple(
        (*_PLAIN, f"distill.temperature={t}", _OWN.format(share, after, divergence), _LR.format(lr))
        for t, share, after, divergence, lr in (
            (2, 0.5, 0.3, "", 5e-3), (2, 0.25, 0.3, "", 5e-3), (2, 0.5, 0, "", 5e-3),
            (2, 0.5, 0.3, ", divergence: reverse_kl", 5e-3), (2, 0.5, 0.3, "", 1e-2),
            (1, 0.5, 0.3, "", 5e-3),
        )
    ),
}  # fmt: skip
_CHOICE = "chosen.json"
_PILOTS = 3  # of which the least counts: neighbours make a step dearer
_T_OF = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, 95 %, by number of seeds

Pairs = list[tuple[str, str]]


def chains(
    count: int, seed: int, but: Sequence[Pairs] = (), *, numbers: tuple[int, int] = (3, 3)
) -> Pairs:
    """Prompts and completions, none twice and none of `but`."""
    draw, found = random.Random(seed), []
    seen = {prompt for pairs in but for prompt, _ in pairs}
    while len(found) < count:
        terms = [draw.randint(10, 99) for _ in range(draw.randint(*numbers))]
        prompt = "+".join(map(str, terms)) + "="
        if prompt in seen:
            continue
        seen.add(prompt)
        totals = [sum(terms[:end]) for end in range(2, len(terms) + 1)]
        found.append((prompt, ",".join(str(total)[::-1] for total in totals)))
    return found


def write_rows(pairs: Pairs, path: Path) -> None:
    lines = (json.dumps({"prompt": prompt, "completion": said}) for prompt, said in pairs)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def fresh(folder: Path) -> PreTrainedTokenizerFast:
    """A random teacher with one token for each sign."""
    ids = {"<pad>": 0, "<end>": _END} | {sign: i + 2 for i, sign in enumerate("0123456789+=,")}
    backend = Tokenizer(models.BPE(vocab=ids, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=96, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
        bos_token_id=None, eos_token_id=_END, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    save_causal(LlamaForCausalLM(config), tokenizer, folder)
    return tokenizer


def recipe_of(rows: Path, model: Path, *, params: int, tune: dict[str, Any] | None) -> Recipe:
    return validate({
        "name": "chains",
        "task": {"kind": "language-modeling", "max_tokens": 32, "layout": "pad"},
        "data": {"train": str(rows), "prompt": "prompt", "completion": "completion",
                 "validation_fraction": 0.05, "test_fraction": 0.05},
        "teacher": {"model": str(model), **({"tune": tune} if tune else {})},
        "signals": {"dense": {"dtype": "fp32"}},
        "distill": {"temperature": 1, "soft_weight": 1, "hard_weight": 0,
                    "training": {"epochs": 0.1, "batch_size": _BATCH, "learning_rate": 5e-3}},
        "students": [{"name": "student", "budget": {"params": params}}],
        "evidence": {"baselines": "none"},
        "export": {"formats": ["hf"], "primary": "hf"},
    })  # fmt: skip


class Told(Silent):
    """The last line, for what a training says of itself."""

    last = ""

    def say(self, line: str) -> None:
        if "texts of its own" in line:
            self.last = line


def teach(teacher: Path, steps: int, pairs: Pairs) -> None:
    """The teacher, tuned on its own rows, as a plain folder."""
    if (teacher / "config.json").is_file():
        return
    with tempfile.TemporaryDirectory() as name:
        aside = Path(name)
        fresh(aside / "raw")
        write_rows(pairs, aside / "rows.jsonl")
        tune = {"epochs": steps * 64 / (0.9 * len(pairs)), "batch_size": 64, "learning_rate": 4e-3}
        recipe = recipe_of(aside / "rows.jsonl", aside / "raw", params=10**9, tune=tune)
        for folder in (aside / "data", aside / "hf"):
            folder.mkdir()
        tasks.prepare(recipe, aside / "rows.jsonl", None, aside / "raw", aside / "data")
        stages.tune(aside / "hf", recipe, aside / "raw", aside / "data", Silent())
        shutil.copytree(aside / "hf", teacher, dirs_exist_ok=True)


def accuracy(folder: Path, pairs: Pairs) -> float:
    """Share of right last totals, written greedily."""
    model = load_causal(folder, where=str(folder))
    tokenizer = load_tokenizer(folder, where=str(folder))
    prompts = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
    sampling = Sampling(max_new_tokens=14, sampling_temperature=0)
    said = generate(model, prompts, sampling, ends=(_END,), batch_size=250).tokens
    texts = [tokenizer.decode(ids.tolist(), skip_special_tokens=True) for ids in said]
    right = [t.split(",")[-1] == a.split(",")[-1] for t, (_, a) in zip(texts, pairs, strict=True)]
    return sum(right) / len(right)


def once(run: Path, name: str, changes: Sequence[str], steps: int, seed: int) -> tuple[Path, str]:
    """A training's folder, and what it said."""
    rows = json.loads((run / "data/data.json").read_text())["rows"]["train"]
    epochs = f"distill.training.epochs={steps * _BATCH / rows}"
    recipe, _ = load_recipe(run, (*changes, epochs))
    recipe = recipe.model_copy(update={"seed": seed})
    folder = run / f"arm-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    told = Told()
    teaching.distil(
        folder, recipe, recipe.students[0],
        stages.read_plan(run / "students/student/plan").shape, stages.places_of(run),
        told, taught=name != "hard labels",
    )  # fmt: skip
    return folder, told.last


def cost(run: Path, name: str, changes: Sequence[str], steps: int) -> float:
    start = time.process_time()
    once(run, name, changes, steps, 0)
    return time.process_time() - start


def arm(job: tuple[Path, str, Sequence[str], float, int, Pairs]) -> tuple[float, int, float, str]:
    """Accuracy, steps, seconds, what it said of its own texts; on this process' core."""
    run, name, changes, seconds_given, seed, pairs = job
    took = {
        steps: min(cost(run, name, changes, steps) for _ in range(_PILOTS)) for steps in (30, 90)
    }
    steps = max(40, round(seconds_given / ((took[90] - took[30]) / 60)))
    start = time.process_time()
    folder, said = once(run, name, changes, steps, seed)
    seconds = time.process_time() - start
    return accuracy(folder, pairs), steps, seconds, said


def alone(numbers: Any) -> None:
    """One core of those that this process may use, no GPU."""
    disable_progress_bar()
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[numbers.get() % len(cores)]})
    torch.set_num_threads(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, choices=sorted(_T_OF))
    parser.add_argument("--cpu-s", type=float, default=60, help="of each training")
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side")
    parser.add_argument("--choose", action="store_true", help="try each arm's settings instead")
    parser.add_argument("--quick", action="store_true", help="a bad teacher, 3 s, 2 seeds")
    parser.add_argument("--work", type=Path, help="keeps the teacher there for the next time")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    disable_progress_bar()
    seeds, cpu_s = (2, 3.0) if options.quick else (options.seeds, options.cpu_s)
    work = options.work or Path(tempfile.mkdtemp(prefix="limbeck-"))
    work.mkdir(parents=True, exist_ok=True)
    asked, tried = chains(1000, 1), chains(500, 2)
    theirs = chains(
        6000 if options.quick else 60_000, 3, [asked, tried], numbers=(2, 4)
    )
    ours = chains(2000, 4, [asked, tried])
    teach(work / "teacher", 150 if options.quick else 3000, theirs)
    write_rows(ours, work / "rows.jsonl")
    run = work / "run"
    plain = recipe_of(work / "rows.jsonl", work / "teacher", params=33_000, tune=None)
    report = distill(plain, run, meter=NoMeter())
    student = report.students[0]
    print(f"teacher: {report.teacher.params:,} parameters, {accuracy(work / 'teacher', asked):.1%} "
          f"right; student: {student.params:,}, {student.shape}", flush=True)  # fmt: skip
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # of the trainings' processes
    context = multiprocessing.get_context("spawn")
    numbers: Any = context.Queue()
    for number in range(options.jobs):
        numbers.put(number)
    with context.Pool(options.jobs, initializer=alone, initargs=(numbers,)) as pool:
        if options.choose:
            jobs = [(run, n, c, cpu_s, 100, tried) for n, tries in _TRIES.items() for c in tries]
            best: dict[str, tuple[float, Sequence[str]]] = {}
            for (_, name, changes, *_), (right, steps, took, _) in zip(
                jobs, pool.imap(arm, jobs), strict=True
            ):
                print(f"{name:12} {right:6.1%}  {steps:6,} steps  {took:5.1f} s  "
                      f"{', '.join(changes)}", flush=True)  # fmt: skip
                if right > best.get(name, (-1.0, ()))[0]:
                    best[name] = (right, changes)
            kept = {name: list(changes) for name, (_, changes) in best.items()}
            (work / _CHOICE).write_text(json.dumps(kept, indent=1), encoding="utf-8")
            return
        chosen: dict[str, Sequence[str]] = {name: tries[0] for name, tries in _TRIES.items()}
        if (work / _CHOICE).exists():
            chosen = json.loads((work / _CHOICE).read_text(encoding="utf-8"))
        jobs = [
            (run, name, changes, cpu_s, seed, asked)
            for seed in range(seeds) for name, changes in chosen.items()
        ]  # fmt: skip
        found: dict[str, list[float]] = {name: [] for name in chosen}
        for job, (right, steps, took, said) in zip(jobs, pool.imap(arm, jobs), strict=True):
            found[job[1]].append(right)
            print(f"seed {job[4]}  {job[1]:12} {right:6.1%}  {steps:6,} steps  {took:5.1f} s"
                  f"  {said}", flush=True)  # fmt: skip
    base, rows = found["off-policy"], []
    print(f"\n{'':12} {'right':>7} {'over off-policy (95 %)':>26}")
    for name, values in found.items():
        over = [100 * (a - b) for a, b in zip(values, base, strict=True)]
        wide = _T_OF[len(over)] * statistics.stdev(over) / math.sqrt(len(over))
        mean, gain = statistics.mean(values), statistics.mean(over)
        print(f"{name:12} {mean:7.1%} {gain:+8.1f} ({gain - wide:+.1f} to {gain + wide:+.1f})")
        rows.append({
            "measure": "exact match", "setting": name, "ours": 100 * mean,
            "other": 100 * statistics.mean(base), "other_name": "off-policy",
            "ratio": mean / statistics.mean(base), "unit": "%", "n": len(values),
        })  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
