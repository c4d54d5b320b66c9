"""Offline inference with vLLM: a bf16 model that becomes NVFP4 while it loads.

    python examples/offline_inference.py [MODEL]

MODEL is a folder or a hub id. Without one: SmolLM2-135M-Instruct, a small model that comes in a package.
"""

import os
import sys

import torch
from vllm import LLM, SamplingParams


# vLLM starts processes that import this file again: what they must not run again stands in a function.
def main() -> None:
    if len(sys.argv) > 1:
        model = sys.argv[1]
    else:
        from nvfp4_plugin.cli.sample_model import sample_model

        model = str(sample_model())

    on_gpu = torch.cuda.is_available()
    if not on_gpu:  # a small share of this machine: 1 GiB for the KV cache
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

    llm = LLM(
        model,
        # All that it takes: vLLM finds the plugin by itself.
        quantization="nvfp4",
        # Options are optional. W4A16, and the quickest way to choose scales:
        additional_config={"nvfp4": {"activation": "none", "scale_search": "absmax"}},
        max_model_len=512,
        gpu_memory_utilization=0.9 if on_gpu else 0.3,
        enforce_eager=not on_gpu,  # a CPU would spend a minute on compilation
    )
    outputs = llm.chat(
        [[{"role": "user", "content": question}] for question in ("What is the capital of France?", "What is ice made of?")],
        SamplingParams(temperature=0, max_tokens=24),
    )
    for output in outputs:
        print("answer:", output.outputs[0].text.strip())


if __name__ == "__main__":
    main()
