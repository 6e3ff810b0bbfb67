"""The whole decoder: embedding, blocks, final norm, head; built from a Hugging Face folder, one block at a time.

Which blocks train decides everything else: the embedding and the blocks below the first trained one run without a
graph, the blocks above it only pass the gradient on. Skipping the new blocks of an expanded model gives back the model
it was made from, so the base's loss can be measured at any time without a second copy of the weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from llama_pro_fast.batch import PackedBatch
from llama_pro_fast.block import Block, BlockClass, BlockContext, Recompute
from llama_pro_fast.errors import UserError
from llama_pro_fast.families import BlockSpec
from llama_pro_fast.layers import Embedding, RMSNorm
from llama_pro_fast.pretrained import PretrainedFolder
from llama_pro_fast.trained import Trained
from llama_pro_kernels import linear_cross_entropy, linear_cross_entropy_forward, linear_kl

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


class Decoder(nn.Module):
    """A Llama-family language model on packed batches.

    Attributes:
        blocks: the decoder blocks, bottom to top.
        trained_blocks: their indices that train.
        lm_head: the output table; the very module `embed_tokens` when the two are tied.
    """

    def __init__(
        self,
        *,
        embed_tokens: Embedding,
        blocks: Iterable[Block],
        norm: RMSNorm,
        lm_head: Embedding | None,
        rotary_tables: tuple[torch.Tensor, torch.Tensor],
        attention: str,
    ) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.lm_head = embed_tokens if lm_head is None else lm_head
        self.register_buffer("cos", rotary_tables[0], persistent=False)
        self.register_buffer("sin", rotary_tables[1], persistent=False)
        self.attention = attention

    @property
    def trained_blocks(self) -> list[int]:
        return [index for index, block in enumerate(self.blocks) if block.block_class is BlockClass.TRAINED]

    def hidden_states(self, batch: PackedBatch, *, skip: Collection[int] = ()) -> torch.Tensor:
        """The final norm's output ``[T, H]`` in the compute dtype; blocks in ``skip`` are left out."""
        context = BlockContext.for_batch(batch, rotary_tables=(self.cos, self.sin), attention=self.attention)
        x = self.embed_tokens(batch.input_ids)
        for index, block in enumerate(self.blocks):
            if index not in skip:
                x = block(x, context)
        return self.norm(x)

    def logits(self, batch: PackedBatch) -> torch.Tensor:
        """``[T, V]``, all at once: for tests and for generating, not for training."""
        return F.linear(self.hidden_states(batch), self.lm_head.weight_in_compute_dtype)

    def loss(self, batch: PackedBatch, scale: torch.Tensor) -> torch.Tensor:
        """``scale`` × the summed cross-entropy (nats) of the batch's valid tokens, differentiable.

        Args:
            scale: device scalar; 1 / valid tokens of the whole optimizer step makes the step's loss a mean.
        """
        head = self.lm_head
        x = self.hidden_states(batch)
        return linear_cross_entropy(
            x, head.weight, batch.labels, scale, low_precision_weight=head.low_precision, consume=True
        )

    @torch.no_grad()
    def token_losses(self, hidden_states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy ``[T]`` in nats, 0 where the label is ignored."""
        one = torch.ones((), dtype=torch.float32, device=labels.device)
        return linear_cross_entropy_forward(
            hidden_states,
            self.lm_head.weight_in_compute_dtype,
            labels,
            one,
            need_dx=False,
            need_dweight=False,
            per_token=True,
        ).token_losses

    @torch.no_grad()
    def token_kl(self, hidden_base: torch.Tensor, hidden_now: torch.Tensor) -> torch.Tensor:
        """KL(base ‖ now) ``[T]`` in nats from the final hidden states of the two."""
        return linear_kl(hidden_base, hidden_now, self.lm_head.weight_in_compute_dtype)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


def hf_tensors(config, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Split one of :class:`Decoder`'s tensors (a value, a gradient) into Hugging Face names and tensors."""
    top = {"embed_tokens.weight": EMBEDDING, "norm.weight": FINAL_NORM, "lm_head.weight": HEAD}
    if name in top:
        yield top[name], tensor
        return
    _, index, rest = name.split(".", 2)
    parts = BlockSpec.from_config(config, int(index)).tensors()[rest]
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
        for parts in BlockSpec.from_config(config, index).tensors().values():
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
    device: torch.device | str = "cpu",
) -> Block:
    """Decoder block ``index`` of a folder, computing in ``dtype``."""
    spec = BlockSpec.from_config(folder.config, index)
    packed = {
        ours: torch.cat([folder.tensor(f"model.layers.{index}.{name}").to(device) for name, _ in parts])
        for ours, parts in spec.tensors().items()
    }
    return Block(spec, packed, block_class=block_class, compute_dtype=dtype, recompute=recompute)


def load_model(
    folder: PretrainedFolder,
    *,
    trained: Trained | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    max_length: int | None = None,
    attention: str,
    recompute: Sequence[Recompute] | None = None,
) -> Decoder:
    """Read a folder into a :class:`Decoder`, tensor by tensor, so that the peak is the model plus one block.

    Args:
        trained: what trains; by default nothing.
        dtype: of the computation; frozen weights are held in it.
        max_length: longest sequence that will be given; by default the config's positions.
        attention: an attention backend's name (`llama_pro_kernels.select_attention_backend`).
        recompute: of each block; by default none.

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
    blocks = [
        load_block(folder, index, dtype=dtype, block_class=block_class, recompute=policy, device=device)
        for index, (block_class, policy) in enumerate(zip(trained.classes, recompute, strict=True))
    ]
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
