"""Log-probabilities of a prompt from a framework's own engine, in a process of its own.

python prompt_logprobs.py sglang|vllm OUT.json DTYPE MODEL...
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "sglang")]


def reload_weights(engine: Any, model: str) -> None:
    """Read the weights again. On a busy machine the scheduler has not yet put away the request that was just answered."""
    deadline = time.monotonic() + 60
    while True:
        done, message, *_ = engine.update_weights_from_disk(model)
        if done:
            return
        assert "requests are still running" in message, message
        assert time.monotonic() < deadline, message
        time.sleep(0.2)


def with_sglang(model: str, dtype: str, prompt: list[int]) -> list[float]:
    from sglang import Engine
    from sglang_engine import settings

    engine = Engine(**settings(Path(model), {"activation": "none"}, dtype=dtype))
    try:
        sampling = {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True}
        output = engine.generate(input_ids=prompt, sampling_params=sampling, return_logprob=True, logprob_start_len=0)
        assert len(output["output_ids"]) == 4
        reload_weights(engine, model)
        again = engine.generate(input_ids=prompt, sampling_params=sampling)
        assert again["output_ids"] == output["output_ids"]
        return [logprob for logprob, *_ in output["meta_info"]["input_token_logprobs"][1:]]
    finally:
        engine.shutdown()


def with_vllm(model: str, dtype: str, prompt: list[int]) -> list[float]:
    from vllm_engine import engine, logprobs

    with engine(Path(model), {"activation": "none"}, dtype=dtype) as llm:
        return logprobs(llm, prompt).tolist()


if __name__ == "__main__":
    framework, out, dtype, *models = sys.argv[1:]
    from checkpoints import PROMPT

    run = {"sglang": with_sglang, "vllm": with_vllm}[framework]
    Path(out).write_text(json.dumps([run(model, dtype, PROMPT) for model in models]))
