"""Files and places that are not what they should be: one line with the true cause, at once."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama_pro_fast.config import DataConfig
from llama_pro_fast.errors import UserError
from llama_pro_fast.hf.config import find_config
from llama_pro_fast.hf.folder import PretrainedFolder
from llama_pro_fast.hf.safetensors import TORCH_DTYPES, num_not_finite, read_header
from llama_pro_fast.plan import main as plan_main
from llama_pro_fast.text.sources import resolve_sources

LONG = "x" * 300


@pytest.fixture
def model(copy_of, base) -> Path:
    return copy_of(base)


@pytest.fixture
def both_refuse(cli, refused):
    """``train`` and ``plan`` refuse a model's folder."""

    def run(model: Path, *fragments: str) -> None:
        refused(*fragments, model__path=model)
        code, _, err = cli(plan_main, "--model.path", model, "--expand.groups", 2, "--gpu", "h100", "--train.steps", 2)
        cli.refused(code, err, *fragments)

    return run


# -- what a config says --------------------------------------------------------------------------------------------


def refusal(function, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("depth", [300, 900, 100_000])
def test_a_deeply_nested_config(model, depth):
    content = (model / "config.json").read_text().rstrip()[:-1]
    (model / "config.json").write_text(f'{content}, "more": {"[" * depth}{"]" * depth}, "vocab_size": 0}}')
    assert str(model / "config.json") in refusal(find_config, str(model))


SIZES = ["num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim"]


@pytest.mark.parametrize("name", SIZES)
def test_an_absurd_size(model, name):
    for size in (10**8, 10**9, 10**400, 0, -1, 2.5, 1e5, True, "4", [4], {}):
        edit(model / "config.json", **{name: size})
        message = refusal(find_config, str(model))
        assert f"{model / 'config.json'}: {name} is {size!r:.20}" in message
        assert "not a whole number from 1 to " in message


def test_absurd_depth_is_refused_by_plan_and_train(both_refuse, model):
    edit(model / "config.json", num_hidden_layers=10**6)
    both_refuse(model, "num_hidden_layers is 1000000", "not a whole number from 1 to ")


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# -- what weights say ----------------------------------------------------------------------------------------------


def test_an_index_that_names_no_file_of_its_folder(refused, model):
    (model / "model.safetensors").rename(model / "model-1.safetensors")
    names, path = load_file(model / "model-1.safetensors"), model / "model.safetensors.index.json"
    for shard in (7, None, [], {}, "../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""):
        index = {"weight_map": dict.fromkeys(names, "model-1.safetensors") | {"model.norm.weight": shard}}
        path.write_text(json.dumps(index))
        message = refusal(lambda: PretrainedFolder(model).entries)
        assert f"{path}: names {shard!r} as the file of model.norm.weight" in message
    refused(path, "'' as the file of model.norm.weight", model__path=model)


def test_a_deeply_nested_index(refused, model):
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text('{"weight_map": ' + "[" * 100_000 + "]" * 100_000 + "}")
    refused(model / "model.safetensors.index.json", "not readable as JSON", model__path=model)


ODD = [
    *({"dtype": odd} for odd in (7, None, ["BF16"], {})),
    *({"shape": odd} for odd in (32, "32", [32.0], [-32], [True], None, [[32]], {"32": 1}, ["32"])),
    *({"data_offsets": odd} for odd in ([0], [0, 1, 2], ["0", "64"], [0.0, 64.0], {"0": 1, "1": 2}, [-64, 0], None)),
    {"data_offsets": [10**30, 10**30 + 64]},
]


def test_a_header_of_odd_types(refused, model):
    path = model / "model.safetensors"
    content = path.read_bytes()

    def damaged_by(change) -> None:
        path.write_bytes(content)
        rewrite_header(path, change)
        message = refusal(read_header, path)
        assert f"{path}: damaged (" in message
        assert "download it again" in message

    for changes in ODD:
        damaged_by(lambda table, changes=changes: table["model.norm.weight"].update(changes))
    for row in (None, 7, "x", []):
        damaged_by(lambda table, row=row: table.update({"model.norm.weight": row}))
    refused(path, "damaged", "download it again", model__path=model)


@pytest.mark.parametrize("header", [b"[" * 100_000, b"[]", b"7", b'"x"', b"{" * 9, b"\xff" * 64])
def test_a_header_that_is_no_table(tmp_path, header):
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert "damaged" in refusal(read_header, tmp_path / "a.safetensors")


def rewrite_header(path: Path, change) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    table = json.loads(content[8 : 8 + length])
    change(table)
    header = json.dumps(table).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.embed_tokens.weight", float("nan")),
        ("model.norm.weight", float("inf")),
        ("model.layers.3.mlp.down_proj.weight", float("nan")),
    ],
)
def test_a_base_with_values_that_are_not_finite(refused, model, tmp_path, name, value):
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[-3:-1] = value
    save_file(tensors, path, metadata={"format": "pt"})
    refused(path, f"{name} has 2 values that are not finite", "download it again", model__path=model)
    assert not (tmp_path / "run" / "expanded").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_largest_and_smallest_values_are_finite(dtype):
    spelling = next(name for name, known in TORCH_DTYPES.items() if known == dtype)
    values = torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)
    values[::2] = torch.finfo(dtype).min

    def count() -> int:
        return num_not_finite(memoryview(bytearray(values.view(torch.uint8).numpy().tobytes())), spelling)

    assert count() == 0
    values[7], values[500], values[999] = float("nan"), float("inf"), float("-inf")
    assert count() == 3


