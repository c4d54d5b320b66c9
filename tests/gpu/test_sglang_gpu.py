"""Tiny models in SGLang's own Engine on a GPU, bf16, CUDA graphs on, against Hugging Face's in fp32.

python test_sglang_gpu.py MODEL SETTINGS OUT.json serves one model and writes what came out: a process of its own, for SGLang
kills the one that started it when its scheduler fails.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import PROMPT, save
from gpu_models import BOUNDS, DECODED, KINDS, gpu_model, saved

pytestmark = [pytest.mark.gpu, pytest.mark.sglang]

SETTINGS: dict[str, Any] = {
    "quantization": "nvfp4",
    "dtype": "bfloat16",
    # What needs no package beyond SGLang's kernels.
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "skip_tokenizer_init": True,
    "disable_radix_cache": True,
    "max_total_tokens": 4096,
    "max_running_requests": 4,
    "mem_fraction_static": 0.5,
    "random_seed": 0,
}
GRAPHS = {"cuda_graph_bs_decode": [1, 2, 4], "cuda_graph_max_bs_decode": 4, "disable_prefill_cuda_graph": True}


def _serve(model: str, settings: dict[str, Any]) -> dict[str, list[Any]]:
    """PROMPT's log-probabilities, greedy tokens after it with theirs as decoding and as one prompt gave them, and the tokens
    once the weights have been read again."""
    from prompt_logprobs import reload_weights
    from sglang import Engine

    engine = Engine(model_path=model, **settings)
    try:

        def ask(prompt: list[int], tokens: int) -> tuple[list[float], list[int], list[float]]:
            sampling = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
            output = engine.generate(input_ids=prompt, sampling_params=sampling, return_logprob=True, logprob_start_len=0)
            given, decoded = (output["meta_info"][f"{of}_token_logprobs"] for of in ("input", "output"))
            return [logprob for logprob, *_ in given[1:]], output["output_ids"], [logprob for logprob, *_ in decoded]

        given, tokens, decoded = ask(PROMPT, DECODED)
        together = ask(PROMPT + tokens, 1)[0][-DECODED:]
        reload_weights(engine, model)
        reloaded = ask(PROMPT, DECODED)[1]
        return {"given": given, "tokens": tokens, "decoded": decoded, "together": together, "reloaded": reloaded}
    finally:
        engine.shutdown()


def _run(model: Path, activation: str, **others: Any) -> dict[str, torch.Tensor]:
    pytest.importorskip("sglang.srt.plugins")
    pytest.importorskip("sgl_kernel", reason="SGLang's kernels are not installed")
    out = model.parent / "out.json"
    settings = {**SETTINGS, **others, "json_model_override_args": json.dumps({"nvfp4": {"activation": activation}})}
    tests = Path(__file__).parent.parent
    path = os.pathsep.join([str(tests), str(tests / "sglang"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, __file__, str(model), json.dumps(settings), str(out)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return {name: torch.tensor(values) for name, values in json.loads(out.read_text()).items()}


def _error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return (got - expected).square().mean().sqrt().item()


@pytest.mark.parametrize("form", ["bf16", "modelopt"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_log_probabilities(kind: str, form: str, tmp_path: Path) -> None:
    folder, expected = saved(kind, form, tmp_path)
    for activation, (low, high) in BOUNDS.items():
        result = _run(folder, activation, **GRAPHS)
        error = _error(result["given"], expected)
        assert low <= error < high, f"{activation}: root mean square error {error:.4f}"
        # A row at a time, by CUDA graphs, comes to what all rows at once come to.
        assert _error(result["decoded"], result["together"]) < high, activation
        # The graphs read the weights that were loaded last.
        assert torch.equal(result["reloaded"], result["tokens"]), activation


@pytest.mark.parametrize("kind", list(KINDS))
def test_cuda_graphs_change_nothing(kind: str, tmp_path: Path) -> None:
    folder = save(gpu_model(kind), "bf16", tmp_path / "bf16")
    graphs, eager = _run(folder, "none", **GRAPHS), _run(folder, "none", disable_cuda_graph=True)
    assert torch.equal(graphs["tokens"], eager["tokens"])
    torch.testing.assert_close(graphs["decoded"], eager["decoded"], rtol=0, atol=1e-3)


if __name__ == "__main__":
    served, given_settings, results = sys.argv[1:]
    Path(results).write_text(json.dumps(_serve(served, json.loads(given_settings))))
