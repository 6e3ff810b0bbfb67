"""A run's model as an ordinary Hugging Face folder.

Works on any run that has a complete checkpoint, finished or not. Tensors that did not train are copied byte for byte
from the folder the run trains; trained ones are cast once to the dtype they have there. Nothing is held but one tensor
at a time.

An export can be scaled. A new block adds to the residual stream what those modules give that were zero at its birth
(rewrite.py); with these times A it adds, to first order, A of it. At 1 the model is what was trained, at 0 the base bit
for bit, and between them it has learned less and forgotten less, without any training.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from llama_pro_fast.config import Settled
from llama_pro_fast.errors import UserError
from llama_pro_fast.expansion.lineage import intact_bases
from llama_pro_fast.expansion.manifest import MANIFEST_KEY, Manifest
from llama_pro_fast.expansion.rewrite import block_tensor_name, write_json
from llama_pro_fast.files import new_folder
from llama_pro_fast.hf.config import CONFIG_FILE, with_older_rope_keys
from llama_pro_fast.hf.folder import INDEX_FILE, SINGLE_FILE, PretrainedFolder
from llama_pro_fast.hf.safetensors import write_header
from llama_pro_fast.resume import load_config
from llama_pro_fast.runs.checkpoint import complete_checkpoints
from llama_pro_fast.runs.marker import step_of
from llama_pro_fast.training.checkpoint_folder import CheckpointFolder

LARGEST_SCALE = 2.0
"""So far beyond what was trained as the base lies before it."""


def export_run(
    run: Path,
    out: Path | None = None,
    *,
    from_step: int | None = None,
    scale: float | Sequence[float] | None = None,
) -> tuple[Path, int]:
    """Export the run's last complete checkpoint.

    Args:
        run: the run's folder.
        out: where to; by default ``run/export``, which an earlier export of the same run may occupy.
        from_step: take the checkpoint of that step instead; then, unless it is the last, ``out`` must be given.
        scale: by how much to scale what the run's new blocks add: from 0, the base, over 1, what was trained, to
            :data:`LARGEST_SCALE`. Where the model was expanded several times, one number for each generation of new
            blocks, oldest first, or a single one for the newest, which the run trained.

    Returns:
        The export's folder, and the step it is of.

    Raises:
        UserError: no run, no complete checkpoint or a damaged one, its base is gone or changed, ``out`` is taken, full
            or not writable; or the model cannot be scaled so.
    """
    if scale is not None:
        scale = _checked(scale, run, out)
    config, folder = load_config(run), CheckpointFolder(run, from_step)
    if from_step is not None and _is_own(run, out) and step_of(complete_checkpoints(run)[-1]) != from_step:
        raise UserError(
            f"--from_step {from_step}: give a folder of its own for it; {run / 'export'} is of the last step"
        )
    try:
        folder.check()
        _export(folder, config, out, scale)
    except UserError:
        if from_step is not None or folder.checkpoint.exists():
            raise
        return export_run(run, out, scale=scale)  # the run goes on, and has given this one up for a newer one
    return out or run / "export", folder.step


def _checked(scale: float | Sequence[float], run: Path, out: Path | None) -> tuple[float, ...]:
    numbers = tuple(map(float, [scale] if isinstance(scale, int | float) else scale))
    for number in numbers:
        if not 0 <= number <= LARGEST_SCALE:  # nor is NaN
            raise UserError(f"--scale {number:g}: give 0 (the base) to 1 (what was trained), at most {LARGEST_SCALE:g}")
    if _is_own(run, out):
        raise UserError(f"--scale: give a folder of its own for it; {run / 'export'} is the model as it was trained")
    return numbers


def _is_own(run: Path, out: Path | None) -> bool:
    """Whether it is the run's own export, which is read as its model."""
    return out is None or os.path.realpath(out) == os.path.realpath(run / "export")


def _export(folder: CheckpointFolder, config: Settled, out: Path | None, scale: tuple[float, ...] | None) -> None:
    manifest, factors = _scaled(folder.run, config, PretrainedFolder(folder.path), scale)
    with new_folder(out or folder.run / "export", replace=out is None) as partial:
        for file in folder.files:
            entries = [entry for entry in folder.entries.values() if entry.file == file]
            with open(partial / file, "wb") as target:
                write_header(target, [(e.name, e.dtype, e.shape, e.num_bytes) for e in entries])
                for entry in entries:
                    for piece in folder.read_bytes(entry.name, factors.get(entry.name, 1.0)):
                        target.write(piece)
        index = [] if folder.files == [SINGLE_FILE] else [folder.path / INDEX_FILE]
        for path in [*index, *folder.companions()]:
            shutil.copyfile(path, partial / path.name)
        raw_config = with_older_rope_keys(folder.raw_config, folder.config)
        if manifest is not None:
            raw_config[MANIFEST_KEY] = manifest.to_config()
        write_json(partial / CONFIG_FILE, raw_config)


def _scaled(
    run: Path, config: Settled, base: PretrainedFolder, scale: tuple[float, ...] | None
) -> tuple[Manifest | None, dict[str, float]]:
    """The export's manifest, and by name what is scaled and by how much.

    Raises:
        UserError: the run's model has no new blocks, other generations than there are numbers, or not the base any more
            that 0 would give back.
    """
    manifest = Manifest.from_config(base.raw_config)
    if manifest is None or config.train.parameters != "new_blocks":
        if scale is not None:
            raise UserError(
                f"--scale: {run} trained other weights than new blocks; to keep a part of what it learned, average the "
                f"weights of its export and of {base.path}, tensor by tensor"
            )
        return manifest and dataclasses.replace(manifest, base_intact=False, scale=()), {}
    count, intact = len(manifest.generations), intact_bases(base)
    *older, newest = scale or (1.0,)
    older = older or [1.0] * (count - 1)
    if len(older) != count - 1:
        raise UserError(
            f"--scale {','.join(f'{number:g}' for number in scale)}: the model was expanded {count} "
            f"time{'s' * (count != 1)}; give so many numbers, oldest first, or one for the newest blocks"
        )
    factors = {}
    for generation, factor in enumerate([*older, newest], start=1):
        if factor == 1:
            continue
        zeroed = manifest.zeroed(generation)
        if not zeroed or not intact[generation - 1]:
            made_from = manifest.generations[generation - 1].name
            raise UserError(
                f"--scale {factor:g}: at 0 the model would not be {made_from}, which its new blocks were put into: "
                "weights, or the manifest, were changed since; export it as it is, without --scale"
            )
        for index, modules in zeroed.items():
            names = (block_tensor_name(index, f"{name}.{kind}") for name in modules for kind in ("weight", "bias"))
            factors |= dict.fromkeys(base.entries.keys() & names, factor)
    # The newest blocks have trained since they were scaled, if ever they were.
    before = manifest.scale[:-1] or [1.0] * (count - 1)
    now = (*(one * other for one, other in zip(before, older, strict=True)), newest)
    scaled = dataclasses.replace(
        manifest,
        base_intact=intact[-1] and all(factor == 1 for factor in older),
        scale=now if any(factor != 1 for factor in now) else (),
    )
    return scaled, factors
