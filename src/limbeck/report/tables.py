"""The report's tables as plain text cells: markdown, page and terminal show the same numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from limbeck.report.benchmarks import Benchmarks, BenchmarkScore
from limbeck.report.document import (
    Capability,
    Latency,
    Quality,
    Report,
    Retention,
    Stage,
    TeacherEntry,
    holds,
)
from limbeck.report.wording import (
    BASELINES,
    BUDGETS,
    NONE,
    bound,
    budget_value,
    bytes_text,
    count_text,
    digits3,
    energy_text,
    joined,
    percent,
    quality_text,
    rate_text,
    seconds_text,
)


@dataclass(frozen=True, slots=True)
class Table:
    """A head and rows of as many cells; `text` columns are words, the others numbers."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text: int = 1  # how many columns at the left are words


def models_table(report: Report) -> Table:
    """Teacher and students, each in its primary format."""
    head: tuple[str, ...] = (
        "model", "parameters", "size", "latency, median (p95)", "throughput", "peak memory",
        report.metric, "retention", "agreement", "mean KL, nats",
    )  # fmt: skip
    models = (report.teacher, *report.students)
    rows: list[tuple[str, ...]] = [(*_cost_cells("teacher", report.teacher), "100 %", NONE, NONE)]
    for student in report.students:
        fidelity = student.fidelity
        kl = fidelity.mean_kl if fidelity else None
        rows.append(
            (
                *_cost_cells(student.name, student),
                quality_text(student.retention),
                percent(fidelity.agreement if fidelity else None),
                NONE if kl is None else f"{kl:.3f}",
            )
        )
    if any(q.perplexity for m in models if (q := m.main.quality)):  # of language models
        head += ("perplexity", "tokens written")
        rows = [(*row, *_text_cells(model)) for row, model in zip(rows, models, strict=True)]
    return Table(head, tuple(rows))


def _text_cells(model: TeacherEntry) -> tuple[str, str]:
    perplexity = model.main.quality.perplexity if model.main.quality else None
    return (NONE if perplexity is None else f"{perplexity:.2f}", rate_text(model.main.tokens_per_s))


def _cost_cells(name: str, model: TeacherEntry) -> tuple[str, ...]:
    main = model.main
    return (
        name,
        NONE if model.params is None else count_text(model.params),
        bytes_text(main.size_bytes),
        _latency_cell(main.latency_ms),
        rate_text(main.throughput_per_s),
        bytes_text(main.peak_memory_bytes),
        quality_text(main.quality),
    )


def _latency_cell(found: Latency | None) -> str:
    return f"{digits3(found.median)} ms ({digits3(found.p95)})" if found else NONE


def terminal_table(report: Report) -> list[list[str]]:
    """What fits a terminal: the head, then a row each for teacher and students. Plain text."""
    table = models_table(report)
    keep = [0, 1, 2, 3, 6, 7]
    rows = [[row[i] for i in keep] for row in (table.head, *table.rows)]
    rows[0].append("budget")
    rows[1].append("")
    for row, student in zip(rows[2:], report.students, strict=True):
        row.append("met" if student.budget.met else "MISSED")
    return rows


def budgets_table(report: Report) -> Table:
    rows = []
    for student in report.students:
        for key, limit in student.budget.asked.items():
            found = student.budget.measured[key]
            met = "met" if holds(key, limit, found) else "missed"
            share = NONE if found is None else percent(found / limit)
            predicted = budget_value(key, student.budget.predicted.get(key))
            asked = f"{bound(key)} {budget_value(key, limit)}"
            cells = (asked, predicted, budget_value(key, found), share, met)
            rows.append((student.name, BUDGETS[key], *cells))
    heads = ("student", "budget", "limit", "predicted", "measured", "used", "result")
    return Table(heads, tuple(rows), 2)


def baselines_table(report: Report) -> Table:
    """The student, and what the same shape reaches without being taught by the teacher; of language
    models also perplexity and KL."""
    rows: list[tuple[str, ...]] = []
    for student in report.students:
        others = [getattr(student.baselines, name) for name in BASELINES]
        if not any(others):
            continue
        each: list[Quality | None] = [student.main.quality, *others]
        rows.append((student.name, *map(quality_text, each)))
        if any(q.perplexity for q in each if q):
            perplexities = [q.perplexity if q else None for q in each]
            rows.append((f"{student.name}, perplexity", *map(_plain, perplexities)))
            kls = [q.mean_kl if q else None for q in others]
            own = student.fidelity.mean_kl if student.fidelity else None
            rows.append((f"{student.name}, mean KL, nats", *map(_plain, (own, *kls))))
    if report.linear:
        empty = (NONE,) * len(BASELINES)
        rows.append(("linear on TF-IDF", quality_text(report.linear), *empty))
    return Table(("model", report.metric, *BASELINES.values()), tuple(rows))


def _plain(value: float | None) -> str:
    return NONE if value is None else digits3(value)


def capability_names(report: Report) -> list[str]:
    """Every capability, the worst kept first: by the student that kept least of it."""
    names = dict.fromkeys(name for student in report.students for name in student.capabilities)
    worst = {
        name: min((r.value for r in _retentions(report, name)), default=float("inf"))
        for name in names
    }
    return sorted(names, key=lambda name: (worst[name], name))


def _retentions(report: Report, name: str) -> list[Retention]:
    found = [student.capabilities.get(name) for student in report.students]
    return [capability.retention for capability in found if capability and capability.retention]


