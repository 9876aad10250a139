"""OpenAI's package against the server: a completion, a stream, and a perplexity by an extra route.

dape serve
python examples/openai_client.py --prompt "It was a dark and"
"""

from __future__ import annotations

import argparse
from typing import Any

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description="OpenAI's package against the server.")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key", default="none", help="where the server has keys")
    parser.add_argument("--prompt", default="It was a dark and")
    options = parser.parse_args()
    with OpenAI(base_url=f"{options.base_url}/v1", api_key=options.api_key) as client:
        model = client.models.list().data[0].id

        completion = client.completions.create(
            model=model, prompt=options.prompt, max_tokens=16, temperature=0
        )
        text = completion.choices[0].text
        print("completion:", options.prompt + text)

        print("stream:    ", options.prompt, end="")
        stream = client.completions.create(
            model=model,
            prompt=options.prompt,
            max_tokens=16,
            seed=1,
            stream=True,
            # What OpenAI's package does not know goes here: any of vLLM's parameters.
            extra_body={"min_p": 0.1, "repetition_penalty": 1.1},
        )
        for chunk in stream:
            print(chunk.choices[0].text, end="", flush=True)
        print()

        body = {"input": options.prompt + text}
        answer: Any = client.post("/perplexity", body=body, cast_to=object)
        scored = answer["data"][0]
        print(f"perplexity: {scored['perplexity']:.2f} over {scored['num_scored']} tokens")


if __name__ == "__main__":
    main()
