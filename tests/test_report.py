"""The report: data, text and page. Everything shown is made up here."""

from __future__ import annotations

import ast
import json
import math
import os
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import limbeck.report
from limbeck.errors import DamagedError, RunFolderError
from limbeck.report import (
    Artifact,
    Baselines,
    BudgetEntry,
    Capability,
    Environment,
    Fidelity,
    Latency,
    Parity,
    Quality,
    Report,
    Retention,
    ShapeEntry,
    Stage,
    StudentEntry,
    TeacherEntry,
    TrainingPoint,
    markdown,
    page,
    read_report,
    terminal_table,
    verdicts,
    write_report,
)
from limbeck.report.charts import HEIGHT, WIDTH, linear_axis, log_axis
from limbeck.report.curves import series
from limbeck.report.drawing import Box

ROOT = Path(__file__).parent.parent
SCHEMA = ROOT / "docs" / "report.schema.json"
REWRITE = (
    'python -c "from limbeck.report import Report; print(Report.schema_json())"'
    " > docs/report.schema.json"
)
EVIL = "<script>alert(1)</script> | \"quoted\" 'single' `tick` [a](b) *x*"
NEWSGROUPS = [
    "alt.atheism", "comp.graphics", "comp.os.ms-windows.misc", "comp.sys.ibm.pc.hardware",
    "comp.sys.mac.hardware", "comp.windows.x", "misc.forsale", "rec.autos", "rec.motorcycles",
    "rec.sport.baseball", "rec.sport.hockey", "sci.crypt", "sci.electronics", "sci.med",
    "sci.space", "soc.religion.christian", "talk.politics.guns", "talk.politics.mideast",
    "talk.politics.misc", "talk.religion.misc",
]  # fmt: skip


def quality(value: float, n: int = 7532) -> Quality:
    half = 1.96 * math.sqrt(max(value * (1 - value), 1e-4) / n)
    return Quality(
        metric="accuracy", value=value, low=max(value - half, 0), high=min(value + half, 1), n=n
    )


def retention(value: float, n: int = 7532) -> Retention:
    half = 1.4 / math.sqrt(n)
    return Retention(value=value, low=value - half, high=value + half, n=n)


def artifacts(name: str, mb: float, ms: float | None, value: float) -> tuple[Artifact, ...]:
    found = []
    for format, size, slow in (("hf", 4.0, 2.1), ("onnx-fp32", 4.0, 1.7), ("onnx-int8", 1.0, 1.0)):
        latency = None if ms is None else Latency(median=ms * slow, p95=ms * slow * 1.3, n=100)
        parity = Parity(max_abs_diff=0.13 / size, agreement=0.993, n=7532)
        found.append(
            Artifact(
                format=format, path=f"models/{name}/{format}", size_bytes=int(mb * size * 1e6),
                quality=quality(value), latency_ms=latency,
                throughput_per_s=None if ms is None else 1900 / ms / slow,
                peak_memory_bytes=int(9e7 + 2 * mb * size * 1e6), device="cpu", threads=1,
                parity=None if format == "hf" else parity,
            )
        )  # fmt: skip
    return tuple(found)


def curve(seed: int, last: float, soft: bool) -> tuple[TrainingPoint, ...]:
    noise, points = random.Random(seed), []
    for i in range(60):
        kd = 2.4 * math.exp(-i / 14) + 0.35 + noise.gauss(0, 0.06)
        ce = 2.9 * math.exp(-i / 16) + 0.5 + noise.gauss(0, 0.07)
        at = last * (1 - math.exp(-(i + 4) / 12))
        points.append(
            TrainingPoint(
                step=10 * i, loss=kd + 0.5 * ce if soft else ce, soft=kd if soft else None,
                hard=0.5 * ce if soft else None, examples_per_s=240 + noise.gauss(0, 9),
                validation=at if i % 12 == 11 else None,
            )
        )  # fmt: skip
    return tuple(points)


