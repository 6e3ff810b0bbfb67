"""Where new blocks go (LLaMA Pro, arXiv 2401.02415, section 3.2).

L blocks are cut into N groups; after each group stand P copies of the group's last P blocks."""

from __future__ import annotations

from dataclasses import dataclass

from llama_pro_fast.config import ExpandConfig
from llama_pro_fast.errors import UserError
from llama_pro_fast.model.trained import Trained


@dataclass(frozen=True)
class ExpansionPlan:
    """Which block each block of the expanded model comes from.

    Attributes:
        sources: for every block of the expanded model, the block of the model being expanded that it is or copies.
        is_new: for every block of the expanded model, whether it is a copy.
    """

    sources: tuple[int, ...]
    is_new: tuple[bool, ...]

    @classmethod
    def from_groups(cls, num_layers: int, groups: int, copies: int = 1) -> ExpansionPlan:
        """The paper's form: N groups, as equal as they can be, P copies after each.

        Raises:
            UserError: no groups, more groups than blocks, or more copies than the smallest group has blocks.
        """
        if not 1 <= groups <= num_layers:
            raise UserError(
                f"--expand.groups {groups}: the model has {num_layers} blocks; give a number from 1 to {num_layers}"
            )
        smallest = num_layers // groups
        if copies > smallest:
            raise UserError(
                f"--expand.copies {copies}: the smallest of {groups} groups of {num_layers} blocks has {smallest}; "
                "give fewer copies or fewer groups"
            )
        return cls.from_after(num_layers, [(group + 1) * num_layers // groups - 1 for group in range(groups)], copies)

    @classmethod
    def from_after(cls, num_layers: int, after: list[int], copies: int = 1) -> ExpansionPlan:
        """Each block k in ``after`` (from 0, any order) is followed by copies of the blocks k-P+1 … k.

        Raises:
            UserError: a block that is not there or is named twice, none at all, or too few blocks before it to copy.
        """
        if copies < 1:
            raise UserError(f"--expand.copies {copies}: give 1 or more")
        for block in block_numbers("expand.after", after, num_layers):
            if block - copies + 1 < 0:
                raise UserError(
                    f"--expand.after {block}: {copies} copies need {copies} blocks, there are {block + 1} up to it"
                )
        sources: list[int] = []
        is_new: list[bool] = []
        for block in range(num_layers):
            sources.append(block)
            is_new.append(False)
            if block in after:
                sources.extend(range(block - copies + 1, block + 1))
                is_new.extend([True] * copies)
        return cls(tuple(sources), tuple(is_new))

    @classmethod
    def from_config(cls, num_layers: int, config: ExpandConfig) -> ExpansionPlan:
        """What a recipe or command line asks for.

        Raises:
            UserError: both or neither of ``groups`` and ``after`` are given, or one of them cannot be followed.
        """
        if (config.groups is None) == (config.after is None):
            given = "none" if config.groups is None else "each"
            raise UserError(
                f"--expand.groups and --expand.after: {given} of them is given; give one (null takes a recipe's back)"
            )
        if config.groups is not None:
            return cls.from_groups(num_layers, config.groups, config.copies)
        return cls.from_after(num_layers, block_numbers("expand.after", config.after, num_layers), config.copies)

    @property
    def num_old(self) -> int:
        return len(self.sources) - sum(self.is_new)

    @property
    def num_layers(self) -> int:
        """Blocks of the expanded model."""
        return len(self.sources)

    @property
    def new_indices(self) -> tuple[int, ...]:
        """The new blocks, in the expanded model's numbering."""
        return tuple(index for index, new in enumerate(self.is_new) if new)

    @property
    def old_indices(self) -> tuple[int, ...]:
        """``old_indices[k]`` is where block k stands in the expanded model."""
        return tuple(index for index, new in enumerate(self.is_new) if not new)

    @property
    def trained(self) -> Trained:
        """The new blocks, and nothing else."""
        return Trained(self.num_layers, self.new_indices)


def block_numbers(key: str, given: list[int] | str, num_layers: int) -> list[int]:
    """The block numbers that an option names, as a list or as ``3,7,11``.

    Args:
        key: of the option.

    Raises:
        UserError: they are no numbers, none at all, of blocks that are not there, or named twice.
    """
    try:
        blocks = [int(block) for block in given.split(",")] if isinstance(given, str) else given
    except ValueError as error:
        raise UserError(f"--{key} {given}: not a list of block numbers such as 3,7,11") from error
    if not blocks:
        raise UserError(f"--{key}: no block is named; give block numbers such as 3,7,11")
    for block in blocks:
        if not 0 <= block < num_layers:
            raise UserError(f"--{key} {block}: the model has blocks 0 to {num_layers - 1}")
        if blocks.count(block) > 1:
            several = "; for several new blocks in one place give --expand.copies" if key == "expand.after" else ""
            raise UserError(f"--{key} {block}: named twice{several or '; give it once'}")
    return blocks
