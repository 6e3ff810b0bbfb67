"""All the text of a run: what it trains on, packed and in order, and what it is measured on."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from llama_pro_fast.config import DataConfig
from llama_pro_fast.console import amount, duration
from llama_pro_fast.data.dataset import Mixed, PackedDataset
from llama_pro_fast.data.sample import HeldOutSample
from llama_pro_fast.errors import UserError
from llama_pro_fast.text.preparing import default_cache, tokenize_source
from llama_pro_fast.text.sources import ResolvedSource, resolve_sources
from llama_pro_fast.text.store import TokenStore

ORDER = 2
"""Raise it when the same documents would come in another order, or packed in another way."""
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
        train: every source that trains, packed.
        mixed: every source and what of it trains; in the order of ``held_out``.
        held_out: every source's held-out side.
        fingerprint: changes when the order or the content of the training text does.
        measured: changes when the held-out text does.
    """

    train: PackedDataset
    mixed: list[Mixed]
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
        batch_size: int,
        default_general: bool,
        taught: bool = False,
        progress: Callable[[str], None] | None = None,
    ) -> Corpus:
        """Find the sources, tokenise what the cache does not hold, and set up the order.

        Args:
            batch_size: sequences of a step, in each of which the sources have their shares.
            default_general: measure the built-in prose where the recipe names no general text.
            taught: the general sources' sequences come last in a batch, so that the base can teach there.
            progress: told how far it is, in words.

        Raises:
            UserError: a source is missing, unreadable, empty or too small, or the shares do not fit each other, or with
                ``taught`` no general source trains.
        """
        sources = resolve_sources(config, default_general=default_general)
        stores = tokenized(sources, tokenizer, config, shares=[config.held_out] * len(sources), progress=progress)
        mixed = mix(sources, stores, replay=config.replay, drop_duplicates=config.drop_duplicates)
        packed = {"seq_len": seq_len, "seed": seed, "batch_size": batch_size, "packing": config.packing}
        general = [number for number, source in enumerate(sources) if source.role == "general"]
        if taught and not any(mixed[number].trains for number in general):
            text = "" if config.general else " and --data.general FILE"
            raise UserError(f"--train.kl_weight: no general text is trained on; add --data.replay 0.2{text}")
        trained = [(each.key, each.weight, each.share) for each in mixed if each.trains]
        measured = [
            (source.role, source.name, store.key(store.held_out)) for source, store in zip(sources, stores, strict=True)
        ]
        return cls(
            PackedDataset(mixed, **packed, cache=cache_of(config), taught=general if taught else ()),
            mixed,
            [HeldOut(source, store, seq_len) for source, store in zip(sources, stores, strict=True)],
            _digest([ORDER, trained, sorted(packed.items())]),
            _digest(measured),
        )

    def documents(self, ranges: Iterable[tuple[int, int]], tokenizer, limit: int) -> list[str]:
        """The documents of some training sequences, for a person to find them.

        Args:
            ranges: (first, count) of sequences, counted from the start of the run.

        Returns:
            At most ``limit`` texts like ``mine, crawl.jsonl line 17: "How it begins…"``; where there are more, one that
            says how many.
        """
        found = list(dict.fromkeys(each for first, count in ranges for each in self.train.documents(first, count)))
        texts = []
        for source, number in found[:limit]:
            text, store = self.held_out[source], self.held_out[source].store
            begin, length = store.extent(number)
            beginning = _one_line(
                tokenizer.decode(
                    store.tokens(np.array([begin]), np.array([min(length, BEGINNING_TOKENS)])), skip_special_tokens=True
                )
            )
            more = "…" if len(beginning) > BEGINNING or length > BEGINNING_TOKENS else ""
            texts.append(f'{where(text, number)}: "{beginning[:BEGINNING].rstrip()}{more}"')
        return texts if len(found) <= limit else [*texts, f"and {len(found) - limit:,} more"]

    @property
    def labels(self) -> list[str]:
        """Names of the sources, each of one: a name is unique only among the sources of its role."""
        names = [text.source.name for text in self.held_out]
        return [
            f"{text.source.name} ({text.source.role})" if names.count(text.source.name) > 1 else text.source.name
            for text in self.held_out
        ]

    def description(self) -> str:
        """Sources with their training tokens, weights and shares, and how well they are packed, for a person."""
        parts = []
        for each in self.mixed:
            if not each.trains:
                continue
            times = f", {float(each.share):.3g} of every step" if each.share is not None else ""
            times = f" x {each.weight:g}" if each.weight not in (None, 1) else times
            parts.append(f"{each.name} {each.num_tokens:,} tokens{times}")
        return "; ".join(parts)

    def packing(self) -> str:
        """How full the sequences are, and what stands in them without its beginning, for a person."""
        return (
            f"sequences {self.train.filled:.2%} full, {self.train.without_beginning:.1%} of the tokens in a piece "
            "without its document's beginning"
        )


