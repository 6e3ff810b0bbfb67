"""Which text an evaluation measures, and how much of it.

A document that a run trained on would flatter its model. So of a file that it trained on only the held-out side counts,
by the share and the split that its own configuration names; of any other file every document does.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llama_pro_fast.config import DataConfig
from llama_pro_fast.data.corpus import HeldOut, tokenized
from llama_pro_fast.data.remarks import left_out
from llama_pro_fast.data.sample import HeldOutSample
from llama_pro_fast.errors import UserError
from llama_pro_fast.hf.folder import PretrainedFolder
from llama_pro_fast.resume import load_config
from llama_pro_fast.runs.run_folder import shown
from llama_pro_fast.text.sources import ResolvedSource, resolve_sources
from llama_pro_fast.text.store import TokenStore


@dataclass(frozen=True)
class MeasuredSource:
    """A source, and the share of its documents that counts: 1 is all of them."""

    source: ResolvedSource
    share: float


@dataclass(frozen=True)
class MeasuredText:
    """A text in tokens.

    Attributes:
        source: where it comes from.
        now, base: it in the tokens of the model, and of the base where that is another model; the very same sample
            where these are the same tokens.
        documents: how many there are; of a long text not all are measured.
        note: why predictions of the two cannot be compared, in words; empty where they can.
        remarks: what of the source was not read.
        keys: of ``now`` and ``base``; they change when a token does.
    """

    source: ResolvedSource
    now: HeldOutSample
    base: HeldOutSample | None
    documents: int
    note: str
    remarks: list[str]
    keys: list[str]


def own_texts(run: Path) -> list[MeasuredSource]:
    """The texts that a run itself measures: the held-out side of each of its own."""
    config = load_config(run)
    sources = resolve_sources(config.data, default_general=config.train.parameters != "all")
    return [MeasuredSource(source, config.data.held_out) for source in sources]


def given_texts(data: DataConfig, runs: Sequence[Path]) -> tuple[list[MeasuredSource], list[str]]:
    """The texts that the user names.

    Args:
        runs: what they trained on does not count.

    Returns:
        The sources, and a line for each of which not all counts, or for which that cannot be found out.
    """
    trained: dict[tuple[str, str], tuple[float, ResolvedSource, Path]] = {}
    notes = []
    for run in runs:
        own = load_config(run).data
        try:
            sources = resolve_sources(own, default_general=False)
        except UserError as error:
            notes.append(f"{run}: its own text is not all here, so it may have trained on what is measured: {error}")
            continue
        for source in sources:
            for file in _files(source) if source.trains else ():
                if file not in trained or own.held_out < trained[file][0]:
                    trained[file] = own.held_out, source, run
    found = []
    for source in resolve_sources(data, default_general=False, only_measured=True):
        hits = [trained[file] for file in _files(source) if file in trained]
        share = 1.0
        if hits:
            share, own, run = min(hits, key=lambda hit: hit[0])
            source = dataclasses.replace(source, text=own.text, split_by=own.split_by)  # by which the sides are told
            notes.append(f"{source.name}: {shown(run)} trained on it, so only the {share:.3g} it held out is measured")
        found.append(MeasuredSource(source, share))
    return found, notes


def _files(source: ResolvedSource) -> Iterator[tuple[str, str]]:
    """A source's files, wherever a name for them leads, as the kind of text they are read for."""
    for file in source.files:
        yield source.kind, file.path if "://" in file.path else os.path.realpath(file.path)


def in_tokens(
    sources: Sequence[MeasuredSource],
    models: Sequence[tuple[str, PretrainedFolder]],
    data: DataConfig,
    *,
    seq_len: int,
    max_tokens: int,
    progress: Callable[[str], None],
) -> list[MeasuredText]:
    """The texts, tokenised.

    Args:
        models: name and folder of the model, and of a base that is another model.
        data: how texts are read.
        max_tokens: of each text, in the tokens of the model.

    Raises:
        UserError: a text cannot be read, is empty or leaves nothing to predict, or a model has no tokenizer.
    """
    given, shares = [each.source for each in sources], [each.share for each in sources]
    stores = [tokenized(given, folder.tokenizer(), data, shares=shares, progress=progress) for _, folder in models]
    texts = []
    for source, *found in zip(given, *stores, strict=True):
        remarks = list(left_out(HeldOut(source, found[0], seq_len)))
        among = [None] if len(found) == 1 else _in_both(*found)
        if (in_both := among[0]) is not None:
            who = " and ".join(name for name, _ in models)
            if not len(in_both):
                raise UserError(f"{source.path}: {who} see other documents in it: each ends one at its own EOS's name")
            left = found[0].held_out.num_documents - len(in_both)
            remarks.append(
                f"{source.name}: left out {left:,} of its documents, which {who} do not end in the same places"
            )
        now = _sample(source, found[0], seq_len, max_tokens, among[0])
        base, note = (now, "") if len(models) == 2 else (None, "")
        if base is not None:
            base, note = _of_the_base(source, now, found[1], among[1], models)
        documents = found[0].held_out.num_documents if in_both is None else len(in_both)
        keys = [store.key(store.held_out) for store in found]
        texts.append(MeasuredText(source, now, base, documents, note, remarks, keys))
    return texts


def _in_both(now: TokenStore, base: TokenStore) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Which held-out documents of each are the same texts, in one order; None where all are, as nearly always. Where a
    text has the name of one tokenizer's EOS in it, that sees two documents and another one sees one."""
    digests = [store.digests[store.held_out.numbers] for store in (now, base)]
    if np.array_equal(*digests):
        return None, None
    _, *numbers = np.intersect1d(*digests, return_indices=True)
    return numbers[0], numbers[1]


def _of_the_base(
    source: ResolvedSource,
    now: HeldOutSample,
    store: TokenStore,
    among: np.ndarray | None,
    models: Sequence[tuple[str, PretrainedFolder]],
) -> tuple[HeldOutSample, str]:
    (name, folder), (base_name, base_folder) = models
    if now.equals(_sample(source, store, now.seq_len, now.num_tokens, among)):
        sizes = folder.config.vocab_size, base_folder.config.vocab_size
        if sizes[0] == sizes[1]:
            return now, ""
        return now, f"{source.name}: no KL, as {base_name} knows {sizes[1]:,} tokens and {name} {sizes[0]:,}"
    # The same documents, to the same place in the last one.
    whole = _sample(source, store, now.seq_len, store.held_out.num_tokens, among)
    base = _sample(source, store, now.seq_len, whole.tokens_of(now.num_documents), among)
    return (
        base,
        f"{source.name}: no KL, and only bits per byte compare: {base_name} cuts it into other tokens than {name}",
    )


def _sample(
    source: ResolvedSource, store: TokenStore, seq_len: int, max_tokens: int, among: np.ndarray | None
) -> HeldOutSample:
    sample = HeldOutSample(store, seq_len=seq_len, max_tokens=max_tokens, among=among)
    if not sample.num_predicted:
        raise UserError(
            f"{source.path}: documents of a single token each, which leave nothing to predict: give longer ones"
        )
    return sample
