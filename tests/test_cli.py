"""The `nvfp4` command: quantize, eval, doctor, the frame of bench, and the servers that the demo starts and stops."""

import http.server
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from nvfp4_configs import CheckpointFormat, Nvfp4Config
from nvfp4_kernels import Nvfp4Weight, quantize_weight
from nvfp4_plugin.cli import app, bench_block, bench_vllm, benchmark, processes, server
from nvfp4_plugin.cli.benchmark import Case, Unavailable
from nvfp4_plugin.cli.model_folder import ModelFolder, sqnr
from nvfp4_plugin.cli.sample_model import cache_folder

demo = importlib.import_module("nvfp4_plugin.cli.demo")  # the package's own `demo` is the command

CPU = torch.device("cpu")


def invoke(*arguments: object, status: int = 0):
    """Run the command in this process; its output as one line, so that wrapping hides no words."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result


def one_line(text: str) -> str:
    return " ".join(text.replace("│", " ").split())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model in two files: two layers, a router, an expert, a norm, an embedding, a head, an odd K."""
    torch.manual_seed(int(time.time()))
    folder = tmp_path / "model"
    folder.mkdir()

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16)

    first = {
        "model.embed_tokens.weight": weight(32, 64),
        "model.layers.0.self_attn.q_proj.weight": weight(64, 64) * 4,
        "model.layers.0.self_attn.k_proj.weight": weight(32, 64),
        "model.layers.0.self_attn.q_proj.bias": weight(64),
        "model.layers.0.mlp.gate.weight": weight(4, 64),
        "model.layers.0.mlp.experts.0.down_proj.weight": weight(64, 32),
        "model.layers.0.input_layernorm.weight": weight(64),
    }
    second = {
        # Runs fused with q and k, and lies in another file.
        "model.layers.0.self_attn.v_proj.weight": weight(32, 64) / 4,
        "model.layers.0.mlp.odd_proj.weight": weight(64, 24),
        "model.layers.0.conv.weight": weight(8, 8, 4),
        "lm_head.weight": weight(32, 64),
    }
    for number, tensors in enumerate((first, second), 1):
        save_file(tensors, folder / f"model-0000{number}-of-00002.safetensors")
    weight_map = {name: f"model-0000{n}-of-00002.safetensors" for n, t in enumerate((first, second), 1) for name in t}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "hidden_size": 64}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


QUANTIZED = [
    "model.layers.0.mlp.experts.0.down_proj",
    "model.layers.0.self_attn.k_proj",
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.v_proj",
]


# ---------------------------------------------------------------------------------------------------------------------
# nvfp4 quantize


def test_quantize_writes_a_modelopt_checkpoint(model, tmp_path):
    out = tmp_path / "out"
    result = invoke("quantize", model, out, "--device", "cpu")
    assert "4 layers" in result.output
    before, after = tensors_of(model), tensors_of(out)
    assert sorted(name.removesuffix(".weight_scale") for name in after if name.endswith("weight_scale")) == QUANTIZED
    for module in QUANTIZED:
        data, scales, scale = (after[f"{module}.{name}"] for name in ("weight", "weight_scale", "weight_scale_2"))
        assert scale.shape == ()
        expected = quantize_weight(before[f"{module}.weight"], scale_search="mse", global_scale=scale)
        assert torch.equal(data, expected.data)
        assert torch.equal(scales.view(torch.uint8), expected.scales.view(torch.uint8))
        assert sqnr(before[f"{module}.weight"], Nvfp4Weight(data, scales, scale)) > 20
    untouched = [name for name in before if name.removesuffix(".weight") not in QUANTIZED]
    assert all(torch.equal(before[name], after[name]) for name in untouched)
    assert len(after) == len(untouched) + 3 * len(QUANTIZED)


def test_quantize_writes_config_and_index(model, tmp_path):
    out = tmp_path / "out"
    invoke("quantize", model, out)
    config = json.loads((out / "config.json").read_text())
    assert config["hidden_size"] == 64
    parsed = CheckpointFormat.parse(config["quantization_config"])
    assert (parsed.kind, parsed.static_activations) == ("modelopt", False)
    assert {"lm_head", "model.layers.0.mlp.gate", "model.layers.0.mlp.odd_proj"} <= set(parsed.ignore)
    assert not any(parsed.ignores(module) for module in QUANTIZED)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        with safe_open(out / file, framework="pt") as handle:
            assert name in handle.keys()  # noqa: SIM118
    assert set(index["weight_map"]) == set(tensors_of(out))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors_of(out).values())
    assert (out / "tokenizer.json").read_text() == "{}"


