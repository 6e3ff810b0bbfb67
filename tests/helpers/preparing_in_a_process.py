"""A source tokenised by a process of its own, which can be killed in the middle."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from reading import resolved
from tokenizers_of_kinds import KINDS
from transformers import PreTrainedTokenizerFast

from llama_pro_fast.text import preparing, units
from llama_pro_fast.text.store import TokenStore


def a_tokenizer(kind: str = "byte_level", **special) -> PreTrainedTokenizerFast:
    names = {"bos_token": "<s>", "eos_token": "</s>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=KINDS[kind](), **names)


def prepared_by_workers(path: Path, cache: Path, *, unit_bytes: int, workers: int = 2, progress=None) -> TokenStore:
    """Tokenise a source in many small units, which would otherwise be too little for workers."""
    before = units.UNIT_BYTES, preparing.LITTLE_BYTES
    units.UNIT_BYTES, preparing.LITTLE_BYTES = unit_bytes, 0
    try:
        return preparing.tokenize_source(
            resolved(path), a_tokenizer(), held_out=0.2, cache_dir=cache, workers=workers, progress=progress
        )
    finally:
        units.UNIT_BYTES, preparing.LITTLE_BYTES = before


def prepare(path: str, cache: str, unit_bytes: int) -> None:
    """For a process of its own."""
    prepared_by_workers(Path(path), Path(cache), unit_bytes=unit_bytes)


def processes_with(mark: str) -> list[int]:
    """Ids of the processes that have a text in their environment; those that have ended and wait are none."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return [number for number in found if number != os.getpid()]


def all_gone(mark: str) -> bool:
    """Wait for the processes with a mark to end."""
    for _ in range(300):
        if not processes_with(mark):
            return True
        time.sleep(0.1)
    return False


if __name__ == "__main__":
    prepare(sys.argv[1], sys.argv[2], int(sys.argv[3]))
