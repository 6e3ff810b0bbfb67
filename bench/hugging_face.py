"""Hugging Face's LlamaForCausalLM over drawn weights: as it is, with what its users switch on, and with LoRA."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from workload import Runner, Workload

from llama_pro_fast.model import expected_tensors as tensor_shapes

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
) -> Runner:
    """The expanded model, of which the new blocks train.

    Args:
        attention: transformers' name for it; or ``cudnn``, which is SDPA held to that backend.
        checkpointing: of layers: ``none``; ``all``, by the model's own switch; ``trained``, those that have a trained
            parameter, which is LLaMA-Factory's way.
        pure: trained weights in the compute dtype too, no autocast.
        liger: with Liger's kernels; they stay in this process's transformers.
        compiled: decoder layers and loss through torch.compile. Layers whose parameters and input need the same
            gradients share what was compiled, where the whole model as one graph takes minutes.
    """
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    trained = tuple(f"model.layers.{index}." for index in workload.trained_blocks)
    model = drawn_model(workload, trained, attention=attention, pure=pure)
    _checkpoint(model, checkpointing)
    if compiled:
        for layer in model.model.layers:
            layer.compile()
        model.loss_function = torch.compile(model.loss_function)
    backend = SDPBackend.CUDNN_ATTENTION if attention == "cudnn" else None
    return runner_of(workload, model, list(model.named_parameters()), pure=pure, backend=backend)


def build_full(workload: Workload, *, checkpointing: str = "none", pure: bool = False) -> Runner:
    """The base, of which everything trains; arguments as of :func:`build_hf`."""
    workload = replace(workload, expanded=False)
    model = drawn_model(workload, ("",), pure=pure)
    _checkpoint(model, checkpointing)
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
    config._attn_implementation = "sdpa" if attention == "cudnn" else attention
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
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable()
    if which == "trained":
        # Enabling makes the embedding's output need a gradient, which all layers then pass down; not so here.
        model.disable_input_require_grads()
        for layer in model.model.layers:
            layer.gradient_checkpointing = any(p.requires_grad for p in layer.parameters())


def runner_of(
    workload: Workload,
    model: nn.Module,
    tensors: list[tuple[str, torch.Tensor]],
    *,
    pure: bool = False,
    backend: SDPBackend | None = None,
) -> Runner:
    device, dtype = workload.device, workload.dtype

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        mixed = dtype == torch.bfloat16 and not pure
        with contextlib.ExitStack() as stack:
            if mixed:
                stack.enter_context(torch.autocast(device, dtype))
            if backend is not None:
                stack.enter_context(sdpa_kernel(backend))
            return model(input_ids=tokens, labels=tokens).loss

    return Runner(
        model=model,
        prepare=lambda tokens: tokens.to(device),
        loss=loss,
        tensors=lambda: tensors,
        facts={
            "attention": model.config._attn_implementation + (f", {backend.name.lower()}" if backend else ""),
            "trained_dtype": str(dtype if pure else torch.float32).removeprefix("torch."),
        },
    )