def test_projections_that_run_fused_share_a_global_scale(model, tmp_path):
    invoke("quantize", model, tmp_path / "out")
    after, before = tensors_of(tmp_path / "out"), tensors_of(model)
    q, k, v = (after[f"model.layers.0.self_attn.{name}_proj.weight_scale_2"] for name in "qkv")
    assert q == k == v
    assert q == quantize_weight(before["model.layers.0.self_attn.q_proj.weight"]).global_scale


def test_quantize_honours_options(model, tmp_path):
    out = tmp_path / "out"
    result = invoke("quantize", model, out, "--ignore", "*_proj", "--ignore", "no.such", "--lm-head", "--recipe", "fast_load")
    assert "ignore: 'no.such' matches no module" in one_line(result.output)
    after = tensors_of(out)
    assert [name for name in after if name.endswith("weight_scale")] == ["lm_head.weight_scale"]
    expected = quantize_weight(tensors_of(model)["lm_head.weight"], scale_search="absmax")
    assert torch.equal(after["lm_head.weight"], expected.data)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        # Two of them, so that k_proj alone is left.
        (
            "re:.*[qv]_proj",
            "mean {attn}.q_proj, {attn}.v_proj but not {attn}.k_proj, which run as one fused layer {attn}.qkv_proj:",
        ),
        (
            "*.experts.1.*",
            "mean {experts}.1.gate_proj, {experts}.1.up_proj but not {experts}.0.gate_proj, {experts}.0.up_proj, "
            "{experts}.2.gate_proj and 1 more, which run as one fused layer {experts}:",
        ),
    ],
)
def test_quantize_refuses_to_leave_parts_of_a_fused_layer(pattern, words, model, tmp_path):
    file = model / "model-00002-of-00002.safetensors"
    block = "model.layers.1.mlp.experts"
    experts = {
        f"{block}.{i}.{name}.weight": torch.randn(32, 64, dtype=torch.bfloat16)
        for i in range(3)
        for name in ("gate_proj", "up_proj")
    }
    save_file({**load_file(file), **experts}, file)
    result = invoke("quantize", model, tmp_path / "out", "--ignore", pattern, status=1)
    words = words.format(attn="model.layers.0.self_attn", experts=block)
    assert result.output.startswith(f"error: ignore: the patterns {pattern} {words}")
    assert result.output.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_quantize_lets_whole_fused_layers_be_ignored(model, tmp_path):
    invoke("quantize", model, tmp_path / "out", "--ignore", "self_attn")
    after = tensors_of(tmp_path / "out")
    assert [name for name in after if name.endswith("weight_scale")] == [f"{QUANTIZED[0]}.weight_scale"]


def test_quantize_names_a_nan_tensor_and_leaves_nothing(model, tmp_path):
    file = model / "model-00002-of-00002.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.v_proj.weight"][3, 5:7] = float("nan")
    save_file(tensors, file)
    result = invoke("quantize", model, tmp_path / "out", status=1)
    # Also of a projection that runs fused: the first of them is what is being written.
    assert f"error: model.layers.0.self_attn.v_proj.weight ({file}): weight: 2 values are NaN" in result.output
    assert "the first at [3, 5]" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def _truncate(model: Path) -> None:
    file = model / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _config(model: Path, **changes: object) -> None:
    (model / "config.json").write_text(json.dumps({"model_type": "llama", **changes}))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda model: (model / "config.json").unlink(), ["no config.json"]),
        (lambda model: (model / "config.json").write_text("{"), ["config.json is not JSON"]),
        (lambda model: (model / "config.json").write_text("[]"), ["config.json: got []; allowed: a JSON object"]),
        (lambda model: (model / "config.json").write_bytes(b"\xff"), ["config.json is not JSON"]),
        (partial(_config, quantization_config="foo"), ["quantized already (foo)"]),
        (lambda model: [file.unlink() for file in model.glob("*.safetensors*")], ["no *.safetensors"]),
        (lambda model: (model / "model-00002-of-00002.safetensors").unlink(), ["00002-of-00002", "missing"]),
        (_truncate, ["model-00001-of-00002.safetensors is not a whole safetensors file"]),
        (partial(_config, quantization_config={"quant_method": "fp8"}), ["quantized already (fp8)", "bf16"]),
        (partial(_config, model_type="gpt2"), ["model_type: got 'gpt2'", "transposed"]),
    ],
)
def test_quantize_says_what_is_wrong_with_a_model(model, tmp_path, spoil, words):
    spoil(model)
    text = one_line(invoke("quantize", model, tmp_path / "out", status=1).output)
    for word in ["error:", *words]:
        assert word in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "hoper_fp8"], ["unknown recipe 'hoper_fp8'", "did you mean 'hopper_fp8'"]),
        (["--scale-search", "sse"], ["scale_search: got 'sse'", "'four_over_six'"]),
        (["--ignore", "re:("], ["ignore: 're:(' is not a regular expression"]),
        (["--device", "gpu"], ["got 'gpu'", "cuda:N"]),
        (["--device", "meta"], ["got 'meta'; allowed: auto, cpu, cuda, cuda:N"]),
        (["--device", "cuda:99"], ["cuda:99", "CUDA devices"]),
    ],
)
def test_bad_options_are_refused(model, tmp_path, arguments, words):
    text = one_line(invoke("quantize", model, tmp_path / "out", *arguments, status=2).output)
    for word in words:
        assert word in text


