"""What is measured: the sizes, and the same random Llama for everybody, drawn tensor by tensor.

A tensor is drawn from a generator seeded by its own name in the base, so nobody needs a second copy of the model to get
bit-equal weights, whatever order and packing it is built in; a new block draws its source's numbers, with `o_proj` and
`down_proj` zero, which is what an expansion makes. So the base and its expansion are the same function at the start.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig

from llama_pro_fast.config import OptimConfig
from llama_pro_fast.expansion.plan import ExpansionPlan
from llama_pro_fast.hf.known_shapes import SHAPES, model_shape
from llama_pro_fast.model.trained import Trained

OPTIM = OptimConfig(lr=1e-5, schedule="wsd", warmup_steps=0, decay_steps=0)
STD = 0.02
CHECKSUM_CHUNK = 1 << 20  # elements: its int64 scratch stays far below the smallest model


@dataclass(frozen=True)
class Size:
    """A base model, its expansion, and what is affordable to run of it.

    Attributes:
        title: of the expanded model, for a reader.
        base: arguments of `LlamaConfig`, before expansion.
        groups: of the expansion, a new block after each.
        seq, micro_batch: tokens per sequence and sequences per step, by default.
        steps, warmup, rounds: timed and untimed steps of each round, by default.
    """

    title: str
    base: dict[str, Any]
    groups: int
    seq: int
    micro_batch: int
    steps: int
    warmup: int = 3
    rounds: int = 1


def base_shape(*sizes: int) -> dict[str, Any]:
    """Arguments of `LlamaConfig` from layers, hidden, intermediate, heads, key/value heads and vocabulary."""
    return _arguments(model_shape("llama", *sizes, max_position_embeddings=131_072, rms_norm_eps=1e-5))


def _arguments(shape: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in shape.items() if key != "model_type"}


_1B, _7B, _8B = (_arguments(SHAPES[f"meta-llama/{name}"]) for name in ("Llama-3.2-1B", "Llama-2-7b-hf", "Llama-3.1-8B"))
# Two layers as wide as Llama-3.2-1B's and a new one after each: a block of every class, small enough for a CPU.
_WIDE, _TINY = _1B | {"num_hidden_layers": 2, "vocab_size": 8192}, base_shape(8, 256, 688, 8, 4, 4096)
SIZES = {
    "tiny": Size("A tiny Llama + 2 new blocks", _TINY, groups=2, seq=256, micro_batch=2, steps=6, warmup=2, rounds=3),
    "cpu": Size("2 layers of Llama-3.2-1B + 2 new blocks", _WIDE, groups=2, seq=256, micro_batch=1, steps=2, warmup=1),
    "1b": Size("Llama-3.2-1B + 4 new blocks", _1B, groups=4, seq=4096, micro_batch=4, steps=12),
    # Two sequences, so that stock Hugging Face without checkpointing fits a card of 141 GB with room.
    "7b": Size("LLaMA-2-7B + 8 new blocks", _7B, groups=8, seq=4096, micro_batch=2, steps=8),
    "8b": Size("Llama-3.1-8B + 8 new blocks", _8B, groups=8, seq=4096, micro_batch=2, steps=8),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one child process is asked to run; plain values only, so that it travels."""

    size: str
    seq: int
    micro_batch: int
    steps: int
    warmup: int
    device: str
    seed: int = 0
    expanded: bool = True
    """Else the base itself, for those who train something else than new blocks."""
    attention: str = "auto"
    """Backend of ours."""
    document: int | None = None
    """Tokens of each of the documents that are packed into a sequence; by default a sequence is one."""

    @property
    def document_length(self) -> int:
        return self.document or self.seq

    @property
    def predictions(self) -> int:
        """Of a step: a document's last token predicts nothing."""
        return self.micro_batch * self.seq // self.document_length * (self.document_length - 1)

    @property
    def dtype(self) -> torch.dtype:
        """Of the computation and of every frozen weight."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @property
    def shape(self) -> Size:
        return SIZES[self.size]

    @cached_property
    def plan(self) -> ExpansionPlan:
        layers = self.shape.base["num_hidden_layers"]
        if not self.expanded:
            return ExpansionPlan(tuple(range(layers)), (False,) * layers)
        return ExpansionPlan.from_groups(layers, self.shape.groups)

    @property
    def trained(self) -> Trained:
        return self.plan.trained

    @property
    def config(self) -> LlamaConfig:
        """Of the expanded model, or of the base."""
        return LlamaConfig(**(self.shape.base | {"num_hidden_layers": len(self.plan.sources)}))

    def token_batches(self) -> Iterator[torch.Tensor]:
        """For each step other random tokens ``[B, S]``."""
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.warmup + self.steps):
            yield torch.randint(self.config.vocab_size, (self.micro_batch, self.seq), generator=generator)

    def draw(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The Hugging Face tensor ``name`` of that model, in the compute dtype, on the device."""
        if name.startswith("model.layers."):
            _, _, index, rest = name.split(".", 3)
            if self.plan.is_new[int(index)] and rest in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
                return torch.zeros(shape, dtype=self.dtype, device=self.device)
            name = f"model.layers.{self.plan.sources[int(index)]}.{rest}"
        generator = torch.Generator(self.device).manual_seed(self.seed * (1 << 32) + zlib.crc32(name.encode()))
        tensor = torch.empty(shape, dtype=self.dtype, device=self.device).normal_(std=STD, generator=generator)
        return tensor.add_(1) if len(shape) == 1 else tensor


@dataclass(frozen=True, kw_only=True)
class Runner:
    """A contestant, built.

    Attributes:
        prepare: tokens ``[B, S]`` -> the batch on the device, outside the timing.
        loss: batch -> mean loss over the predictions, differentiable.
        tensors: Hugging Face names and tensors of every parameter, for the checksum.
        facts: what a row says of it besides.
    """

    model: nn.Module
    prepare: Callable[[torch.Tensor], Any]
    loss: Callable[[Any], torch.Tensor]
    tensors: Callable[[], Iterable[tuple[str, torch.Tensor]]]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


@torch.no_grad()
def weights_digest(runner: Runner, dtype: torch.dtype) -> str:
    """A checksum of every weight's bits, the same for whoever holds the same numbers under the same names.

    Made on the device: 17 GB need not travel. Float32 masters are cast to ``dtype``, where they came from exactly.
    """
    names, sums = [], []
    for name, tensor in sorted(runner.tensors(), key=lambda pair: pair[0]):
        bits = tensor.to(dtype).reshape(-1).view(torch.int16 if dtype.itemsize == 2 else torch.int32)
        # Weighed by position and chained (both wrap around), so that neither an exchange nor a shift goes unseen.
        total = torch.zeros((), dtype=torch.int64, device=bits.device)
        for chunk in bits.split(CHECKSUM_CHUNK):
            places = torch.arange(1, 1 + len(chunk), device=bits.device)
            total = total * 1_000_003 + (chunk.long() * places).sum()
        names.append(name)
        sums.append(total)
    return hashlib.sha256(repr((names, torch.stack(sums).tolist())).encode()).hexdigest()[:16]
