"""Hugging Face's LlamaForCausalLM over drawn weights: as it is, with what its users switch on, and with LoRA."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from workload import Runner, Workload

from llama_pro_fast.hf.loading import expected_tensors as tensor_shapes

RANK = 16
"""Of LoRA."""


def build_hf(
    workload: Workload,
    *,
    attention: str = "sdpa",
    checkpointing: str = "none",
    pure: bool = False,
    liger: bool = False,
    compiled: bool = False,
    float8: str = "",
    everything: bool = False,
) -> Runner:
    """The expanded model, of which the new blocks train.

    Args:
        everything: the base in its place, of which everything trains.
        attention: transformers' name for it.
        checkpointing: of layers: ``none``; ``all``, by the model's own switch; ``trained``, those that have a trained
            parameter, which is LLaMA-Factory's way.
        pure: trained weights in the compute dtype too, no autocast.
        liger: with Liger's kernels; they stay in this process's transformers.
        float8: torchao's recipe (``tensorwise``, ``rowwise``) for the linear layers of the blocks, whose products are
            then all in eight bits; its casts are fast only where they are compiled.
        compiled: decoder layers and loss through torch.compile. Layers whose parameters and input need the same
            gradients share what was compiled, where the whole model as one graph takes minutes.
    """
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    if everything:
        workload = replace(workload, expanded=False)
    trained = ("",) if everything else tuple(f"model.layers.{index}." for index in workload.trained.blocks)
    model = drawn_model(workload, trained, attention=attention, pure=pure)
    _checkpoint(model, checkpointing)
    if float8:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        recipe = Float8LinearConfig.from_recipe_name(float8)
        convert_to_float8_training(model, config=recipe, module_filter_fn=lambda _, name: "lm_head" not in name)
    if compiled:
        for layer in model.model.layers:
            layer.compile()
        model.loss_function = torch.compile(model.loss_function)
    return runner_of(workload, model, list(model.named_parameters()), pure=pure)


def build_lora(workload: Workload, *, checkpointing: str = "none") -> Runner:
    """The base, frozen, with adapters on every linear layer but the head, which are float32 as PEFT makes them."""
    from peft import LoraConfig, get_peft_model

    workload = replace(workload, expanded=False)
    model = drawn_model(workload, ())
    # Wrapping gives the base's parameters other names.
    tensors = list(model.named_parameters())
    torch.manual_seed(workload.seed)
    adapters = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, adapters)
    _checkpoint(model, checkpointing)
    return runner_of(workload, wrapped, tensors)


def drawn_model(
    workload: Workload, trained: tuple[str, ...], *, attention: str = "sdpa", pure: bool = False
) -> LlamaForCausalLM:
    """Tensors whose name starts with one of ``trained`` train."""
    config = workload.config
    config._attn_implementation = attention
    config.use_cache = False
    # Without memory first: transformers would draw weights of its own beside ours.
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    for name, shape in tensor_shapes(config).items():
        trains = name.startswith(trained)
        weight = workload.draw(name, shape).to(torch.float32 if trains and not pure else workload.dtype)
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(weight, requires_grad=trains))
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(workload.device)
    return model.train()


def _checkpoint(model: LlamaForCausalLM, which: str) -> None:
    if which != "none":
        # The name transformers is moving to, else the one it had; both default to recomputing whole blocks.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    if which == "trained":
        # Enabling makes the embedding's output need a gradient, which all layers then pass down; not so here.
        model.disable_input_require_grads()
        for layer in model.model.layers:
            layer.gradient_checkpointing = any(p.requires_grad for p in layer.parameters())


def runner_of(
    workload: Workload, model: nn.Module, tensors: list[tuple[str, torch.Tensor]], *, pure: bool = False
) -> Runner:
    device, dtype = workload.device, workload.dtype

    def loss(batch: dict[str, Any]) -> torch.Tensor:
        mixed = dtype == torch.bfloat16 and not pure
        with torch.autocast(device, dtype) if mixed else contextlib.nullcontext():
            return model(**batch).loss

    attention, trained = model.config._attn_implementation, str(dtype if pure else torch.float32)
    facts = {"attention": attention, "trained_dtype": trained.removeprefix("torch.")}
    prepare = packed(workload, flash=attention.startswith("flash"))
    return Runner(model=model, prepare=prepare, loss=loss, tensors=lambda: tensors, facts=facts)


def packed(workload: Workload, *, flash: bool) -> Callable[[torch.Tensor], dict[str, Any]]:
    """Tokens ``[B, S]`` -> the model's arguments, as transformers' `DataCollatorWithFlattening` makes them.

    Where sequences hold several documents, all are one row whose positions begin anew, and a document's first token is
    nobody's label. ``flash`` takes the boundaries with it, so that no layer looks for them.
    """
    length = workload.document_length

    def prepare(tokens: torch.Tensor) -> dict[str, Any]:
        tokens = tokens.to(workload.device)
        if length == workload.seq:
            return {"input_ids": tokens, "labels": tokens}
        documents = tokens.reshape(-1, length)
        labels = documents.clone()
        labels[:, 0] = -100
        positions = torch.arange(length, device=tokens.device).expand_as(documents)
        batch: dict[str, Any] = {"input_ids": documents, "labels": labels, "position_ids": positions}
        batch = {name: rows.reshape(1, -1) for name, rows in batch.items()}
        if flash:
            bounds = torch.arange(len(documents) + 1, dtype=torch.int32, device=tokens.device) * length
            batch |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": length, "max_length_k": length}
        return batch

    return prepare