def test_quantize_does_not_overwrite(model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("")
    assert "out exists" in one_line(invoke("quantize", model, out, status=1).output)
    assert (out / "precious").exists()


def test_quantize_deletes_nothing_that_it_did_not_make(model, tmp_path):
    mine = tmp_path / "out.partial" / "precious"
    mine.parent.mkdir()
    mine.write_text("")
    invoke("quantize", model, tmp_path / "out")
    assert mine.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "out.partial"]


def test_quantize_fills_the_working_directory(model, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    invoke("quantize", model, ".")
    assert sorted(os.listdir(".")) == sorted(path.name for path in model.iterdir())


@pytest.mark.parametrize("out", ["/proc/out", "file/out"])
def test_quantize_says_what_it_cannot_write(out, model, tmp_path):
    (tmp_path / "file").write_text("")
    result = invoke("quantize", model, tmp_path / out, status=1)
    last = result.output.splitlines()[-1]
    assert last.startswith("error: ")
    assert out in last


def _add(model: Path, **weights: torch.Tensor) -> None:
    file = model / "model-00002-of-00002.safetensors"
    save_file({**load_file(file), **weights}, file)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("model.layers.0.mlp.experts.gate_up_proj", (2, 64, 64), "stacked experts are quantized only while they load: serve"),
        # Its gate and up could be, and run in one module with it.
        ("model.layers.0.mlp.experts.1.down_proj.weight", (64, 24), "K = 24 is not a multiple of 16, and it runs as one with"),
    ],
)
def test_quantize_refuses_experts_that_cannot_be_served(name, shape, words, model, tmp_path):
    _add(model, **{name: torch.randn(shape, dtype=torch.bfloat16)})
    result = invoke("quantize", model, tmp_path / "out", status=1)
    assert result.output.startswith(f"error: {name.removesuffix('.weight')}")
    assert words in result.output


@pytest.mark.parametrize("command", ["quantize", "eval"])
def test_warnings_name_what_stays_as_it_is(command, model, tmp_path):
    _config(model, tie_word_embeddings=True)
    result = invoke(command, model, *([tmp_path / "out"] if command == "quantize" else []), "--lm-head")
    assert "warning: not quantized: model.layers.0.mlp.odd_proj: K = 24 is not a multiple of 16\n" in result.stderr
    assert f"warning: lm_head: {model} has no head of its own" in result.stderr


def test_sizes_are_told_in_a_unit_that_fits(model, tmp_path):
    assert "4 layers, 20.0 KiB -> 5.6 KiB" in invoke("quantize", model, tmp_path / "out").output


# ---------------------------------------------------------------------------------------------------------------------
# nvfp4 eval and doctor


def test_version():
    assert re.fullmatch(r"nvfp4-plugin \S+\n", invoke("--version").output)


def test_eval_of_no_layer_is_an_error(model):
    assert "error: " in (text := invoke("eval", model, "--ignore", "*", status=1).output)
    assert "found no linear layer to quantize" in text


@pytest.mark.parametrize("device", ["meta", "mps"])
@pytest.mark.parametrize("command", [["doctor"], ["eval", "/"]])
def test_devices_without_kernels_are_refused(command, device):
    assert f"got '{device}'" in one_line(invoke(*command, "--device", device, status=2).output)


