"""The models of the CHE benchmark: the package's own decoder layers over an input and placeholders.

As many placeholders as the answer has symbols follow the input, and the whole answer is read from them in
one pass (Ruoss et al. 2023). `bidirectional` is the published encoder. `causal` is what a decoder can run:
every placeholder sees the whole input and the placeholders before it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from dape_engine.config import DapeConfig, ModelConfig, PositionConfig
from dape_engine.model import DapeForCausalLM, initialise
from dape_training.che.attention import whole_attention
from dape_training.che.task import Task

Setup = Literal["bidirectional", "causal"]


class CheModel(nn.Module):
    """A decoder whose vocabulary is the task's symbols and, after the input symbols, the placeholder."""

    def __init__(
        self,
        task: Task,
        position: PositionConfig,
        dape: DapeConfig | None,
        *,
        layers: int,
        heads: int,
        hidden: int,
        dropout: float,
        setup: Setup,
        longest: int,
    ):
        super().__init__()
        self.task = task
        self.causal = setup == "causal"
        self.decoder = DapeForCausalLM(
            ModelConfig(
                vocab_size=max(task.input_symbols + 1, task.output_symbols),
                hidden_size=hidden,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                intermediate_size=4 * hidden,
                train_length=longest,
                max_model_len=longest,
                position=position,
                dape=dape,
            )
        )
        initialise(self.decoder)

        def drop(module: nn.Module, _: object, output: Tensor) -> Tensor:
            return functional.dropout(output, dropout, module.training)

        # The layers have no dropout of their own; as in the reference it acts on what attention and MLP add.
        for layer in self.decoder.layers:
            for part in (layer.attention, layer.mlp):
                part.register_forward_hook(drop)

    def forward(self, inputs: Tensor, positions: Tensor) -> Tensor:
        """Return the logits of the answers [B, m, output symbols].

        Args:
            inputs: int64 [B, l].
            positions: int64 [l + m], ascending, the places of the input and of the placeholders after it.
        """
        answer = len(positions) - inputs.shape[1]
        placeholders = inputs.new_full((len(inputs), answer), self.task.input_symbols)
        encodings = [encoding.encoding() for encoding in self.decoder.encodings]

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return whole_attention(query, key, value, encodings[layer], positions, causal=self.causal)

        stream = self.decoder(torch.cat([inputs, placeholders], 1), positions, attend)
        logits: Tensor = self.decoder.final_linear(stream[:, -answer:])
        return logits[..., : self.task.output_symbols]
