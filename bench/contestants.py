"""Who is measured, on what: the same random expanded Llama, built directly on the device, in several implementations.

Every contestant is the same function of the same numbers. A tensor is drawn from a generator seeded by its own name in
the base, so nobody needs a second copy of the model to get bit-equal weights, whatever order and packing it is built
in; a new block draws its source's numbers, with `o_proj` and `down_proj` zero, which is what an expansion makes. All
share one optimizer class (`llama_pro_fast.optimizer`: fused AdamW, clipping, no host sync), one set of trained blocks
and one stream of tokens.

    ours                llama_pro_fast's decoder; trained weights float32, the rest in the compute dtype
    hf                  stock LlamaForCausalLM, SDPA, in the same precisions: on a GPU trained weights float32, frozen
                        ones bf16, under autocast to bf16
    hf-checkpointing    hf with every block recomputed in backward
    hf-bf16             GPU only: hf with trained weights and moments bf16 too, no autocast. Cheaper and less exact than
                        all others, so its loss may drift from theirs.

To add one: a function ``Workload -> Runner`` in `CONTESTANTS`.
"""

from __future__ import annotations

import contextlib
import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llama_pro_fast.batch import PackedBatch
from llama_pro_fast.block import Block, Recompute, RMSNorm, block_classes
from llama_pro_fast.expansion import ExpansionPlan
from llama_pro_fast.families import BlockSpec
from llama_pro_fast.model import EMBEDDING, FINAL_NORM, HEAD, Decoder, Embedding, hf_tensors, rotary_tables
from llama_pro_fast.model import expected_tensors as tensor_shapes
from llama_pro_fast.shapes import SHAPES, model_shape
from llama_pro_kernels import select_attention_backend

STD = 0.02
CHECKSUM_CHUNK = 1 << 20  # elements: its int64 scratch stays far below the smallest model


@dataclass(frozen=True, kw_only=True)
class Size:
    """A base model, its expansion, and what is affordable to run of it.

    Attributes:
        base: arguments of `LlamaConfig`, before expansion.
        groups: of the expansion, a new block after each.
        seq, micro_batch: tokens per sequence and sequences per step, by default.
        steps, warmup, rounds: timed and untimed steps of each round, by default.
    """

    base: dict[str, Any]
    groups: int
    seq: int
    micro_batch: int
    steps: int
    warmup: int = 3
    rounds: int = 1


def _arguments(shape: dict[str, Any]) -> dict[str, Any]:
    """Of `LlamaConfig`."""
    return {key: value for key, value in shape.items() if key != "model_type"}


def published(hub_id: str) -> dict[str, Any]:
    """The shape of a well-known Llama."""
    return _arguments(SHAPES[hub_id])


def base_shape(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int, **more: Any) -> dict:
    longest = {"max_position_embeddings": 131_072, "rms_norm_eps": 1e-5}
    return _arguments(model_shape("llama", layers, hidden, intermediate, heads, kv_heads, vocab, **(longest | more)))


SIZES = {
    "tiny": Size(
        base=base_shape(8, 256, 688, 8, 4, 4096), groups=2, seq=256, micro_batch=2, steps=6, warmup=2, rounds=3
    ),
    "1b": Size(base=published("meta-llama/Llama-3.2-1B"), groups=4, seq=4096, micro_batch=4, steps=12),
    # Two sequences, so that stock Hugging Face without checkpointing fits a card of 141 GB with room.
    "7b": Size(base=published("meta-llama/Llama-2-7b-hf"), groups=8, seq=4096, micro_batch=2, steps=8),
    "8b": Size(base=published("meta-llama/Llama-3.1-8B"), groups=8, seq=4096, micro_batch=2, steps=8),
}


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

    @property
    def dtype(self) -> torch.dtype:
        """Of the computation and of every frozen weight."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @property
    def shape(self) -> Size:
        return SIZES[self.size]

    @cached_property
    def plan(self) -> ExpansionPlan:
        return ExpansionPlan.from_groups(self.shape.base["num_hidden_layers"], self.shape.groups)

    @property
    def trained_blocks(self) -> list[int]:
        return [index for index, new in enumerate(self.plan.is_new) if new]

    @property
    def config(self) -> LlamaConfig:
        """Of the expanded model."""
        return LlamaConfig(**(self.shape.base | {"num_hidden_layers": len(self.plan.sources)}))

    def token_batches(self) -> Iterator[torch.Tensor]:
        """For each step other random tokens ``[B, S]``; every sequence is one document."""
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.warmup + self.steps):
            yield torch.randint(self.config.vocab_size, (self.micro_batch, self.seq), generator=generator)

    def draw(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The Hugging Face tensor ``name`` of the expanded model, in the compute dtype, on the device."""
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
        loss: batch -> mean loss over the ``B·(S-1)`` predictions, differentiable.
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


