"""`base:samples`: general text that the base writes itself, once, for those who have none to replay.

A document is drawn token by token from the base's own distribution: temperature 1, no top-k, no top-p. That is the one
which training should leave as it is. A sharpened one, or one cut off, is narrower, and would be learned as such.

A document begins as documents began in pretraining. Where the tokenizer adds a BOS, that stands before it. Elsewhere
(Qwen, SmolLM) documents stood in a row with a mark between them. The mark alone does not do: in the first position a
token attends to itself only, and what follows is, to such a model, the middle of some text. So a short document stands
before the mark. After the mark alone, four of ten texts by SmolLM2-135M-Instruct begin with a hyphen. After a document
and the mark, whether that is a sentence of English or German, a list or code, they begin with `In`, `The` or a heading:
for six such documents the first token's distributions are 0.14 nats (KL) apart on average, and each is 0.8 to 1.6 from
that after the mark alone.

Document n has a generator of its own, seeded by n, so it depends on the base alone and not on those beside it; but
rounding, and a GPU's generator, differ with the device, the dtype, the size of a batch and the version of PyTorch. None
of these is in the file's name: what was written first stays the base's text for all runs that share a cache.

    CACHE/samples/<key>.jsonl     {"text": ...} a line; <key>.partial while it is being written, batch by batch
"""

from __future__ import annotations

import dataclasses
import fcntl
import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import transformers

from llama_pro_fast.config import DataConfig, RunConfig, Source
from llama_pro_fast.console import amount, duration, say
from llama_pro_fast.data.corpus import cache_of, check_taught
from llama_pro_fast.digests import file_hash
from llama_pro_fast.errors import UserError
from llama_pro_fast.expansion.lineage import intact_bases
from llama_pro_fast.expansion.manifest import Manifest
from llama_pro_fast.files import sync, writing_to
from llama_pro_fast.hf.folder import PretrainedFolder, folder_digest
from llama_pro_fast.hf.loading import check_tensors
from llama_pro_fast.hf.stock import leave_out_blocks, stock_model
from llama_pro_fast.host import available_memory
from llama_pro_fast.planning.devices import GIB
from llama_pro_fast.text.sources import listed, resolve_sources

PATH, NAME = "base:samples", "base-samples"
FORMAT = 1
"""Raise it when the same base would write other text."""
DOCUMENTS = 1_000
"""About half a million tokens: at a replay of 0.2 a run of 2.5 M goes through them once, a GPU writes them in minutes,
and with a fiftieth of them held out what is forgotten is measured on 10,000 tokens."""
TOKENS = 1_024
"""Of a document at most, where it is cut: a batch takes as long as its longest."""
BATCH = {"cuda": 64, "cpu": 16}
"""Documents written at once, where there is memory: a GPU takes as long for few; of a CPU's work less is lost when it
is stopped."""
SEPARATOR = "<|endoftext|>"
"""What stood between the documents in vocabularies after GPT-2's. A chat model's EOS may be another token, which ends a
turn and not a document."""
DOCUMENT_BEFORE = "The end."


def is_wanted(data: DataConfig) -> bool:
    """Whether the base is to write text."""
    return any(source.path == PATH for source in listed(data.general))


def check_samples(config: RunConfig) -> None:
    """Refuse what the base cannot be asked to write.

    Raises:
        UserError: naming the source and the remedy.
    """
    sources = [(role, source) for role in ("domain", "general") for source in listed(getattr(config.data, role))]
    if sum(source.path == PATH for _, source in sources) > 1:
        raise UserError(f"{PATH}: stands there more than once; name it once, with as many `documents:` as you want")
    for role, source in sources:
        if source.path != PATH:
            if source.documents is not None:
                raise UserError(f"{source.path}: documents {source.documents}: only {PATH} has a number; leave it out")
            continue
        if role == "domain":
            raise UserError(f"--data.domain {PATH}: the base knows what it writes; it is for --data.general")
        if config.model.init == "random":
            raise UserError(
                f"--data.general {PATH}: random weights have nothing to keep; leave it out, or give a pretrained base"
            )
        plain = Source(path=PATH)
        for key in ("text", "subset", "split", "split_by"):
            if getattr(source, key) != getattr(plain, key):
                raise UserError(f"{PATH}: has no columns, subsets or splits: leave `{key}:` out")


def check_given(config: RunConfig) -> None:
    """Refuse text to be measured that the base would have to write first.

    Raises:
        UserError: naming the remedy.
    """
    check_samples(config)
    if is_wanted(config.data):
        raise UserError(
            f"--data.general {PATH}: is written for a run; give the file that it was written to (in `samples` of the "
            "cache), or name no text to measure a run's own"
        )


