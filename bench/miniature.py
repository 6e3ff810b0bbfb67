"""One training step of LLaMA-2-7B + 8 in the small: every extent times k/64. What it holds, what it computes.

Hidden and intermediate size, head dimension, vocabulary and sequence length shrink by the same factor; the 40 layers,
the 32 heads and the 4 sequences stay. Every tensor of a step is then a product of at most two shrunk extents
(a weight, a row of activations for each token, a square of scores for each head), so that any count of bytes is
a + b·k + c·k², FLOPs are c·k³, and shares are the same at every k but for the lower terms: the moment at which a step
is fullest in the small is the moment at which it is fullest at full size. (Fewer heads instead of narrower ones would
break this: the scores of eager attention would grow as k³ and overtake the logits somewhere on the way. So would fewer
layers: how many there are decides which moment it is.) Chunks that
have a fixed length in our code (of logits; of a sum over a weight's rows) shrink with the rest. k = 64 is the model
itself, and the same code measures it.

    entry   bytes allocated before the step's second micro-batch, by kind: frozen weights, trained weights (masters),
            their narrow copies, gradients (from the first micro-batch), AdamW's moments.
    peak    entry, and the most that forward, loss and backward of the second micro-batch allocate beyond it
            (bench/peak_bytes.py; on a GPU `torch.cuda.max_memory_allocated`). The optimizer's step comes later, when
            nothing is kept, and is not in it.
    kept    by each layer for backward: storages alive when the next layer starts that were not when this one did, its
            output left out, its input counted where it is still held (bench/live_storages.py). With two numbers of
            sequences, bytes a token, and bytes whatever the tokens, which are the narrow copies of weights that
            autocast makes and autograd keeps.
    work    FLOPs of forward and backward by PyTorch's counter: products with a weight, and attention. Attention that is
            one operation counts as in `llama_pro_fast.cost`, the causal half and its backward twice its forward; eager
            attention counts as the products of full squares that it is.

Not seen: memory that a library takes past PyTorch's allocator, the allocator's slack, a CUDA context.
"""

from __future__ import annotations

import gc
import importlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

import torch
from live_storages import LiveStorages
from peak_bytes import PeakBytes
from torch.utils.flop_counter import FlopCounterMode
from workload import OPTIM, Runner, Size, Workload, base_shape

from llama_pro_fast.block import block_classes
from llama_pro_fast.cost import step_cost
from llama_pro_fast.optimizer import Optimizer

FULL = 64
LOWEST = "lowest trained"


@dataclass(frozen=True, kw_only=True)
class Miniature(Workload):
    """``k`` parts of 64 of LLaMA-2-7B's extents, expanded; of its depth ``groups`` of 8. In bf16 on every device."""

    k: int
    groups: int

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    @property
    def shape(self) -> Size:
        k = self.k
        narrow = {"head_dim": 2 * k, "max_position_embeddings": 64 * k}
        base = base_shape(4 * self.groups, 64 * k, 172 * k, 32, 32, 500 * k, **narrow)
        return Size(base=base, groups=self.groups, seq=self.seq, micro_batch=self.micro_batch, steps=self.steps)


def miniature(k: int, *, device: str, groups: int = 8) -> Miniature:
    return Miniature(size="7b", k=k, groups=groups, seq=64 * k, micro_batch=4, steps=2, warmup=0, device=device)


def layer_classes(workload: Workload) -> list[str]:
    """Of each layer. The lowest trained one, whose input needs no gradient, is apart: it may keep less."""
    classes = [kind.value for kind in block_classes(len(workload.plan.sources), workload.trained_blocks)]
    classes[min(workload.trained_blocks)] = LOWEST
    return classes


def shrink_chunks(k: int) -> None:
    """Let chunks of a fixed length be as many parts of it; for the rest of the process."""
    # By name: the package has functions of the same names.
    loss, reference = map(
        importlib.import_module, ("llama_pro_kernels.linear_cross_entropy", "llama_pro_kernels.reference")
    )
    loss._CHUNK_BYTES = loss._CHUNK_BYTES * k * k // FULL**2
    loss._MIN_ROWS = loss._MIN_ROWS * k // FULL
    loss._ROW_MULTIPLE = loss._ROW_MULTIPLE * k // FULL
    reference.DSCALE_ROWS = reference.DSCALE_ROWS * k // FULL