# -- pipes, sockets and devices ------------------------------------------------------------------------------------


def pipe(path: Path) -> None:
    os.mkfifo(path)


def bound_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path may not be long
    socket.socket(socket.AF_UNIX).bind(path.name)
    os.chdir(here)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


KINDS = pytest.mark.parametrize("make", [pipe, bound_socket, endless])


@KINDS
def test_text_that_is_no_file(tmp_path, make):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "good.txt").write_text("Good text.\n")
    for name in ("a.jsonl", "a.txt", "a.parquet", "folder/b.jsonl"):
        make(tmp_path / name)
        given = tmp_path / name.partition("/")[0]
        message = refusal(resolve_sources, DataConfig(domain=str(given)))
        assert f"{tmp_path / name}: a pipe, a socket or a device" in message


@KINDS
def test_a_model_with_what_is_no_file(copy_of, base, make):
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        model = copy_of(base, name)
        (model / name).unlink()
        make(model / name)
        assert f"{model / name}: a pipe, a socket or a device" in refusal(PretrainedFolder, model)


def test_pipes_are_refused_by_plan_and_train(both_refuse, refused, model, tmp_path):
    pipe(tmp_path / "a.jsonl")
    refused(tmp_path / "a.jsonl", "a pipe, a socket or a device", data__domain=tmp_path / "a.jsonl")
    (model / "config.json").unlink()
    pipe(model / "config.json")
    both_refuse(model, model / "config.json", "a pipe, a socket or a device")


# -- places --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "place", "words"),
    [
        ("output", LONG, "File name too long; give a shorter name"),
        ("output", f"folder/{LONG}/run", "File name too long; give a shorter name"),
        ("output", "/proc/x", "a folder is gone, or none can be made there"),
        ("output", "file", "is a file"),
        ("output", "file/run", "Not a directory; something is in the way"),
        ("output", "dangling", "File exists; something is in the way"),
        ("output", "circle", "something is in the way"),
        ("output", "circle/run", "links lead in a circle"),
        ("data.cache", "file", "Not a directory; something is in the way"),
        ("data.domain", LONG, "no such file or folder"),
        ("data.domain", f"{LONG}.jsonl", "no such file or folder"),
        ("data.domain", "~nobody-of-that-name/a.jsonl", "no such file or folder"),
        ("model.path", "~nobody-of-that-name/a", "no such folder"),
        ("model.path", LONG, "no such folder"),
        ("model.path", "/" + LONG, "no such folder"),
    ],
)
def test_a_place_that_cannot_be(refused, tmp_path, monkeypatch, option, place, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    refused(words, place, **{option.replace(".", "__"): place})
    assert not os.path.exists(tmp_path / "nowhere")
