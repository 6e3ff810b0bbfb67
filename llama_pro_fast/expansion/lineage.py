"""What a model's files prove of where it comes from, and whether they are still those of an earlier time.

A manifest is text: the model may have been trained on elsewhere, or the text edited. But it holds the digest of each
model that was expanded, and a digest can be taken again: of the tensors that are left without that and the later
generations' new blocks, under the names they had then.
"""

from __future__ import annotations

import json
from typing import Any

from llama_pro_fast.digests import combined_digest
from llama_pro_fast.expansion.manifest import Manifest
from llama_pro_fast.expansion.rewrite import block_tensor_name, split_name
from llama_pro_fast.hf.config import CONFIG_FILE
from llama_pro_fast.hf.folder import PretrainedFolder, tensor_digests
from llama_pro_fast.hf.loading import EMBEDDING, HEAD

NOT_OF_THE_MODEL = ("transformers_version", "_name_or_path")
"""Keys of config.json that say who wrote it."""

LONGEST_VALUE = 60


def intact_bases(folder: PretrainedFolder) -> tuple[bool, ...]:
    """Of each generation, oldest first, whether the model it was made from is still in ``folder``, byte for byte: is
    what is left without the new blocks of this generation and of those after it. Empty if it was never expanded.

    All tensors are read, once a process. A tied head that is stored, or is not any more, makes no difference.

    Raises:
        UserError: a file or the manifest is damaged.
    """
    manifest = Manifest.from_config(folder.raw_config)
    if manifest is None:
        return ()
    digests, intact = tensor_digests(folder), []
    for generation, base in enumerate(manifest.generations, start=1):
        found = _digests_without(digests, {row.index for row in manifest.new_blocks if row.generation >= generation})
        same = combined_digest(found) == base.digest
        if not same and folder.config.tie_word_embeddings and EMBEDDING in found:
            head = {} if HEAD in found else {HEAD: found[EMBEDDING]}
            same = combined_digest({name: d for name, d in found.items() if name != HEAD} | head) == base.digest
        intact.append(same)
    return tuple(intact)


def _digests_without(digests: dict[str, str], blocks: set[int]) -> dict[str, str]:
    """A model's digests without those of some blocks; the others move up."""
    left = {}
    for name, digest in digests.items():
        if (split := split_name(name)) is None:
            left[name] = digest
        elif split[0] not in blocks:
            left[block_tensor_name(split[0] - sum(block < split[0] for block in blocks), split[1])] = digest
    return left


def model_identity(folder: PretrainedFolder) -> dict[str, Any]:
    """What makes ``folder`` the model it is: ``weights``, the combined digest of its tensors, and ``config``, all that
    config.json (the manifest included) says of the model. It survives JSON; see :func:`difference`."""
    config = {key: value for key, value in folder.raw_config.items() if key not in NOT_OF_THE_MODEL}
    return {"weights": combined_digest(tensor_digests(folder)), "config": config}


def difference(then: dict[str, Any], now: dict[str, Any]) -> str | None:
    """How one :func:`model_identity` differs from another, as a clause such as ``rope_theta was 10000.0 and is
    500000.0 in config.json``; None where it does not."""
    if (found := _first_difference(then["config"], now["config"])) is not None:
        key, (before, after) = found
        is_now = "is gone from" if after is _ABSENT else f"is {_shown(after)} in"
        was = "was not there" if before is _ABSENT else f"was {_shown(before)}"
        return f"{key} {was} and {is_now} {CONFIG_FILE}"
    if then["weights"] != now["weights"]:
        return f"the weights were {then['weights']} and are {now['weights']}"
    return None


_ABSENT = object()


def _first_difference(then: Any, now: Any, key: str = "") -> tuple[str, tuple[Any, Any]] | None:
    """The place of the first value that differs, dotted, and both values."""
    if isinstance(then, list) and isinstance(now, list):
        then, now = (dict(enumerate(values)) for values in (then, now))
    if not (isinstance(then, dict) and isinstance(now, dict)):
        # As JSON a NaN is equal to itself.
        return None if then == now or _shown(then, None) == _shown(now, None) else (key, (then, now))
    for name in [*then, *(name for name in now if name not in then)]:
        place = f"{key}.{name}" if key else str(name)
        if found := _first_difference(then.get(name, _ABSENT), now.get(name, _ABSENT), place):
            return found
    return None


def _shown(value: Any, longest: int | None = LONGEST_VALUE) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if longest is None or len(text) <= longest else text[: longest - 1] + "…"