def measure(build: Callable[[Workload], Runner], workload: Miniature) -> dict[str, Any]:
    """Entry, peak, kept and work of one contestant, in a process of its own."""
    shrink_chunks(workload.k)
    if workload.device == "cpu":
        # Attention's scratch is per thread: no count is to depend on the machine.
        torch.set_num_threads(1)
    runner = build(workload)
    trained = runner.trained
    optimizer = Optimizer(runner.model, trained, OPTIM, workload.steps)
    moments = optimizer.state().values()
    first, second = workload.token_batches()
    second = runner.prepare(second)
    kept = kept_by_layer(runner, workload, layer_classes(workload))
    work = count_work(runner, runner.prepare(first[:1]), workload)
    gc.collect()
    entry = {
        "frozen weights": _bytes(p for p in runner.model.parameters() if not p.requires_grad),
        "masters": _bytes(trained.values()),
        "copies": _bytes(getattr(module, "low_precision", None) for module in runner.model.modules()),
        "gradients": _bytes(p.grad for p in trained.values()),
        "moments": _bytes(moments),
    }
    if workload.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        runner.loss(second).backward()
        peak = torch.cuda.max_memory_allocated()
    else:
        with PeakBytes() as beyond:
            runner.loss(second).backward()
        peak = sum(entry.values()) + beyond.bytes
    return {"entry": entry, "peak": peak, **kept, "work": work}


def kept_by_layer(runner: Runner, workload: Workload, names: list[str]) -> dict[str, dict[str, Any]]:
    """By class of layer: bytes a token, and bytes whatever the tokens.

    Raises:
        ValueError: two layers of a class differ.
    """
    tokens = next(workload.token_batches())
    few, many = 1, 2
    counts = [live_between_layers(runner, runner.prepare(tokens[:sequences])) for sequences in (few, many)]
    found: dict[str, set] = {}
    for name, less, more in zip(names, *counts, strict=True):
        a_token = Fraction(more - less, (many - few) * workload.seq)
        found.setdefault(name, set()).add((a_token, more - a_token * many * workload.seq))
    for name, kinds in found.items():
        if len(kinds) > 1:
            raise ValueError(f"{name} layers keep different amounts (bytes a token, bytes): {sorted(kinds)}")
    return {
        "kept a token": {name: a_token for name, [(a_token, _)] in found.items()},
        "kept besides": {name: besides for name, [(_, besides)] in found.items()},
    }


def live_between_layers(runner: Runner, batch: Any) -> list[int]:
    """Bytes each layer leaves alive for backward, bottom to top."""
    model = runner.model
    layers, norm = (model.blocks, model.norm) if hasattr(model, "blocks") else (model.model.layers, model.model.norm)
    storages, alive, embedded = LiveStorages(), [], []

    def look(module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        # A frame still holds the layer's input when it starts; transformers' holds the embedding's output to the end,
        # which is kept for backward only where it has a gradient.
        embedded[:] = embedded or [arguments[0]]
        without = (arguments[0],) if embedded[0].requires_grad else (embedded[0], arguments[0])
        alive.append(storages.live_bytes(without=without))

    hooks = [module.register_forward_pre_hook(look) for module in [*layers, norm]]
    try:
        with storages:
            runner.loss(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return [after - before for before, after in pairwise(alive)]


def count_work(runner: Runner, batch: Any, workload: Workload) -> dict[str, int]:
    """FLOPs of a micro-batch, from one sequence of it; leaves gradients behind."""

    # The first argument of each is as large as the queries: 2·S FLOPs for each of its elements is the causal half.
    def forward(shape: Any, *rest: Any, **options: Any) -> int:
        return 2 * workload.seq * math.prod(shape)

    def backward(shape: Any, *rest: Any, **options: Any) -> int:
        return 2 * forward(shape)

    scaled = "_scaled_dot_product"
    formulas = {
        getattr(torch.ops.aten, name + suffix): formula
        for suffix, formula in (("", forward), ("_backward", backward))
        for name in (f"{scaled}_flash_attention", f"{scaled}_efficient_attention", f"{scaled}_cudnn_attention")
    }
    formulas |= {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: forward,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
        torch.ops.llama_pro_kernels.attention_forward: forward,
        torch.ops.llama_pro_kernels.attention_backward: backward,
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        runner.loss(batch).backward()
    counts = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    # Batched products are eager attention's: no weight has a batch.
    attention = sum(flops for op, flops in counts.items() if "attention" in op or "bmm" in op)
    products = sum(counts.values()) - attention
    return {"products": workload.micro_batch * products, "attention": workload.micro_batch * attention}


def needed_work(workload: Miniature) -> dict[str, float]:
    """What `llama_pro_fast.cost` says the step needs, nothing made twice."""
    cost = step_cost(workload.config, workload.trained_blocks, seq_len=workload.seq)
    tokens = workload.micro_batch * workload.seq
    return {"products": tokens * (cost.total - cost.attention), "attention": tokens * cost.attention}


def _bytes(tensors: Iterable[torch.Tensor | None]) -> int:
    storages = {id(t): t.untyped_storage() for t in tensors if t is not None}
    return sum({storage._cdata: storage.nbytes() for storage in storages.values()}.values())