def with_samples(
    config: RunConfig,
    folder: PretrainedFolder,
    tokenizer: transformers.PreTrainedTokenizerBase,
    *,
    device: torch.device,
    dtype: torch.dtype,
    tell: Callable[[str], None],
) -> DataConfig:
    """The run's text with a file in place of each `base:samples`; what is not there is written.

    Args:
        folder: the model that the run expands or trains.
        device, dtype: of the computation. When this returns nothing of the base is left in memory.
        tell: told how far it is, in words.

    Raises:
        UserError: the base is not in the model any more, it has no token to begin with, or the cache cannot be written.
    """
    if not is_wanted(config.data):
        return config.data
    check_tensors(folder)
    _check_others(config)
    base = _Base(folder, *_base_in(folder, config), tokenizer, device, dtype, config.train.memory)
    cache, general = cache_of(config.data), []
    for source in listed(config.data.general):
        if source.path == PATH:
            path = base.samples(source.documents or DOCUMENTS, cache / "samples", tell)
            source = dataclasses.replace(source, path=str(path), documents=None, name=source.name or NAME)
        general.append(source)
    return dataclasses.replace(config.data, general=general)


def _check_others(config: RunConfig) -> None:
    """Refuse now what would be refused of the run's text once the base had written its own.

    Raises:
        UserError: as :func:`resolve_sources` and :func:`check_taught`.
    """
    known, *_ = listed(config.data.domain)  # a text that is there, in place of one that is not yet
    general = [
        dataclasses.replace(known, name=source.name or NAME, weight=source.weight, share=source.share)
        if source.path == PATH
        else source
        for source in listed(config.data.general)
    ]
    sources = resolve_sources(dataclasses.replace(config.data, general=general), default_general=False)
    if config.train.kl_weight:
        check_taught(config.data, any(source.trains for source in sources if source.role == "general"))


def _base_in(folder: PretrainedFolder, config: RunConfig) -> tuple[str, tuple[int, ...]]:
    """The digest of the model that the run should not forget, and the blocks of ``folder`` that are not in it.

    Where new blocks train it is the model without them. Where others do it is the whole model, unless the run itself
    has expanded it.
    """
    manifest = Manifest.from_config(folder.raw_config)
    if manifest is None or (config.train.parameters != "new_blocks" and not config.expand.wanted):
        return folder_digest(folder), ()
    if gone := manifest.base_gone(intact_bases(folder)):
        raise UserError(f"--data.general {PATH}: nobody to write them: {gone}; give a file of general text")
    return manifest.generations[-1].digest, manifest.trained_blocks


