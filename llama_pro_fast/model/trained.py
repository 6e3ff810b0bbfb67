"""What of a model trains: one value, made once from the recipe and the model's manifest, which everybody asks."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from llama_pro_fast.model.policy import BlockClass

MARKS = {BlockClass.PREFIX: ".", BlockClass.FROZEN: "o", BlockClass.TRAINED: "X"}
"""How a strip of blocks shows each class."""
LEGEND = "X trains, o passes the gradient on, . has no backward"


@dataclass(frozen=True)
class Trained:
    """Which of a model's blocks train.

    Attributes:
        num_layers: how many blocks the model has.
        blocks: indices of those that train, rising.
        everything: all blocks train, and the embeddings, the final norm and the head too.
        base_gone: why the model without ``blocks`` is not the one they were put into, or does not stay it, in words;
            empty where it is.
        older_blocks: indices of the new blocks of earlier expansions, rising: without these too the model is the one
            before the first.
        first_base_gone: why it is not; empty where it is.
    """

    num_layers: int
    blocks: tuple[int, ...]
    everything: bool = False
    base_gone: str = ""
    older_blocks: tuple[int, ...] = ()
    first_base_gone: str = ""

    @classmethod
    def all_of(cls, num_layers: int) -> Trained:
        """Every parameter of a model."""
        gone = "all parameters train, the base is not kept"
        return cls(num_layers, tuple(range(num_layers)), everything=True, base_gone=gone)

    @functools.cached_property
    def classes(self) -> list[BlockClass]:
        """The class of each block, bottom to top."""
        return [
            BlockClass.PREFIX
            if index < self.first
            else BlockClass.TRAINED
            if index in self.blocks
            else BlockClass.FROZEN
            for index in range(self.num_layers)
        ]

    @property
    def first(self) -> int:
        """The lowest block with a backward; the number of blocks where none has one."""
        return min(self.blocks, default=self.num_layers)

    @property
    def skip_for_base(self) -> tuple[int, ...]:
        """The blocks without which the model is its base; none where it is not in there."""
        return () if self.base_gone else self.blocks

    @property
    def skip_for_first_base(self) -> tuple[int, ...]:
        """The blocks without which the model is the one before the first of several expansions; none where there was
        one only, or it is not in there."""
        return () if self.first_base_gone or not self.older_blocks else tuple(sorted(self.blocks + self.older_blocks))

    @property
    def strip(self) -> str:
        """``..XooX``, a letter a block, as :data:`LEGEND` says."""
        return "".join(MARKS[kind] for kind in self.classes)
