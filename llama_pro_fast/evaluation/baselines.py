"""Two figures to hold a model's bits per byte against: what counting tokens gives, and what gzip gives.

A model that loses to either on some text has learned nothing of it worth having.
"""

from __future__ import annotations

import gzip
import math
from dataclasses import dataclass

import numpy as np

from llama_pro_fast.data.corpus import HeldOut


@dataclass(frozen=True)
class References:
    """For one held-out text, over what the model's figures are over.

    Attributes:
        unigram_loss: nats per token of the token frequencies in the source's training side (add-one smoothing).
        unigram_bits_per_byte: the same per UTF-8 byte.
        gzip_bits_per_byte: of the same documents, end to end, at gzip's best level.
    """

    unigram_loss: float
    unigram_bits_per_byte: float | None
    gzip_bits_per_byte: float


def references(text: HeldOut, tokenizer, *, vocab_size: int, max_tokens: int) -> References | None:
    """The two figures for a source's held-out text; None where it has no training side to count.

    Args:
        max_tokens: held-out tokens measured at most, as for the model.
    """
    if not text.store.train.num_tokens:
        return None
    sample = text.sample(max_tokens)
    counts = np.ones(vocab_size)
    counts[: len(text.store.counts)] += text.store.counts
    nats = math.log(counts.sum()) - np.log(counts)
    documents = sample.documents()
    # Of a document's tokens all but the first are predicted.
    total = float(sum(nats[document[1:]].sum() for document in documents))
    written = "".join(tokenizer.batch_decode(documents, skip_special_tokens=True)).encode()
    return References(
        unigram_loss=total / sample.num_predicted,
        unigram_bits_per_byte=total / math.log(2) / sample.num_bytes if sample.num_bytes else None,
        gzip_bits_per_byte=8 * len(gzip.compress(written, 9)) / max(1, len(written)),
    )
