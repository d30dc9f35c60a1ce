"""Load an exported model and call it; as a script, time it in a process that holds nothing else.

Imports only the standard library and numpy at the top, and the model's own runtime where it is
loaded: for ONNX no torch is ever in the process. Of limbeck it imports nothing but the networks
that transformers lacks, where one is loaded: `runtime` starts this file by its path (`python -P
runtime_worker.py`), so that a process of a known kind is measured.

A request is one JSON object on stdin: the arguments of `measure`. The answer is the last line on
stdout: the fields of `limbeck.runtime.Timing`.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# inputs by name, batch first -> (B, C) float32 logits
Arrays = Mapping[str, np.ndarray]
Predictor = Callable[[Arrays], np.ndarray]
# some tokens, how many to write after them -> tokens per second on the wall, by feeding any token
Write = Callable[[list[int], int], float]

# The calls are spread over rounds with a pause between: a neighbour's burst then spoils one round
# and not the median of all calls.
_ROUNDS, _PAUSE_S = 5, 0.1
_WARM_UP_CALLS = 5
_ASKED, _WRITTEN = 8, 32  # tokens of a prompt, and after it
ESTIMATOR = "estimator.json"  # beside a .skops file


def load(path: str, format: str, threads: int) -> tuple[Predictor, str]:
    """A function from the inputs to logits, and the runtime's name and version."""
    if format.startswith("gguf-"):
        predict, _, runtime = _load_gguf(path, threads, 512)
        return predict, runtime
    if format == "skops":
        return _load_skops(path, threads)
    return _load_hf(path, threads)[::2] if format == "hf" else _load_onnx(path, threads)


def _load_gguf(path: str, threads: int, context: int) -> tuple[Predictor, Write, str]:
    import llama_cpp

    # Without its AMX kernels: with them 0.3.36 ends the process on some machines.
    inner = llama_cpp.llama_cpp
    plain = inner.llama_model_default_params

    def careful() -> Any:
        found = plain()
        found.use_extra_bufts = False
        return found

    inner.llama_model_default_params = careful
    try:
        model = llama_cpp.Llama(
            path, n_ctx=context, n_batch=context, n_threads=threads, n_threads_batch=threads,
            verbose=False,
        )  # fmt: skip
    finally:
        inner.llama_model_default_params = plain

    def predict(inputs: Arrays) -> np.ndarray:
        model.reset()
        model.eval(inputs["input_ids"][0].tolist())
        return np.zeros((1, 1), np.float32)  # it was for the time

    def write(ids: list[int], n: int) -> float:
        model.reset()
        model.eval(ids)
        start = time.perf_counter()
        for _ in range(n):
            model.eval([ids[0]])
        return n / (time.perf_counter() - start)

    return predict, write, f"llama.cpp (llama-cpp-python {llama_cpp.__version__})"


def _load_skops(path: str, threads: int) -> tuple[Predictor, str]:
    """An estimator with `predict_proba`, beside a file that says how rows reach it: as an array of
    numbers and indices of categories, or as a data frame with the columns that it was fitted on.
    What it says becomes logits: the logarithm of each probability, or of `floor`."""
    import skops.io
    from sklearn import __version__

    about = json.loads((Path(path).parent / ESTIMATOR).read_text(encoding="utf-8"))
    model = skops.io.load(path, trusted=about["trusted"])
    known = model.get_params() if hasattr(model, "get_params") else {}
    if jobs := [name for name in known if name.endswith("n_jobs")]:
        model.set_params(**dict.fromkeys(jobs, threads))
    names = {"numbers": about["numbers"], "categories": list(about["values"])}
    values = [np.array([None, *found], dtype=object) for found in about["values"].values()]

    def frame(inputs: Arrays) -> Any:
        import pandas

        columns = {}
        for name, array in inputs.items():
            for at, column in enumerate(names[name]):
                one = array[:, at]
                columns[column] = one if name == "numbers" else values[at][one]
        return pandas.DataFrame(columns, columns=about["columns"])

    def predict(inputs: Arrays) -> np.ndarray:
        given = [inputs[name] for name in names if name in inputs]
        table = frame(inputs) if about["columns"] else np.concatenate(given, 1, dtype=np.float64)
        probs = model.predict_proba(table)[:, about["order"]]
        logits: np.ndarray = np.log(np.maximum(probs, about["floor"])).astype(np.float32)
        return logits

    return predict, f"scikit-learn {__version__}"


