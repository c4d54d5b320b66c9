"""What a command says when it cannot go on, and the one place that says it."""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Console
from safetensors import SafetensorError
from typer.core import TyperGroup


class CommandError(Exception):
    """Not a defect of the command: its message is all that the user needs."""


def say(kind: str, text: object, style: str) -> None:
    """One line on standard error, `kind: text`."""
    Console(stderr=True).print(f"{kind}: {text}", style=style, markup=False, highlight=False, soft_wrap=True)


class Commands(TyperGroup):
    """Commands whose errors are one line, `error: ...`, with exit status 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # typer ends quietly
            raise
        except (CommandError, OSError, SafetensorError) as error:
            say("error", error, "red")
            raise typer.Exit(1) from None
