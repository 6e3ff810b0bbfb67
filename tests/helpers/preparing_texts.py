"""Texts to tokenise, and what became of them."""

from __future__ import annotations

import os
from pathlib import Path

from reading import resolved, write

from llama_pro_fast.text import shards
from llama_pro_fast.text.preparing import tokenize_source
from llama_pro_fast.text.store import TokenStore

TEXTS = [f"Document {i}: {'ünïcode 🦙 ' * (i % 7)}and its end.\n" for i in range(60)]
OLD = (10**9, 10**9)
"""Times of a file that is not just being written."""


def write_rows(path: Path, texts, **columns) -> Path:
    write(path, [{"text": text} | columns for text in texts])
    os.utime(path, OLD)
    return path


def keys(store: TokenStore) -> list[str]:
    return [store.key(side) for side in (store.train, store.held_out)]


def prepared(path, tokenizer, cache, **settings) -> TokenStore:
    return tokenize_source(resolved(path), tokenizer, **{"held_out": 0.2, "cache_dir": cache} | settings)


def documents(store: TokenStore, side: str = "train") -> list[list[int]]:
    side = getattr(store, side)
    return [store.tokens(side.begins[i : i + 1], side.lengths[i : i + 1]).tolist() for i in range(side.num_documents)]


def texts_of(store: TokenStore, tokenizer) -> list[str]:
    """All documents in the order of the source."""
    found = {}
    for side in ("train", "held_out"):
        for number, ids in zip(getattr(store, side).numbers.tolist(), documents(store, side), strict=True):
            found[store.place(number), number] = tokenizer.decode(ids, skip_special_tokens=True)
    return [found[key] for key in sorted(found)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Made:
    """The shards that are written, one after the other."""

    def __init__(self, monkeypatch):
        self.keys: list[str] = []
        real = shards.ShardWriter.__init__

        def counted(writer, folder, *args):
            self.keys.append(folder.stem)
            real(writer, folder, *args)

        monkeypatch.setattr(shards.ShardWriter, "__init__", counted)
