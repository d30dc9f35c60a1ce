"""Progress of long work, for whoever shows it. The library only tells; `cli` draws the bars."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Bar(Protocol):
    def advance(self, amount: int, note: str = "") -> None: ...


class Progress(Protocol):
    def bar(
        self, title: str, total: int, unit: str, *, done: int = 0
    ) -> AbstractContextManager[Bar]: ...

    def say(self, line: str) -> None: ...


class Silent:
    """Shows nothing."""

    @contextmanager
    def bar(self, title: str, total: int, unit: str, *, done: int = 0) -> Iterator[Silent]:  # noqa: ARG002
        yield self

    def advance(self, amount: int, note: str = "") -> None:
        pass

    def say(self, line: str) -> None:
        pass
