"""Two ranks: tensor parallelism, and experts spread over the ranks. Weight-only, so that nothing depends on a rank's share."""

from __future__ import annotations

import pytest
import torch
from checkpoints import PROMPT
from vllm_engine import engine, logprobs

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

OPTIONS = {"activation": "none"}


@pytest.fixture(scope="module")
def one_rank(checkpoint) -> torch.Tensor:
    with engine(checkpoint("qwen2_moe", "bf16"), OPTIONS) as llm:
        return logprobs(llm, PROMPT)


@pytest.mark.parametrize(
    ("form", "experts"), [("bf16", True), ("bf16", False), ("modelopt", True), ("compressed_tensors", False)]
)
def test_two_ranks_equal_one(form: str, experts: bool, one_rank: torch.Tensor, checkpoint) -> None:
    folder = checkpoint("qwen2_moe", form)
    with engine(folder, OPTIONS, tensor_parallel_size=2, enable_expert_parallel=experts) as llm:
        # A rank quantizes its shard with the scale of the whole matrix: the difference is the order of sums alone, and a
        # code here and there where a reciprocal was rounded twice.
        torch.testing.assert_close(logprobs(llm, PROMPT), one_rank, rtol=0, atol=1e-3)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        torch.testing.assert_close(logprobs(llm, PROMPT), one_rank, rtol=0, atol=1e-3)


@pytest.mark.parametrize("experts", [False, True])
def test_two_ranks_of_gpt_oss_equal_one(experts: bool, checkpoint) -> None:
    folder = checkpoint("gpt_oss", "bf16")
    with engine(folder, OPTIONS) as llm:
        one = logprobs(llm, PROMPT)
    with engine(folder, OPTIONS, tensor_parallel_size=2, enable_expert_parallel=experts) as llm:
        torch.testing.assert_close(logprobs(llm, PROMPT), one, rtol=0, atol=1e-3)
