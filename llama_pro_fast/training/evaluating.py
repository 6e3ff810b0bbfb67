"""The story of an evaluation: which model and base, which text, what is known already; then load, measure and note.

A run counts as the model that an export of its checkpoint would be. Models are loaded one after the other, so two take
no more memory on the device than one and a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llama_pro_fast import __version__
from llama_pro_fast.config import RunConfig, TrainConfig, check_values
from llama_pro_fast.console import waiting
from llama_pro_fast.data.corpus import cache_of
from llama_pro_fast.data.sample import HeldOutSample
from llama_pro_fast.errors import UserError
from llama_pro_fast.evaluation.remembered import Remembered
from llama_pro_fast.evaluation.texts import BaseText, Figures, Watch, measure, read_by_base
from llama_pro_fast.expansion.lineage import intact_bases, model_identity
from llama_pro_fast.expansion.manifest import Manifest, what_trains
from llama_pro_fast.hf.config import CONFIG_FILE, resolve
from llama_pro_fast.hf.folder import PretrainedFolder
from llama_pro_fast.hf.loading import load_model
from llama_pro_fast.host import available_memory
from llama_pro_fast.model.decoder import DTYPES, Decoder
from llama_pro_fast.model.policy import Recompute
from llama_pro_fast.model.trained import Trained
from llama_pro_fast.planning import devices
from llama_pro_fast.planning.devices import GIB
from llama_pro_fast.planning.job import Job, sequence_length
from llama_pro_fast.planning.memory import evaluation_memory
from llama_pro_fast.resume import load_config
from llama_pro_fast.runs.marker import COMPLETE
from llama_pro_fast.runs.run_folder import shown
from llama_pro_fast.training import model_folder
from llama_pro_fast.training.checkpoint_folder import CheckpointFolder
from llama_pro_fast.training.measured_texts import MeasuredText, given_texts, in_tokens, own_texts
from llama_pro_fast.training.settle import settle_computation, start_device
from llama_pro_kernels import implementation_name

TOKENS = 65_536
"""Measured of a text at most, where the user does not say."""
AT_A_TIME = 16_384
"""Tokens of a micro-batch at most: more make no product faster."""


@dataclass(frozen=True, kw_only=True)
class TextReport(Figures):
    """The figures of one text.

    Attributes:
        source, role: its name, and ``domain`` or ``general``.
        of_documents: how many ``documents`` are a sample of.
        cached: whether they were known from an earlier call.
    """

    source: str
    role: str
    of_documents: int
    cached: bool


@dataclass(frozen=True, kw_only=True)
class Report:
    """What an evaluation found.

    Attributes:
        model: as the user named it.
        step: of the run's checkpoint that was read; None where it was an ordinary folder.
        base, first_base: names of what it is held against; None where there is no such model.
        device, dtype, attention, seq_len: what was computed with.
        micro_batch_size: sequences at a time; None where everything was known.
        planned_bytes: of tensors on the device; None likewise.
        texts: the domain first.
        notes: what a reader of the figures should know, a line each.
    """

    model: str
    step: int | None
    base: str | None
    first_base: str | None
    device: str
    dtype: str
    attention: str
    seq_len: int
    micro_batch_size: int | None
    planned_bytes: int | None
    texts: list[TextReport]
    notes: list[str]


@dataclass(frozen=True)
class _Model:
    """The model or its base: its name, its files, and what it is computed with."""

    name: str
    folder: PretrainedFolder
    train: TrainConfig

    def identity(self, remembered: Remembered) -> str:
        """Another one where a tensor or the config is another."""
        folder = self.folder
        files = [folder.path / name for name in (CONFIG_FILE, *folder.files)]
        if isinstance(folder, CheckpointFolder):
            files.append(folder.checkpoint / COMPLETE)

        def find() -> dict[str, Any]:
            self._check()
            with waiting(f"reading {self.name} ..."):
                return model_identity(folder)

        return remembered.held_by(files, find)

    def load(self) -> Decoder:
        self._check()
        with waiting(f"loading {self.name} ..."):
            return load_model(
                self.folder,
                dtype=DTYPES[self.train.dtype],
                device=self.train.device,
                max_length=self.train.seq_len,
                attention=self.train.attention,
            )

    @property
    def is_gone(self) -> bool:
        """Whether its checkpoint is not there any more."""
        return isinstance(self.folder, CheckpointFolder) and not self.folder.checkpoint.exists()

    def _check(self) -> None:
        if isinstance(self.folder, CheckpointFolder):
            self.folder.check()


def evaluate_texts(
    model: str, config: RunConfig, *, base: str | None = None, from_step: int | None = None, fresh: bool = False
) -> Report:
    """Measure a model on texts, and beside it what it came from or another model.

    Args:
        model: folder in the Hugging Face layout, a run's folder or a hub id.
        config: of it the texts and how they are read (``data``), ``eval.tokens``, and of ``train`` what is computed
            with. What it leaves open is, for a run, as the run has it, its own held-out texts too.
        base: another model to hold it against; by default the bases in the model itself, by its manifest.
        from_step: of a run, the checkpoint to take; by default the last.
        fresh: measure again what is known.

    Raises:
        UserError: there is no such model or text, or no memory for them, or a loss is not finite.
    """
    check_values(config)
    runs, device = model_folder.runs_behind(model), start_device(config)
    config = _as_the_run(config, runs[0], device) if runs else config
    with waiting("reading config ..."):
        named = [(model, from_step), *([(base, None)] if base else [])]
        models = _settled(config, named, device)
    try:
        return _report(models, config, runs, device, fresh=fresh)
    except (UserError, OSError):
        if from_step is not None or not any(each.is_gone for each in models):
            raise
        # The run goes on, and has given this checkpoint up for a newer one.
        return evaluate_texts(model, config, base=base, fresh=fresh)


def _report(
    models: Sequence[_Model], config: RunConfig, runs: Sequence[Path], device: torch.device, *, fresh: bool
) -> Report:
    now, other = models[0], models[1] if len(models) > 1 else None
    max_tokens, seq_len = config.eval.tokens or TOKENS, now.train.seq_len
    with waiting("reading text ...") as update:
        if config.data.domain or config.data.general:
            of_base = model_folder.runs_behind(other.name) if other else []
            sources, notes = given_texts(config.data, [*runs, *of_base])
            if (unknown := _trained_elsewhere(now, runs)) is not None:
                notes.append(f"{unknown}: which text its new blocks trained on is not known here, so all is measured")
        elif runs:
            sources, notes = own_texts(runs[0]), [f"measured: what {shown(runs[0])} held out of its own text"]
        else:
            raise UserError(
                "--data.general: say what to measure: a file, a folder or a pattern of text, or a data set of the hub "
                "(--data.domain takes the same)"
            )
        texts = in_tokens(
            sources,
            [(each.name, each.folder) for each in models],
            config.data,
            seq_len=seq_len,
            max_tokens=max_tokens,
            progress=update,
        )

    remembered = Remembered(cache_of(config.data))
    computed = [__version__, seq_len, max_tokens, now.train.dtype, now.train.device]
    computed += [part for each in models for part in (each.identity(remembered), each.train.attention)]
    figures = {}
    for index, text in enumerate(texts):
        if not fresh and (values := remembered.get([*computed, *text.keys])) is not None:
            figures[index] = Figures.from_dict(values)
    missing = {index: text for index, text in enumerate(texts) if index not in figures}
    manifest = None if other else Manifest.from_config(now.folder.raw_config)
    micro_batch, planned = None, None
    if missing:
        skips, gone = _bases_within(now) if manifest else ({}, "")
        micro_batch, planned = _micro_batch(now, other, skips)
        found = _measured(list(missing.values()), now, other, skips, micro_batch, planned)
        for (index, text), each in zip(missing.items(), found, strict=True):
            figures[index] = replace(each, note=gone)
            remembered.put([*computed, *text.keys], asdict(figures[index]))

    reports = []
    for index, text in enumerate(texts):
        found = replace(figures[index], note=text.note or figures[index].note)
        named = {"source": text.source.name, "role": text.source.role, "of_documents": text.documents}
        reports.append(TextReport(**vars(found), **named, cached=index not in missing))
    lines = [*notes, *(line for text in texts for line in text.remarks), *(report.note for report in reports)]
    return Report(
        model=now.name,
        step=getattr(now.folder, "step", None),
        base=other.name
        if other
        else (manifest.generations[-1].name if any(report.base for report in reports) else None),
        first_base=manifest.base.name if any(report.first_base for report in reports) else None,
        device=now.train.device,
        dtype=now.train.dtype,
        attention=now.train.attention,
        seq_len=seq_len,
        micro_batch_size=micro_batch,
        planned_bytes=planned,
        texts=reports,
        notes=[line for line in dict.fromkeys(lines) if line],
    )


def _trained_elsewhere(now: _Model, runs: Sequence[Path]) -> str | None:
    """The model, it or one behind it, with new blocks that none of the runs trained; None if there is none."""
    if not runs:
        folder, name, trained = now.folder, now.name, 0
    else:
        last = load_config(runs[-1])
        name, trained = last.model.path, 0 if last.expand.wanted else 1
        try:
            folder = PretrainedFolder(resolve(name, wanted="tokenizer"))
        except UserError:  # gone since, as it may be
            return None
    manifest = Manifest.from_config(folder.raw_config)
    return name if manifest is not None and len(manifest.generations) > trained else None


def _as_the_run(config: RunConfig, run: Path, device: torch.device) -> RunConfig:
    """``config`` with what it leaves open as the run has it; the dtype only on a device of the run's kind."""
    own = load_config(run)

    def filled(asked: Any, own: Any, names: Sequence[str]) -> Any:
        default = type(asked)()
        return replace(asked, **{n: getattr(own, n) for n in names if getattr(asked, n) == getattr(default, n)})

    given = config.data.domain or config.data.general
    return replace(
        config,
        data=filled(config.data, own.data, ("special_tokens", "max_bad_share", "cache")),
        train=filled(config.train, own.train, ("seq_len", *(["dtype"] if own.train.device == device.type else []))),
        eval=config.eval if given else filled(config.eval, own.eval, ("tokens",)),
    )