def student(i: int, name: str, of: int, labels: list[str], bare: bool) -> StudentEntry:
    share, noise = i / max(of - 1, 1), random.Random(i)
    mb, ms = 8.1 * 0.18**share, None if bare else 2.6 * 0.19**share
    value = 0.797 - 0.075 * share**1.4
    kept = value / 0.812
    capabilities = {}
    for label in labels:
        teacher, part = 0.6 + 0.35 * noise.random(), kept + noise.gauss(0.01, 0.05 + 0.08 * share)
        capabilities[label] = Capability(
            quality=quality(min(teacher * part, 1), 380), teacher_quality=quality(teacher, 380),
            retention=retention(part, 380), n=380,
        )  # fmt: skip
    asked = [{"params": 9_000_000}, {"size_mb": 4.0}, {"latency_ms": 0.45, "size_mb": 1.6}][i % 3]
    if bare:
        asked = {"params": 9_000_000}
    measured = {"params": int(mb * 1.05e6), "size_mb": mb, "latency_ms": ms}
    plain = Baselines(
        hard_labels=quality(value + (0.004 if i == 1 else -0.023)),
        random_init=quality(value - 0.09) if i == of - 1 else None,
        untaught=quality(0.17 - 0.1 * share) if i == of - 1 else None,
    )
    return StudentEntry(
        name=name, params=int(mb * 1.05e6), primary="onnx-int8",
        artifacts=artifacts(name, mb, ms, value),
        shape=ShapeEntry.of({"hidden": 256 - 96 * i // of, "ffn": 768, "heads": 8}, (0, 2, 5)),
        reason="The widest shape of three layers that the measured file size allows.",
        budget=BudgetEntry.of(asked, {key: measured[key] for key in asked}),
        retention=retention(kept), capabilities=capabilities,
        fidelity=Fidelity(agreement=0.9 - 0.1 * share, mean_kl=0.11 + 0.2 * share, n=7532),
        baselines=Baselines() if bare else plain,
    )  # fmt: skip


def make_report(
    names: tuple[str, ...] = ("large", "medium", "small"),
    labels: list[str] = NEWSGROUPS,
    bare: bool = False,
) -> Report:
    """Three students of a teacher of 22.7 M parameters; `bare`: nothing optional, no latency."""
    students = tuple(student(i, n, len(names), labels, bare) for i, n in enumerate(names))
    stages = [("data", 4.2, 0.01), ("teacher", 251.0, 1.31), ("signals", 41.5, 0.22)]
    stages += [("importance", 12.1, 0.06), ("plan", 18.8, 0.09)]
    stages += [(f"students/{name}", 62.0 - i, 0.33) for i, name in enumerate(names)]
    stages += [("evidence", 88.0, 0.46), ("export", 39.0, 0.2), ("measure", 74.0, 0.38)]
    return Report(
        limbeck="0.1.0",
        recipe={"name": "quickstart", "seed": 0, "students": [{"name": n} for n in names]},
        environment=Environment(
            cpu="AMD EPYC 7B13", cores=2, threads=2,
            versions={"python": "3.11.9", "torch": "2.13.0", "onnxruntime": "1.23.0"},
        ),
        teacher=TeacherEntry(
            name="all-MiniLM-L6-v2", params=22_721_684, primary="onnx-int8",
            artifacts=artifacts("teacher", 23.1, None if bare else 6.4, 0.812),
        ),
        students=students,
        stages=tuple(
            Stage(
                name=name, seconds=seconds, energy_wh=None if bare else energy,
                energy_source="not metered" if bare else "estimated: codecarbon, 65 W constant",
                reused=name == "data",
            )
            for name, seconds, energy in stages
        ),
        linear=None if bare else quality(0.789),
        training={} if bare else {
            "teacher": curve(1, 0.81, soft=False),
            **{name: curve(7 + i, 0.79 - 0.02 * i, soft=True) for i, name in enumerate(names)},
            f"{names[-1]}/hard_labels": curve(99, 0.7, soft=False),
        },
        labels=tuple(labels),
        layer_importance=None if bare else (1.0, 0.71, 0.55, 0.48, 0.62, 0.93),
        warnings=() if bare else ("The teacher was tuned for two epochs; more would raise it.",),
    )  # fmt: skip


CASES = {
    "usual": make_report(),
    "one student, two classes": make_report(("only",), ["no", "yes"]),
    "twelve students": make_report(tuple(f"student-{i}" for i in range(12))),
    "200 classes": make_report(("a", "b"), [f"class-{i}" for i in range(200)]),
    "bare": make_report(bare=True),
    "evil": make_report(labels=[EVIL, "plain"]),
}
every_case = pytest.mark.parametrize("report", CASES.values(), ids=CASES.keys())


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))


def test_published_schema_is_the_codes() -> None:
    same = SCHEMA.read_text() == Report.schema_json() + "\n"
    assert same, f"docs/report.schema.json is old; rewrite it with: {REWRITE}"