def capability_of(report: Report, name: str) -> Capability:
    """One student's; the teacher's quality and n in it are the same for all."""
    return next(s.capabilities[name] for s in report.students if name in s.capabilities)


def capabilities_table(report: Report) -> Table:
    rows = []
    for name in capability_names(report):
        any_student = capability_of(report, name)
        kept = []
        for student in report.students:
            capability = student.capabilities.get(name)
            kept.append(quality_text(capability.retention if capability else None, 0))
        teacher = quality_text(any_student.teacher_quality)
        rows.append((name, str(any_student.n), teacher, *kept))
    names = (student.name for student in report.students)
    return Table(("capability", "n", "teacher", *names), tuple(rows))


def benchmarks_table(report: Report) -> Table:
    """A row for each metric of each task; numbers in the metric's own unit, as lm-eval has them."""
    found = report.benchmarks
    names = [*dict.fromkeys(name for one in found.results for name in one.scores)] if found else []
    rows = []
    for one in found.results if found else ():
        shots = "" if not one.num_fewshot else f", {one.num_fewshot} shots"
        metric = one.metric + (f" ({one.filter})" if one.filter else "")
        if one.higher_is_better is False:
            metric += ", less is better"
        n = next(iter(one.scores.values())).n
        scores = [_benchmark_cell(one.scores.get(name)) for name in names]
        rows.append((one.task, metric, f"version {one.version}{shots}", f"{n:,}", *scores))
    return Table(("task", "metric", "as", "n", *names), tuple(rows), 3)


def _benchmark_cell(found: BenchmarkScore | None) -> str:
    if found is None or found.value is None:
        return NONE
    error = "" if found.stderr is None else f" ± {found.stderr:.3g}"
    return f"{found.value:.4g}{error}"


def benchmarks_text(found: Benchmarks) -> str:
    """What was done, in plain sentences."""
    text = f"By lm-eval {found.lm_eval}, of the hf folders; ± is its standard error. Other "
    text += "versions of a task, and other numbers of shots, do not compare."
    if found.limit is not None:
        text += f" Only the first {found.limit:,} examples of each task were asked: published "
        text += "numbers are of all."
    return text


def stages_table(report: Report) -> Table:
    rows = [
        (
            stage.name,
            "reused" if stage.reused else "made",
            seconds_text(stage.seconds),
            energy_text(stage.energy_wh),
            stage.energy_source,
        )
        for stage in report.stages
    ]
    return Table(("stage", "this run", "time", "energy", "source"), tuple(rows), 2)


def cost_text(stages: tuple[Stage, ...]) -> str:
    """What it took to make everything in the report, and where the energy is from."""
    if not stages:
        return "No stage was recorded."
    text = f"Making all of it took {seconds_text(sum(s.seconds for s in stages))}"
    metered = [s for s in stages if s.energy_wh is not None]
    if metered:
        total = energy_text(sum(s.energy_wh or 0.0 for s in metered))
        sources = dict.fromkeys(s.energy_source.split(":")[0] for s in metered)
        text += f" and {total} ({joined([*sources])})"
        if len(metered) < len(stages):
            text += f" in {len(metered)} of {len(stages)} stages that were metered"
    made = [s for s in stages if not s.reused]
    if len(made) < len(stages):
        text += f"; this run made {len(made)} of {len(stages)} stages"
        text += f" in {seconds_text(sum(s.seconds for s in made))} and reused the others"
    return text + "."


def files_table(report: Report) -> Table:
    """Every exported file of every model."""
    rows = []
    for name, model in [("teacher", report.teacher), *((s.name, s) for s in report.students)]:
        for artifact in model.artifacts:
            parity = artifact.parity
            rows.append(
                (
                    name,
                    artifact.format + (" (primary)" if artifact.format == model.primary else ""),
                    artifact.path,
                    bytes_text(artifact.size_bytes),
                    quality_text(artifact.quality),
                    f"{artifact.quality.n:,}" if artifact.quality else NONE,
                    _latency_cell(artifact.latency_ms),
                    rate_text(artifact.throughput_per_s),
                    bytes_text(artifact.peak_memory_bytes),
                    f"{artifact.device}, {artifact.threads}",
                    percent(parity.agreement, 2) if parity else NONE,
                    f"{parity.max_abs_diff:.2g}" if parity else NONE,
                )
            )
    head = (
        "model", "format", "path", "size", report.metric, "n", "latency, median (p95)",
        "throughput", "peak memory", "device, threads", "parity: agreement", "parity: max diff",
    )  # fmt: skip
    return Table(head, tuple(rows), 3)


def environment_table(report: Report) -> Table:
    found = report.environment
    rows = [
        ("processor", found.cpu),
        ("cores", str(found.cores)),
        ("threads", str(found.threads)),
        ("limbeck", report.limbeck),
        *found.versions.items(),
    ]
    return Table(("what", "value"), tuple(rows), 2)


def recipe_lines(recipe: Mapping[str, Any], indent: int = 0) -> list[str]:
    """The resolved recipe, readable: nested names, indented. Not meant to be parsed."""
    lines = []
    for key, value in recipe.items():
        head = f"{'  ' * indent}{key}:"
        if isinstance(value, Mapping) and value:
            lines += [head, *recipe_lines(value, indent + 1)]
        elif isinstance(value, list | tuple) and any(isinstance(v, Mapping) for v in value):
            for i, entry in enumerate(value):
                nested = entry if isinstance(entry, Mapping) else {"": entry}
                lines += [f"{'  ' * indent}{key}[{i}]:", *recipe_lines(nested, indent + 1)]
        else:
            lines.append(f"{head} {value}")
    return lines