def _settled(config: RunConfig, named: Sequence[tuple[str, int | None]], device: torch.device) -> list[_Model]:
    """The models, with one sequence length, each with the attention backend that serves it."""
    folders = [model_folder.opened(name, from_step=step) for name, step in named]
    configs = [replace(config, model=replace(config.model, path=name)) for name, _ in named]
    seq_len = min(sequence_length(each, folder.config) for each, folder in zip(configs, folders, strict=True))
    configs = [replace(each, train=replace(each.train, seq_len=seq_len)) for each in configs]
    return [
        _Model(each.model.path, folder, settle_computation(each, folder, device).train)
        for each, folder in zip(configs, folders, strict=True)
    ]


def _bases_within(now: _Model) -> tuple[dict[str, tuple[int, ...]], str]:
    """Of each base that is in an expanded model, by its digest, the blocks without which the model is that; and in
    words, why one is not."""
    folder = now.folder
    with waiting(f"reading {now.name} ..."):
        trained = what_trains(
            folder.raw_config,
            folder.config.num_hidden_layers,
            parameters="new_blocks",
            name=now.name,
            intact=intact_bases(folder),
        )
    skips = {"base": trained.skip_for_base, "first_base": trained.skip_for_first_base}
    gone = trained.base_gone or (trained.first_base_gone if trained.older_blocks else "")
    return {name: blocks for name, blocks in skips.items() if blocks}, gone