@every_case
def test_schema_accepts_what_is_written(report, validator, tmp_path) -> None:
    write_report(report, tmp_path)
    validator.validate(json.loads((tmp_path / "report.json").read_text()))
    assert read_report(tmp_path) == report


@pytest.mark.parametrize("where", ["", "teacher", "students.0", "students.0.artifacts.0.quality"])
def test_schema_and_model_refuse_an_unknown_field(where, validator) -> None:
    data = json.loads(CASES["usual"].model_dump_json())
    here = data
    for step in filter(None, where.split(".")):
        here = here[int(step) if step.isdigit() else step]
    here["surprise"] = 1
    assert not validator.is_valid(data)
    with pytest.raises(ValidationError, match="surprise"):
        Report.model_validate(data)


def test_shape_is_flat_and_typed(validator) -> None:
    data = json.loads(CASES["usual"].model_dump_json())
    assert data["students"][0]["shape"] == {
        "layers": [0, 2, 5],
        "hidden": 256,
        "ffn": 768,
        "heads": 8,
    }
    data["students"][0]["shape"]["hidden"] = "wide"
    assert not validator.is_valid(data)


def test_budget_cannot_say_met_when_it_is_not() -> None:
    with pytest.raises(ValidationError, match="numbers say otherwise"):
        BudgetEntry(asked={"params": 10}, measured={"params": 11}, met=True)
    with pytest.raises(ValidationError, match="different keys"):
        BudgetEntry(asked={"params": 10}, measured={"size_mb": 1}, met=True)
    assert not BudgetEntry.of({"latency_ms": 1.0}, {"latency_ms": None}).met


def test_primary_must_be_among_the_artifacts() -> None:
    with pytest.raises(ValidationError, match="primary format 'gguf'"):
        TeacherEntry(name="t", params=1, primary="gguf", artifacts=artifacts("t", 1, 1, 0.5))


