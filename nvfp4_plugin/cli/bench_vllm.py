"""`nvfp4 bench vllm`: whole models in vLLM, random weights, this plugin beside bf16 and vLLM's own NVFP4.

Every method serves the same shape in an engine and a process of its own; only one of them works at a time, and each gets
several turns. `python -m` this module with a JSON job on standard input is that process; it prints one JSON line.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.table import Table

from nvfp4_configs import Activation
from nvfp4_plugin.cli.benchmark import WARM_UP_SECONDS, JsonOption, check_least, check_words
from nvfp4_plugin.cli.errors import CommandError
from nvfp4_plugin.cli.processes import interrupt_on_termination, process_group

_COMMON = {"torch_dtype": "bfloat16", "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        **_COMMON,
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "vocab_size": 151936,
        "rope_theta": 1000000.0,
        "hidden_act": "silu",
        **_COMMON,
    },
}
MODELOPT = {
    "quant_method": "modelopt",
    "quant_algo": "NVFP4",
    "quant_library": "modelopt",
    "group_size": 16,
    "ignore": ["lm_head", "*.gate"],
    "config_groups": {
        "group_0": {
            "input_activations": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
            "weights": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
            "targets": ["Linear"],
        }
    },
}
# Columns: this plugin (its options), vLLM's own NVFP4 for the same checkpoint form, and no quantization.
METHODS: dict[str, dict[str, Any]] = {
    "nvfp4-plugin": {"quantization": "nvfp4"},
    "vllm-nvfp4": {"quantization": None},
    "bf16": {"quantization": None},
}
_RESULT = '{"tokens_per_second"'
_READY, _DONE = "ready", "done"
_GO, _WENT = "go {}", "went {}"  # of a turn
BATCHES = (1, 16, 64)
PREFILL = (8, 2048)
TOKENS = 144  # that each prompt of a decoding batch gets
TURNS, REPEATS = 3, 2
KV_CACHE_BYTES = 4 << 30  # for all of PREFILL's tokens, and the same for every method


def vllm(
    shape: Annotated[str, typer.Option(help=f"Model shape: {', '.join(SHAPES)}.")] = "llama-3-8b",
    layers: Annotated[int, typer.Option(help="Decoder layers; 0 takes the model's own number.")] = 0,
    method: Annotated[list[str], typer.Option(help="May be given several times.")] = list(METHODS),  # noqa: B006
    activation: Annotated[str, typer.Option(help="This plugin's activation mode.")] = "auto",
    timeout: Annotated[int, typer.Option(help="Seconds that one method may take to start, and to be measured.")] = 900,
    together: Annotated[
        bool, typer.Option("--together", help="Start all engines at once, each on its share of the memory; they work in turns.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Prefill and decode throughput of a whole model in vLLM with random weights, by CUDA graphs and torch.compile."""
    check_words("--shape", [shape], SHAPES)
    check_least("--layers", [layers], 0)
    check_least("--timeout", [timeout], 1)
    check_words("--method", method, METHODS)
    check_words("--activation", [activation], get_args(Activation))
    config = dict(SHAPES[shape])
    if layers:
        config["num_hidden_layers"] = layers
    interrupt_on_termination()
    results = _measure(method, config, activation, timeout, together)
    if json:
        sys.stdout.write(json_line({"shape": shape, "layers": config["num_hidden_layers"], "results": results}) + "\n")
    else:
        _show(shape, config["num_hidden_layers"], results)
    if all("error" in result for result in results.values()):
        raise CommandError("no method could be measured")


def _show(shape: str, layers: int, results: dict[str, dict[str, Any]]) -> None:
    table = Table(title=f"{shape}, {layers} layers, random weights: tokens/s", title_justify="left")
    table.add_column("case")
    for name in results:
        table.add_column(name, justify="right")
    cases = next((list(result["tokens_per_second"]) for result in results.values() if "tokens_per_second" in result), [])
    for case in cases:
        rates = [result.get("tokens_per_second", {}).get(case) for result in results.values()]
        table.add_row(case, *("-" if rate is None else f"{rate:,.0f}" for rate in rates))
    Console().print(table)
    for name, result in results.items():
        if "error" in result:
            Console().print(f"- {name}: {result['error']}", style="dim", markup=False, highlight=False)


