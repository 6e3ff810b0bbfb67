"""A packed batch: several documents laid end to end in one flat row of tokens; and what blocks read of it.

Everything attention and rotary need to keep documents apart is made here, on the host, once per batch:

    tokens        a0 a1 a2 | b0 b1 | c0 c1 c2 c3          T = 9
    position_ids   0  1  2    0  1    0  1  2  3
    cu_seqlens     0          3       5            9  9 9  (padded by repeating T: empty documents)
    labels        a1 a2  -    b1 -   c1 c2 c3  -           the last token of a document predicts nothing
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_pro_fast.model.spec import BlockSpec

IGNORE_INDEX = -100


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch of T tokens.

    Attributes:
        input_ids: ``[T]`` int64.
        labels: ``[T]`` int64, already shifted: ``labels[t]`` is the token that follows ``input_ids[t]`` in its own
            document, :data:`IGNORE_INDEX` where there is none.
        position_ids: ``[T]`` int64, restarting at 0 with every document.
        cu_seqlens: ``[C]`` int32, document boundaries from 0 to T, padded by repeating T.
        max_seqlen: upper bound on a document's length, constant over a run.
        num_valid: how many labels are not ignored; a host integer, so nobody has to ask the device.
        num_general: how many tokens, the last ones, are of general text, on which the base is the teacher.
        num_valid_general: how many of their labels are not ignored.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    num_valid: int
    num_general: int = 0
    num_valid_general: int = 0

    @property
    def general(self) -> PackedBatch:
        """The last ``num_general`` tokens, which begin with a document, as a batch; of the documents before them empty
        ones are left."""
        before = len(self.labels) - self.num_general
        return dataclasses.replace(
            self,
            input_ids=self.input_ids[before:],
            labels=self.labels[before:],
            position_ids=self.position_ids[before:],
            cu_seqlens=(self.cu_seqlens - before).clamp(min=0),
            num_valid=self.num_valid_general,
        )

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its tensors on ``device``."""
        on_gpu = torch.device(device).type == "cuda"
        moved = {
            # From pageable memory a copy makes the host wait.
            f.name: (value.pin_memory() if on_gpu and value.device.type == "cpu" else value).to(
                device, non_blocking=True
            )
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), torch.Tensor)
        }
        return dataclasses.replace(self, **moved)

    @classmethod
    def from_documents(
        cls,
        documents: Sequence[Sequence[int]],
        *,
        next_tokens: Sequence[int | None] | None = None,
        cu_seqlens_length: int | None = None,
        max_seqlen: int | None = None,
    ) -> PackedBatch:
        """Pack token lists.

        Args:
            documents: token ids of each document (or piece of one).
            next_tokens: for each document the token that follows it in its source when it was cut short, else None.
                A piece cut at the sequence length thereby still predicts its continuation.
            cu_seqlens_length: C; by default ``len(documents) + 1``.
            max_seqlen: by default the longest document.
        """
        lengths = [len(document) for document in documents]
        total = sum(lengths)
        bounds = [0]
        for length in lengths:
            bounds.append(bounds[-1] + length)
        cu_seqlens_length = cu_seqlens_length or len(bounds)
        assert cu_seqlens_length >= len(bounds), f"{len(documents)} documents do not fit {cu_seqlens_length} boundaries"

        labels: list[int] = []
        for index, document in enumerate(documents):
            following = next_tokens[index] if next_tokens is not None else None
            if len(document):
                labels.extend(document[1:])
                labels.append(IGNORE_INDEX if following is None else following)
        return cls(
            input_ids=torch.tensor([token for document in documents for token in document], dtype=torch.int64),
            labels=torch.tensor(labels, dtype=torch.int64),
            position_ids=torch.tensor([p for length in lengths for p in range(length)], dtype=torch.int64),
            cu_seqlens=torch.tensor(bounds + [total] * (cu_seqlens_length - len(bounds)), dtype=torch.int32),
            max_seqlen=max(lengths, default=0) if max_seqlen is None else max_seqlen,
            num_valid=sum(label != IGNORE_INDEX for label in labels),
        )


def padded_boundaries(count: int) -> int:
    """How long ``cu_seqlens`` is made for ``count`` boundaries: the next power of two, at least 16."""
    return max(16, 1 << (count - 1).bit_length())


@dataclass(frozen=True)
class BlockContext:
    """What every block of a forward pass shares: the batch's layout, the rotary tables, the attention backend.

    Attributes:
        position_ids: ``[T]`` int64.
        cu_seqlens: ``[C]`` int32.
        max_seqlen: upper bound on a document's length, constant over a run.
        cos, sin: ``[positions, D/2]`` float32.
        attention: name of the attention backend.
    """

    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    cos: Tensor
    sin: Tensor
    attention: str

    @classmethod
    def for_batch(cls, batch: PackedBatch, *, rotary_tables: tuple[Tensor, Tensor], attention: str) -> BlockContext:
        cos, sin = rotary_tables
        return cls(batch.position_ids, batch.cu_seqlens, batch.max_seqlen, cos, sin, attention)

    @property
    def rotation(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the rotary ops take beside their heads."""
        return self.cos, self.sin, self.position_ids

    def window(self, spec: BlockSpec) -> int | None:
        """The sliding window of a block, in keys. None if no document can be longer than the window: plain attention is
        then the same, and a backend without windows will do."""
        return spec.window if spec.window is not None and spec.window < self.max_seqlen else None
