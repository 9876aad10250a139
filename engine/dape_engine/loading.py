"""How a model gets its weights: layer by layer, so that only one layer's are ever there twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from dape_engine.config import ModelConfig
from dape_engine.errors import ModelFolderError
from dape_engine.model import DapeForCausalLM, Layer
from dape_engine.options import EngineOptions
from dape_engine.tensors import POSITION, DummyTensors, StoredTensors, TensorSource
from dape_engine.weights import load_config
from dape_kernels.host import release_memory
from dape_kernels.quantized import Int8Linear, quantise

LAYERS = "layers."
LINEARS = ("attention.query_key_value", "attention.dense", "mlp.linear1", "mlp.linear2")
LINEAR_WEIGHTS = tuple(f".{name}.weight" for name in LINEARS)
FIRST, OUTPUT = "word_embeddings.weight", "final_linear.weight"


class ModelLoader:
    """The weights of a model folder, checked against its `config.json`.

    Positional parameters are kept in float32 whatever `dtype` is: biases are never half precision.

    Args:
        folder: the model folder.
        dtype: of weights and activations.
        device: where they go.
        options: `yarn_factor`, `load_format` and `quantization` count.

    Raises:
        SettingsError: as `load_config`.
        ModelFolderError: a file is missing or damaged, or its tensors do not fit `config.json`.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device, options: EngineOptions):
        self.config = load_config(folder, options.yarn_factor)
        self._folder = folder
        self._dtype = dtype
        self._device = device
        self._quantised = options.quantization is not None
        with torch.device("meta"):
            expected = DapeForCausalLM(self.config).state_dict()
        self._names = frozenset(expected)
        self._source: TensorSource
        if options.load_format == "dummy":
            dtypes = dict.fromkeys(expected, getattr(torch, self.config.dtype))
            self._aliases = _aliases(self.config, frozenset())
            shapes = {name: t.shape for name, t in expected.items() if name not in self._aliases}
            self._source = DummyTensors(self.config, shapes)
        else:
            self._source = StoredTensors(folder)
            self._aliases = _aliases(self.config, self._source.names)
            stored = self._source.read(self._source.names)
            shared = {name: stored[place] for name, place in self._aliases.items() if place in stored}
            _check_tensors(folder, expected, stored | shared)
            dtypes = {name: tensor.dtype for name, tensor in stored.items()}
        own = self._names - self._aliases.keys()
        self._sizes: dict[str, int] = {name: expected[name].numel() for name in own}
        self._dtypes: dict[str, torch.dtype] = dtypes

    @property
    def num_parameters(self) -> int:
        """How many numbers the weights are."""
        return sum(self._sizes.values())

    def memory(self, *, packed: bool) -> int:
        """Return about the bytes of all weights; `packed`: with a decoder of the CPU and its own copies."""

        def width(name: str, kept: bool) -> int:
            if self._is_quantised(name):
                return 1
            own: int = self._dtype.itemsize
            stored: int = self._dtypes[name].itemsize
            return min(own, stored) if kept else own

        own = sum(size * width(n, packed and n.startswith(LAYERS)) for n, size in self._sizes.items())
        output = self._place(OUTPUT)
        return own + packed * self._sizes[output] * width(output, True)

    def open(self) -> DapeForCausalLM:
        """Return the model with all its weights but those of the layers, which stay on the device "meta"."""
        with torch.device("meta"):
            model = DapeForCausalLM(self.config)
            if self._quantised:
                for layer in model.layers:
                    _quantise_layer(layer)
        model.requires_grad_(False).eval()
        outside = [name for name in self._names if not name.startswith(LAYERS) or POSITION in name]
        model.load_state_dict(self._read(outside), strict=False, assign=True)
        return model

    def load(self) -> DapeForCausalLM:
        """Return the model with all its weights."""
        model = self.open()
        for index in range(self.config.num_hidden_layers):
            self.fill(model, index)
        return model

    def fill(self, model: DapeForCausalLM, index: int, *, exact: bool = True) -> None:
        """Give a layer its weights; not `exact`: bfloat16 weights stay that where the model is float32."""
        prefix = f"{LAYERS}{index}."
        own = [name for name in self._names if name.startswith(prefix) and POSITION not in name]
        state = {name.removeprefix(prefix): t for name, t in self._read(own, exact=exact).items()}
        model.layers[index].load_state_dict(state, strict=False, assign=True)

    @contextmanager
    def packing(self, model: DapeForCausalLM, index: int) -> Iterator[None]:
        """Give a layer its weights until the end of the block, for a decoder that copies them."""
        self.fill(model, index, exact=False)
        yield
        model.layers[index].to("meta")
        release_memory()

    def _read(self, names: Iterable[str], *, exact: bool = True) -> dict[str, Tensor]:
        """Return tensors, and scales beside quantised ones, as the model takes them."""
        state: dict[str, Tensor] = {}
        for place, tensor in self._source.read({self._place(name) for name in names}).items():
            if self._is_quantised(place):
                scale = f"{place.removesuffix('weight')}scale"
                state[place], state[scale] = self._quantise(place, tensor)
            else:
                state[place] = self._convert(place, tensor, exact)
        return state | {name: state[self._place(name)] for name in names}

    def _place(self, name: str) -> str:
        """Return the name under which a tensor is stored."""
        return self._aliases.get(name, name)

    def _convert(self, name: str, tensor: Tensor, exact: bool) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.to(self._device)
        stays = not exact and tensor.dtype == torch.bfloat16 and self._dtype == torch.float32
        wanted = torch.float32 if POSITION in name else tensor.dtype if stays else self._dtype
        return tensor.to(device=self._device, dtype=wanted)

    def _quantise(self, name: str, tensor: Tensor) -> tuple[Tensor, Tensor]:
        try:
            return quantise(tensor.to(self._device))
        except ValueError as error:
            raise ModelFolderError(f"{self._folder}: tensor {name} cannot be quantised: {error}") from error

    def _is_quantised(self, name: str) -> bool:
        """Whether it is the weight of a linear layer; embeddings and the output layer stay as they are."""
        return self._quantised and name.startswith(LAYERS) and name.endswith(LINEAR_WEIGHTS)


