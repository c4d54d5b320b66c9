"""A chat with a server that runs NVFP4. Start one first, in another terminal:

    vllm serve MODEL --quantization nvfp4
    python examples/openai_client.py http://127.0.0.1:8000/v1 "What is the capital of France?"

(On a machine without a GPU: `python -m vllm.entrypoints.openai.api_server --model MODEL --quantization nvfp4`.)
"""

import sys

from openai import OpenAI

base_url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
question = sys.argv[2] if len(sys.argv) > 2 else "What is the capital of France?"

# Nothing here knows of NVFP4: it is the server's matter.
client = OpenAI(base_url=base_url, api_key="any")
model = client.models.list().data[0].id
answer = client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": question}], max_tokens=24, temperature=0
)
print(f"{model} answers: {answer.choices[0].message.content}")