def _micro_batch(now: _Model, other: _Model | None, skips: Mapping[str, Sequence[int]]) -> tuple[int, int]:
    """Sequences at a time, the same for both models so that equal models compute equally, and bytes on the device.

    Raises:
        UserError: not even one fits.
    """
    train = now.train
    device = devices.present() if train.device == "cuda" else devices.cpu()
    usable = device.usable if train.memory == "auto" else int(train.memory * GIB)
    dtype = DTYPES[train.dtype]
    triton = implementation_name(train.device, dtype).startswith("triton")

    def needed(size: int) -> int:
        peaks = []
        for model in filter(None, (now, other)):
            config = model.folder.config
            # What waits for the comparison is counted by the blocks that are skipped for a second base.
            older = tuple(skips["first_base"]) if len(skips) == 2 else ()
            trained = Trained(config.num_hidden_layers, (), older_blocks=older)
            attention, none = model.train.attention, [Recompute.NONE] * config.num_hidden_layers
            job = Job(
                config=config, trained=trained, dtype=dtype, seq_len=train.seq_len, attention=attention, triton=triton
            )
            peaks.append(evaluation_memory(job, none, micro_batch_size=size))
        if other is not None:
            width = other.folder.config.hidden_size
            peaks[0] += dtype.itemsize * width * (other.folder.config.vocab_size + size * train.seq_len)
        return max(peaks)

    sizes = [max(1, AT_A_TIME // train.seq_len)] if train.micro_batch_size is None else [train.micro_batch_size]
    while train.micro_batch_size is None and sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    for size in sizes:
        if needed(size) <= usable:
            return size, needed(size)
    raise UserError(
        f"--train.memory: {now.name} needs {needed(sizes[-1]) / GIB:,.2f} GiB, with {sizes[-1]} x {train.seq_len} "
        f"tokens at a time, and {usable / GIB:,.2f} GiB are usable on {device.title}; lower --train.seq_len, or give "
        "another --train.device"
    )


def _measured(
    texts: Sequence[MeasuredText],
    now: _Model,
    other: _Model | None,
    skips: Mapping[str, Sequence[int]],
    micro_batch: int,
    planned: int,
) -> Iterator[Figures]:
    """The figures of each text, one after the other.

    Raises:
        UserError: a loss is not finite, or the host has no memory for what is kept of the base.
    """
    of_base: list[BaseText | None] = [None] * len(texts)
    head = None
    if other is not None:
        _check_room(texts, other, planned)
        model = other.load()
        for index, text in enumerate(texts):
            with _watched(text, text.base, other, micro_batch) as watch:
                of_base[index] = read_by_base(
                    model, text.base, micro_batch=micro_batch, keep_states=not text.note, watch=watch
                )
        head = model.lm_head.weight_in_compute_dtype.cpu()
        del model
        if now.train.device == "cuda":
            torch.cuda.empty_cache()
    model = now.load()
    head = None if head is None else head.to(now.train.device)
    for index, text in enumerate(texts):
        with _watched(text, text.now, now, micro_batch) as watch:
            found = measure(
                model,
                text.now,
                micro_batch=micro_batch,
                skips=skips,
                other=of_base[index],
                other_head=head,
                watch=watch,
            )
        of_base[index] = None
        _check_finite(text, found, now, other)
        yield found


@contextmanager
def _watched(text: MeasuredText, sample: HeldOutSample, model: _Model, micro_batch: int) -> Iterator[Watch]:
    said, count = f"{model.name} on {text.source.name}", sample.num_batches(micro_batch)
    with waiting(f"{said} ...") as update:
        yield lambda done: update(f"{said}: {done} of {count} batches")


def _check_room(texts: Sequence[MeasuredText], other: _Model, planned: int) -> None:
    kept = sum(text.now.num_tokens for text in texts if not text.note)
    kept *= other.folder.config.hidden_size * DTYPES[other.train.dtype].itemsize
    needed, free = kept + (planned if other.train.device == "cpu" else 0), available_memory()
    if needed > 0.9 * free:
        raise UserError(
            f"--eval.tokens: what is kept of {other.name} takes {kept / GIB:,.2f} GiB of the host's memory, where "
            f"{free / GIB:,.2f} GiB are free; lower it, or measure a text at a time"
        )


def _check_finite(text: MeasuredText, found: Figures, now: _Model, other: _Model | None) -> None:
    figures = [found.loss, *(f for base in (found.base, found.first_base) if base for f in (base.loss, base.kl or 0.0))]
    if all(map(math.isfinite, figures)):
        return
    who = now.name if not math.isfinite(found.loss) or other is None else other.name
    wider = "" if now.train.dtype == "float32" else " or give --train.dtype float32"
    raise UserError(
        f"{who}: its loss on {text.source.name} is not finite: if it is finite on another text, leave this one "
        f"out{wider}; else the weights are too large to compute with"
    )
