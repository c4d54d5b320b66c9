"""SGLang's own Engine with its scheduler and tokenizer processes, and vLLM on the same checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import PROMPT, reference_logprobs, tiny_model

pytestmark = pytest.mark.sglang

CASES = [("llama", "bf16"), ("mixtral", "compressed_tensors"), ("qwen3_moe", "modelopt")]


def _run(framework: str, models: list[Path], out: Path) -> list[torch.Tensor]:
    script = Path(__file__).with_name("prompt_logprobs.py")
    command = [sys.executable, str(script), framework, str(out), "bfloat16", *map(str, models)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return [torch.tensor(values) for values in json.loads(out.read_text())]


def _close(got: torch.Tensor, expected: torch.Tensor) -> None:
    error = got - expected
    # What bf16 activations cost: another choice of weight scales costs 0.4 or so.
    assert error.abs().max() < 0.15
    assert error.square().mean().sqrt() < 0.04


@pytest.fixture(scope="module")
def served(checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    models = [checkpoint(kind, form) for kind, form in CASES]
    results = _run("sglang", models, tmp_path_factory.mktemp("sglang") / "out.json")
    return {kind: result for (kind, _), result in zip(CASES, results, strict=True)}


@pytest.mark.parametrize("kind", [kind for kind, _ in CASES])
def test_engine_equals_hugging_face_over_fake_quantized_weights(kind: str, served, tmp_path: Path) -> None:
    _close(served[kind], reference_logprobs(tiny_model(kind), PROMPT, tmp_path))


def test_vllm_agrees_on_a_modelopt_checkpoint(served, checkpoint, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    [expected] = _run("vllm", [checkpoint("qwen3_moe", "modelopt")], tmp_path / "out.json")
    _close(served["qwen3_moe"], expected)
