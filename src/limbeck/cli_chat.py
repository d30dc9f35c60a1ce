"""The verb `chat`: questions from the terminal, answers as they are written. No heavy imports."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from limbeck.errors import LimbeckError


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "student", type=Path, help="RUN/students/NAME, a .gguf file or an hf folder"
    )
    parser.add_argument("--system", metavar="TEXT", help="what it is told beforehand")
    parser.add_argument(
        "--max-new-tokens", type=_whole, default=256, metavar="N",
        help="tokens of an answer at most; a question has to leave room for them (256)",
    )  # fmt: skip
    parser.add_argument(
        "--temperature", type=_warm, default=0.0, metavar="T",
        help="of the draws; 0, the default, is the likeliest token each time",
    )  # fmt: skip


def chat(arguments: argparse.Namespace) -> None:
    """Until /exit or the end of the input."""
    from limbeck import _api

    talk = _api.chat_with(
        arguments.student, system=arguments.system, max_new_tokens=arguments.max_new_tokens,
        sampling_temperature=arguments.temperature,
    )  # fmt: skip
    asks = "> " if sys.stdin.isatty() else ""
    if asks:
        print("/exit ends the conversation.")
    while True:
        try:
            text = input(asks).strip()
        except EOFError:
            return
        if text == "/exit":
            return
        if not text:
            continue
        try:
            for piece in talk.say(text):
                print(piece, end="", flush=True)
        except LimbeckError as error:  # of this question; the conversation goes on
            print(f"limbeck: {error}", file=sys.stderr)
            continue
        print(f"\n({talk.note})" if talk.note else "", flush=True)


def _whole(text: str) -> int:
    try:
        found = int(text)
    except ValueError:
        found = 0
    if found < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a whole number from 1 on")
    return found


def _warm(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a number from 0 on")
    return found
