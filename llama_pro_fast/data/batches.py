"""Pieces of documents -> a packed batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from llama_pro_fast.model.batch import IGNORE_INDEX, PackedBatch, padded_boundaries

if TYPE_CHECKING:
    from llama_pro_fast.text.store import Side, TokenStore

FILLING = -1
"""Instead of a source's number: places of a sequence that no document fills."""


class Row(NamedTuple):
    """Pieces in the order in which they are laid, all ``[pieces]`` int64.

    Attributes:
        sources: the source of each, or FILLING.
        documents: the document it is of, on its source's side.
        offsets: tokens of the document before it.
        lengths: its tokens.
    """

    sources: np.ndarray
    documents: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray


def lay(row: Row, sides: Sequence[tuple[TokenStore, Side]], seq_len: int) -> PackedBatch:
    """The batch of a row of pieces.

    The last token of a piece predicts the next token of its document, also where that is not in the piece; a document's
    last token predicts nothing. Filling has token 0 and no targets.

    Args:
        sides: of each source.
        seq_len: ``max_seqlen`` of the batch.
    """
    bounds = np.concatenate(([0], np.cumsum(row.lengths)))
    total = int(bounds[-1])
    input_ids = np.zeros(total, np.int64)
    labels = np.full(total, IGNORE_INDEX, np.int64)
    for source, (store, side) in enumerate(sides):
        here = np.flatnonzero(row.sources == source)
        if not len(here):
            continue
        documents, offsets, lengths = row.documents[here], row.offsets[here], row.lengths[here]
        goes_on = offsets + lengths < side.lengths[documents]
        begins = side.begins[documents] + offsets
        found = store.tokens(begins, lengths + goes_on)  # one token more: what the last one predicts
        learned = store.learned(begins, lengths + goes_on)
        ends = np.cumsum(lengths)
        at = np.arange(ends[-1]) + np.repeat(bounds[here] - (ends - lengths), lengths)
        read = np.arange(ends[-1]) + np.repeat(np.cumsum(goes_on) - goes_on, lengths)
        input_ids[at] = found[read]
        targets = found if learned is None else np.where(learned, found, IGNORE_INDEX)
        targets = np.append(targets, IGNORE_INDEX)[read + 1]
        targets[ends[~goes_on] - 1] = IGNORE_INDEX
        labels[at] = targets
    position_ids = np.arange(total) - np.repeat(bounds[:-1], row.lengths)
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(position_ids),
        cu_seqlens=torch.from_numpy(_padded(bounds)),
        max_seqlen=seq_len,
        num_valid=int(np.count_nonzero(labels != IGNORE_INDEX)),
    )


def _padded(bounds: np.ndarray) -> np.ndarray:
    """``cu_seqlens`` ``[C]`` int32: the boundaries and empty documents, C the next power of two, at least 16.

    C is fixed within a bucket of batches and not for the run. Shapes should recur, so that the allocator's blocks and
    any compiled code do, but every empty document costs: PyTorch's flash-attention 2 gives each document 128 more rows
    of fp32 dq in backward, and every kernel a tile of its grid. A C that is enough for any batch of a corpus with a few
    tiny documents is a hundred times what most need (2.7 GiB of such rows at 7B width); the next power of two is at
    most twice, and takes few values. A CUDA graph, which needs one C, has to choose it for itself.
    """
    cu_seqlens = np.full(padded_boundaries(len(bounds)), bounds[-1], np.int32)
    cu_seqlens[: len(bounds)] = bounds
    return cu_seqlens
