"""The expansion manifest: which blocks of a model are new, and what they were made from.

It lies in the model's ``config.json`` under ``block_expansion``. The trainer reads which blocks train from here, and
from nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from llama_pro_fast.errors import UserError
from llama_pro_fast.expansion.plan import ExpansionPlan, block_numbers
from llama_pro_fast.hf.config import CONFIG_FILE
from llama_pro_fast.model.trained import Trained

MANIFEST_KEY = "block_expansion"
FORMAT_VERSION = 1
ZEROED = ("self_attn.o_proj", "mlp.down_proj")


@dataclass(frozen=True)
class ModelId:
    """A model an expansion started from; ``digest`` is :func:`~llama_pro_fast.digests.combined_digest`."""

    name: str
    digest: str
    num_hidden_layers: int


@dataclass(frozen=True)
class NewBlock:
    """One row of the manifest.

    Attributes:
        index: where the block stands in this model.
        copy_of: the block it was copied from, in the numbering of the model its generation was made from
            (``generations[generation - 1]``). Later generations move ``index`` and leave this alone.
        zeroed: the modules in it whose weights and biases were zero at birth.
        generation: from 1.
    """

    index: int
    copy_of: int
    zeroed: tuple[str, ...]
    generation: int


@dataclass(frozen=True)
class Manifest:
    """What ``config.json`` says of how a model was expanded.

    Attributes:
        base: the model before the first expansion.
        generations: the model each generation was made from; the first is ``base``.
        new_blocks: the new blocks of all generations, by index.
        base_intact: whether the newest generation's base is still in the model unchanged. Training more than the new
            blocks ends that: without its new blocks the model is then no model that was there before. Believed only
            where no weights are read; the trainer asks the digests (`expansion.lineage`), whatever is said here.
        scale: by how much an export has scaled what each generation's blocks add, oldest first, since they last
            trained; empty where it has scaled none.
    """

    base: ModelId
    generations: tuple[ModelId, ...]
    new_blocks: tuple[NewBlock, ...]
    base_intact: bool = True
    scale: tuple[float, ...] = ()

    @property
    def trained_blocks(self) -> tuple[int, ...]:
        """Indices of the newest generation's blocks: each generation freezes all that was there before it."""
        return tuple(block.index for block in self.new_blocks if block.generation == len(self.generations))

    def zeroed(self, generation: int) -> dict[int, tuple[str, ...]]:
        """Of each block of a generation the modules that were zero at birth: times 0 they make it an identity again.
        Empty where a row does not name those that do."""
        found = {row.index: row.zeroed for row in self.new_blocks if row.generation == generation}
        known = all(len(names) == len(ZEROED) and all(name in names for name in ZEROED) for names in found.values())
        return found if known else {}

    def base_gone(self, intact: Sequence[bool] | None) -> str:
        """Why the model without its newest blocks is not what they were put into; empty where it is.

        Args:
            intact: as in :func:`what_trains`.
        """
        if self.base_intact if intact is None else intact[-1]:
            return ""
        made_from = self.generations[-1]
        if not self.base_intact:
            scaled = any(factor != 1 for factor in self.scale[:-1])
            why = "older new blocks were scaled in an export" if scaled else "more than the new blocks was trained"
            return f"{why} since, {made_from.name} is no longer in the model"
        return self._not_in_there(made_from, "its new blocks", self.trained_blocks)

    def first_base_gone(self, intact: Sequence[bool] | None) -> str:
        """The same of the model before the first expansion, without all new blocks."""
        if intact is None or intact[0]:
            return ""
        return self._not_in_there(self.base, "all new blocks", tuple(row.index for row in self.new_blocks))

    @staticmethod
    def _not_in_there(model: ModelId, what: str, blocks: tuple[int, ...]) -> str:
        return (
            f"without {what} ({', '.join(map(str, blocks))}) the model is not {model.name}, which the manifest says it "
            "was made from: weights or block numbers were changed since"
        )

    @classmethod
    def of_expansion(cls, previous: Manifest | None, made_from: ModelId, plan: ExpansionPlan) -> Manifest:
        """The record of expanding ``made_from``, whose own record (if it was expanded before) is ``previous``."""
        generation = 1 + (len(previous.generations) if previous else 0)
        older = previous.new_blocks if previous else ()
        old_indices = plan.old_indices
        rows = [NewBlock(old_indices[b.index], b.copy_of, b.zeroed, b.generation) for b in older]
        rows += [NewBlock(index, plan.sources[index], ZEROED, generation) for index in plan.new_indices]
        return cls(
            base=previous.base if previous else made_from,
            generations=(*(previous.generations if previous else ()), made_from),
            new_blocks=tuple(sorted(rows, key=lambda block: block.index)),
            scale=(*previous.scale, 1.0) if previous and previous.scale else (),
        )

    @classmethod
    def from_config(cls, raw_config: dict[str, Any]) -> Manifest | None:
        """Read ``config.json``'s content; None for a model that was never expanded.

        Raises:
            UserError: the record is of another format or contradicts itself or the config.
        """
        if (raw := raw_config.get(MANIFEST_KEY)) is None:
            return None
        if not isinstance(raw, dict) or "format_version" not in raw:
            raise _bad_manifest("has no format_version")
        if raw["format_version"] != FORMAT_VERSION:
            raise _bad_manifest(
                f"has format version {raw['format_version']}, this version of llama-pro-fast reads {FORMAT_VERSION}"
            )
        try:
            manifest = cls(
                base=ModelId(**raw["base"]),
                generations=tuple(ModelId(**row) for row in raw["generations"]),
                new_blocks=tuple(NewBlock(**{**row, "zeroed": tuple(row["zeroed"])}) for row in raw["new_blocks"]),
                base_intact=raw.get("base_intact", True),
                scale=tuple(raw.get("scale", ())),
            )
        except KeyError as error:
            raise _bad_manifest(f"lacks {error.args[0]}") from error
        except TypeError as error:
            # The dataclasses' own words name the missing or unknown key.
            raise _bad_manifest(str(error).split("__init__() ")[-1]) from error
        manifest._check(raw_config.get("num_hidden_layers"))
        return manifest

    def _check(self, num_layers: Any) -> None:
        rows = self.new_blocks
        numbers = [num_layers, *(number for row in rows for number in (row.index, row.copy_of, row.generation))]
        numbers += [model.num_hidden_layers for model in (self.base, *self.generations)]
        if not all(type(number) is int for number in numbers):
            raise _bad_manifest("has a block number or layer count that is no whole number")
        words = [word for model in (self.base, *self.generations) for word in (model.name, model.digest)]
        if not all(isinstance(word, str) for word in words):
            raise _bad_manifest("has a name or digest of a model that is no text")
        if not isinstance(self.base_intact, bool):
            raise _bad_manifest(f"says base_intact {self.base_intact!r:.40}, which is neither true nor false")
        if not all(type(factor) in (int, float) and math.isfinite(factor) for factor in self.scale):
            raise _bad_manifest("has a scale that is no number")
        if len(self.scale) not in (0, len(self.generations)):
            raise _bad_manifest(f"has {len(self.scale)} scales for {len(self.generations)} generations")
        if not rows or not self.generations:
            raise _bad_manifest("names no new block")
        for row in rows:
            if not 0 <= row.index < num_layers:
                raise _bad_manifest(f"names block {row.index} and the model has {num_layers}")
            if sum(other.index == row.index for other in rows) > 1:
                raise _bad_manifest(f"names block {row.index} twice")
            if not 1 <= row.generation <= len(self.generations):
                raise _bad_manifest(f"puts block {row.index} in a generation, {row.generation}, that it does not list")
            if not 0 <= row.copy_of < self.generations[row.generation - 1].num_hidden_layers:
                raise _bad_manifest(f"says block {row.index} copies {row.copy_of}, which its base did not have")
        if self.base != self.generations[0]:
            raise _bad_manifest("has a base that is not the first generation's model")
        depths = [model.num_hidden_layers for model in self.generations] + [num_layers]
        for generation, (before, depth) in enumerate(pairwise(depths), start=1):
            if before + sum(row.generation == generation for row in rows) != depth:
                raise _bad_manifest(f"does not add up: generation {generation} made {depth} blocks of {before}")

    def to_config(self) -> dict[str, Any]:
        """The value of the ``block_expansion`` key; without ``scale`` where nothing was scaled."""
        config = {"format_version": FORMAT_VERSION, **asdict(self)}
        return config if self.scale else {key: value for key, value in config.items() if key != "scale"}


