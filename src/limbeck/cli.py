"""The command line: verbs, and the only place that speaks to people. Imports nothing heavy."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from limbeck import cli_chat
from limbeck.errors import LimbeckError, TargetMissedError

_EPILOG = """\
exit codes: 0 done, 2 a mistake in what was asked, 3 a budget was not met, 4 stored data is
damaged, 130 interrupted (run the same command again: it goes on where it stopped)"""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except LimbeckError as error:
        print(f"limbeck: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nlimbeck: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="limbeck", epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Distils a model you have into the family of models you need.",
    )  # fmt: skip
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    def verb(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        made.set_defaults(run=run)
        return made

    def recipe(made: argparse.ArgumentParser) -> None:
        made.add_argument("recipe", help="a built-in recipe's name, a YAML file or a run folder")
        made.add_argument(
            "--set", action="append", default=[], metavar="A.B=VALUE", dest="overrides",
            help="change a setting, e.g. students.small.budget.size_mb=4; may be repeated",
        )  # fmt: skip

    distill = verb("distill", _distill, "teach, export, measure and report a family of students")
    recipe(distill)
    distill.add_argument("--out", required=True, type=Path, help="the run's folder; resumes there")
    distill.add_argument("--repair", action="store_true", help="make damaged stages anew")
    recipe(verb("plan", _plan, "show each student's shape and predicted cost before any training"))
    scaled = verb("scale", _scale, "add a student to a finished elastic run, without training")
    scaled.add_argument("run_folder", type=Path, metavar="RUN", help="the run's folder")
    scaled.add_argument("--name", required=True, help="what the student shall be called")
    for flag, kind, help in (
        ("params", int, "parameters at most"), ("size-mb", float, "MB of the file at most"),
        ("latency-ms", float, "median ms of a batch-1 call at most"),
        ("memory-mb", float, "MB of memory at most, while it runs"),
        ("energy-mj", float, "mJ of a batch-1 call at most (the recipe's measure.watts x latency)"),
        ("retention", float, "share of the teacher's quality at least, such as 0.97"),
    ):  # fmt: skip
        scaled.add_argument(f"--{flag}", type=kind, metavar="X", help=help)
    measured = verb("axes", _axes, "show what of a model can be cut, proved on its weights")
    measured.add_argument("model", help="a model's folder, or a source as in a recipe")
    shown = verb("report", _report, "print a finished run's table and where its report lies")
    shown.add_argument("run_folder", type=Path, metavar="DIR", help="the run's folder")
    listed = verb("recipes", _recipes, "list the built-in recipes, or show one")
    listed.add_argument("show", nargs="?", choices=["show"], help="print a recipe to start from")
    listed.add_argument("name", nargs="?", help="which")
    tried = verb(
        "try", _try, "classify a text, an image or a row with a student, or let it write on"
    )
    tried.add_argument(
        "student", type=Path, help="RUN/students/NAME, an .onnx or .gguf file or an hf folder"
    )
    tried.add_argument(
        "what", help="a text or its beginning, a row as JSON, or the path of an image or a signal"
    )
    cli_chat.options(verb("chat", cli_chat.chat, "talk with a student that was made for it"))
    kept = verb("signals", _signals, "say what captured signals hold, check them, or tidy up")
    kept.add_argument(
        "what", choices=["info", "verify", "prune"],
        help="info: codec, size and origins; verify: every checksum, and some rows against the "
        "teacher; prune: remove files that are no part of the capture",
    )  # fmt: skip
    kept.add_argument("folder", type=Path, metavar="DIR", help="a run's folder, or its signals'")
    kept.add_argument(
        "--rows", type=int, default=64, metavar="N", help="to verify against the teacher (64)"
    )
    verb("doctor", _doctor, "say what this installation can do: devices, extras, versions, cache")
    return parser


def _distill(arguments: argparse.Namespace) -> None:
    from limbeck import _api

    with _terminal() as progress:
        report = _api.distill(
            arguments.recipe, arguments.out, overrides=arguments.overrides,
            repair=arguments.repair, progress=progress,
        )  # fmt: skip
    _show(report, arguments.out)
    _raise_for_missed(report)


def _scale(arguments: argparse.Namespace) -> None:
    from limbeck import _api

    keys = ("params", "size_mb", "latency_ms", "memory_mb", "energy_mj", "retention")
    given = {key: getattr(arguments, key) for key in keys if getattr(arguments, key) is not None}
    with _terminal() as progress:
        report = _api.scale(
            arguments.run_folder, name=arguments.name, budget=given, progress=progress
        )
    _show(report, arguments.run_folder)
    _raise_for_missed(report)


def _raise_for_missed(report: Any) -> None:
    missed = [s.name for s in report.students if not s.budget.met]
    if missed:
        from limbeck.report import verdicts

        budgets = verdicts(report)[: sum(len(s.budget.asked) for s in report.students)]
        raise TargetMissedError(
            ", ".join(f"recipe.students.{name}.budget" for name in missed),
            " ".join(verdict.text for verdict in budgets if not verdict.ok).rstrip("."),
            allowed="what each budget says", fix="raise it and run again",
        )  # fmt: skip


def _plan(arguments: argparse.Namespace) -> None:
    from limbeck import _api

    with _terminal() as progress:
        plan = _api.plan(arguments.recipe, overrides=arguments.overrides, progress=progress)
    rows = [["student", "parameters", "size MB", "latency ms", "shape"]]
    for p in plan.students:
        latency = "" if p.cost.latency_ms is None else f"{p.cost.latency_ms:.2f}"
        shape = ", ".join(f"{k} {v}" for k, v in p.shape.sizes.items())
        depths = {name: len(kept) for name, kept in p.shape.stacks.items()}
        if not depths and p.shape.layers:  # stages of one layer each have none to choose from
            depths = {"layers": len(p.shape.layers)}
        shape += "".join(f", {name} {n}" for name, n in depths.items())
        size = f"{p.cost.size_bytes / 1e6:.2f}"
        rows.append([p.name, f"{p.cost.params:,}", size, latency, shape])
    _table(rows)
    for p in plan.students:
        print(f"{p.name}: {p.reason}")
    rows = [["signals", "bytes a position", "size MB", "capture s"]]
    for c in plan.signals:
        name = f"{c.name}, chosen" if c.chosen else c.name
        size = f"{c.size_bytes / 1e6:.2f}"
        seconds = "–" if c.seconds is None else f"{c.seconds:.0f}"
        rows.append([name, f"{c.bytes_per_position:,}", size, seconds])
    _table(rows)
    print(f"signals: {plan.signals_reason}")


def _axes(arguments: argparse.Namespace) -> None:
    from limbeck import _api

    with _terminal() as progress:
        axes = _api.axes(arguments.model, progress=progress)
    rows = [["axis", "fields", "size", "steps of", "proved", "why"]]
    for axis in axes:
        verdict = "yes" if axis.proved else "no"
        size, step = str(axis.size), str(axis.granularity)
        rows.append([axis.name, ", ".join(axis.fields), size, step, verdict, axis.reason])
    _table(rows)


def _report(arguments: argparse.Namespace) -> None:
    from limbeck import _api

    _show(_api.load_report(arguments.run_folder), arguments.run_folder)


def _recipes(arguments: argparse.Namespace) -> None:
    from limbeck import _api
    from limbeck.errors import RecipeError

    known = _api.list_recipes()
    if arguments.show is None:
        for name, path in known.items():
            title = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
            print(title.removeprefix(f"{name}: ").join([f"{name:12} ", ""]))
    elif arguments.name in known:
        print(known[arguments.name].read_text(encoding="utf-8"), end="")
    else:
        raise RecipeError(
            "recipes show", f"{arguments.name!r}", allowed=", ".join(known), fix="name one of them"
        )


def _try(arguments: argparse.Namespace) -> None:
    from limbeck import _api

    written = _api.write_with(arguments.student, arguments.what)
    if written is not None:
        print(arguments.what, end="")
        for piece in written:
            print(piece, end="", flush=True)
        print()
        return
    for label, probability in _api.try_student(arguments.student, arguments.what)[:5]:
        print(f"{100 * probability:5.1f} %  {label}")


def _signals(arguments: argparse.Namespace) -> None:
    from limbeck import _api

    if arguments.what == "info":
        for title, value in _api.describe_signals(arguments.folder).items():
            print(f"{title:28}{value}")
    elif arguments.what == "prune":
        gone = _api.prune_signals(arguments.folder)
        for path in gone:
            print(f"removed {path}")
        print(f"{len(gone)} files, {sum(gone.values()):,} bytes")
    else:
        shards, found = _api.verify_signals(arguments.folder, rows=arguments.rows)
        print(f"checksums           {shards} shards are as they were written")
        if found is None:
            print("teacher             not at hand: a run has it beside its signals")
            return
        print(f"asked again         {found.positions:,} positions\n"
              f"largest difference  {found.largest_difference:.3g}")  # fmt: skip
        if found.gradient_error is None:
            return
        kl = "none: a sample is no distribution" if found.kl is None else f"{found.kl:.3g} nats"
        score = "" if found.bias_score is None else f", {found.bias_score:.1f} standard errors"
        print(f"total variation     {found.total_variation:.3g}\n"
              f"KL                  {kl}\n"
              f"gradient            off by {found.gradient_error:.3g} of its length, "
              f"of that bias {found.gradient_bias:.3g}{score}")  # fmt: skip


def _doctor(arguments: argparse.Namespace) -> None:  # noqa: ARG001 one signature for all verbs
    from limbeck import _api

    for title, found in _api.doctor().items():
        items = [f"{k}: {v}" for k, v in found.items()] if isinstance(found, dict) else found
        print(f"{title}: {items}" if isinstance(items, str) else f"{title}:")
        for line in [] if isinstance(items, str) else items:
            print(f"  {line}")


def _show(report: Any, folder: Path) -> None:
    from limbeck.report import terminal_table, verdicts

    _table(terminal_table(report))
    for verdict in verdicts(report):
        print(f"{'yes' if verdict.ok else 'NO ':3}  {verdict.text}")
    print(f"report: {folder / 'report.html'}")


def _table(rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for head in rows[0]:
        table.add_column(escape(head), overflow="fold")
    for row in rows[1:]:
        table.add_row(*map(escape, row))
    Console().print(table)


class _Terminal:
    """Bars with speed and time left on a terminal; one line every so often in a log file."""

    _EVERY = 15.0  # seconds between lines in a log file

    def __init__(self, bars: Any) -> None:
        self._bars = bars
        self._live = bars.console.is_terminal

    def say(self, line: str) -> None:
        from rich.markup import escape

        self._bars.console.print(escape(line), soft_wrap=True, highlight=False)

    @contextmanager
    def bar(self, title: str, total: int, unit: str, *, done: int = 0) -> Iterator[Any]:
        opened = _Bar(self, title, total, unit, done)
        try:
            yield opened
        finally:
            opened.close()


class _Bar:
    def __init__(self, terminal: _Terminal, title: str, total: int, unit: str, done: int) -> None:
        self._terminal, self._title, self._total, self._unit = terminal, title, total, unit
        self._start = self._shown = time.monotonic()
        self._first = self._done = done
        self._task = terminal._bars.add_task(
            title, total=total, completed=done, unit=unit, speed=""
        )

    def advance(self, amount: int, note: str = "") -> None:  # noqa: ARG002 the protocol's
        self._done += amount
        now = time.monotonic()
        speed = (self._done - self._first) / max(now - self._start, 1e-9)
        self._terminal._bars.update(self._task, advance=amount, speed=f"{speed:.1f}/s")
        if not self._terminal._live and now - self._shown > _Terminal._EVERY:
            self._shown = now
            left = (self._total - self._done) / max(speed, 1e-9)
            self._terminal.say(
                f"{self._title:36} {self._done:>7}/{self._total} {self._unit}"
                f"  {speed:8.1f}/s  {left:5.0f} s left"
            )

    def close(self) -> None:
        self._terminal._bars.remove_task(self._task)
        if not self._terminal._live:
            seconds = time.monotonic() - self._start
            self._terminal.say(f"{self._title:36} {self._done} {self._unit} in {seconds:.1f} s")


@contextmanager
def _terminal() -> Iterator[_Terminal]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}, {task.fields[speed]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        yield _Terminal(bars)


if __name__ == "__main__":
    sys.exit(main())