def test_eval_measures_each_layer(model):
    report = json.loads(invoke("eval", model, "--json", "--scale-search", "absmax", "--device", "cpu").stdout)
    layers = {layer["layer"]: layer["sqnr_db"] for layer in report["layers"]}
    assert sorted(layers) == QUANTIZED
    for module, measured in layers.items():
        weight = tensors_of(model)[f"{module}.weight"]
        error = weight.double() - quantize_weight(weight, scale_search="absmax").dequantize(torch.float64)
        assert measured == pytest.approx(
            10 * torch.log10(weight.double().square().sum() / error.square().sum()).item(), abs=1e-3
        )
    assert report["mean_sqnr_db"] == pytest.approx(sum(layers.values()) / len(layers))
    better = json.loads(invoke("eval", model, "--json", "--scale-search", "mse").stdout)
    assert better["mean_sqnr_db"] > report["mean_sqnr_db"] + 0.5


def test_eval_prints_a_table(model):
    text = one_line(invoke("eval", model).stdout)
    assert "scale_search mse" in text
    assert all(module in text for module in QUANTIZED)
    assert "over 4 layers" in text


def test_eval_of_weights_that_lose_nothing(model):
    for file in model.glob("*.safetensors"):
        save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}, file)
    report = json.loads(invoke("eval", model, "--json").stdout)
    assert report["mean_sqnr_db"] is None
    assert len(report["layers"]) == 4


