"""`nvfp4 demo`: a real model, quantized while a real server loads it, answers two questions."""

from __future__ import annotations

import math
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nvfp4_configs import CONFIG_ENV, Nvfp4Config
from nvfp4_plugin.cli.benchmark import check_words, device_name, pick_device
from nvfp4_plugin.cli.model_folder import ModelError, ModelFolder, mean_finite, read_config, sqnr
from nvfp4_plugin.cli.processes import interrupt_on_termination
from nvfp4_plugin.cli.sample_model import NAME, sample_model
from nvfp4_plugin.cli.server import CONTEXT, LAUNCHES, ServerError, free_port, running

QUESTIONS = (
    "What is the capital of France? Answer in one sentence.",
    "Explain in two short sentences why the sky is blue.",
)
MAX_TOKENS = 64
SAMPLE_RECIPE = "four_over_six"
"""For the sample model where NVFP4_CONFIG names nothing: it loads sooner than with the full search of the default."""


@dataclass(frozen=True)
class Answer:
    """What came back for one question."""

    text: str
    tokens: int
    seconds: float
    """From the first token to the last: decoding alone."""


def demo(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help=f"Folder or hub id of a bf16 model [{NAME}].")] = "",
    framework: Annotated[str, typer.Option("--framework", help=f"{' or '.join(LAUNCHES)}.")] = "vllm",
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds that the server may take to start.")] = 1800,
) -> None:
    """Serve a model with --quantization nvfp4 and ask it two questions."""
    console = Console()
    check_words("--framework", [framework], LAUNCHES)
    interrupt_on_termination()
    if not model:
        with console.status(f"Preparing {NAME}"):
            model = str(sample_model())
        os.environ.setdefault(CONFIG_ENV, SAMPLE_RECIPE)  # for the server, and for what is measured here
    device = pick_device("auto")
    console.print(f"Model   {model}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"Device  {device_name(device)}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"Options {CONFIG_ENV}={os.environ.get(CONFIG_ENV, '')}", markup=False, highlight=False, soft_wrap=True)
    log = Path(tempfile.mkdtemp(prefix="nvfp4-demo-")) / f"{framework}.log"
    console.print(f"Log     {log}", markup=False, highlight=False, soft_wrap=True)
    port = free_port()
    launch = LAUNCHES[framework](model, port, on_gpu=device.type == "cuda", context=_context(model))
    start = time.monotonic()
    with console.status("") as status:

        def waiting(line: str) -> None:
            seconds = time.monotonic() - start
            status.update(
                f"{framework} loads and quantizes the model, {seconds:.0f} s  [dim]{_short(line, console.width)}[/dim]"
            )

        waiting("")
        with running(launch, port, log, timeout=timeout, waiting=waiting) as url:
            status.stop()
            console.print(f"Server  ready after {time.monotonic() - start:.0f} s at {url}/v1", highlight=False)
            answers = [ask(f"{url}/v1", question, console) for question in QUESTIONS]
    console.print(summary(model, answers, device, console))


def _context(model: str) -> int:
    """CONTEXT, or what a model in a folder can take at most where that is less."""
    config = read_config(Path(model)) if Path(model).is_dir() else {}
    own = (config.get("text_config") or config).get("max_position_embeddings")
    return min(own or CONTEXT, CONTEXT)


def _short(line: str, width: int) -> str:
    """A log line cut to what fits beside the status, safe for rich's markup."""
    return line[-max(20, width - 60) :].replace("[", "(").replace("]", ")")


def ask(base_url: str, question: str, console: Console) -> Answer:
    """Ask one question and print the answer as it comes: in a chat, or plainly where the model has no form for chats."""
    from openai import APIError, BadRequestError, OpenAI

    client = OpenAI(base_url=base_url, api_key="none")
    name = client.models.list().data[0].id
    console.print(f"\n[bold]> {question}[/bold]", highlight=False)
    text, tokens, first, last = "", 0, math.nan, math.nan
    request: dict[str, Any] = {"model": name, "max_tokens": MAX_TOKENS, "temperature": 0}
    request |= {"stream": True, "stream_options": {"include_usage": True}}
    try:
        try:
            stream = client.chat.completions.create(messages=[{"role": "user", "content": question}], **request)
        except BadRequestError as error:
            console.print(
                f"no chat ({error.message}): plain completion", style="dim", markup=False, highlight=False, soft_wrap=True
            )
            stream = client.completions.create(prompt=question, **request)
        for chunk in stream:
            if chunk.usage:
                tokens = chunk.usage.completion_tokens
            if chunk.choices and (piece := _piece(chunk.choices[0])):
                last = time.perf_counter()
                first = last if math.isnan(first) else first
                text += piece
                console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    except APIError as error:
        raise ServerError(f"the server refused {question!r}: {error.message}") from None
    console.print()
    if not text.strip():
        raise ServerError(f"the server gave an empty answer to {question!r}")
    return Answer(text, tokens, last - first)


def _piece(choice: Any) -> str | None:
    """What a part of a streamed answer adds, in a chat's form or a completion's."""
    return choice.delta.content if hasattr(choice, "delta") else choice.text


def summary(model: str, answers: list[Answer], device: Any, console: Console) -> Table:
    """The small table at the end: weight bytes, SQNR, speed and kernels."""
    from nvfp4_kernels import dispatch

    table = Table(show_header=False, box=None, pad_edge=False)
    config = Nvfp4Config.resolve()
    if Path(model).is_dir():
        try:
            for row in weight_rows(Path(model), config, console):
                table.add_row(*row)
        except ModelError as error:  # it has been served all the same
            table.add_row("Weights", escape(f"not compared with bf16: {error}"))
    # The first token of a burst takes no decoding step.
    steps, seconds = sum(answer.tokens - 1 for answer in answers), sum(answer.seconds for answer in answers)
    table.add_row("Decoding, one request", f"{steps / seconds:,.1f} tokens/s" if seconds else "too short to time")
    for choice in dispatch.explain(device):
        if choice.operation == "linear" and choice.mode == config.activation:
            table.add_row("Kernels", f"{choice.kernel}; {choice.reason}")
    return table


def weight_rows(model: Path, config: Nvfp4Config, console: Console) -> list[tuple[str, str]]:
    """Bytes of the quantized layers before and after, and their mean SQNR."""
    from rich.progress import track

    folder = ModelFolder(model)
    before = after = 0
    noise = []
    for module in track(folder.linear_layers(config), "measuring the weights", console=console, transient=True):
        weight = folder.tensor(f"{module}.weight")
        quantized = folder.quantize(module, config, weight)
        before += weight.nbytes
        after += quantized.nbytes
        noise.append(sqnr(weight, quantized))
    return [
        ("Linear weights", f"{before / 1e6:,.1f} MB bf16 -> {after / 1e6:,.1f} MB NVFP4 ({before / after:.2f}x smaller)"),
        ("Mean weight SQNR", f"{mean_finite(noise):.2f} dB over {len(noise)} layers"),
    ]
