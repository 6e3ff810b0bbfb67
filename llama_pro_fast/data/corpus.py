"""All the text of a run: what it trains on, packed and in order, and what it is measured on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from llama_pro_fast.config import DataConfig
from llama_pro_fast.data.packing import HeldOutSample, PackedDataset
from llama_pro_fast.data.sources import ResolvedSource, resolve_sources
from llama_pro_fast.data.tokens import TokenStore, tokenize_source
from llama_pro_fast.errors import UserError

BEGINNING, BEGINNING_TOKENS = 60, 256
"""Characters of a document that name it, and tokens that hold so many in any script."""


@dataclass(frozen=True)
class HeldOut:
    """The held-out documents of one source."""

    source: ResolvedSource
    store: TokenStore
    seq_len: int

    def sample(self, max_tokens: int) -> HeldOutSample:
        """At most ``max_tokens`` tokens of them.

        Raises:
            UserError: there is nothing to predict: every document is a single token.
        """
        sample = HeldOutSample(self.store, seq_len=self.seq_len, max_tokens=max_tokens)
        if not sample.num_predicted:
            raise UserError(
                f"{self.source.path}: held-out documents of a single token each, which leave nothing to predict: "
                "give longer documents or raise --data.held_out"
            )
        return sample

    def beginnings(self, length: int, max_tokens: int) -> list[list[int]]:
        """The first tokens of each document of the sample: ``length``, or all but its last where it is shorter."""
        documents = self.sample(max_tokens).documents()
        return [document[: min(length, len(document) - 1)].tolist() for document in documents if len(document) > 1]


@dataclass(frozen=True)
class Corpus:
    """A run's text.

    Attributes:
        train: every source that has a weight, packed.
        held_out: every source's held-out side.
        fingerprint: changes when the order or the content of the training text does.
        measured: changes when the held-out text does.
    """

    train: PackedDataset
    held_out: list[HeldOut]
    fingerprint: str
    measured: str

    @classmethod
    def prepare(
        cls,
        config: DataConfig,
        tokenizer,
        *,
        seq_len: int,
        seed: int,
        default_general: bool,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> Corpus:
        """Find the sources, tokenise what the cache does not hold, and set up the order.

        Args:
            default_general: measure the built-in prose where the recipe names no general text.
            progress: called with a source's name, documents and tokens written so far.

        Raises:
            UserError: a source is missing, unreadable, empty or too small.
        """
        held_out = []
        for source in resolve_sources(config, default_general=default_general):

            def report(documents: int, tokens: int, name: str = source.name) -> None:
                if progress is not None:
                    progress(name, documents, tokens)

            store = tokenize_source(
                source, tokenizer, held_out=config.held_out, cache_dir=config.cache, progress=report
            )
            held_out.append(HeldOut(source, store, seq_len))
        train = PackedDataset([(text.store, text.source.weight) for text in held_out], seq_len=seq_len, seed=seed)
        trained = [(text.store.key, text.source.weight) for text in held_out if text.source.weight > 0]
        fingerprint = hashlib.sha256(repr((trained, seq_len, seed)).encode()).hexdigest()
        measured = [(text.source.role, text.source.name, text.store.key) for text in held_out]
        return cls(train, held_out, fingerprint, hashlib.sha256(repr(measured).encode()).hexdigest())

    def documents(self, ranges: Iterable[tuple[int, int]], tokenizer, limit: int) -> list[str]:
        """The documents of some training sequences, for a person to find them.

        Args:
            ranges: (first, count) of sequences, counted from the start of the run.

        Returns:
            At most ``limit`` texts like ``mine, document 17: "How it begins…"``, where 17 counts, from 1, the source's
            documents that train; where there are more, one that says how many.
        """
        found = list(dict.fromkeys(each for first, count in ranges for each in self.train.documents(first, count)))
        texts = []
        for source, number in found[:limit]:
            text, split = self.held_out[source], self.held_out[source].store.train
            begin, end = split.offsets[number : number + 2].tolist()
            tokens = split.tokens[begin : min(end, begin + BEGINNING_TOKENS)].tolist()
            beginning = _one_line(tokenizer.decode(tokens, skip_special_tokens=True))
            more = "…" if len(beginning) > BEGINNING or end > begin + BEGINNING_TOKENS else ""
            texts.append(f'{text.source.name}, document {number + 1}: "{beginning[:BEGINNING].rstrip()}{more}"')
        return texts if len(found) <= limit else [*texts, f"and {len(found) - limit:,} more"]

    def description(self) -> str:
        """Sources with their training tokens and weights, for a person."""
        parts = []
        for text in self.held_out:
            if text.source.weight > 0:
                times = "" if text.source.weight == 1 else f" x {text.source.weight:g}"
                parts.append(f"{text.source.name} {text.store.train.num_tokens:,} tokens{times}")
        return "; ".join(parts)


def _one_line(text: str) -> str:
    """``text`` with a space for each run of what is blank or cannot be seen."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
