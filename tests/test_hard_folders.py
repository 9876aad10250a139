"""Hostile model folders: links, pipes, devices, absurd numbers. Each is refused in one line, at once."""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dape_engine.config import MAX_LAYERS, MAX_SIZE
from dape_engine.engine import AsyncEngine
from dape_engine.errors import ModelFolderError, SettingsError
from dape_engine.loading import load_model
from dape_engine.options import EngineOptions
from dape_engine.tokenizer import TextTokenizer
from dape_engine.weights import load_config
from dape_server.cli import main
from models import plain_logprobs, write_model

CPU = torch.device("cpu")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FILES = [WEIGHTS, "config.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def load(folder: Path) -> None:
    """Read everything that a folder holds."""
    config = load_config(folder)
    TextTokenizer.load(folder, config)
    load_model(folder, torch.float32, CPU)


def check_refused(folder: Path, message: str) -> None:
    with pytest.raises(ModelFolderError, match=message) as caught:
        load(folder)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < len(str(folder)) + 300


@pytest.mark.parametrize("file", FILES)
def test_links_to_files_are_followed(folder: Path, file: str) -> None:
    """As in Hugging Face's cache, where every name is a link to a blob beside the snapshots."""
    before = plain_logprobs(folder, [5, 6, 7])
    blob = folder.parent / "blobs" / "0a1b2c"
    blob.parent.mkdir()
    (folder / file).rename(blob)
    (folder / file).symlink_to(Path("../blobs/0a1b2c"))
    load(folder)
    assert torch.equal(plain_logprobs(folder, [5, 6, 7]), before)


SPECIAL: dict[str, Callable[[Path], object]] = {
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
    "link to a pipe": lambda path: (os.mkfifo(path.with_name("pipe")), path.symlink_to("pipe")),
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("file", [*FILES, INDEX, "chat_template.jinja"])
def test_what_is_not_a_regular_file_is_refused_unread(folder: Path, file: str, kind: str) -> None:
    (folder / file).unlink(missing_ok=True)
    SPECIAL[kind](folder / file)
    check_refused(folder, f"{file}: it is not a regular file")


@pytest.mark.parametrize("target", ["nowhere", WEIGHTS], ids=["dangling", "to itself"])
def test_links_to_nothing_are_refused(folder: Path, target: str) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(target)
    check_refused(folder, f"cannot read .*{WEIGHTS}")


def test_another_programs_file_is_not_shown(folder: Path) -> None:
    for file in FILES:
        content = (folder / file).read_bytes()
        (folder / file).unlink()
        (folder / file).symlink_to("/etc/passwd")
        with pytest.raises(ModelFolderError) as caught:
            load(folder)
        assert "root:" not in caught.value.message
        (folder / file).unlink()
        (folder / file).write_bytes(content)


def header(length: int, text: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + text)


def change_type(dtype: torch.dtype) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        tensors["norm.weight"] = tensors["norm.weight"].to(dtype)
        save_file(tensors, folder / WEIGHTS)

    return change


def write_index(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / INDEX).write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (header(1 << 62, b"{}"), "header too large"),
        (header(90_000_000, b" " * 100), "invalid header length"),
        (header(100_000, b"[" * 100_000), "is damaged"),
        (lambda f: (f / WEIGHTS).write_bytes(b""), "header too small"),
        (change_type(torch.int64), r"norm\.weight has the unexpected type torch\.int64"),
        (change_type(torch.complex64), r"norm\.weight has the unexpected type torch\.complex64"),
        (write_index("[" * 100_000), "not valid JSON"),
        (write_index('{"weight_map": {"a": "x\\u0000.safetensors"}}'), "cannot read"),
        (write_index('{"weight_map": {"a": [1], "b": 2}}'), r"names the file \[1\]"),
        (write_index('{"weight_map": {"a": "/etc/x.safetensors"}}'), "not in the folder"),
        (write_index("[]"), "is damaged"),
        (lambda f: (f / "tokenizer_config.json").write_text("[" * 100_000), "not valid JSON"),
        (lambda f: (f / "tokenizer.json").write_text("[" * 100_000), "cannot read"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{"), "not UTF-8"),
    ],
)
def test_damage_is_told_in_one_line(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    check_refused(folder, message)


@pytest.mark.parametrize("value", [MAX_SIZE, MAX_SIZE + 1, 1 << 62, 10**30])
@pytest.mark.parametrize(
    "place",
    [
        ("vocab_size",),
        ("hidden_size",),
        ("num_hidden_layers",),
        ("num_attention_heads",),
        ("intermediate_size",),
        ("position", "fire", "mlp_width"),
        ("position", "sandwich", "dimension"),
        ("position", "cope", "max_positions"),
        ("position", "learned", "max_positions"),
    ],
    ids=".".join,
)
def test_absurd_sizes_are_refused_before_memory_is_taken(
    folder: Path, place: tuple[str, ...], value: int
) -> None:
    path = folder / "config.json"
    config: dict[str, Any] = {**json.loads(path.read_text()), "dape": None}
    if len(place) == 1:
        config[place[0]] = value
    else:
        config["position"] = {"kind": place[1], place[2]: value}
    path.write_text(json.dumps(config))
    check_refused(folder, r"config\.json|tensor")


def test_the_most_layers_are_compared_with_the_weights(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": MAX_LAYERS}))
    check_refused(folder, f"lacks {18 * (MAX_LAYERS - 2)} tensor")


def test_a_length_without_end_costs_no_memory(folder: Path) -> None:
    """What depends on the distance is tabulated as far as the cache reaches, and no further."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_model_len": MAX_SIZE}))
    engine = AsyncEngine(folder, EngineOptions(kv_cache_memory=1 << 20))
    assert engine.max_model_len == engine.num_blocks * engine.block_size < 1 << 14


def test_a_cache_that_no_machine_has_is_refused(folder: Path) -> None:
    with pytest.raises(SettingsError, match=r"kv_cache_memory: .* cannot be allocated"):
        AsyncEngine(folder, EngineOptions(kv_cache_memory=1 << 60))


@pytest.mark.parametrize("command", [["serve", "{}", "--port", "0"], ["generate", "{}", "the"]])
def test_the_command_line_says_it_in_one_line_with_exit_code_2(
    folder: Path,
    command: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    monkeypatch.setattr(sys, "argv", ["dape", *(part.format(folder) for part in command)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"dape: cannot read {folder / WEIGHTS}: it is not a regular file\n"