def test_doctor():
    report = json.loads(invoke("doctor", "--json", "--device", "cpu").stdout)
    assert report["device"]["type"] == "cpu"
    # A distribution of PyPI leaves out which CUDA it was built for, which torch tells behind a "+".
    assert report["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    for framework in report["frameworks"]:
        assert framework["installed"]
        assert framework["entry_point"].startswith("nvfp4_plugin.")
        assert framework["knows_nvfp4"] is True
    kernels = {(choice["operation"], choice["mode"]): choice for choice in report["kernels"]}
    for mode in ("auto", "none", "fp8_per_token", "nvfp4_per_token", "nvfp4_per_tensor"):
        assert kernels["linear", mode]["kernel"]
        assert kernels["fused_moe", mode]["reason"]


def test_doctor_reports_what_is_wrong(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    monkeypatch.setenv("NVFP4_CONFIG", "no_such_recipe")
    text = one_line(invoke("doctor", "--device", "cpu", status=1).output)
    assert "VLLM_PLUGINS=other leaves the plugin out" in text
    assert "unknown recipe 'no_such_recipe'" in text


# ---------------------------------------------------------------------------------------------------------------------
# nvfp4 bench


def test_time_calls_tells_fast_from_slow():
    fast = benchmark.time_calls([lambda: time.sleep(0.001)], CPU, repeats=5)
    slow = benchmark.time_calls([lambda: time.sleep(0.02)] * 3, CPU, repeats=5)
    assert fast.timer == "perf_counter"
    assert 0.001 <= fast.seconds < slow.seconds
    assert slow.seconds >= 0.02


def test_time_calls_tells_what_the_host_does():
    made = []
    timing = benchmark.time_calls([lambda: made.append(1), lambda: time.sleep(0.002)], CPU, repeats=5, host=True)
    assert timing.timer == "host"
    assert timing.seconds < 0.002  # three of the five are the quick one
    assert len(made) == 3 + 3


def _unavailable():
    raise Unavailable("not installed")


def test_run_prints_times_reasons_and_a_plot(tmp_path, capsys):
    def cases():
        for m in (1, 16):
            yield Case({"layer": "qkv", "M": m}, "ours", lambda: [lambda: time.sleep(0.001)], bytes=10**6, flops=10**9)
            yield Case({"layer": "qkv", "M": m}, "peer", _unavailable)

    plot = tmp_path / "plots" / "times.png"
    results = benchmark.run("Layers", cases(), CPU, plot=plot, repeats=3)
    printed = capsys.readouterr()
    # Where nobody sees the bar, each time is said at once: a run of many minutes may not come to its table.
    assert re.search(r"^qkv M=1 ours: \d{4}\.\d\d us\nqkv M=1 peer: not installed\nqkv M=16 ours: ", printed.err, re.MULTILINE)
    text = one_line(printed.out)
    assert "Layers" in text
    assert "peer: not installed" in text
    assert text.count("not installed") == 1
    assert [result.timing is None for result in results] == [False, True, False, True]
    assert plot.read_bytes().startswith(b"\x89PNG")

    benchmark.run("Layers", cases(), CPU, json=True, repeats=3)
    document = json.loads(capsys.readouterr().out)
    first, second = document["measurements"][:2]
    assert first["M"] == 1
    assert first["GB/s"] == pytest.approx(1e6 / (first["microseconds"] * 1e-6) / 1e9)
    assert first["TFLOP/s"] == pytest.approx(1e9 / (first["microseconds"] * 1e-6) / 1e12)
    assert second == {"layer": "qkv", "M": 1, "name": "peer", "unavailable": "not installed"}

    saved, again = tmp_path / "saved.json", tmp_path / "again.png"
    saved.write_text(json.dumps(document))
    shown = one_line(invoke("bench", "show", str(saved), "--plot", str(again)).output)
    assert "Layers" in shown
    assert f"{first['microseconds']:,.1f}" in shown
    assert "peer: not installed" in shown
    assert again.read_bytes().startswith(b"\x89PNG")

    document["measurements"] = document["measurements"][:2]  # one point
    saved.write_text(json.dumps(document))
    again.unlink()
    invoke("bench", "show", str(saved), "--plot", str(again))
    assert again.read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def termination():
    """Whatever a command makes of SIGTERM and SIGHUP is undone."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("termination")
@pytest.mark.parametrize("again", [1e-5, 1e-3, 3e-2])
def test_a_run_that_is_stopped_prints_what_it_has(capsys, again):
    """`timeout` sends its signal twice, the second time to the whole process group."""

    def stop():
        threading.Timer(again, os.kill, (os.getpid(), signal.SIGTERM)).start()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    cases = [Case({"M": m}, "ours", setup) for m, setup in ((1, lambda: [lambda: None]), (2, stop), (3, stop))]
    with pytest.raises(typer.Exit) as left:
        benchmark.run("Layers", cases, CPU, json=True, repeats=1)
    assert left.value.exit_code == 130
    captured = capsys.readouterr()
    assert [row["M"] for row in json.loads(captured.out)["measurements"]] == [1]
    assert "stopped after 1 of 3 cases" in captured.err
    time.sleep(again)


def test_a_file_that_is_no_run_is_refused(tmp_path):
    other = tmp_path / "other.json"
    other.write_text('{"a": 1}')
    assert "is not a benchmark's JSON" in one_line(invoke("bench", "show", str(other), status=2).output)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["quantize", "--shape", "3x64", "--only", "per_token", "--only", "copy"], ["per_token", "copy"]),
        (["linear", "--layer", "48x64", "--m", "3"], ["none", "nvfp4_per_token", "bf16"]),
        (["moe", "--model", "4x2x64x32", "--m", "3"], ["none", "nvfp4_per_token"]),
    ],
)
def test_benchmarks_run_on_the_cpu(arguments, names):
    output = invoke("bench", *arguments, "--device", "cpu", "--repeats", "2", "--json").stdout
    measured = {row["name"]: row for row in json.loads(output)["measurements"]}
    assert all(measured[name]["microseconds"] > 0 for name in names)
    document = json.loads(invoke("bench", *arguments, "--device", "cpu", "--repeats", "2", "--json", "--host").stdout)
    assert document["title"].endswith("what a call keeps the host")
    assert all(row["timer"] == "host" and "GB/s" not in row for row in document["measurements"] if row["name"] in names)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        *((["linear", "--layer", shape], f"--layer: got '{shape}'; allowed: ") for shape in ("64x40", "0x64", "64x0", "²x64")),
        (["quantize", "--shape", "64x40"], "--shape: got '64x40'; allowed: MxK with K a multiple of 16"),
        (["moe", "--model", "4x2x0x32"], "--model: got '4x2x0x32'; allowed: "),
        *(([bench, "--mode", "bogus"], "--mode: got 'bogus'; allowed: auto, nvfp4_per_token") for bench in ("linear", "moe")),
        *(([bench, "--m", "-1"], "--m: got -1; allowed: 1 or more") for bench in ("linear", "block", "moe")),
        (["block", "--model", "bogus"], "--model: got 'bogus'; allowed: llama-3-8b, "),
        (["linear", "--plot", "x.txt"], "'--plot': got 'x.txt'; allowed: a file that ends in .png"),
        (["linear", "--plot", "/proc/x.png"], "'--plot': got '/proc/x.png'; allowed: a file that can be written"),
        (["vllm", "--layers", "-3"], "--layers: got -3; allowed: 0 or more"),
        (["vllm", "--activation", "foo"], "--activation: got 'foo'; allowed: auto, "),
    ],
)
def test_benchmarks_refuse_bad_options_before_any_work(arguments, words):
    assert words in one_line(invoke("bench", *arguments, status=2).output)


def test_bench_block_times_the_layers_of_a_block(monkeypatch):
    monkeypatch.setitem(bench_block.BLOCKS, "tiny", (64, 96, 32, 128))
    arguments = ("bench", "block", "--model", "tiny", "--ranks", "1", "--ranks", "2", "--m", "3", "--device", "cpu")
    rows = json.loads(invoke(*arguments, "--repeats", "2", "--json").stdout)["measurements"]
    ours = {row["block"]: row for row in rows if row["name"] == "auto"}
    assert list(ours) == ["tiny", "tiny on 2 GPUs"]
    values = 64 * (96 + 2 * 32) + 64 * 96 + 2 * 128 * 64 + 64 * 128
    for row, ranks in zip(ours.values(), (1, 2), strict=True):
        operations = 2 * 3 * values / ranks
        assert row["TFLOP/s"] * row["microseconds"] * 1e6 == pytest.approx(operations)
    assert {row["unavailable"] for row in rows if row["name"] != "auto"} == {"needs a CUDA device, this is cpu"}
    assert "got 3, which tiny cannot be divided among" in one_line(invoke(*arguments, "--ranks", "3", status=2).output)
    assert "needs an SM90 GPU" in one_line(invoke(*arguments, "--tune", status=2).output)


def test_bench_vllm_fails_where_every_method_does(monkeypatch):
    monkeypatch.setattr(bench_vllm, "_measure", lambda methods, *_: {method: {"error": "exit code 1"} for method in methods})
    for form in ([], ["--json"]):
        assert "error: no method could be measured\n" in invoke("bench", "vllm", *form, status=1).stderr


def test_a_backend_of_bench_linear_is_known_and_serves_or_says_why():
    text = one_line(invoke("bench", "linear", "--backend", "cutlass", status=2).output)
    assert "got 'cutlass'; allowed: cuda, reference, cublas" in text
    where = ("--device", "cpu", "--layer", "64x64", "--m", "2", "--mode", "nvfp4_per_token", "--repeats", "2", "--json")
    [row] = [
        row
        for row in json.loads(invoke("bench", "linear", "--backend", "cublas", *where).stdout)["measurements"]
        if row["name"] == "nvfp4_per_token"
    ]
    assert "'cublas' cannot serve this call: the tensor is on cpu" in row["unavailable"]


# ---------------------------------------------------------------------------------------------------------------------
# Servers, and the folder of the sample model

SERVER = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def _gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, RuntimeError])
def test_a_server_is_stopped_with_its_children_however_we_leave(tmp_path, error):
    port, log = server.free_port(), tmp_path / "log"
    launch = server.Launch([sys.executable, "-c", SERVER, str(port)], {})
    with pytest.raises(error) if error else nullcontext(), server.running(launch, port, log, timeout=60) as url:
        assert url == f"http://127.0.0.1:{port}"
        child = int(log.read_text().split()[1])
        assert not _gone(child)
        if error:
            raise error
    deadline = time.monotonic() + 10
    while not _gone(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _gone(child)


def test_a_signal_at_the_fork_stops_the_process(monkeypatch):
    started = []

    class Interrupted(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self.pid)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt), processes.process_group([sys.executable, "-c", "import time; time.sleep(600)"]):
            pass
        assert [_gone(pid) for pid in started] == [True]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_process_started_beside_the_main_thread_is_stopped():
    with ThreadPoolExecutor() as pool:

        def work():
            with processes.process_group([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
                assert not _gone(process.pid)
            return process.pid

        assert _gone(pool.submit(work).result())


def test_a_server_that_dies_shows_the_end_of_its_log(tmp_path):
    launch = server.Launch(
        [sys.executable, "-c", "import os; print('because of ' + os.environ['WHY']); exit(3)"], {"WHY": "this"}
    )
    with pytest.raises(server.ServerError, match=r"(?s)status 3.*because of this"), server.running(launch, 1, tmp_path / "log"):
        pytest.fail("it was never ready")


def test_a_server_that_does_not_come_up_is_stopped(tmp_path):
    seen: list[str] = []
    launch = server.Launch([sys.executable, "-c", "import time; print('loading', flush=True); time.sleep(600)"], {})
    start = time.monotonic()
    with (
        pytest.raises(server.ServerError, match=r"(?s)not ready in time.*loading"),
        server.running(launch, server.free_port(), tmp_path / "log", timeout=3, waiting=seen.append),
    ):
        pytest.fail("it was never ready")
    assert time.monotonic() - start < 60
    assert seen[-1] == "loading"


def test_launches_ask_for_nvfp4():
    for make in server.LAUNCHES.values():
        for on_gpu in (False, True):
            command = make("folder", 1234, on_gpu=on_gpu, arguments=["--dtype", "float32"]).command
            assert command[command.index("--quantization") + 1] == "nvfp4"
            assert "127.0.0.1" in command
            assert command[-2:] == ["--dtype", "float32"]


@pytest.mark.parametrize(
    ("config", "context"),
    [({}, 2048), ({"max_position_embeddings": 8192}, 2048), ({"text_config": {"max_position_embeddings": 512}}, 512)],
)
def test_the_demo_asks_for_no_more_context_than_a_model_has(config, context, model):
    _config(model, **config)
    for make in server.LAUNCHES.values():
        assert str(context) in make("folder", 1234, on_gpu=False, context=demo._context(str(model))).command


class Completions(http.server.BaseHTTPRequestHandler):
    """A server of a model without a chat template."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer(200, '{"object": "list", "data": [{"id": "m", "object": "model", "created": 0, "owned_by": ""}]}')

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/chat/completions"):
            return self.answer(400, '{"error": {"message": "no chat template"}}')
        parts = [{"choices": [{"text": word, "index": 0}]} for word in ("Par", "is")]
        chunks = [*parts, {"choices": [], "usage": {"completion_tokens": 2, "prompt_tokens": 1, "total_tokens": 3}}]
        self.answer(
            200, "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n", "text/event-stream"
        )

    def answer(self, status, text, kind="application/json"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(text.encode())


def test_the_demo_asks_a_model_without_a_chat_template_plainly(capsys):
    pytest.importorskip("openai")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Completions) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        answer = demo.ask(f"http://127.0.0.1:{served.server_port}/v1", "Where?", Console(width=200))
        served.shutdown()
    assert (answer.text, answer.tokens) == ("Paris", 2)
    assert "no chat template" in capsys.readouterr().out


def test_the_demo_of_a_quantized_model_leaves_the_comparison_out(model, tmp_path, capsys):
    invoke("quantize", model, tmp_path / "out")
    console = Console(width=200)
    console.print(demo.summary(str(tmp_path / "out"), [demo.Answer("Paris", 2, 0.5)], CPU, console))
    text = one_line(capsys.readouterr().out)
    assert "not compared with bf16: " in text
    assert "is quantized already (modelopt)" in text
    assert "2.0 tokens/s" in text


def test_the_sample_model_lies_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "nvfp4-plugin"
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert cache_folder() == Path.home() / ".cache" / "nvfp4-plugin"


@pytest.mark.parametrize("arguments", [("demo", "MODEL"), ("bench", "vllm", "--layers", "1", "--together")])
def test_an_interrupted_command_leaves_no_process(model, tmp_path, arguments):
    """SIGTERM while a server or an engine starts: the command stops it before it ends."""
    environment = os.environ | {"TMPDIR": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "nvfp4_plugin.cli", *(str(model) if word == "MODEL" else word for word in arguments)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not (children := _children(process.pid)) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert children, output
    assert process.returncode not in (0, None)
    assert all(_gone(child) for child in children)


def _children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in text.read_text().split()] if text.exists() else []


def test_linear_layers_by_name_and_shape(model):
    folder = ModelFolder(model)
    assert sorted(folder.linear_layers(Nvfp4Config())) == QUANTIZED
    reasons = folder.left_alone(Nvfp4Config(ignore=("v_proj",)))
    assert reasons["model.layers.0.mlp.gate"] == "a router"
    assert reasons["model.layers.0.self_attn.v_proj"] == "ignored"
    assert reasons["model.layers.0.mlp.odd_proj"] == "K = 24 is not a multiple of 16"
    assert "lm_head" in reasons["lm_head"]
    assert "lm_head" not in folder.left_alone(Nvfp4Config(lm_head=True))
