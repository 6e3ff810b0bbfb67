"""The last check of an export: it is what was trained, and stock transformers computes the same from it.

Our loader reads the export back and measures it on held-out text, as the trained model was measured after its last
step; then our decoder and transformers go on greedily from the beginnings of held-out documents.

Our decoder keeps no cache of keys and values, so each new token costs a forward pass over all that is before it: right
for a few dozen tokens, not for serving, which an export leaves to transformers, vLLM and the like.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional as F

from llama_pro_fast.config import Settled
from llama_pro_fast.data.corpus import Corpus
from llama_pro_fast.errors import UserError
from llama_pro_fast.evaluation import dial
from llama_pro_fast.evaluation.held_out import evaluate
from llama_pro_fast.hf.folder import PretrainedFolder, no_progress_bars
from llama_pro_fast.hf.loading import load_model
from llama_pro_fast.hf.safetensors import TORCH_DTYPES
from llama_pro_fast.host import available_memory
from llama_pro_fast.model.batch import PackedBatch
from llama_pro_fast.model.decoder import DTYPES, Decoder

TIE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""How far apart, as a share of the largest logit, two candidates may be and still trade places by rounding."""

ROUNDED = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""How much, in nats per token, a loss may change when trained float32 weights are rounded to a dtype. In float32 only
the order of sums differs; a bf16 weight is off by up to 2⁻⁹ of itself, in either direction."""

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 3, 24, 24


def unchecked(said: str) -> dict[str, Any]:
    """For a report: what :func:`read_export_back` returns, where it could not be done or failed."""
    dial_said = "not measured, as the export was not read back"
    return {
        "export_check": {"equal": 0, "compared": 0, "said": said},
        "sample": None,
        "dial": [],
        "dial_said": dial_said,
    }


@dataclass(frozen=True)
class ExportCheck:
    """What came of reading an export back.

    Attributes:
        now: our continuations, token ids.
        base: the same with the new blocks skipped; None where they are not the base's any more.
        equal: tokens in which stock transformers' continuations equal ours, of ``compared``. After a tie that rounding
            decided the rest of that continuation is left out.
    """

    now: list[list[int]]
    base: list[list[int]] | None
    equal: int
    compared: int


def read_export_back(
    config: Settled,
    folder: Path,
    corpus: Corpus,
    tokenizer: transformers.PreTrainedTokenizerBase,
    results: list[dict[str, Any]],
    *,
    new_blocks: Mapping[int, Collection[str]],
    tokens: int,
    progress: Callable[[str], None] = lambda said: None,
) -> dict[str, Any]:
    """Check a run's export, where there is memory for it, and see what it would be with its new blocks scaled.

    Args:
        results: of the run's summary: what the trained model's last evaluation was.
        new_blocks: blocks without which the model is its base, and the modules of each that were zero at its birth;
            empty where there are none, and no modules where they are not known.
        tokens: that the run trained on.
        progress: is told what goes on.

    Returns:
        ``export_check`` (equal, compared, and both in words), ``sample`` (a prompt, the base's continuation and the
        trained model's, as text; None where nothing was computed) and ``dial`` (as :func:`dial.sweep` gives it; empty
        where nothing was measured) with ``dial_said`` (what is to be said of it), for the run's report.

    Raises:
        UserError: the export is not the trained model, or transformers computes something else from it.
    """
    export, device, dtype = PretrainedFolder(folder), torch.device(config.train.device), DTYPES[config.train.dtype]
    available = available_memory()  # transformers loads on the host first
    if device.type == "cuda":
        torch.cuda.empty_cache()
        available = min(available, torch.cuda.mem_get_info(device)[0])
    needed = sum(math.prod(entry.shape) for entry in export.entries.values()) * dtype.itemsize
    if 1.2 * needed > available:
        return unchecked(f"not read back: {needed / 1e9:,.1f} GB of weights, {available / 1e9:,.1f} GB of memory free")

    domain = [text for text in corpus.held_out if text.source.role == "domain"]
    length = min(PROMPT_TOKENS, config.train.seq_len // 2)
    prompts = [prompt for text in domain for prompt in text.beginnings(length, config.eval.tokens)][:PROMPTS]
    new_tokens = min(NEW_TOKENS, config.train.seq_len - length)
    stock = stock_greedy(folder, prompts, new_tokens, dtype, device)
    model = load_model(
        export,
        dtype=dtype,
        device=device,
        max_length=config.train.seq_len,
        attention=config.train.attention,
    )
    sample = domain[0].sample(config.eval.tokens)
    loss = evaluate(model, sample.batches(config.train.micro_batch_size)).loss
    for row in results:  # none where the metrics could not be written
        if (row["role"], row["source"]) == ("domain", domain[0].source.name):
            stored = {TORCH_DTYPES[entry.dtype] for entry in export.entries.values()}
            _check_loss(folder, loss, row["after"]["loss"], stored, dtype)

    check = compare_greedy(folder, model, prompts, stock, dtype=dtype, new_blocks=new_blocks)
    said = f"read back: loss {loss:.4f}; in stock transformers {check.equal} of {check.compared} greedy tokens equal"

    def written(documents: list[list[int]] | None) -> str | None:
        return tokenizer.decode(documents[0], skip_special_tokens=True) if documents else None

    found = {
        "export_check": {"equal": check.equal, "compared": check.compared, "loss": loss, "said": said},
        "sample": {"prompt": written(prompts), "base": written(check.base), "now": written(check.now)},
    }
    if not new_blocks or not all(new_blocks.values()) or len(domain) == len(corpus.held_out):
        why = "there is no base that new blocks could be scaled down to"
        if new_blocks:
            why = "there is no general text" if all(new_blocks.values()) else "the manifest names no modules to scale"
        return found | {"dial": [], "dial_said": f"not measured: {why}"}
    train = config.train
    try:
        rows = dial.sweep(
            model,
            corpus.held_out,
            new_blocks,
            tokens=dial.num_tokens(config.eval.tokens, tokens),
            micro_batch=train.micro_batch_size,
            progress=progress,
        )
    except torch.OutOfMemoryError:
        return found | {"dial": [], "dial_said": "not measured: no memory left on the device"}
    return found | {"dial": rows, "dial_said": dial.said(rows)}


def _check_loss(folder: Path, loss: float, trained: float, stored: set[torch.dtype], dtype: torch.dtype) -> None:
    # A norm or bias that trains is computed with in float32, and in a model read back in the computation's dtype.
    if not abs(loss - trained) <= max(ROUNDED[each] for each in stored | {dtype}):
        said = f"{folder}: has a loss of {loss:.4f} on the held-out text, the trained model had {trained:.4f}"
        if {torch.float16, torch.bfloat16} & stored:
            said += (
                ": weights that moved by less than 16 bits can tell are the base's again. Store the base in float32 to "
                "keep them; if that is not it, do not use this export, and please report it with config.json"
            )
            raise UserError(said)
        raise UserError(f"{said}; do not use this export, and please report it with config.json")


def compare_greedy(
    folder: Path,
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    stock: Sequence[Sequence[int]],
    *,
    dtype: torch.dtype,
    new_blocks: Collection[int] = (),
) -> ExportCheck:
    """Compare transformers' greedy continuations with ours.

    Args:
        folder: the export, to name it.
        model: our decoder, loaded from it.
        stock: what :func:`stock_greedy` gave, all of one length.
        new_blocks: blocks without which the model is its base; empty where there are none.

    Raises:
        UserError: they differ by more than rounding, or a logit is not finite.
    """
    new_tokens = len(stock[0])
    now, logits = greedy(model, prompts, new_tokens)
    equal = compared = 0
    for ours, theirs, rows in zip(now, stock, logits, strict=True):
        for mine, other, row in zip(ours, theirs, rows, strict=True):
            compared += 1
            finite = bool(row.isfinite().all())
            if mine == other and finite:
                equal += 1
                continue
            gap = float(row[mine] - row[other])
            if not finite or gap > TIE[dtype] * float(row.abs().max()):
                raise UserError(
                    f"{folder}: stock transformers goes on otherwise than our decoder (logits {gap:.3g} apart); do not "
                    "use this export, and please report it with config.json"
                )
            break
    base = greedy(model, prompts, new_tokens, skip=new_blocks)[0] if new_blocks else None
    return ExportCheck(now, base, equal, compared)


@torch.no_grad()
def greedy(
    model: Decoder, prompts: Sequence[Sequence[int]], new_tokens: int, *, skip: Collection[int] = ()
) -> tuple[list[list[int]], list[list[torch.Tensor]]]:
    """The likeliest next token, ``new_tokens`` times, for each prompt.

    Returns:
        The new token ids of each prompt, and for each of them the logits ``[V]`` (float32, on the CPU) it was taken by.
    """
    device = model.norm.weight.device
    sequences, logits = [list(prompt) for prompt in prompts], [[] for _ in prompts]
    for _ in range(new_tokens):
        batch = PackedBatch.from_documents(sequences).to(device)
        last = batch.cu_seqlens[1:].long() - 1
        rows = (
            F.linear(model.hidden_states(batch, skip=skip)[last], model.lm_head.weight_in_compute_dtype).float().cpu()
        )
        for sequence, kept, row in zip(sequences, logits, rows, strict=True):
            sequence.append(int(row.argmax()))
            kept.append(row)
    return [sequence[len(prompt) :] for sequence, prompt in zip(sequences, prompts, strict=True)], logits


@torch.no_grad()
def stock_greedy(
    folder: Path, prompts: Sequence[Sequence[int]], new_tokens: int, dtype: torch.dtype, device: torch.device
) -> list[list[int]]:
    """What stock transformers does of :func:`greedy`.

    Raises:
        UserError: it misses a weight, or finds one it does not know.
    """
    with no_progress_bars():
        model, told = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    if odd := [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in told[kind]]:
        raise UserError(f"{folder}: transformers misses or does not know {odd[0]}; please report it with config.json")
    model.eval().to(device)
    continuations = []
    for prompt in prompts:
        # Not `generate`, in which the export's generation settings would have a say.
        ids = torch.tensor([list(prompt)], device=device)
        for _ in range(new_tokens):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        continuations.append(ids[0, len(prompt) :].tolist())
    return continuations
