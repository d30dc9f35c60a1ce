"""Tiny random models and data: CPU, offline, seconds."""

import os
import re
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

import limbeck  # noqa: F401  sets the environment before torch is imported

_FOUR_PARTS = re.compile(r"limbeck: .+?: .+; allowed: .+; \S.+")  # where, what, allowed, what to do


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """What a test keeps is not left in the user's cache."""
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def quick():
    """No stop-watch and no energy meter in this process."""
    from tiny_world import quickly

    with quickly():
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """The tiny world with a teacher that already knows the task: a run takes seconds."""
    from tiny_world import make_known_world

    return make_known_world(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def finished(tiny) -> Path:
    from limbeck.cli import main
    from tiny_world import quickly

    out = tiny / "finished"
    with quickly():
        assert main(["distill", str(tiny / "recipe.yaml"), "--out", str(out)]) == 0
    return out


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A finished run to do harm to."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def refused(tiny, capsys):
    """A command that must end with this exit code and one message in four parts, returned."""
    from limbeck.cli import main

    def command(*arguments: object, code: int = 2) -> str:
        before = contents(tiny)
        assert main([*map(str, arguments)]) == code
        assert contents(tiny) == before, "nothing is written over"
        said = capsys.readouterr().err
        assert "Traceback" not in said
        messages = [line for line in said.splitlines() if line.startswith("limbeck: ")]
        assert len(messages) == 1, said
        assert said.rstrip().endswith(messages[0]), "the message stands last"
        assert _FOUR_PARTS.fullmatch(messages[0]), messages[0]
        return messages[0]

    return command


@pytest.fixture
def distil(tiny, tmp_path, refused):
    """`distill` of the tiny world's recipe with changed settings, which must be refused."""

    def command(*changes: str, out: Path | None = None, code: int = 2) -> str:
        settings = [word for change in changes for word in ("--set", change)]
        out = out or tmp_path / "out"
        return refused("distill", tiny / "recipe.yaml", "--out", out, *settings, code=code)

    return command