def _load_onnx(path: str, threads: int) -> tuple[Predictor, str]:
    import onnxruntime

    session = onnx_session(path, threads)

    def predict(inputs: Arrays) -> np.ndarray:
        logits: np.ndarray = session.run(["logits"], dict(inputs))[0]
        return logits

    return predict, f"onnxruntime {onnxruntime.__version__}"


def onnx_session(model: str | bytes, threads: int) -> Any:
    """Of a file, or of its contents."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class Decoder:
    """A language model in an ONNX session that takes and gives its cache (`export.onnx_language`).

    `output`: the name of what it says, (B, T, V) logits or else.
    """

    def __init__(self, session: Any, output: str = "logits") -> None:
        self._session, self._output = session, output
        shapes = {one.name: one.shape for one in session.get_inputs()}
        self._past = {n: s for n, s in shapes.items() if n.startswith("past_key_values.")}
        self._present = [n.replace("past_key_values", "present") for n in self._past]

    def __call__(
        self, ids: np.ndarray, past: Sequence[np.ndarray] = (), *,
        mask: np.ndarray | None = None, places: np.ndarray | None = None,
    ) -> tuple[np.ndarray, list[np.ndarray]]:  # fmt: skip
        """What it says of `ids` (B, T) behind what `past` holds of them, and the past after it.

        Without `mask` (B, P + T) and `places` (B, T) no token is padding.
        """
        num, length = ids.shape
        before = past[0].shape[2] if past else 0
        if mask is None:
            mask = np.ones((num, before + length), np.int64)
        if places is None:
            places = np.tile(np.arange(before, before + length), (num, 1))
        feed = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
        empty = [np.zeros((num, s[1], 0, s[3]), np.float32) for s in self._past.values()]
        feed |= dict(zip(self._past, past or empty, strict=True))
        said, *present = self._session.run([self._output, *self._present], feed)
        return said, present


def _load_decoder(path: str, threads: int) -> tuple[Predictor, Write, str]:
    import onnxruntime

    model = Decoder(onnx_session(path, threads))

    def predict(inputs: Arrays) -> np.ndarray:
        return model(inputs["input_ids"], mask=inputs["attention_mask"])[0]

    def write(ids: list[int], n: int) -> float:
        _, past = model(np.array([ids]))
        start = time.perf_counter()
        for _ in range(n):
            _, past = model(np.array([ids[:1]]), past)
        return n / (time.perf_counter() - start)

    return predict, write, f"onnxruntime {onnxruntime.__version__}"


def _load_hf(path: str, threads: int) -> tuple[Predictor, Write, str]:
    import torch
    import transformers

    name = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    home = transformers
    if not hasattr(transformers, name):
        from limbeck import nets as home  # type: ignore[no-redef]
    model = getattr(home, name).from_pretrained(
        path,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        dtype=torch.float32,
    ).eval()

    @torch.inference_mode()
    def predict(inputs: Arrays) -> np.ndarray:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)  # the process's, so it is given back
        try:
            output = model(**{name: torch.from_numpy(array) for name, array in inputs.items()})
        finally:
            torch.set_num_threads(before)
        logits: np.ndarray = output.logits.numpy()
        return logits

    @torch.inference_mode()
    def write(ids: list[int], n: int) -> float:
        torch.set_num_threads(threads)
        said = model(input_ids=torch.tensor([ids]), use_cache=True)
        start = time.perf_counter()
        for _ in range(n):
            said = model(
                input_ids=torch.tensor([ids[:1]]), past_key_values=said.past_key_values,
                use_cache=True,
            )  # fmt: skip
        return n / (time.perf_counter() - start)

    return predict, write, f"torch {torch.__version__}"


def measure(
    path: str,
    format: str,
    *,
    inputs: Sequence[Mapping[str, Any]],
    threads: int,
    runs: int,
    batch_size: int,
    writes: bool = False,
    examples: str | None = None,
) -> dict[str, object]:
    """The fields of `Timing`: speed does not depend on what the inputs are, but on their size.

    Of trees it does: `examples` is the path of a .npz file with arrays of rows to take instead.
    """
    if format == "skops":
        sys.meta_path.insert(0, _NoTorch())
    if writes:
        context = inputs[0]["dims"][0]
        if format.startswith("gguf-"):
            predict, write, runtime = _load_gguf(path, threads, max(context, _ASKED + _WRITTEN))
        else:
            loader = _load_hf if format == "hf" else _load_decoder
            predict, write, runtime = loader(path, threads)
        batch_size = 1
    else:
        predict, runtime = load(path, format, threads)
    batch = random_inputs(inputs, batch_size) if examples is None else _stored(examples)
    one = {name: array[:1] for name, array in batch.items()}

    _seconds(predict, one, _WARM_UP_CALLS)
    rounds = []
    for part in np.array_split(np.arange(runs), _ROUNDS):
        rounds += _seconds(predict, one, len(part))
        time.sleep(_PAUSE_S)
    peak = peak_memory_bytes()  # before the large batches

    batches, tokens_per_s = [], None
    if writes:
        ids = batch["input_ids"][0, :_ASKED].tolist()
        tokens_per_s = float(np.median([write(ids, _WRITTEN) for _ in range(_ROUNDS)]))
    else:
        _seconds(predict, batch, 1)
        for _ in range(_ROUNDS):
            batches += _seconds(predict, batch, 1)
            time.sleep(_PAUSE_S)

    # One thread: the time that it held a core. On a machine that does nothing else this is the
    # time on the wall; beside three busy processes the same file gave 63 to 115 ms on the wall and
    # 14 to 17 so. Several threads wait for each other, and only the wall knows how long.
    column = 1 if threads == 1 else 0
    calls = np.array(rounds) * 1000  # (runs, 2) ms
    low, median, high, p95 = np.percentile(calls[:, column], [25, 50, 75, 95])
    return {
        "latency_ms": float(median),
        "latency_p95_ms": float(p95),
        "latency_iqr_ms": float(high - low),
        "latency_wall_ms": float(np.median(calls[:, 0])),
        "throughput_per_s": float(batch_size / np.median(np.array(batches)[:, column]))
        if batches else None,
        "tokens_per_s": tokens_per_s,
        "peak_memory_bytes": peak,
        "device": "cpu",
        "threads": threads,
        "runtime": runtime,
        "runs": runs,
        "torch_loaded": "torch" in sys.modules,
    }


class _NoTorch:
    """skops looks into each module of scikit-learn, and one takes torch along where it is there."""

    def find_spec(self, name: str, *_: object) -> None:
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(name)


def _stored(path: str) -> Arrays:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def random_inputs(inputs: Sequence[Mapping[str, Any]], batch_size: int) -> dict[str, np.ndarray]:
    """Of the largest size. `inputs` have the fields of `limbeck.types.Input`."""
    random = np.random.default_rng(0)
    found: dict[str, np.ndarray] = {}
    for one in inputs:
        size = (batch_size, *one["dims"])
        if one["dtype"] == "float32":
            found[one["name"]] = random.standard_normal(size, dtype=np.float32)
        elif one["below"] is None:
            found[one["name"]] = np.ones(size, dtype=np.int64)
        else:
            found[one["name"]] = random.integers(0, one["below"], size)
    return found


def _seconds(predict: Predictor, inputs: Arrays, runs: int) -> list[tuple[float, float]]:
    """Of each call: on the wall, and that this thread held a core."""
    seconds = []
    for _ in range(runs):
        held, wall = time.thread_time(), time.perf_counter()
        predict(inputs)
        seconds.append((time.perf_counter() - wall, time.thread_time() - held))
    return seconds


def peak_memory_bytes() -> int:
    """The most memory that this process ever held: interpreter, numpy, runtime, model, buffers."""
    try:
        # Not `ru_maxrss`: on Linux a started process inherits its parent's peak there.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.stdin.read()))))  # noqa: T201
