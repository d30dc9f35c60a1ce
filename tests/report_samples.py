"""Made-up reports, as real ones look: a teacher of 22.7 M parameters and its students."""

from __future__ import annotations

import math
import random
from base64 import b64encode

import numpy as np

from limbeck.report import (
    Answer,
    Artifact,
    Baselines,
    Benchmarks,
    BudgetEntry,
    Capability,
    Environment,
    Fidelity,
    FrontierPoint,
    Latency,
    Parity,
    Parting,
    Quality,
    Report,
    Retention,
    Score,
    ShapeEntry,
    Stage,
    StudentEntry,
    TeacherEntry,
    TextExample,
    Texts,
    TextScores,
    TrainingPoint,
    UnitImportance,
    WrittenText,
)  # fmt: skip
from limbeck.tasks.images import png

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
                step=10 * i, loss=kd + 0.5 * ce if soft else ce,
                terms={"soft": kd, "hard": 0.5 * ce} if soft else {"hard": ce},
                examples_per_s=240 + noise.gauss(0, 9),
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
        unit_importance=() if bare else unit_importance(),
        frontier=() if bare else frontier(students),
        warnings=() if bare else ("The teacher was tuned for two epochs; more would raise it.",),
    )  # fmt: skip


def unit_importance() -> tuple[UnitImportance, ...]:
    draw, found = random.Random(5), []
    for axis, units, groups in (("hidden", 384, 1), ("heads", 12, 6), ("ffn", 1536, 6)):
        for at in range(groups):
            shares = sorted((draw.random() ** 3 for _ in range(units)), reverse=True)
            whole = sum(shares)
            running = [sum(shares[: round(k * units / 20)]) / whole for k in range(21)]
            few = tuple(draw.sample([s / whole for s in shares], units)) if units < 64 else None
            found.append(
                UnitImportance(
                    axis=axis, group=axis if groups == 1 else f"{axis}.{at}", units=units,
                    cumulative=tuple(running), by_unit=few, total=1 + draw.random(),
                )
            )  # fmt: skip
    return tuple(found)


def frontier(students: tuple[StudentEntry, ...]) -> tuple[FrontierPoint, ...]:
    """The students, and two shapes below each."""
    found = []
    for student in students:
        for part, name in ((1.0, student.name), (0.93, None), (0.86, None)):
            found.append(
                FrontierPoint(
                    name=name, trained=name is not None, shape=student.shape,
                    params=round(student.params * part), size_mb=student.params * part / 1e6,
                    quality=0.79 - 0.4 * (1 - part), loss=0.7, n=512,
                )
            )  # fmt: skip
    return tuple(found)


def pictured(kind: str = "image") -> Report:
    """A report on images, rows or series, two students of which part with the teacher."""
    labels = ["T-shirt", "trouser", "pullover", EVIL]
    report, found = make_report(("large", "small", "like the teacher"), labels), []
    for n, kept in enumerate(report.students):
        examples = []
        for i in range(4 if n < 2 else 0):
            random = np.random.default_rng(n + i)
            pixels = random.integers(0, 256, (8, 8, 3)).astype(np.uint8)
            shown = {
                "image": "data:image/png;base64," + b64encode(png(pixels)).decode(),
                "row": [["width", "2.5"], ["a_name_that_is_rather_long_for_a_column", EVIL]],
                "series": random.normal(size=(2, 96)).cumsum(1).tolist() if i else [[1.0, 1.0]],
            }[kind]
            sure = [Answer(label=labels[k], probability=p) for k, p in ((i, 0.7), (3 - i, 0.2))]
            examples.append(
                Parting(
                    label=labels[(i + n) % 4], teacher=tuple(sure), student=tuple(sure[::-1]),
                    kl=2.5 - i / 2, **{kind: shown},
                )
            )  # fmt: skip
        found.append(kept.model_copy(update={"partings": tuple(examples)}))
    return report.model_copy(update={"students": tuple(found)})


PACKAGES = [
    ("Describe the package: zlib1g-dev",
     "zlib is a library implementing the deflate compression method found in gzip and PKZIP. This "
     "package includes the development support files."),
    ("Describe the package: fonts-noto\n\nIn two sentences.", "A collection of fonts. " * 9),
    (EVIL, EVIL),
]  # fmt: skip


def wrote() -> Report:
    """A report on language models, whose texts are better the larger the model."""
    report, draw = make_report(labels=[]), random.Random(3)
    names, examples = ["teacher", *(s.name for s in report.students)], []
    for prompt, reference in PACKAGES:
        written = {}
        for i, name in enumerate(names):
            words = reference.split(" ")
            said = [w if draw.random() > i / 5 else draw.choice(words) for w in words]
            text = " ".join(said[: len(said) - 4 * i]) if i < 3 else ""
            written[name] = WrittenText(text=text, ended=i < 2, rouge_l=1 - i / 5)
        examples.append(TextExample(prompt=prompt, reference=reference, written=written))
    scores = {}
    for i, name in enumerate([*names, "medium/hard_labels"]):
        value = [Score(value=v, low=v - 0.03, high=v + 0.03, n=97) for v in (0.1, 0.5, 0.6)]
        few = {k: s.model_copy(update={"value": s.value - i / 60})
               for k, s in zip(("exact_match", "rouge_l", "chrf"), value, strict=True)}  # fmt: skip
        scores[name] = TextScores(**few, ended=0.9 - i / 10)
    left_out = "3 of 100 prompts are left out: they leave no room for 64 tokens in a context of 99."
    texts = Texts(max_new_tokens=64, scores=scores, examples=examples, notes=(left_out,))
    scores = {name: {"value": 0.61 - i / 20, "stderr": 0.01, "n": 2376}
              for i, name in enumerate(names)}  # fmt: skip
    none = {name: {"value": None, "n": 9} for name in names[1:]}
    results = [
        {"task": "arc_easy", "version": "1.0", "metric": "acc", "num_fewshot": 5, "scores": scores},
        {"task": EVIL, "version": EVIL, "metric": "perplexity", "filter": EVIL,
         "higher_is_better": False, "scores": none},
    ]  # fmt: skip
    found = Benchmarks.model_validate({"lm_eval": "0.4.13", "limit": 2376, "results": results})
    return report.model_copy(update={"texts": texts, "benchmarks": found})


CASES = {
    "texts": wrote(),
    "images": pictured(),
    "rows": pictured("row"),
    "series": pictured("series"),
    "usual": make_report(),
    "one student, two classes": make_report(("only",), ["no", "yes"]),
    "twelve students": make_report(tuple(f"student-{i}" for i in range(12))),
    "200 classes": make_report(("a", "b"), [f"class-{i}" for i in range(200)]),
    "bare": make_report(bare=True),
    "evil": make_report(labels=[EVIL, "plain"]),
}