def json_line(value: object) -> str:
    """`value` as one line of JSON."""
    return json.dumps(value, separators=(",", ":"))


class _Worker:
    """The process of one method: starts its engine, works in turns, prints what it measured. Gone when closed."""

    def __init__(self, method: str, config: dict[str, Any], activation: str, share: float, timeout: int) -> None:
        self._started = time.monotonic()
        self._timeout = timeout
        with contextlib.ExitStack() as stack:
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            self._log = stack.enter_context(tempfile.TemporaryFile("w+"))
            self._process = stack.enter_context(
                process_group(
                    [sys.executable, "-m", "nvfp4_plugin.cli.bench_vllm"],
                    stdin=subprocess.PIPE,
                    stdout=self._log,
                    stderr=subprocess.STDOUT,
                )
            )
            job = {
                "method": method,
                "config": config,
                "activation": activation,
                "memory": share,
                "folder": str(self._folder),
                "batches": BATCHES,
                "prefill": PREFILL,
                "kv_cache_bytes": KV_CACHE_BYTES,
            }
            assert self._process.stdin is not None
            self._process.stdin.write(json_line(job).encode())
            self._process.stdin.close()
            self.close = stack.pop_all().close

    def _wait(self, until: Callable[[], bool], deadline: float) -> None:
        while self._process.poll() is None and not until() and time.monotonic() < deadline:
            time.sleep(0.1)

    def wait_until_ready(self) -> None:
        """Return when the engine has started, or will not any more."""
        self._wait((self._folder / _READY).exists, self._started + self._timeout)

    def take_turn(self, turn: int) -> bool:
        """Let the engine go through all cases; whether it has."""
        (self._folder / _GO.format(turn)).touch()
        went = (self._folder / _WENT.format(turn)).exists
        self._wait(went, time.monotonic() + self._timeout)  # from now on: it may have waited for others
        return went()

    def result(self) -> dict[str, Any]:
        """What the process printed, or an error."""
        # It prints soon after its last turn, and it does not matter how long the engine takes to go.
        self._wait((self._folder / _DONE).exists, time.monotonic() + 10)
        code = self._process.poll()
        self._log.seek(0)
        output = self._log.read()
        lines = [line for line in output.splitlines() if line.startswith(_RESULT)]
        if lines:
            return json.loads(lines[-1])
        sys.stderr.write(output[-6000:])
        problem = f"not done after {self._timeout} s" if code is None else f"exit code {code}"
        return {"error": f"{problem}, its last lines are on standard error"}


def _measure(
    methods: Sequence[str], config: dict[str, Any], activation: str, timeout: int, together: bool
) -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {}
    for group in [methods] if together else [[method] for method in methods]:
        share = 0.9 / len(group)
        with contextlib.ExitStack() as stack:
            workers: dict[str, _Worker] = {}
            for method in group:
                workers[method] = stack.enter_context(contextlib.closing(_Worker(method, config, activation, share, timeout)))
            for worker in workers.values():
                worker.wait_until_ready()
            # A machine is not the same all the time: what is compared is measured close together.
            working = list(workers.values())
            for turn in range(TURNS):
                working = [worker for worker in working if worker.take_turn(turn)]
            for method, worker in workers.items():
                results[method] = worker.result()
                # Minutes pass until the table; what is known is said at once.
                sys.stderr.write(f"{method}: {json_line(results[method])}\n")
    return results