def what_trains(
    raw_config: dict[str, Any],
    num_layers: int,
    *,
    parameters: str,
    blocks: list[int] | str | None = None,
    plan: ExpansionPlan | None = None,
    name: str,
    intact: Sequence[bool] | None = None,
) -> Trained:
    """What of a model trains, by the recipe and by its manifest, or by the expansion it is about to get.

    Args:
        raw_config: ``config.json``'s content.
        num_layers: blocks of that model.
        parameters, blocks: the recipe's `train.parameters` and `train.blocks`.
        plan: how the model will be expanded first.
        name: of the model, for the error.
        intact: of each generation, whether its base is still in the model (:func:`lineage.intact_bases`); without it
            the manifest is believed.

    Raises:
        UserError: new blocks are to train and there are none, or are to come and there are some already, or a block is
            named that is not there.
    """
    manifest = Manifest.from_config(raw_config)
    if plan is not None and manifest is not None:
        raise UserError(
            f"--expand.*: {name} is expanded already; leave the option out to train its new blocks, or add a "
            "generation with `llama-pro-fast expand` first"
        )
    if parameters == "all":
        return Trained.all_of(num_layers if plan is None else plan.num_layers)
    if parameters == "blocks":
        named = block_numbers("train.blocks", blocks, num_layers)
        return Trained(num_layers, tuple(sorted(named)), base_gone="blocks of the base train, it is not kept")
    if plan is not None:
        return plan.trained
    if manifest is None:
        raise UserError(
            f"{name}: has no new blocks to train; say where they go, for example --expand.groups "
            f"{max(1, num_layers // 4)} (or train everything with --train.parameters all)"
        )
    return Trained(
        num_layers,
        manifest.trained_blocks,
        base_gone=manifest.base_gone(intact),
        older_blocks=tuple(row.index for row in manifest.new_blocks if row.index not in manifest.trained_blocks),
        first_base_gone=manifest.first_base_gone(intact),
    )


def _bad_manifest(what: str) -> UserError:
    return UserError(f"{CONFIG_FILE}: its key {MANIFEST_KEY} {what}; expand the base model again")