def tokenized(
    sources: Sequence[ResolvedSource],
    tokenizer,
    config: DataConfig,
    *,
    shares: Sequence[float],
    progress: Callable[[str], None] | None = None,
) -> list[TokenStore]:
    """The tokens of each source; what is in the cache is not made again.

    Args:
        shares: of each source, how much of it is held out; 1 is all of it.
        progress: told how far it is, in words.

    Raises:
        UserError: a source is unreadable, empty or too small, or the cache lies in one.
    """
    cache = cache_of(config)
    for folder in (Path(source.path).expanduser() for source in sources if source.kind == "files"):
        if folder.is_dir() and cache.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"--data.cache {cache}: lies in {folder}, a folder of text: give another place")
    return [
        tokenize_source(
            source,
            tokenizer,
            held_out=share,
            special_tokens=config.special_tokens,
            cache_dir=cache,
            workers=config.workers,
            max_bad_share=config.max_bad_share,
            progress=_telling(source.name, progress or (lambda text: None)),
        )
        for source, share in zip(sources, shares, strict=True)
    ]


def cache_of(config: DataConfig) -> Path:
    """The folder of caches."""
    return Path(config.cache).expanduser() if config.cache is not None else default_cache()


def mix(
    sources: Sequence[ResolvedSource], stores: Sequence[TokenStore], *, replay: float, drop_duplicates: bool
) -> list[Mixed]:
    """What of each source trains.

    Args:
        replay: share of a step that the general sources have together; among them it is divided by their weights times
            their tokens.
    """
    mixed = []
    for source, store in zip(sources, stores, strict=True):
        mask = ~repeated(store)[store.train.numbers] if drop_duplicates else None
        weight = source.weight if source.share is None else None
        mixed.append(Mixed(store=store, weight=weight, share=source.share, name=source.name, mask=mask))
    if replay:
        general = [n for n, source in enumerate(sources) if source.role == "general" and source.weight]
        amounts = {n: Fraction(str(mixed[n].weight)) * mixed[n].num_tokens for n in general}
        for n in general:
            share = Fraction(str(replay)) * amounts[n] / sum(amounts.values())
            mixed[n] = dataclasses.replace(mixed[n], weight=None, share=share)
    return mixed


def repeated(store: TokenStore) -> np.ndarray:
    """Which of a source's documents repeat one before them, ``[documents]`` bool."""
    first = np.zeros(len(store.digests), bool)
    first[np.unique(store.digests, return_index=True)[1]] = True
    return ~first


def where(text: HeldOut, number: int) -> str:
    """The place of a document of a source: ``mine, crawl.jsonl line 17``."""
    file, line = text.store.place(number)
    named = "" if Path(file).stem == text.source.name else f"{text.source.name}, "
    return f"{named}{file} line {line:,}"


def _telling(name: str, tell: Callable[[str], None]) -> Callable[[int, int, int, int, int], None]:
    """A function that turns the counts of :func:`tokenize_source` into words."""
    started, at_start = time.monotonic(), None

    def progress(done: int, total: int, text: int, documents: int, tokens: int) -> None:
        nonlocal at_start
        at_start = done if at_start is None else at_start
        seconds = time.monotonic() - started
        speed = (done - at_start) / seconds if seconds > 0 else 0
        pace = f", {text / seconds / 1e6:.1f} MB of text/s, {duration((total - done) / speed)} left" if speed else ""
        tell(
            f"tokenising {name}: {done / 1e6:,.1f} of {total / 1e6:,.1f} MB ({done / max(1, total):.0%}){pace}; "
            f"{documents:,} documents, {amount(tokens)} tokens"
        )

    return progress


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


def _one_line(text: str) -> str:
    """``text`` with a space for each run of what is blank or cannot be seen."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
