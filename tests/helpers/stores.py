"""Stores of tokens in memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llama_pro_fast.text.documents import text_hash
from llama_pro_fast.text.shards import DOCUMENT
from llama_pro_fast.text.store import Shard, TokenStore


def in_memory_store(
    train: Sequence[Sequence[int]] = (),
    held_out: Sequence[Sequence[int]] = (),
    *,
    num_bytes: Sequence[int] | None = None,
    learned: Sequence[bool] | None = None,
    key: str = "",
) -> TokenStore:
    """A store of these documents.

    Args:
        num_bytes: of the held-out documents; by default 4 for each token after the first.
        learned: of every token, those of ``train`` first; by default all are.
    """
    texts = [*train, *held_out]
    documents = np.zeros(len(texts), DOCUMENT)
    documents["end"] = np.cumsum([len(text) for text in texts])
    documents["line"] = np.arange(1, len(texts) + 1)
    documents["digest"] = [text_hash(repr(text)) for text in texts]
    sizes = [4 * (len(text) - 1) for text in held_out] if num_bytes is None else num_bytes
    documents["num_bytes"] = [*(-1 for _ in train), *sizes]
    shard = Shard(
        np.array([token for text in texts for token in text], np.uint32),
        lambda: documents,
        lambda: np.bincount([token for text in train for token in text]),
        None if learned is None else np.packbits(np.array(learned, bool)),
        files=[("in memory", 0)],
    )
    return TokenStore([shard], encoder=key)


def numbered(lengths: Sequence[int], first: int = 0) -> list[list[int]]:
    """Documents whose every token is a different number, from ``first`` on."""
    ends = np.cumsum(lengths, dtype=np.int64) + first
    return [list(range(end - length, end)) for end, length in zip(ends.tolist(), lengths, strict=True)]


def numbered_stores(lengths: Sequence[Sequence[int]]) -> tuple[list[TokenStore], list[list[list[int]]]]:
    """Training stores whose every token is a different number, so that a token says where it comes from."""
    corpora, first = [], 1
    for of_store in lengths:
        corpora.append(numbered(of_store, first))
        first += sum(of_store)
    return [in_memory_store(train=documents, key=str(i)) for i, documents in enumerate(corpora)], corpora
