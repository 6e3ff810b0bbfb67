"""A model's files read into a :class:`Decoder`, and its tensors back under Hugging Face names.

The folder is read one tensor at a time, so the peak is the model plus one block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from llama_pro_fast.errors import UserError
from llama_pro_fast.hf.families import block_spec, hf_parts
from llama_pro_fast.hf.folder import PretrainedFolder
from llama_pro_fast.model.block import Block
from llama_pro_fast.model.decoder import Decoder
from llama_pro_fast.model.layers import Embedding, RMSNorm
from llama_pro_fast.model.policy import BlockClass, Recompute
from llama_pro_fast.model.trained import Trained

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def hf_tensors(config, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Split one of :class:`Decoder`'s tensors (a value, a gradient) into Hugging Face names and tensors."""
    top = {"embed_tokens.weight": EMBEDDING, "norm.weight": FINAL_NORM, "lm_head.weight": HEAD}
    if name in top:
        yield top[name], tensor
        return
    _, index, rest = name.split(".", 2)
    parts = hf_parts(block_spec(config, int(index)))[rest]
    for (hf_name, _), part in zip(parts, tensor.split([shape[0] for _, shape in parts]), strict=True):
        yield f"model.layers.{index}.{hf_name}", part


def rotary_tables(config, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin ``[length, D/2]`` float32 for positions 0 … length-1, computed by transformers itself.

    The families compute them alike, so Llama's module serves all configs. For `longrope` and `dynamic`, whose angles
    depend on how long the text is, ``length`` decides, once for the run: transformers would decide by the longest
    document of each batch.
    """
    # Imported here: it takes seconds, and who only plans has no use for it.
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    positions = torch.arange(length)[None]
    cos, sin = LlamaRotaryEmbedding(config)(torch.empty(0, dtype=torch.float32), positions)
    half = cos.shape[-1] // 2
    return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()


def expected_tensors(config) -> dict[str, tuple[int, ...]]:
    """Every tensor a checkpoint of this config must hold, with its shape."""
    shapes = {EMBEDDING: (config.vocab_size, config.hidden_size), FINAL_NORM: (config.hidden_size,)}
    for index in range(config.num_hidden_layers):
        for parts in hf_parts(block_spec(config, index)).values():
            shapes |= {f"model.layers.{index}.{name}": shape for name, shape in parts}
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, config.hidden_size)
    return shapes


def check_tensors(folder: PretrainedFolder) -> None:
    """Config and weights must tell of the same model.

    Raises:
        UserError: naming the first tensor that is missing, unknown, of another shape or of a dtype that is no float.
    """
    expected = expected_tensors(folder.config)
    # A tied checkpoint may store its head as well; old ones store the rotary frequencies.
    known_extra = {HEAD} if folder.config.tie_word_embeddings else set()
    for name, entry in folder.entries.items():
        if name not in expected and name not in known_extra and not name.endswith("rotary_emb.inv_freq"):
            raise UserError(
                f"{folder.path / entry.file}: holds {name}, which a model of {folder.config.num_hidden_layers} layers "
                "by the config has not; config.json and weights are of different models"
            )
        if name in expected and entry.shape != expected[name]:
            raise UserError(
                f"{folder.path / entry.file}: {name} has shape {list(entry.shape)}, the config says "
                f"{list(expected[name])}; config.json and weights are of different models"
            )
        if name in expected and entry.dtype not in ("F64", "F32", "F16", "BF16"):
            raise UserError(f"{folder.path / entry.file}: {name} is {entry.dtype}; give bf16, fp16 or fp32 weights")
    if folder.config.tie_word_embeddings and HEAD in folder.entries and EMBEDDING in folder.entries:
        same = folder.entries[HEAD].shape == folder.entries[EMBEDDING].shape
        if not same or folder.digest(HEAD) != folder.digest(EMBEDDING):
            raise UserError(
                f"{folder.path}: config.json ties the head to the embeddings and {HEAD} holds other weights; set "
                "tie_word_embeddings to false there, or delete the tensor"
            )
    for name in expected:
        if name not in folder.entries:
            raise UserError(
                f"{folder.path}: the config ({folder.config.num_hidden_layers} layers) asks for {name} and no weight "
                "file holds it; config.json and weights are of different models"
            )


def load_embedding(
    folder: PretrainedFolder, *, dtype: torch.dtype, name: str = EMBEDDING, trained: bool = False, device="cpu"
) -> Embedding:
    """The embedding table, or with ``name=HEAD`` the head."""
    return Embedding(folder.tensor(name).to(device), trained=trained, compute_dtype=dtype)


def load_block(
    folder: PretrainedFolder,
    index: int,
    *,
    dtype: torch.dtype,
    block_class: BlockClass = BlockClass.FROZEN,
    recompute: Recompute = Recompute.NONE,
    eight_bits: bool = False,
    device: torch.device | str = "cpu",
) -> Block:
    """Decoder block ``index`` of a folder, computing in ``dtype``."""
    spec = block_spec(folder.config, index)
    packed = {
        ours: torch.cat([folder.tensor(f"model.layers.{index}.{name}").to(device) for name, _ in parts])
        for ours, parts in hf_parts(spec).items()
    }
    how = {"block_class": block_class, "compute_dtype": dtype, "recompute": recompute, "eight_bits": eight_bits}
    return Block(spec, packed, **how)


def load_model(
    folder: PretrainedFolder,
    *,
    trained: Trained | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    max_length: int | None = None,
    attention: str,
    recompute: Sequence[Recompute] | None = None,
    eight_bits: bool = False,
    loaded: Callable[[Block], Any] = lambda block: None,
) -> Decoder:
    """Read a folder into a :class:`Decoder`, tensor by tensor, so that the peak is the model plus one block.

    Args:
        trained: what trains; by default nothing.
        dtype: of the computation; frozen weights are held in it.
        max_length: longest sequence that will be given; by default the config's positions.
        attention: an attention backend's name (`llama_pro_kernels.select_attention_backend`).
        recompute: of each block; by default none.
        eight_bits: whether frozen blocks that pass the gradient on make backward's products in e4m3.
        loaded: called with each block, before the next one is read.

    Raises:
        UserError: config and weights disagree, or a file is damaged.
    """
    check_tensors(folder)
    config = folder.config
    count = config.num_hidden_layers
    trained = trained or Trained(count, ())
    recompute = recompute or [Recompute.NONE] * count
    how = {"trained": trained.everything, "dtype": dtype, "device": device}
    embed_tokens = load_embedding(folder, **how)
    blocks = []
    for index, (block_class, policy) in enumerate(zip(trained.classes, recompute, strict=True)):
        of_block = {"recompute": policy, "eight_bits": eight_bits}
        blocks.append(load_block(folder, index, dtype=dtype, block_class=block_class, device=device, **of_block))
        loaded(blocks[-1])
    norm = RMSNorm(
        folder.tensor(FINAL_NORM).to(device), config.rms_norm_eps, trained=trained.everything, compute_dtype=dtype
    )
    lm_head = None if config.tie_word_embeddings else load_embedding(folder, name=HEAD, **how)
    cos, sin = rotary_tables(config, max_length or config.max_position_embeddings)
    return Decoder(
        embed_tokens=embed_tokens,
        blocks=blocks,
        norm=norm,
        lm_head=lm_head,
        rotary_tables=(cos.to(device), sin.to(device)),
        attention=attention,
    )
