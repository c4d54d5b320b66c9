"""Offline inference with SGLang: a bf16 model that becomes NVFP4 while it loads.

    python examples/sglang_offline_inference.py [MODEL]

MODEL is a folder or a hub id. Without one: SmolLM2-135M-Instruct, a small model that comes in a package.
"""

import json
import sys

import torch
from sglang import Engine
from transformers import AutoTokenizer


# SGLang starts processes that import this file again: what they must not run again stands in a function.
def main() -> None:
    if len(sys.argv) > 1:
        model = sys.argv[1]
    else:
        from nvfp4_plugin.cli.sample_model import sample_model

        model = str(sample_model())

    small = {}
    if not torch.cuda.is_available():  # a small KV cache; other programs' memory counts to the share that SGLang may take
        small = {"device": "cpu", "attention_backend": "torch_native", "max_total_tokens": 2048, "mem_fraction_static": 0.9}

    engine = Engine(
        model_path=model,
        # All that it takes: SGLang finds the plugin by itself.
        quantization="nvfp4",
        # Options are optional. W4A16, and the quickest way to choose scales:
        json_model_override_args=json.dumps({"nvfp4": {"activation": "none", "scale_search": "absmax"}}),
        context_length=512,
        log_level="error",
        **small,
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    for question in ("What is the capital of France?", "What is ice made of?"):
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        output = engine.generate(prompt, {"temperature": 0, "max_new_tokens": 24})
        print("answer:", output["text"].strip())
    engine.shutdown()


if __name__ == "__main__":
    main()