def build_ours(workload: Workload, *, recompute: Recompute = Recompute.NONE) -> Runner:
    """Every block that has a backward makes ``recompute`` again."""
    config, device, dtype = workload.config, torch.device(workload.device), workload.dtype
    spec = BlockSpec.from_config(config, 0)
    shapes = tensor_shapes(config)
    classes = block_classes(config.num_hidden_layers, workload.trained_blocks)

    def block(index: int) -> Block:
        packed = {
            ours: torch.cat([workload.draw(f"model.layers.{index}.{name}", shape) for name, shape in parts])
            for ours, parts in spec.tensors().items()
        }
        return Block(spec, packed, block_class=classes[index], compute_dtype=dtype, recompute=recompute)

    def embedding(name: str) -> Embedding:
        return Embedding(workload.draw(name, shapes[name]), trained=False, compute_dtype=dtype)

    cos, sin = rotary_tables(config, workload.seq)
    backend = select_attention_backend(device, dtype, head_dim=spec.head_dim)
    model = Decoder(
        embed_tokens=embedding(EMBEDDING),
        blocks=[block(index) for index in range(config.num_hidden_layers)],
        norm=RMSNorm(
            workload.draw(FINAL_NORM, shapes[FINAL_NORM]), config.rms_norm_eps, trained=False, compute_dtype=dtype
        ),
        lm_head=None if config.tie_word_embeddings else embedding(HEAD),
        rotary_tables=(cos.to(device), sin.to(device)),
        attention=backend,
    )
    scale = torch.tensor(1.0 / (workload.micro_batch * (workload.seq - 1)), device=device)
    return Runner(
        model=model,
        prepare=lambda tokens: PackedBatch.from_documents(tokens.tolist()).to(device),
        loss=lambda batch: model.loss(batch, scale),
        tensors=lambda: (pair for name, p in model.named_parameters() for pair in hf_tensors(config, name, p)),
        facts={"attention": backend, "trained_dtype": "float32"},
    )


def build_hf(
    workload: Workload,
    *,
    attention: str = "sdpa",
    checkpointing: str = "none",
    pure: bool = False,
    liger: bool = False,
) -> Runner:
    """Hugging Face's LlamaForCausalLM.

    Args:
        attention: transformers' name for it.
        checkpointing: of layers: ``none``; ``all``, by the model's own switch; ``trained``, those that have a trained
            parameter, which is LLaMA-Factory's way.
        pure: trained weights in bf16 too, no autocast.
        liger: with Liger's kernels; they stay in this process's transformers.
    """
    if pure and workload.device != "cuda":
        raise ValueError("hf-bf16 is for a GPU: a CPU computes in float32 here")
    config, device, dtype = workload.config, workload.device, workload.dtype
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    config._attn_implementation = attention
    config.use_cache = False
    # Without memory first: transformers would draw weights of its own beside ours.
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    trained_prefixes = tuple(f"model.layers.{index}." for index in workload.trained_blocks)
    for name, shape in tensor_shapes(config).items():
        trained = name.startswith(trained_prefixes)
        weight = workload.draw(name, shape).to(torch.float32 if trained and not pure else dtype)
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(weight, requires_grad=trained))
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    model.train()
    if checkpointing != "none":
        # The name transformers is moving to, else the one it had; both default to recomputing whole blocks.
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable()
    if checkpointing == "trained":
        # Enabling makes the embedding's output need a gradient, which all layers then pass down; not so here.
        model.disable_input_require_grads()
        for index, layer in enumerate(model.model.layers):
            layer.gradient_checkpointing = index in workload.trained_blocks

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        mixed = dtype == torch.bfloat16 and not pure
        with torch.autocast(device, dtype) if mixed else contextlib.nullcontext():
            return model(input_ids=tokens, labels=tokens).loss

    return Runner(
        model=model,
        prepare=lambda tokens: tokens.to(device),
        loss=loss,
        tensors=model.named_parameters,
        facts={
            "attention": config._attn_implementation,
            "trained_dtype": str(dtype if pure else torch.float32).removeprefix("torch."),
        },
    )


CONTESTANTS: dict[str, Callable[[Workload], Runner]] = {
    "ours": build_ours,
    "hf": build_hf,
    "hf-checkpointing": lambda workload: build_hf(workload, checkpointing="all"),
    "hf-bf16": lambda workload: build_hf(workload, pure=True),
}


@torch.no_grad()
def weights_digest(runner: Runner, dtype: torch.dtype) -> str:
    """A checksum of every weight's bits, the same for whoever holds the same numbers under the same names.

    Made on the device: 17 GB need not travel. Float32 masters are narrowed to ``dtype``, where they came from exactly.
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
