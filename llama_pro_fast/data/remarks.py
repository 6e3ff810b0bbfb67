"""What a run says of its text before it trains on it: what was left out, what is missing, what will not train well."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from llama_pro_fast.config import DataConfig
from llama_pro_fast.data.corpus import Corpus, HeldOut

WITHOUT_REPLAY = (
    "where others measured it, Qwen3-0.6B with 7 new blocks went from perplexity 14.1 to 21.0 on wikitext without "
    "replay, and to 13.2 with 20 %"
)
FEW = 5
"""Documents, fewer than which say little of others."""
ROLES = "domain", "general"
POORLY_FILLED = 0.98
"""Share of text in the sequences below which a run hears of it."""


def remarks(corpus: Corpus, config: DataConfig, *, packaged_base: bool) -> Iterator[str]:
    """A line for each thing that a person should know of a run's text.

    Args:
        packaged_base: whether the base is the one in the package, whose own text the built-in prose is.
    """
    for text in corpus.held_out:
        yield from left_out(text)
    if config.replay and not config.general:
        yield f"data.replay {config.replay:g}: nothing is replayed without --data.general TEXT; {WITHOUT_REPLAY}"
    if not config.general and not packaged_base and any(t.source.role == "general" for t in corpus.held_out):
        yield (
            "no --data.general: what is forgotten is measured on Python's own documentation, a poor stand-in for what "
            "this base knows; docs/data.md names better texts"
        )
    files = {role: {f.path for t in corpus.held_out if t.source.role == role for f in t.source.files} for role in ROLES}
    if both := files["domain"] & files["general"]:
        yield f"{min(both)}: is text to learn and general text: what is learned from it counts as not forgotten"
    if corpus.train.filled < POORLY_FILLED:
        yield f"{corpus.packing()}: lower --train.seq_len or add text"


def measured_on_little(corpus: Corpus, max_tokens: int) -> Iterator[str]:
    """A line where so many tokens are of few documents."""
    few = {text.source.name: round(text.sample(max_tokens).num_documents, 1) for text in corpus.held_out}
    few = {name: documents for name, documents in few.items() if documents < FEW}
    if few:
        named = ", ".join(f"{name} {documents:g}" for name, documents in few.items())
        yield (
            f"measured on few documents ({named}), which say little of others: give --eval.tokens above {max_tokens:,} "
            "or a larger --data.held_out"
        )


def left_out(text: HeldOut) -> Iterator[str]:
    """What of a source was not read or could not be, by reason, each with its first place."""
    store = text.store
    if not_read := text.source.describe_not_read():
        yield f"{text.source.name}: not read: {not_read}"
    if total := sum(count for _, count, _ in store.faults):
        reasons = []
        for reason, count, places in store.faults:
            file, line, detail = places[0]
            more = f": {detail}" if detail else ""
            reasons.append(f"{count:,} {reason} (first {file} line {line:,}{more})")
        yield f"{text.source.name}: {total:,} of {store.rows.rows:,} rows left out: {'; '.join(reasons)}"
    if store.num_empty:
        first = "" if store.rows.first_empty is None else " (first {} line {:,})".format(*store.rows.first_empty)
        yield f"{text.source.name}: {store.num_empty:,} of {store.rows.rows:,} rows hold no text{first}"


def untrained_tokens(corpus: Corpus, embedding: np.ndarray, names) -> Iterator[str]:
    """A line where the text holds tokens whose rows of the embedding are equal: nobody has trained them, and the model
    cannot tell them apart.

    Args:
        embedding: ``[vocabulary, H]``, of any dtype.
        names: ids -> tokens.
    """
    hashes = np.array([hash(row.tobytes()) for row in embedding])
    _, group, sizes = np.unique(hashes, return_inverse=True, return_counts=True)
    alike = sizes[group] > 1
    for text in corpus.held_out:
        counts = text.store.counts[: len(alike)]
        used = np.flatnonzero(alike[: len(counts)] & (counts > 0))
        if len(used):
            most = used[np.argsort(-counts[used], kind="stable")][:3]
            yield (
                f"{text.source.name}: {counts[used].sum():,} tokens are of {len(used):,} kinds whose rows of the "
                f"embedding are equal, so never trained ({', '.join(map(repr, names(most.tolist())))}): the model "
                "cannot tell them apart, and the embedding is frozen"
            )
