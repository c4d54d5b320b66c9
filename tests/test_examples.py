"""Every file in examples/, run as its docstring says, with the demo's own model on the real vLLM."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvfp4_plugin.cli import server
from nvfp4_plugin.cli.sample_model import NAME, sample_model

EXAMPLES = Path(__file__).parent.parent / "examples"
# Scales from the maximum: the quickest to load.
ENVIRONMENT = os.environ | {"NVFP4_CONFIG": "fast_load", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def run(*command: str) -> str:
    """The output of a command, which has to succeed."""
    result = subprocess.run([sys.executable, *command], env=ENVIRONMENT, capture_output=True, text=True, timeout=800)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def model() -> Path:
    folder = sample_model()
    assert sorted(folder.glob("*.safetensors"))
    assert (folder / "tokenizer.json").is_file()
    return folder


@pytest.fixture(scope="module")
def url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = server.free_port()
    launch = server.vllm_launch(str(model), port, on_gpu=False, arguments=["--served-model-name", NAME])
    launch = server.Launch(launch.command, {**launch.env, "NVFP4_CONFIG": "fast_load"})
    with server.running(launch, port, tmp_path_factory.mktemp("log") / "vllm.log") as base:
        yield base


def test_every_example_is_run_here():
    assert {file.name for file in EXAMPLES.iterdir() if file.suffix == ".py"} == {
        "kernels.py",
        "moe_layer.py",
        "offline_inference.py",
        "openai_client.py",
        "sglang_offline_inference.py",
    }


def test_kernels():
    output = run(str(EXAMPLES / "kernels.py"))
    per_token = float(re.search(r"per token: +the quiet tokens keep ([\d.]+) dB", output)[1])
    per_tensor = float(re.search(r"per tensor: +the quiet tokens keep ([\d.]+) dB", output)[1])
    assert per_token > per_tensor + 1
    errors = [float(value) for value in re.findall(r"activation \w+ +([\d.]+) dB", output)]
    assert len(errors) == 3
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] > 15


def test_moe_layer():
    output = run(str(EXAMPLES / "moe_layer.py"))
    errors = [float(value) for value in re.findall(r"relative error ([\d.]+)", output)]
    assert len(errors) == 3
    assert 0 < errors[0] < errors[1] < errors[2] < 0.3


@pytest.mark.parametrize(
    "file",
    [
        pytest.param("offline_inference.py", marks=pytest.mark.vllm),
        pytest.param("sglang_offline_inference.py", marks=pytest.mark.sglang),
    ],
)
def test_offline_inference(model, file):
    output = run(str(EXAMPLES / file), str(model))
    answers = re.findall(r"^answer: (.*)", output, re.MULTILINE)
    assert len(answers) == 2
    assert "Paris" in answers[0]


@pytest.mark.vllm
def test_openai_client(url):
    output = run(str(EXAMPLES / "openai_client.py"), f"{url}/v1", "What is the capital of France?")
    assert re.match(rf"{NAME} answers: .*Paris", output)
