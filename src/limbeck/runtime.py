"""Run exported files: their logits for many examples, and their cost in a process of their own.

An int8 file quantises activations as they come, with one range for a whole call. What it says about
an example thus depends on the others of its batch: on MiniLM tuned on 20 Newsgroups 2 to 3 % of the
answers change between batch 1 and batch 32, padding or not, as many as int8 itself changes. So the
answers of an int8 file are always taken one example a call, as on the device that it is for: they
depend on nothing else and can be repeated. (Batches of 32 would be only a tenth faster.)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np

from limbeck import runtime_worker
from limbeck.cores import on_each
from limbeck.errors import LimbeckError, MissingExtraError
from limbeck.recipe import Recipe, file_of
from limbeck.runtime_worker import Predictor
from limbeck.tasks.task import Rows, Task
from limbeck.types import Input


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """What one exported file costs on this machine, measured in a fresh process.

    With one thread, times are those that the thread held a core: what other processes took away
    does not count. With several, they are on the wall.
    """

    latency_ms: float  # median of batch-1 calls with inputs of the largest size
    latency_p95_ms: float
    latency_iqr_ms: float  # spread: between the first and the third quarter of the calls
    latency_wall_ms: float  # median on the wall; far above `latency_ms`: the machine was busy
    throughput_per_s: float | None  # examples, in batches; None: written text tells more
    peak_memory_bytes: int  # of the whole process after the batch-1 calls: interpreter included
    device: str
    threads: int
    runtime: str  # name and version
    runs: int  # timed batch-1 calls
    tokens_per_s: float | None = None  # written one after the other, by a model that writes


def load_predictor(path: Path, format: str, *, threads: int) -> Predictor:
    """A function from inputs by name, batch first, to logits (B, C) float32.

    Raises MissingExtraError without the extra 'export', LimbeckError where the file does not load.
    """
    try:
        return runtime_worker.load(str(path), format, threads)[0]
    except ImportError as error:
        raise MissingExtraError.of(f"running {path.name}", "export") from error
    except Exception as error:  # each runtime has its own exceptions
        raise LimbeckError(
            str(path), f"does not load as {format}: {_last_lines(str(error))}",
            fix="export it again",
        ) from error  # fmt: skip


def predict(
    path: Path,
    format: str,
    rows: Rows,
    *,
    batch_size: int = 32,
    progress: Callable[[int], object] | None = None,
) -> np.ndarray:
    """Logits (N, C) of the rows, in their order.

    Batches hold examples of like length, so that little is padded; int8 files get one example a
    call (see above). Each core has a call of its own. `progress` is told the number of examples
    done since it was last told.
    """
    if not len(rows):
        raise ValueError("no examples to predict")
    order = np.argsort(rows.lengths, kind="stable")
    size = 1 if format == "onnx-int8" else batch_size
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    model = load_predictor(path, format, threads=1)

    def run(batch: np.ndarray) -> np.ndarray:
        inputs = rows.batch(batch.tolist()).inputs
        return model({name: tensor.numpy() for name, tensor in inputs.items()})

    done: list[np.ndarray] = []
    for found in on_each(run, batches):
        done.append(found)
        if progress is not None:
            progress(len(found))
    logits = np.empty((len(rows), done[0].shape[1]), dtype=np.float32)  # (N, C)
    logits[order] = np.concatenate(done)
    return logits


def time_file(
    recipe: Recipe, task: Task, config: Any, hf: Path, files: Path, format: str
) -> Timing:
    """As the recipe says. A GGUF file in llama.cpp where that is there, else its folder `hf`."""
    path = hf if format == "hf" else files / file_of(format)
    examples = None
    if format == "skops":
        rows = task.rows("test").sample(32, seed=recipe.seed)
        batch = rows.batch(range(len(rows)))
        path, examples = hf / "model.skops", {k: v.numpy() for k, v in batch.inputs.items()}
    if format.startswith("gguf-") and util.find_spec("llama_cpp") is None:
        path, format = hf, "hf"
    return time_artifact(
        path, format, inputs=task.inputs(config), threads=recipe.measure.threads,
        runs=recipe.measure.latency_runs, writes=not recipe.task.has_labels, examples=examples,
    )  # fmt: skip


def time_artifact(
    path: Path,
    format: str,
    *,
    inputs: Sequence[Input],
    threads: int,
    runs: int,
    batch_size: int = 32,
    timeout_s: float = 900,
    writes: bool = False,
    examples: Mapping[str, np.ndarray] | None = None,
) -> Timing:
    """Latency, throughput and memory of an exported file, in a process that holds nothing else.

    One that `writes` text is timed in writing some, and not in batches.
    Batch-1 latency first, in rounds with pauses between; then memory; then batches of
    `batch_size`. All inputs are of their largest size, or they are `examples`, rows by name: what
    trees cost depends on where a row leads.
    Raises LimbeckError, with its last lines, where the process fails or takes too long.
    """
    request: dict[str, Any] = {
        "path": str(path.resolve()), "format": format,
        "inputs": [asdict(one) for one in inputs],
        "threads": threads, "runs": runs, "batch_size": batch_size, "writes": writes,
    }  # fmt: skip
    environment = {
        **os.environ,
        "GOMP_SPINCOUNT": "0",  # libgomp's threads spin otherwise: see _startup
        "OMP_NUM_THREADS": str(threads),
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    try:
        with tempfile.TemporaryDirectory(prefix="limbeck-") as aside:
            if examples is not None:
                request["examples"] = str(Path(aside) / "examples.npz")
                np.savez(request["examples"], allow_pickle=False, **examples)
            done = subprocess.run(
                # By path and with -P: `-m limbeck.runtime_worker` would import limbeck around it.
                [sys.executable, "-P", runtime_worker.__file__],
                input=json.dumps(request), capture_output=True, text=True, env=environment,
                timeout=timeout_s, check=False,
            )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise _failed(path, f"took longer than {timeout_s:g} s", error.stderr) from None
    if done.returncode != 0:
        if "No module named 'onnxruntime'" in done.stderr:
            raise MissingExtraError.of(f"timing {path.name}", "export")
        raise _failed(path, f"ended with status {done.returncode}", done.stderr)
    answer = json.loads(done.stdout.splitlines()[-1])
    if format != "hf":
        assert not answer["torch_loaded"], "memory would be torch's"
    del answer["torch_loaded"]
    return Timing(**answer)


def _failed(path: Path, what: str, output: str | bytes | None) -> LimbeckError:
    text = output.decode(errors="replace") if isinstance(output, bytes) else output or ""
    said = _last_lines(text) or "it said nothing"
    return LimbeckError(
        f"timing {path}", f"the process that ran it {what}: {said}",
        fix="`limbeck doctor` says whether the runtimes work",
    )  # fmt: skip


def _last_lines(text: str, count: int = 3) -> str:
    return " / ".join(line.strip() for line in text.strip().splitlines()[-count:])[:600]
