"""From the stages' measurements to one report, and from the report to each student's card."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from limbeck.cache import Fetched
from limbeck.cores import cores
from limbeck.recipe import Recipe, file_of
from limbeck.report import (
    Artifact,
    Baselines,
    Benchmarks,
    BudgetEntry,
    Capability,
    Environment,
    Fidelity,
    FrontierPoint,
    Parting,
    Quality,
    Report,
    Retention,
    ShapeEntry,
    Stage,
    StudentEntry,
    TeacherEntry,
    Texts,
    TrainingPoint,
    UnitImportance,
)
from limbeck.run import Made, Run, write_text

_VERSIONED = (
    "torch", "transformers", "onnx", "onnxruntime", "onnxscript", "safetensors", "tokenizers",
    "numpy", "scikit-learn", "codecarbon",
)  # fmt: skip


LARGEST = "largest"  # in the folder of an elastic run's training: that of the largest size alone
_BUSY = 1.25  # wall time over core time above which a reader is told


@dataclass(frozen=True, kw_only=True)
class Member:
    """The teacher or a student: where its stages lie."""

    name: str
    primary: str
    model: Made
    onnx: Made  # the exported files
    measured: Made
    plan: Made | None = None
    compared: Made | None = None
    tried: Made | None = None  # temperatures, where the recipe leaves the choice
    features: Made | None = None  # hidden states and which layers learn from which
    baselines: Mapping[str, Made] = field(default_factory=dict)

    @property
    def said(self) -> tuple[Path, str, Path]:
        """The primary file, its format, and where its answers lie."""
        path = artifact_path(self.model.folder, self.onnx.folder, self.primary)
        return path, self.primary, self.measured.folder


def artifact_path(hf: Path, files: Path, format: str) -> Path:
    if format == "skops":
        return hf / "model.skops"
    return hf if format == "hf" else files / file_of(format)


def assemble(
    run: Run, recipe: Recipe, data: Made, space: Made, teacher: Member,
    family: Mapping[str, Member], together: Made | None, frontier: Made | None,
    linear: Made | None, texts: Texts | None, benchmarks: Benchmarks | None,
) -> Report:  # fmt: skip
    about, survey = data.json("data.json"), space.json("summary.json")
    curves = _curves(teacher, family, together)
    return Report(
        limbeck=metadata.version("limbeck"),
        recipe=recipe.model_dump(mode="json"),
        environment=environment(),
        teacher=TeacherEntry(
            name=_teacher_name(recipe),
            params=teacher.measured.json("measurement.json")["params"],
            primary=teacher.primary,
            artifacts=_artifacts(run, teacher),
        ),
        students=tuple(_student(run, recipe, member) for member in family.values()),
        stages=tuple(Stage.model_validate(vars_of(record)) for record in run.stages),
        linear=_quality(linear),
        training=curves,
        labels=tuple(about["labels"]),
        texts=texts,
        benchmarks=benchmarks,
        frontier=_frontier(frontier, family),
        layer_importance=tuple(survey["layer_importance"]) or None,
        importance=recipe.importance.model_dump(),
        unit_importance=tuple(map(UnitImportance.model_validate, survey["unit_importance"])),
        warnings=(
            *_warnings(recipe, about, survey, (teacher, *family.values())),
            *_writing(recipe, curves),
        ),
    )


def _teacher_name(recipe: Recipe) -> str:
    if (estimator := recipe.teacher.estimator) is not None:
        if estimator.model is None:
            return str(estimator.kind).replace("_", " ")
        return estimator.model.uri.rpartition("/")[2].removesuffix(".skops")
    if recipe.teacher.model is None:
        assert recipe.teacher.config is not None
        return str(recipe.teacher.config["model_type"])
    return recipe.teacher.model.uri.rstrip("/").removesuffix("/model").rpartition("/")[2]


def vars_of(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__slots__}


def environment() -> Environment:
    versions = {"python": platform.python_version(), "system": platform.platform()}
    for name in _VERSIONED:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return Environment(cpu=_cpu(), cores=cores(), threads=cores(), versions=versions)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    name = found.get("model name", platform.machine())
    flags = set(found.get("flags", "").split())
    known = [f for f in ("avx2", "avx512f", "avx512_vnni", "amx_int8", "amx_bf16") if f in flags]
    return f"{name} ({', '.join(known)})" if known else name


def _student(run: Run, recipe: Recipe, member: Member) -> StudentEntry:
    assert member.plan is not None and member.compared is not None
    plan, found = member.plan.json("plan.json"), member.measured.json("measurement.json")
    compared = member.compared.json("comparison.json")
    artifacts = _artifacts(run, member)
    main = next(a for a in artifacts if a.format == member.primary)
    measured: dict[Any, Any] = {
        "params": found["params"],
        "size_mb": main.size_bytes / 1e6,
        "latency_ms": main.latency_ms.median if main.latency_ms else None,
        "memory_mb": main.peak_memory_bytes / 1e6 if main.peak_memory_bytes else None,
        "retention": compared["retention"]["value"] if compared["retention"] else None,
    }
    watts, latency = recipe.measure.watts, measured["latency_ms"]
    measured["energy_mj"] = watts * latency if watts and latency else None
    asked: dict[Any, Any] = recipe.student(member.name).budget.model_dump(exclude_none=True)
    return StudentEntry(
        name=member.name,
        params=found["params"],
        primary=member.primary,
        artifacts=artifacts,
        shape=_shape(plan["shape"]),
        reason=plan["reason"] + _temperature(member.tried) + _layers(member),
        budget=BudgetEntry.of(
            asked, {key: measured[key] for key in asked},
            {key: value for key, value in _predicted(plan["cost"], watts).items() if key in asked},
        ),
        retention=Retention.model_validate(compared["retention"])
        if compared["retention"]
        else None,
        fidelity=Fidelity.model_validate(compared["fidelity"]) if compared["fidelity"] else None,
        capabilities={k: Capability.model_validate(v) for k, v in compared["capabilities"].items()},
        partings=tuple(Parting.model_validate(one) for one in compared.get("partings", ())),
        trained=recipe.student(member.name).trained,
        baselines=Baselines(**{name: _quality(made) for name, made in member.baselines.items()}),
    )


def _shape(shape: Mapping[str, Any]) -> ShapeEntry:
    """Of several stacks of layers only how many each has: which ones, the config does not say."""
    stacks = {name: len(kept) for name, kept in shape["stacks"].items()}
    return ShapeEntry.of({**shape["sizes"], **stacks}, tuple(shape["layers"]))


def _predicted(cost: Mapping[str, Any], watts: float | None) -> dict[Any, Any]:
    latency = cost["latency_ms"]
    found = {
        "params": cost["params"], "size_mb": cost["size_bytes"] / 1e6, "latency_ms": latency,
        "memory_mb": cost["memory_mb"], "energy_mj": watts * latency if watts and latency else None,
    }  # fmt: skip
    return {key: value for key, value in found.items() if value is not None}


def _artifacts(run: Run, member: Member) -> tuple[Artifact, ...]:
    found = []
    for entry in member.measured.json("measurement.json")["artifacts"]:
        format = entry["format"]
        path = artifact_path(member.model.folder, member.onnx.folder, format)
        where = str(path.relative_to(run.folder))
        found.append(Artifact.model_validate({**entry, "path": where}))
    return tuple(found)


def _temperature(tried: Made | None) -> str:
    if tried is None:
        return ""
    found = tried.json("temperature.json")
    curve = ", ".join(f"{p['loss']:.3f} at {p['temperature']:g}" for p in found["curve"])
    return (
        f" Temperature {found['chosen']:g} had the least loss on the validation rows after "
        f"{found['steps']:,} steps: {curve}."
    )


def _layers(member: Member) -> str:
    if member.features is None or not (member.features.folder / "maps.json").exists():
        return ""
    pairs = member.features.json("maps.json")[member.name]["pairs"]
    said = ", ".join(f"{ours} from {theirs}" for ours, theirs in pairs)
    return f" Hidden states, student's layer from teacher's: {said}."


def _quality(made: Made | None) -> Quality | None:
    if made is None:
        return None
    found = made.json("quality.json")
    known = Quality.model_fields
    return Quality.model_validate({k: v for k, v in found.items() if k in known})


def _frontier(made: Made | None, family: Mapping[str, Member]) -> tuple[FrontierPoint, ...]:
    if made is None:
        return ()
    names = {}
    for name, member in family.items():
        assert member.plan is not None
        names[json.dumps(member.plan.json("plan.json")["shape"], sort_keys=True)] = name
    return tuple(
        FrontierPoint(
            name=names.get(json.dumps(entry["shape"], sort_keys=True)),
            trained=entry["name"] is not None,
            shape=_shape(entry["shape"]),
            params=entry["params"], size_mb=entry["size_bytes"] / 1e6, quality=entry["accuracy"],
            loss=entry["loss"], n=entry["n"],
        )
        for entry in made.json("frontier.json")["shapes"]
    )  # fmt: skip


def _curves(
    teacher: Member, family: Mapping[str, Member], together: Made | None
) -> dict[str, tuple[TrainingPoint, ...]]:
    folders = {"teacher": teacher.model.folder}
    if together is not None:
        folders["family"] = together.folder
        folders[next(iter(together.json("family.json")))] = together.folder / LARGEST
    for name, member in family.items():
        folders.setdefault(name, member.model.folder)
        for baseline, made in member.baselines.items():
            folders[f"{name}/{baseline}"] = made.folder.parent / "hf"
    curves = {}
    for name, folder in folders.items():
        path = folder / "training.jsonl"
        if path.exists() and (lines := path.read_text(encoding="utf-8").splitlines()):
            curves[name] = tuple(TrainingPoint.model_validate(json.loads(line)) for line in lines)
    return curves


def _of_two_tokenizers(name: str, compared: Mapping[str, Any]) -> list[str]:
    if (bits := compared.get("bits_per_byte")) is None:
        return []
    return [
        f"{name} has another tokenizer than its teacher, so that accuracies and perplexities do "
        f"not compare: it needs {bits['student']:.3f} bits for a byte of {bits['n']:,} test texts, "
        f"the teacher {bits['teacher']:.3f}."
    ]


def _writing(recipe: Recipe, curves: Mapping[str, Sequence[TrainingPoint]]) -> list[str]:
    """How much of a training the student wrote texts to learn from."""
    found, size = [], recipe.distill.training.batch_size
    for name, points in curves.items():
        timed = [p for p in points if p.examples_per_s and p.writing is not None]
        steps = [b.step - a for a, b in zip([0, *(p.step for p in timed)], timed, strict=False)]
        seconds = [n * size / (p.examples_per_s or 1) for n, p in zip(steps, timed, strict=True)]
        spent = sum(s * (p.writing or 0) for s, p in zip(seconds, timed, strict=True))
        if timed:
            found.append(f"{name}: writing texts of its own took {spent / sum(seconds):.0%} of its "
                         "training.")  # fmt: skip
    return found


def _warnings(
    recipe: Recipe, about: Mapping[str, Any], survey: Mapping[str, Any], members: Sequence[Member]
) -> tuple[str, ...]:
    found = []
    if recipe.measure.threads == 1:
        found.append(
            "Latency and throughput are the time that the one thread held a core: waiting for a "
            "busy machine does not count, in the p95 either."
        )
    trained = {student.name for student in recipe.students if student.trained}
    bare = [m.name for m in members if m.name in trained and not m.baselines]
    if bare:
        found.append(
            f"Without baselines, so nothing says whether the teacher helped them: "
            f"{', '.join(bare)} (evidence.baselines: all trains them)."
        )
    found += about["warnings"]
    refused = [f"{a['name']} ({a['reason']})" for a in survey["axes"] if not a["proved"]]
    if refused:
        found.append(f"Axes that are not cut: {'; '.join(refused)}.")
    for member in members:
        if member.compared is not None:
            found += _of_two_tokenizers(member.name, member.compared.json("comparison.json"))
    return (*found, *_of_files(members))


def _of_files(members: Sequence[Member]) -> list[str]:
    """What is to be said of exported files, in one sentence for all of which it is true."""
    elsewhere: dict[tuple[str, str], list[str]] = {}  # names by format and runtime
    busy: list[str] = []
    unlike: dict[str, list[str]] = {}
    for member in members:
        measured = member.measured.json("measurement.json")
        for entry in measured["artifacts"]:
            format, runtime = entry["format"], entry.get("runtime") or ""
            if format.startswith("gguf") and not runtime.startswith("llama.cpp"):
                elsewhere.setdefault((format, runtime), []).append(member.name)
            wall = measured["wall_ms"][format]
            if wall > _BUSY * entry["latency_ms"]["median"]:
                busy.append(f"{member.name}'s {format} (a call took {wall:.2f} ms on the wall)")
            agreement = entry.get("parity", {}).get("agreement", 1.0)
            if agreement < 0.95:
                said = f"{100 * agreement:.1f} % ({member.name})"
                unlike.setdefault(format, []).append(said)
    found = [
        f"{format} was timed as the hf folder in {runtime}, for {', '.join(names)}: "
        "llama-cpp-python is not there (extra 'verify')."
        for (format, runtime), names in elsewhere.items()
    ]
    if busy:
        found.append(f"The machine was busy while these were timed: {', '.join(busy)}.")
    found += [
        f"{format} gives the answer of the model it came from in only {', '.join(said)} of cases."
        for format, said in unlike.items()
    ]
    return found


def write_cards(report: Report, folder: Path, model: Fetched, data: Fetched) -> None:
    """README.md in each student's Hugging Face folder."""
    from limbeck.export.card import model_card

    for student in report.students:
        hf = student.artifact("hf")
        if hf is not None:
            card = model_card(report, student, teacher=model, data=data)
            write_text(folder / hf.path / "README.md", card)
