from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llama_pro_fast.expansion.plan import ExpansionPlan
from llama_pro_fast.expansion.proof import expand_and_prove
from llama_pro_fast.hf.folder import PretrainedFolder

MakeBase = Callable[..., PretrainedFolder]


@pytest.fixture
def expand(tmp_path: Path) -> Callable[..., PretrainedFolder]:
    """Expand and prove; groups 2 unless said otherwise."""

    def run(base: PretrainedFolder, plan: ExpansionPlan | None = None, name: str = "expanded") -> PretrainedFolder:
        plan = plan or ExpansionPlan.from_groups(base.config.num_hidden_layers, 2)
        expand_and_prove(base, tmp_path / name, plan)
        return PretrainedFolder(tmp_path / name)

    return run


@pytest.fixture
def small_disk(monkeypatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def tensor_bytes(folder: PretrainedFolder, name: str) -> bytes:
    return b"".join(bytes(piece) for piece in folder.read_bytes(name))


def overwrite(folder: PretrainedFolder, name: str, content: bytes) -> None:
    """Put other bytes at the start of a tensor, on disk."""
    entry = folder.entries[name]
    with open(folder.path / entry.file, "r+b") as file:
        file.seek(entry.offset)
        file.write(content[: entry.num_bytes])


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of single bytes that fits a vocabulary of 300."""
    vocabulary = {token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def left_behind(folder: Path) -> Iterator[str]:
    """What lies beside the base after an expansion that failed."""
    return (path.name for path in folder.iterdir() if path.name != "base")