def test_reading_says_what_is_wrong(tmp_path) -> None:
    with pytest.raises(RunFolderError, match=r"no report\.json"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text('{"limbeck": "0')
    with pytest.raises(DamagedError, match=r"report\.json"):
        read_report(tmp_path)


def test_verdicts_tell_misses_by_how_much_and_lost_comparisons() -> None:
    found = verdicts(CASES["usual"])
    bad = [v.text for v in found if not v.ok]
    assert len(bad) == 2, bad
    assert re.match(r"small misses its latency budget by 9\.8 %: 0\.494 ms, 0\.45 ms asked", bad[0])
    assert "medium does not beat the same model without a teacher" in bad[1]
    teacher = next(v for v in found if v.text.startswith("The teacher beats"))
    assert "by 2.3 points" in teacher.text and "intervals part" in teacher.text


@given(st.floats(0, 1), st.floats(0, 1), st.integers(10, 10_000))
@settings(max_examples=50, deadline=None)
def test_teacher_verdict_holds_exactly_if_it_is_better(ours, theirs, n) -> None:
    report = CASES["bare"]
    first = report.teacher.main.model_copy(update={"quality": quality(ours, n)})
    teacher = report.teacher.model_copy(update={"artifacts": (first,)})
    report = report.model_copy(update={"teacher": teacher, "linear": quality(theirs, n)})
    (verdict,) = (v for v in verdicts(report) if v.text.startswith("The teacher"))
    assert verdict.ok == (ours > theirs)
    assert ("part" in verdict.text) == (
        quality(ours, n).low > quality(theirs, n).high
        or quality(theirs, n).low > quality(ours, n).high
    )


@every_case
def test_every_students_name_is_in_text_page_and_terminal(report) -> None:
    text, shown, rows = markdown(report), page(report), terminal_table(report)
    for student in report.students:
        assert student.name in text and student.name in shown
        assert any(row[0] == student.name for row in rows)
    assert len({len(row) for row in rows}) == 1


@every_case
def test_markdown_tables_have_as_many_cells_in_every_row(report) -> None:
    blocks = re.findall(r"(?:^\|.*\n)+", markdown(report), re.M)
    assert len(blocks) >= 5
    for block in blocks:
        assert len({line.count("|") for line in block.splitlines()}) == 1, block


def test_markdown_shows_a_hostile_name_literally() -> None:
    text = markdown(CASES["evil"])
    assert "<script" not in text and "[a](b)" not in text
    assert "&lt;script&gt;alert(1)" in text


class _Page(HTMLParser):
    """Collects what matters: tags, attributes, text; and that every tag is closed."""

    VOID = frozenset({"meta", "wbr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.open, self.words = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.words.append(data)


@every_case
def test_page_is_whole_and_reaches_for_nothing(report) -> None:
    text = page(report)
    found = _Page(text)
    assert not found.open
    for tag in ("script", "link", "img", "iframe", "object", "base", "form", "a"):
        assert tag not in found.tags
    assert not {name for name, _ in found.attributes} & {"src", "href", "xlink:href", "action"}
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    for outside in ("http:", "https:", "//cdn", "@import", "url(", "nan", "Infinity"):
        assert outside not in text.lower().replace("financ", ""), outside
    charts = found.tags.count("svg")
    assert text.count("<figcaption>") <= charts + 1 and charts


def test_page_has_a_title_labels_and_a_table_for_every_chart() -> None:
    figures = re.findall(r"<figure>.*?</figure>", page(CASES["usual"]), re.S)
    assert len(figures) == 2 + 5 + 2  # scatters, trained models, stages and layers
    for figure in figures:
        assert "<figcaption>" in figure and 'class="axis"' in figure
        assert "<title>" in figure and "<details>" in figure and "<table>" in figure


def test_a_hostile_class_name_is_text() -> None:
    text = page(CASES["evil"])
    assert "<script" not in text
    assert EVIL in "".join(_Page(text).words)  # shown as it is, once parsed


def test_missed_budget_and_lost_comparison_are_on_the_page() -> None:
    words = "".join(_Page(page(CASES["usual"])).words).replace("\u00a0", " ")
    assert "small misses its latency budget by 9.8 %" in words
    assert "medium does not beat" in words


def test_unmeasured_latency_is_said_not_drawn() -> None:
    text = page(CASES["bare"])
    assert "latency was not measured" in text
    assert text.count('class="dot teacher"') == 2  # the key's and one chart's


@every_case
def test_same_report_same_bytes(report, tmp_path) -> None:
    again = Report.model_validate_json(report.model_dump_json())
    write_report(report, tmp_path / "a")
    write_report(again, tmp_path / "b")
    for name in ("report.json", "report.md", "report.html"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_failed_write_leaves_the_old_report_whole(tmp_path, monkeypatch) -> None:
    write_report(CASES["usual"], tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_report(CASES["bare"], tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@given(st.lists(st.floats(1e-4, 1e6), min_size=1, max_size=9))
def test_log_axis_holds_the_values_and_has_ticks(values) -> None:
    ticks, low, high = log_axis(values)
    assert low < min(values) and max(values) < high
    assert 2 <= len(ticks) <= 12 and all(low <= tick <= high for tick in ticks)


@given(st.lists(st.floats(0, 5), min_size=1, max_size=9))
def test_linear_axis_holds_the_values_and_has_ticks(values) -> None:
    ticks, low, high = linear_axis(values)
    assert low < min(values) and max(values) < high
    assert 2 <= len(ticks) <= 7 and all(low <= tick <= high for tick in ticks)


@given(st.integers(1, 2000))
@settings(max_examples=30, deadline=None)
def test_long_curves_are_thinned_and_keep_their_end_and_mean(steps) -> None:
    points = [TrainingPoint(step=i, loss=float(i % 7)) for i in range(1, steps + 1)]
    drawn = series(points, "loss")
    assert len(drawn) <= 150 and drawn[-1][0] == steps
    assert min(y for _, y in drawn) >= 0 and max(y for _, y in drawn) <= 6


def test_labels_of_twelve_students_cover_no_other_label() -> None:
    drawings = re.findall(
        rf'<svg viewBox="0 0 {WIDTH} {HEIGHT}".*?</svg>', page(CASES["twelve students"])
    )
    assert len(drawings) == 2
    for drawing in drawings:
        labels = re.findall(
            r'<text class="name[^"]*" x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">([^<]+)',
            drawing,
        )
        assert len(labels) == 13
        boxes: list[Box] = []
        for x, y, anchor, words in labels:
            wide = 8.0 * len(words)  # of a bold letter at 15 px, on a phone
            left = float(x) - {"start": 0, "middle": wide / 2, "end": wide}[anchor]
            box = Box(left, float(y) - 11, left + wide, float(y) + 1)
            assert not any(box.overlap(other) for other in boxes), words
            boxes.append(box)


def test_report_imports_no_torch() -> None:
    for path in Path(limbeck.report.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] in ("torch", "transformers") for name in names)
