"""Who is measured: the same random Llama (bench/workload.py) in several implementations, in the order of their turns.

All share one optimizer class (`training.optimizer`), one stream of tokens and, but for the last group, one set of
trained blocks. Precisions are those of a usual run: on a GPU trained weights float32, frozen ones bf16, products in
bf16 (ours by low-precision copies, the others under autocast); on a CPU all float32.

    ours                llama_pro_fast's decoder; with -mlp, -attention and -block the MLP, all but attention or the
                        whole block is recomputed, with -planned what the planner chooses, block by block; with -fp8
                        frozen blocks make backward's products in eight bits
    hf                  stock LlamaForCausalLM with SDPA (bench/hugging_face.py), and of it
      -checkpointing    every layer recomputed, by the model's own switch
      -checkpointing-trained  only layers with a trained parameter recomputed, which is LLaMA-Factory's rule
      -liger            with Liger's kernels, its fused loss included; -liger-flash4 with FlashAttention 4 in SDPA's
                        place, which takes packed documents as they lie; SDPA takes a mask over all pairs of tokens
      -compile          decoder layers and loss through torch.compile, one graph for all layers of a class
      …-compile-fp8     compiled, with torchao's fp8 in all products of the blocks, a scale a tensor; -rowwise a row
      …-bf16            each of these with trained weights, gradients and moments in bf16, no autocast: cheaper and
                        less exact than all others

Instead of a block expansion, on the base itself; other parameters train, so these compare methods:

    lora                PEFT's LoRA of rank 16 on every linear layer; adapters float32
    full                every weight trains, from float32 masters; -bf16 as above

Compiling, Liger, torchao and pure bf16 are for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import common
import torch
from hugging_face import RANK, build_hf, build_lora
from workload import Runner, Workload

from llama_pro_fast.hf.families import block_spec, hf_parts
from llama_pro_fast.hf.loading import EMBEDDING, FINAL_NORM, HEAD, hf_tensors, rotary_tables
from llama_pro_fast.hf.loading import expected_tensors as tensor_shapes
from llama_pro_fast.model.batch import PackedBatch, padded_boundaries
from llama_pro_fast.model.block import Block
from llama_pro_fast.model.decoder import Decoder
from llama_pro_fast.model.layers import Embedding, RMSNorm
from llama_pro_fast.model.policy import Recompute
from llama_pro_fast.model.trained import Trained
from llama_pro_fast.planning.alternatives import lora_estimate
from llama_pro_fast.planning.cost import step_cost
from llama_pro_fast.planning.devices import GIB, cpu, present
from llama_pro_fast.planning.job import Job, Question, recompute_text
from llama_pro_fast.planning.memory import step_memory
from llama_pro_fast.planning.search import best_fit, flash_backward_flops
from llama_pro_kernels import implementation_name, select_attention_backend

FLASH_4 = "flash_attention_4"
"""Transformers' name of it."""
NEW_BLOCKS, ADAPTERS, EVERYTHING = "new blocks", "adapters", "everything"


@dataclass(frozen=True)
class Contestant:
    """How it is built, and what it needs.

    Attributes:
        trains: the new blocks of the expanded model; or adapters on the base, or everything in it.
        gpu: it is for a GPU only.
        packages: what it needs beside our own dependencies.
    """

    build: Callable[[Workload], Runner]
    trains: str = NEW_BLOCKS
    gpu: bool = False
    packages: tuple[str, ...] = ()

    def missing(self, device: str) -> str | None:
        """Why it cannot run here, if so."""
        if self.gpu and device != "cuda":
            return "needs a GPU"
        lacking = [package for package in self.packages if common.version_of(package) is None]
        return f"not installed: {', '.join(lacking)}" if lacking else None

    def model(self, workload: Workload) -> Workload:
        """With the model that it trains: the expanded one, or the base."""
        return workload if self.trains == NEW_BLOCKS else replace(workload, expanded=False)

    def flops_per_token(self, workload: Workload) -> tuple[float, float]:
        """That its step is for, attention's backward at 2 and at 2.5 times its forward; nothing counted twice."""
        model, whole = self.model(workload), self.trains != NEW_BLOCKS
        trained, length = Trained.all_of(len(model.plan.sources)) if whole else model.trained, model.document_length
        job = Job(config=model.config, trained=trained, seq_len=length)
        if self.trains == ADAPTERS:
            cost = lora_estimate(job, rank=RANK, micro_batch_size=1, usable=1 << 62).cost
        else:
            cost = step_cost(model.config, trained, seq_len=length)
        return cost.total, cost.total + flash_backward_flops(job)