def _work() -> None:
    """The process of one method: reads a job, serves the shape, prints one line."""
    job = json.load(sys.stdin)
    config, method = job["config"], job["method"]
    options: dict[str, Any] = {key: value for key, value in METHODS[method].items() if value is not None}
    if method != "bf16":
        config = config | {"quantization_config": MODELOPT}
    if method == "nvfp4-plugin":
        options["additional_config"] = {"nvfp4": {"activation": job["activation"]}}
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        start = time.perf_counter()
        engine = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_model_len=4096,
            max_num_seqs=max(job["batches"]),
            gpu_memory_utilization=job["memory"],
            kv_cache_memory_bytes=job["kv_cache_bytes"],
            disable_log_stats=False,  # they have the times of tokens
            compilation_config={"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64]},
            **options,
        )
        started = time.perf_counter() - start
        # Without this plugin's entry point vLLM takes such a checkpoint for one of its own, whatever --quantization says.
        served_by = type(engine.llm_engine.vllm_config.quant_config).__module__
        if served_by.startswith("nvfp4_plugin.") != (method == "nvfp4-plugin"):
            raise RuntimeError(f"{method}: vLLM serves it by {served_by}; is nvfp4-plugin installed, with its entry points?")
        Path(job["folder"], _READY).touch()
        seconds: dict[str, list[float]] = {}
        for turn in range(TURNS):
            while not Path(job["folder"], _GO.format(turn)).exists():
                time.sleep(0.05)
            _take_turn(engine, job, config["vocab_size"], seconds)
            Path(job["folder"], _WENT.format(turn)).touch()
    rates = {name: count / statistics.median(seconds[name]) for name, count in _tokens(job).items()}
    print(json_line({"tokens_per_second": rates, "seconds_to_start": started}), flush=True)
    Path(job["folder"], _DONE).touch()


def _take_turn(engine: Any, job: dict[str, Any], vocabulary: int, seconds: dict[str, list[float]]) -> None:
    """Add to `seconds` how long each case takes, once a card's clocks are what they stay at."""
    rows, length = job["prefill"]
    end = time.monotonic() + WARM_UP_SECONDS
    while time.monotonic() < end:
        _generate(engine, max(job["batches"]), 16, 16, vocabulary)
    for _ in range(REPEATS):
        for batch in job["batches"]:
            outputs = _generate(engine, batch, 16, TOKENS, vocabulary)
            seconds.setdefault(_decode(batch), []).append(_seconds_of_decoding([output.metrics for output in outputs]))
        start = time.perf_counter()
        _generate(engine, rows, length, 1, vocabulary)
        seconds.setdefault(_prefill(job), []).append(time.perf_counter() - start)


def _tokens(job: dict[str, Any]) -> dict[str, int]:
    """Case -> tokens in the seconds that are taken of it."""
    rows, length = job["prefill"]
    return {_decode(batch): batch * (TOKENS - 1) for batch in job["batches"]} | {_prefill(job): rows * length}


def _decode(batch: int) -> str:
    return f"decode, batch {batch}"


def _prefill(job: dict[str, Any]) -> str:
    return "prefill {} x {}".format(*job["prefill"])


def _seconds_of_decoding(prompts: Sequence[Any]) -> float:
    """From the last first token of a batch to the end of that prompt, by the engine's clock: prompts arrive one by one, and up
    to then the engine has other work. Those that came before it end some steps before it."""
    last = max(prompts, key=lambda prompt: prompt.first_token_ts)
    return last.last_token_ts - last.first_token_ts


def _generate(engine: Any, rows: int, length: int, tokens: int, vocabulary: int) -> list[Any]:
    """vLLM's output for `rows` random prompts of `length` tokens, with `tokens` new ones each."""
    import random

    from vllm import SamplingParams

    prompts: Sequence[Any] = [
        {"prompt_token_ids": [random.randrange(10, vocabulary - 10) for _ in range(length)]} for _ in range(rows)
    ]
    params = SamplingParams(max_tokens=tokens, min_tokens=tokens, ignore_eos=True, temperature=0, detokenize=False)
    outputs: list[Any] = engine.generate(prompts, params, use_tqdm=False)
    return outputs


if __name__ == "__main__":
    _work()