def load_model(
    folder: Path, dtype: torch.dtype, device: torch.device, options: EngineOptions | None = None
) -> DapeForCausalLM:
    """Return the model of a folder with all its weights; see `ModelLoader`."""
    return ModelLoader(folder, dtype, device, options or EngineOptions()).load()


def _quantise_layer(layer: Layer) -> None:
    """Put linear layers with int8 weights in the place of the others, without weights yet."""
    for name in LINEARS:
        linear = cast("nn.Linear", layer.get_submodule(name))
        layer.set_submodule(name, Int8Linear(linear.in_features, linear.out_features))


def _aliases(config: ModelConfig, stored: frozenset[str]) -> dict[str, str]:
    """Return the names of tensors that are used in several places and stored in the first one only."""
    shared = {}
    if config.position.kind == "t5":
        first = f"{LAYERS}0{POSITION}weight"
        shared = {f"{LAYERS}{layer}{POSITION}weight": first for layer in range(1, config.num_hidden_layers)}
    if config.tie_word_embeddings:
        shared[OUTPUT] = FIRST
    return {name: first for name, first in shared.items() if name not in stored}


def _check_tensors(folder: Path, expected: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    missing, unknown = expected.keys() - state.keys(), state.keys() - expected.keys()
    if missing or unknown:
        what, names = ("lacks", missing) if missing else ("holds the unknown", unknown)
        shown = ", ".join(sorted(names)[:3]) + (" ..." if len(names) > 3 else "")
        raise ModelFolderError(f"{folder} {what} {len(names)} tensor(s): {shown}")
    for name, tensor in state.items():
        if tensor.is_floating_point() != expected[name].is_floating_point() or tensor.is_complex():
            raise ModelFolderError(f"{folder}: tensor {name} has the unexpected type {tensor.dtype}")
        if tensor.shape != expected[name].shape:
            raise ModelFolderError(
                f"{folder}: tensor {name} has shape {list(tensor.shape)}, "
                f"config.json asks for {list(expected[name].shape)}"
            )
