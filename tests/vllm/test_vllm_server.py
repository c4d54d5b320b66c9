"""The OpenAI-compatible server with `--quantization nvfp4`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import vllm_engine  # noqa: F401 (settings of the environment, which the server inherits)
from checkpoints import PROMPT, VOCAB
from vllm_engine import engine

from nvfp4_plugin.cli import server

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def model(checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer: one token for each character that it knows."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("served")
    for file in checkpoint("llama", "modelopt").iterdir():
        (folder / file.name).symlink_to(file)
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{chr(0x100 + i): i for i in range(3, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>").save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = server.free_port()
    arguments = [
        *("--additional-config", json.dumps({"nvfp4": {"activation": "none"}}), "--served-model-name", "tiny"),
        *("--dtype", "float32", "--max-model-len", "128"),
    ]
    launch = server.vllm_launch(str(model), port, on_gpu=False, arguments=arguments)
    # The engine in a process of its own, as users have it.
    environment = {**launch.env, "VLLM_LOGGING_LEVEL": "INFO", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    log = tmp_path_factory.mktemp("log") / "server.log"
    with server.running(server.Launch(launch.command, environment), port, log, timeout=300) as base:
        yield f"{base}/v1"


def test_server_completes_as_the_engine_does(url: str, model: Path) -> None:
    from openai import OpenAI
    from vllm import SamplingParams

    client = OpenAI(base_url=url, api_key="none", max_retries=0)
    assert [served.id for served in client.models.list()] == ["tiny"]
    extra = {"return_token_ids": True, "ignore_eos": True}
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8, temperature=0, extra_body=extra)
    with engine(model, {"activation": "none"}) as llm:
        sampling = SamplingParams(max_tokens=8, temperature=0, detokenize=False, ignore_eos=True)
        [expected] = llm.generate([{"prompt_token_ids": PROMPT}], sampling, use_tqdm=False)
    assert answer.choices[0].model_dump()["token_ids"] == expected.outputs[0].token_ids
    assert answer.usage.completion_tokens == 8
    assert len(answer.choices[0].text) > 0
