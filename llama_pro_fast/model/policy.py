"""What backward asks of a block, and what the block keeps for it.

Sizes and names are those of block.py.

**Classes.** Where a block lies and whether it trains decides what it does:

    prefix    below the lowest trained block. It runs without a graph, keeps nothing and has no backward.
    frozen    above it. Backward computes the gradient of x and no gradient of a weight: four products, one a matrix.
    trained   Backward computes the gradients of x and of every weight: eight products, two a matrix.

Nothing below the lowest trained block trains. So that block computes no gradient of x and skips the dX product of
qkv_proj: seven products instead of eight. Where everything trains it is block 0, and the embeddings want the gradient.

**Kept** from forward to backward, by a frozen and by a trained block alike, are those :class:`Activations` that the
block's policy says (:class:`Recompute`). Backward recomputes the others by the kernels of forward on the same numbers.
Where s was kept, rms_norm_forward of s gives the rows of add_rms_norm_forward bit for bit. So no bit of a gradient
depends on the policy.

    policy             kept                   bytes a token                 recomputed in backward
    none               x, rstd, qkv, o, lse,  4H + 4(N + K)D + 4N + 4I + 8  nothing
                       s, post_rstd, gate_up
    mlp                all these but gate_up  4H + 4(N + K)D + 4N + 8       post_attention_layernorm of s, gate_up_proj
    all_but_attention  x, o, lse              2H + 2ND + 4N                 before the MLP's backward: o_proj, s,
                                                                            post_attention_layernorm, gate_up_proj;
                                                                            after it: input_layernorm, qkv_proj, rotary
    block              x                      2H                            all of forward up to and including
                                                                            gate_up_proj, attention too

`mlp` and `block` recompute before the MLP's backward. The bytes are those of bf16 activations, with rstd, post_rstd and
lse in float32 (`cost.kept_bytes`).

No policy keeps the rows that leave a norm, or SwiGLU's output. Under every policy, on top of what the table says, a
trained block recomputes them from x, s and gate_up, without a product, for the gradients of the matrices that read
them; a frozen block has no such gradients. Nor does any policy keep normed q and k: where a block has q_norm and
k_norm, qkv is raw, and backward norms and rotates q and k once more. down_proj is never recomputed: nothing in backward
reads its output.

**Freed.** What forward computes and does not keep is gone when forward returns, but for y. What is kept is autograd's
until this block's backward has returned. Backward writes the gradient of gate_up over gate_up, unless it is in eight
bits, so it may run only once.
A second call raises (`Consumed`), and does so under the other policies too, for one rule. Of what is recomputed,
gate_up goes with the MLP's backward, s before attention's, qkv after rotary's; rstd, post_rstd, o and lse go when
backward returns. Until then backward also holds the gradients of all the block's weights.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from torch import Tensor


class BlockClass(Enum):
    """What backward asks of a block."""

    PREFIX = "prefix"
    FROZEN = "frozen"
    TRAINED = "trained"


class Recompute(Enum):
    """What a block recomputes in backward instead of keeping it; the table is above."""

    NONE = "none"
    MLP = "mlp"
    ALL_BUT_ATTENTION = "all_but_attention"
    BLOCK = "block"

    @property
    def kept(self) -> tuple[str, ...]:
        """The fields of :class:`Activations` that live from forward to backward."""
        return _KEPT[self]


class Activations(NamedTuple):
    """What backward reads of forward.

    Attributes:
        x: ``[T, H]``, the block's input.
        rstd, post_rstd: ``[T]``, of the two layer norms, in float32 (float64 for float64 activations).
        qkv: ``[T, (N + 2K)·D]``, rotated; raw where a norm on q and k stands before the rotation.
        o: ``[T, N, D]``, attention's output.
        lse: ``[N, T]``, log-sum-exp of attention's scores, in the dtype of ``rstd``.
        s: ``[T, H]``, the sum between the two branches.
        gate_up: ``[T, 2I]``.
    """

    x: Tensor
    rstd: Tensor
    qkv: Tensor
    o: Tensor
    lse: Tensor
    s: Tensor
    post_rstd: Tensor
    gate_up: Tensor


_KEPT = {
    Recompute.NONE: Activations._fields,
    Recompute.MLP: ("x", "rstd", "qkv", "o", "lse", "s", "post_rstd"),
    Recompute.ALL_BUT_ATTENTION: ("x", "o", "lse"),
    Recompute.BLOCK: ("x",),
}
