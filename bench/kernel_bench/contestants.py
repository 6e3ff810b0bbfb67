"""The ops that timing.py times: their inputs, who competes, and the work an ideal kernel cannot avoid.

    ours            the public explicit functions of llama_pro_kernels
    eager           what a plain implementation does in PyTorch; a backward is autograd's, timed alone
    torch.compile   the same functions compiled, static shapes
    liger, quack    liger_kernel.ops and quack, where they can be imported
    bare products   the matrix products of a loss with nothing between, its weight's gradient not summed over the chunks
    backend NAME    attention by each backend that can serve, besides the one that "auto" chooses for ours

Everybody computes the same function of the same numbers, from its own natural layout: ours has gate and up, and q, k
and v, side by side as one projection leaves them; eager and torch.compile have them apart, and so has Liger but for its
newer releases' SwiGLU. So only ours brings dv back into the packed gradient of `rotary backward`; the others are
counted, and rated, without those bytes. quack and older releases of Liger always compute a norm weight's gradient, so
they do the same in `frozen` and `trained`. Ours takes an fp32 master as the weight of a trained norm; the others its
bf16 copy. Where a trained down projection needs SiLU(gate)·up again, the others call their forward for it.

Bytes count each input once and each output once, in their dtypes. FLOPs are of products, causal attention by the pairs
of query and key it really has, its backward as five products for forward's two.

Shapes: T tokens, H hidden, I intermediate, N heads, K key/value heads, D head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

from kernel_bench.elementwise import elementwise_ops
from kernel_bench.ops import Op, Setting
from kernel_bench.products import product_ops

__all__ = ["ops"]


def ops(setting: Setting) -> Iterator[Op]:
    """Every op of a training step, in the order of the table."""
    yield from elementwise_ops(setting)
    yield from product_ops(setting)