def build_ours(workload: Workload, *, recompute: Recompute | None = Recompute.NONE, eight_bits: bool = False) -> Runner:
    """Every block that has a backward recomputes as ``recompute`` says; None leaves the choice to the planner."""
    config, device, dtype = workload.config, torch.device(workload.device), workload.dtype
    job = our_job(workload, eight_bits=eight_bits)
    spec = block_spec(config, 0)
    shapes = tensor_shapes(config)
    classes = workload.trained.classes
    policies = planned_policies(job, workload) if recompute is None else [recompute] * len(classes)

    def block(index: int) -> Block:
        packed = {
            ours: torch.cat([workload.draw(f"model.layers.{index}.{name}", shape) for name, shape in parts])
            for ours, parts in hf_parts(spec).items()
        }
        of_block = {"recompute": policies[index], "eight_bits": eight_bits}
        return Block(spec, packed, block_class=classes[index], compute_dtype=dtype, **of_block)

    def draw(name: str) -> torch.Tensor:
        return workload.draw(name, shapes[name])

    def embedding(name: str) -> Embedding:
        return Embedding(draw(name), trained=False, compute_dtype=dtype)

    cos, sin = rotary_tables(config, workload.seq)
    model = Decoder(
        embed_tokens=embedding(EMBEDDING),
        blocks=[block(index) for index in range(config.num_hidden_layers)],
        norm=RMSNorm(draw(FINAL_NORM), config.rms_norm_eps, trained=False, compute_dtype=dtype),
        lm_head=None if config.tie_word_embeddings else embedding(HEAD),
        rotary_tables=(cos.to(device), sin.to(device)),
        attention=job.attention,
    )
    model.accumulate()
    scale = torch.tensor(1.0 / workload.predictions, device=device)
    planned = step_memory(job, policies, micro_batch_size=workload.micro_batch, accumulating=False)

    def prepare(tokens: torch.Tensor) -> PackedBatch:
        documents = tokens.view(-1, workload.document_length).tolist()
        return PackedBatch.from_documents(documents, cu_seqlens_length=padded_boundaries(len(documents) + 1)).to(device)

    return Runner(
        model=model,
        prepare=prepare,
        loss=lambda batch: model.loss(batch, scale),
        tensors=lambda: (pair for name, p in model.named_parameters() for pair in hf_tensors(config, name, p)),
        facts={
            "attention": job.attention,
            "trained_dtype": "float32",
            "recompute": recompute_text(policies, job.trained.first),
            "planned_gib": round(planned.total / GIB, 4),
        },
    )


def our_job(workload: Workload, *, eight_bits: bool = False) -> Job:
    """What the planner is asked about ours."""
    config, device, dtype = workload.config, torch.device(workload.device), workload.dtype
    head_dim = block_spec(config, 0).head_dim
    return Job(
        config=config,
        trained=workload.trained,
        dtype=dtype,
        seq_len=workload.seq,
        attention=select_attention_backend(device, dtype, requested=workload.attention, head_dim=head_dim),
        triton=implementation_name(device, dtype).startswith("triton"),
        document=workload.document_length,
        eight_bits=eight_bits,
    )


def planned_policies(job: Job, workload: Workload) -> Sequence[Recompute]:
    """What the planner would have each block recompute on this machine."""
    device, sequences = present() if workload.device == "cuda" else cpu(), workload.micro_batch
    question = Question(job=job, device=device, usable=device.usable, batch_size=sequences, micro_batch_size=sequences)
    found = best_fit(question)
    if found is None:
        raise torch.OutOfMemoryError("the planner finds no way to fit this step")
    return found.recompute


def _ours(recompute: Recompute | None, **options: bool) -> Contestant:
    return Contestant(partial(build_ours, recompute=recompute, **options))


def _hf(*, pure: bool = False, **options: object) -> Contestant:
    packages = ("liger-kernel",) if "liger" in options else ()
    packages += ("flash-attn-4",) if "attention" in options else ()
    packages += ("torchao",) if "float8" in options else ()
    trains = EVERYTHING if "everything" in options else NEW_BLOCKS
    gpu = pure or bool(packages) or "compiled" in options
    return Contestant(partial(build_hf, pure=pure, **options), trains=trains, gpu=gpu, packages=packages)


def _lora(**options: object) -> Contestant:
    return Contestant(partial(build_lora, **options), trains=ADAPTERS, packages=("peft",))


FUSED = {"compiled": True, "pure": True, "liger": True, "attention": FLASH_4}

# The most telling first, for a run that is cut short.
CONTESTANTS: dict[str, Contestant] = {
    "ours": _ours(Recompute.NONE),
    "ours-fp8": _ours(Recompute.NONE, eight_bits=True),
    "hf-liger": _hf(liger=True),
    "hf": _hf(),
    "hf-bf16": _hf(pure=True),
    "hf-liger-bf16": _hf(liger=True, pure=True),
    "hf-liger-flash4": _hf(liger=True, attention=FLASH_4),
    "hf-liger-flash4-bf16": _hf(liger=True, attention=FLASH_4, pure=True),
    "hf-compile-bf16": _hf(compiled=True, pure=True),
    "hf-checkpointing-trained": _hf(checkpointing="trained"),
    "hf-checkpointing": _hf(checkpointing="all"),
    "ours-block": _ours(Recompute.BLOCK),
    "ours-planned": _ours(None),
    "ours-mlp": _ours(Recompute.MLP),
    "ours-attention": _ours(Recompute.ALL_BUT_ATTENTION),
    "lora": _lora(),
    "hf-compile": _hf(compiled=True),
    "full-bf16-checkpointing": _hf(everything=True, pure=True, checkpointing="all"),
    "lora-checkpointing": _lora(checkpointing="all"),
    "hf-checkpointing-trained-bf16": _hf(checkpointing="trained", pure=True),
    "hf-checkpointing-bf16": _hf(checkpointing="all", pure=True),
    "full-checkpointing": _hf(everything=True, checkpointing="all"),
    "full": _hf(everything=True),
    "hf-compile-fp8-bf16": _hf(compiled=True, pure=True, float8="tensorwise"),
    "hf-compile-fp8-rowwise-bf16": _hf(compiled=True, pure=True, float8="rowwise"),
    "hf-liger-flash4-compile-fp8-bf16": _hf(**FUSED, float8="tensorwise"),
    "hf-liger-flash4-compile-fp8-rowwise-bf16": _hf(**FUSED, float8="rowwise"),
}
