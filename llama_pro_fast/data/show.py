"""Packed sequences as text, for a person to see what the model will."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from llama_pro_fast.data.corpus import Corpus, where
from llama_pro_fast.model.batch import IGNORE_INDEX


def shown_sequences(corpus: Corpus, tokenizer, count: int) -> Iterator[str]:
    """The first ``count`` sequences of a run: of each piece where it comes from, its tokens and its text."""
    for number in range(count):
        batch, (epoch, position) = corpus.train.batch(number, 1), corpus.train.locate(number)
        bounds = sorted(set(batch.cu_seqlens.tolist()))
        documents = corpus.train.documents(number, 1)
        lines = [f"━━ sequence {number:,} of the run (epoch {epoch}, {position:,} there): {bounds[-1]:,} places"]
        for piece, (begin, end) in enumerate(pairwise(bounds)):
            if piece == len(documents):
                lines.append(f"── {end - begin:,} places without text")
                continue
            source, document = documents[piece]
            _, length = corpus.held_out[source].store.extent(document)
            learned = int((batch.labels[begin:end] != IGNORE_INDEX).sum())
            whole = "whole" if length == end - begin else f"of its {length:,}"
            lines.append(
                f"── {where(corpus.held_out[source], document)}: {end - begin:,} tokens, {whole}, {learned:,} predicted"
            )
            lines.append(tokenizer.decode(batch.input_ids[begin:end], skip_special_tokens=False))
        yield "\n".join(lines)
