"""What a run found out: report.json for programs, report.md for reading, report.html to enjoy."""

from pathlib import Path

from limbeck.report.benchmarks import Benchmark, Benchmarks, BenchmarkScore
from limbeck.report.document import (
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
    Stage,
    StudentEntry,
    TeacherEntry,
    TrainingPoint,
    read_report,
)
from limbeck.report.markdown import markdown
from limbeck.report.page import page
from limbeck.report.parting import Answer, Parting
from limbeck.report.shapes import FrontierPoint, ShapeEntry, UnitImportance
from limbeck.report.tables import terminal_table
from limbeck.report.texts import Score, TextExample, Texts, TextScores, WrittenText
from limbeck.report.wording import Verdict, summary, verdicts
from limbeck.run import write_json, write_text

__all__ = [
    "Answer",
    "Artifact",
    "Baselines",
    "Benchmark",
    "BenchmarkScore",
    "Benchmarks",
    "BudgetEntry",
    "Capability",
    "Environment",
    "Fidelity",
    "FrontierPoint",
    "Latency",
    "Parity",
    "Parting",
    "Quality",
    "Report",
    "Retention",
    "Score",
    "ShapeEntry",
    "Stage",
    "StudentEntry",
    "TeacherEntry",
    "TextExample",
    "TextScores",
    "Texts",
    "TrainingPoint",
    "UnitImportance",
    "Verdict",
    "WrittenText",
    "markdown",
    "page",
    "read_report",
    "summary",
    "terminal_table",
    "verdicts",
    "write_report",
]


def write_report(report: Report, folder: Path) -> None:
    """report.json, report.md and report.html in `folder`, each whole or not at all."""
    write_json(folder / "report.json", report.model_dump(mode="json"))
    write_text(folder / "report.md", markdown(report))
    write_text(folder / "report.html", page(report))
