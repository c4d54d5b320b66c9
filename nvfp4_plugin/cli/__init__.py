"""`nvfp4`: look at this machine, quantize checkpoints, measure kernels and weights."""

from __future__ import annotations

from typing import Annotated

import typer

from nvfp4_plugin.cli.bench import app as bench
from nvfp4_plugin.cli.demo import demo
from nvfp4_plugin.cli.doctor import doctor
from nvfp4_plugin.cli.environment import installed
from nvfp4_plugin.cli.errors import Commands
from nvfp4_plugin.cli.evaluate import evaluate
from nvfp4_plugin.cli.quantize import quantize

app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_show_locals=False)
app.command()(doctor)
app.command()(quantize)
app.add_typer(bench, name="bench")
app.command(name="eval")(evaluate)
app.command()(demo)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"nvfp4-plugin {installed('nvfp4-plugin') or '(not installed)'}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)] = False,
) -> None:
    """NVFP4 quantization for vLLM and SGLang on every device."""