@dataclass(frozen=True)
class _Base:
    """A base that can write; it is loaded when the first document is wanted.

    Attributes:
        folder: the model that it is in.
        digest: its own.
        new_blocks: of ``folder``, which are left out.
        memory: `train.memory`.
    """

    folder: PretrainedFolder
    digest: str
    new_blocks: tuple[int, ...]
    tokenizer: transformers.PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype
    memory: float | str

    def samples(self, documents: int, folder: Path, tell: Callable[[str], None]) -> Path:
        """The file of so many documents in ``folder``; what is not there is written."""
        start, ends = marks(self.tokenizer, self.folder)
        how = {
            "start": start,
            "ends": ends,
            "limit": min(TOKENS, self.folder.config.max_position_embeddings - len(start)),
        }
        if how["limit"] < 1:
            raise UserError(
                f"--data.general {PATH}: {self.folder.path} has too few positions to write in: give a file of general "
                "text"
            )
        settings = [FORMAT, self.digest, documents, how, self.tokenizer.get_vocab()]
        path = folder / f"{file_hash(json.dumps(settings, sort_keys=True).encode()).hexdigest()}.jsonl"
        if path.exists():
            return path
        partial, started, tokens = path.with_suffix(".partial"), time.monotonic(), 0
        with writing_to(path):
            folder.mkdir(parents=True, exist_ok=True)
            with open(partial, "a+b") as file:
                _lock(file, tell)
                if path.exists():  # by now
                    partial.unlink(missing_ok=True)
                    return path
                done = _keep_whole_lines(file)
                for ids in self._write(range(done, documents), how, tell):
                    text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                    # Where it is cut, half of a character may stand at its end.
                    file.write(json.dumps({"text": text.rstrip("\ufffd")}, ensure_ascii=False).encode() + b"\n")
                    file.flush()
                    tokens += len(ids)
                sync(partial)
                partial.rename(path)
                sync(folder)
        took = f"{amount(tokens)} tokens, in {duration(time.monotonic() - started)}"
        say(f"{PATH}: the base wrote {documents - done:,} documents, {took}: {path}")
        return path

    def _write(self, numbers: range, how: dict[str, Any], tell: Callable[[str], None]) -> Iterator[list[int]]:
        """The ids of the documents of these numbers."""
        tell(f"{PATH}: loading the base ...")
        model = stock_model(self.folder.path, self.dtype)
        leave_out_blocks(model, self.new_blocks)
        model.to(self.device)
        size = self._batch(model, len(how["start"]) + how["limit"])
        started = time.monotonic()
        for begin in range(0, len(numbers), size):
            batch = numbers[begin : begin + size]

            def at(token: int, begin: int = begin, batch: range = batch) -> None:
                done = begin + len(batch) * token / how["limit"]
                left = (time.monotonic() - started) * (len(numbers) - done) / done
                tell(f"{PATH}: {batch[0]:,} of {numbers.stop:,} documents, at most {duration(left)} left")

            yield from sample(model, batch, **how, at=at)
        del model
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)  # the peak that is reported is the training's

    def _batch(self, model: Any, length: int) -> int:
        """Documents at once: half of the memory that is free holds their keys, values and logits."""
        config = model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * self.dtype.itemsize
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else available_memory()
        if self.memory != "auto":
            free = min(free, self.memory * GIB - model.get_memory_footprint())
        logits = 16 * config.vocab_size  # float32, and what is made of them
        return int(max(1, min(BATCH[self.device.type], free / 2 // (length * token + logits))))


def marks(tokenizer: transformers.PreTrainedTokenizerBase, folder: PretrainedFolder) -> tuple[list[int], list[int]]:
    """The ids that a document is written after, and those that end it.

    Raises:
        UserError: the tokenizer has no token that begins or ends a document.
    """
    encoded = tokenizer("a", return_special_tokens_mask=True)
    start = encoded["input_ids"][: [*encoded["special_tokens_mask"], 0].index(0)]
    if not start:
        vocabulary = tokenizer.get_vocab()
        between = [name for name in (SEPARATOR, tokenizer.eos_token, tokenizer.bos_token) if name in vocabulary]
        if not between:
            raise UserError(
                f"{folder.path}: the tokenizer names neither BOS nor EOS, so nothing says where a document begins: put "
                f"`eos_token` into tokenizer_config.json, or give a file of general text in place of {PATH}"
            )
        before = tokenizer(DOCUMENT_BEFORE, add_special_tokens=False)["input_ids"]
        start = [*before, vocabulary[between[0]]]
    own = getattr(folder.config, "eos_token_id", None)
    ends = {start[-1], tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    return start, sorted(ends)


def sample(
    model: Any,
    numbers: Sequence[int],
    *,
    start: Sequence[int],
    ends: Sequence[int],
    limit: int,
    at: Callable[[int], None] = lambda token: None,
) -> list[list[int]]:
    """Documents of these numbers, by transformers' `generate`.

    Args:
        model: as transformers loads it. Its generation settings are set aside.
        start: ids that stand before each.
        ends: ids that end one.
        limit: tokens at most.
        at: told the number of each token that is about to be drawn, from 1.

    Returns:
        Their ids, without ``start`` and without the one that ends them.
    """
    # `generate` fills in what is None from the model's own settings, which may penalise or forbid tokens.
    model.generation_config = transformers.GenerationConfig(
        max_new_tokens=limit, do_sample=False, eos_token_id=list(ends), pad_token_id=ends[0]
    )
    ids = torch.tensor([list(start)] * len(numbers), device=model.device)
    rows = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=model.generation_config,
        logits_processor=transformers.LogitsProcessorList([_Sampling(numbers, model.device, at)]),
    )[:, len(start) :].tolist()
    return [row[: next((n for n, token in enumerate(row) if token in ends), len(row))] for row in rows]


class _Sampling(transformers.LogitsProcessor):
    """Adds Gumbel noise to the logits, so that the largest is a draw from their softmax (the Gumbel-max trick).

    It is what `torch.multinomial` does, which knows one generator for a whole batch: here each row has its own, and a
    document does not depend on those beside it.
    """

    def __init__(self, numbers: Sequence[int], device: torch.device, at: Callable[[int], None]) -> None:
        self.generators = [torch.Generator(device).manual_seed(number) for number in numbers]
        self.at, self.token = at, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """``scores`` float32 ``[B, V]``."""
        self.token += 1
        self.at(self.token)
        if scores.isnan().any():
            raise UserError(
                f"--data.general {PATH}: the base's predictions are not finite, so it cannot write: check its weights, "
                "or give a file of general text"
            )
        exponential = torch.empty_like(scores)
        for row, generator in zip(exponential, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - exponential.log_()


def _lock(file: BinaryIO, tell: Callable[[str], None]) -> None:
    """Hold a file as long as it is open, after whoever holds it now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        tell(f"{PATH}: waiting for another process, which writes them ...")
        fcntl.flock(file, fcntl.LOCK_EX)


def _keep_whole_lines(file: BinaryIO) -> int:
    """Cut a file behind its last line that was written whole, and count its lines."""
    file.seek(0)
    count = end = 0
    for line in file:
        # Half of one, or after a power cut zeros.
        if not (line.startswith(b"{") and line.endswith(b"}\n")):
            break
        count, end = count + 1, end + len(line)
    file.truncate(end)
    return count
