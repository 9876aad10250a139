"""Convert a Hugging Face checkpoint, serve it, and see that transformers computes the same.

The checkpoint is a tiny GPT-NeoX (Pythia's form) with random weights, made here; take a folder of your own by
--checkpoint. Starts a server of its own:

python examples/convert_checkpoint.py --port 18120
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

DAPE = [sys.executable, "-m", "dape_server"]
"""`dape`, of the Python that runs this."""
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom."


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert a checkpoint and serve it.")
    parser.add_argument("--checkpoint", type=Path, help="a folder of GPT-NeoX's form; by default a tiny one")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        source, model = options.checkpoint or make_checkpoint(Path(name) / "tiny"), Path(name) / "converted"
        subprocess.run([*DAPE, "convert", "--from", "hf", str(source), str(model)], check=True)
        with serving(model, options.port) as client:
            body = {"input": TEXT, "return_token_logprobs": True}
            [scored] = client.post("/v1/perplexity", json=body).raise_for_status().json()["data"]
        ids = torch.tensor([scored["token_ids"]])
        with torch.inference_mode():
            logprobs = AutoModelForCausalLM.from_pretrained(source)(ids).logits.log_softmax(-1)
        expected = logprobs[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        found = torch.tensor(scored["token_logprobs"][1:])
        print(
            f"perplexity {scored['perplexity']:.3f}, largest difference {(found - expected).abs().max():.1e}"
        )


def make_checkpoint(folder: Path) -> Path:
    """Write a model with random weights and a tokenizer for it, as transformers does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    torch.manual_seed(1)
    config = GPTNeoXConfig(
        vocab_size=304,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@contextmanager
def serving(model: Path, port: int) -> Iterator[httpx.Client]:
    """Serve a model folder while the block runs; yield a client of the server."""
    with (
        subprocess.Popen([*DAPE, "serve", str(model), "--port", str(port)]) as server,
        httpx.Client(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        try:
            while not is_ready(client):
                if server.poll() is not None:
                    sys.exit("the server has ended")
                time.sleep(0.2)
            yield client
        finally:
            server.terminate()


def is_ready(client: httpx.Client) -> bool:
    """Tell whether the server takes requests yet."""
    try:
        return client.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


if __name__ == "__main__":
    main()
