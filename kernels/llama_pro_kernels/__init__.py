"""The operations of a Llama-family decoder, forward and backward, each aware of which of its inputs are frozen.

Each op is a differentiable function ``X`` for any model of yours, made of two plain tensor functions, ``X_forward`` and
``X_backward``, for code that writes its own backward and decides itself what is kept.

=======================  ================================================  ==========================
differentiable op        what it keeps for backward                        for a frozen weight
=======================  ================================================  ==========================
rms_norm                 x, rstd (one number a token)                      no dW computed
add_rms_norm             the sum, rstd                                     no dW computed
trainable_linear         x where the weight trains, W where x needs dX     x not kept, no dW
rotary                   positions and tables                              –
attention                q, k, v, o, lse                                   –
swiglu                   gate_up                                           –
linear_cross_entropy     dX, dW, made together with the loss               two products, no dW
linear_cross_entropy_kl  dX, made together with the losses                 three products; always so
=======================  ================================================  ==========================

A decoder block and the loss, on a row of two documents; the block is frozen, so only its input gets a gradient:

    >>> import torch
    >>> from llama_pro_kernels import (
    ...     add_rms_norm, attention, linear_cross_entropy, rms_norm, rotary, select_attention_backend, swiglu,
    ...     trainable_linear,
    ... )
    >>> T, H, I, N, K, D, V = 8, 16, 24, 4, 2, 4, 32  # D is the head dim, V the vocabulary
    >>> shapes = {"qkv": ((N + 2 * K) * D, H), "o": (H, N * D), "gate_up": (2 * I, H), "down": (H, I)}
    >>> w = {name: torch.randn(shape) for name, shape in shapes.items()}
    >>> x, norm, head = torch.randn(T, H, requires_grad=True), torch.ones(H), torch.randn(V, H)
    >>> position_ids = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    >>> cu_seqlens = torch.tensor([0, 5, 8], dtype=torch.int32)
    >>> angles = torch.arange(T)[:, None] * 10_000.0 ** (-torch.arange(0, D, 2) / D)
    >>> qkv = trainable_linear(rms_norm(x, norm, 1e-5), w["qkv"])
    >>> q, k, v = rotary(qkv, angles.cos(), angles.sin(), position_ids, N, K, D)
    >>> backend = select_attention_backend(x.device, x.dtype, head_dim=D)
    >>> o = attention(q, k, v, cu_seqlens, max_seqlen=5, scale=D**-0.5, backend=backend)
    >>> normed, s = add_rms_norm(trainable_linear(o.flatten(1), w["o"]), x, norm, 1e-5)
    >>> y = s + trainable_linear(swiglu(trainable_linear(normed, w["gate_up"])), w["down"])
    >>> labels = torch.tensor([3, 1, 4, 1, -100, 9, 2, -100])  # a document's last token predicts nothing
    >>> loss = linear_cross_entropy(rms_norm(y, norm, 1e-5), head, labels, scale=torch.tensor(1 / 6))
    >>> loss.backward()
    >>> x.grad.shape, w["qkv"].grad
    (torch.Size([8, 16]), None)

``qk_norm_rotary``, the norm on each head of q and k with the rotation behind it, is a pair only; ``linear``,
``linear_dx``, ``linear_dw``, ``linear_dbias`` and ``linear_dscale`` are the products of a linear layer one by one;
``adamw_`` is the optimizer's step, clipping and copies in it; ``linear_kl`` is a meter, forward only;
``linear_cross_entropy_kl`` is a loss with the same divergence in it. Backward functions are told what is wanted
(``need_dweight``): what is not wanted is neither computed nor allocated. Names that end in an underscore write over an
input; those that end in ``_e4m3`` make or take rows in eight bits (e4m3.py).

CUDA tensors, or any under ``TRITON_INTERPRET=1``, get the kernels in ``triton_kernels``; others, and all of fp64, plain
PyTorch in ``reference.py``. Products are PyTorch's, attention is a backend's. The functional ops are registered as
``torch.ops.llama_pro_kernels``, so ``torch.compile`` keeps them whole and ``FlopCounterMode`` counts their products.

Precision: an op computes in ``accumulation_dtype(x.dtype)``, at least fp32, and rounds its result once. A weight may
have higher precision than the activations (an fp32 master weight beside bf16); its gradient comes back in its own dtype
and is never bf16 on the way. The differentiable ops are differentiable once.
"""

from .adamw import adamw_
from .attention import attention, attention_backward, attention_forward
from .attention_selection import select_attention_backend
from .e4m3 import E4M3, quantize_e4m3
from .library import implementation_name
from .linear import linear, linear_dbias, linear_dscale, linear_dw, linear_dx, linear_dx_e4m3, trainable_linear
from .linear_cross_entropy import (
    LinearCrossEntropyOutput,
    linear_cross_entropy,
    linear_cross_entropy_backward,
    linear_cross_entropy_backward_,
    linear_cross_entropy_forward,
    rows_per_chunk,
)
from .linear_cross_entropy_kl import (
    LinearCrossEntropyKLOutput,
    linear_cross_entropy_kl,
    linear_cross_entropy_kl_forward,
)
from .linear_kl import LinearKLOutput, linear_kl, linear_kl_with_losses
from .qk_norm_rotary import qk_norm_rotary_backward, qk_norm_rotary_backward_e4m3, qk_norm_rotary_forward
from .reference import accumulation_dtype
from .rms_norm import (
    add_rms_norm,
    add_rms_norm_forward,
    rms_norm,
    rms_norm_backward,
    rms_norm_backward_e4m3,
    rms_norm_forward,
)
from .rotary import rotary, rotary_backward, rotary_backward_e4m3, rotary_forward, rotary_forward_
from .swiglu import swiglu, swiglu_backward, swiglu_backward_, swiglu_backward_e4m3, swiglu_forward

__all__ = [
    "E4M3",
    "LinearCrossEntropyKLOutput",
    "LinearCrossEntropyOutput",
    "LinearKLOutput",
    "accumulation_dtype",
    "adamw_",
    "add_rms_norm",
    "add_rms_norm_forward",
    "attention",
    "attention_backward",
    "attention_forward",
    "implementation_name",
    "linear",
    "linear_cross_entropy",
    "linear_cross_entropy_backward",
    "linear_cross_entropy_backward_",
    "linear_cross_entropy_forward",
    "linear_cross_entropy_kl",
    "linear_cross_entropy_kl_forward",
    "linear_dbias",
    "linear_dscale",
    "linear_dw",
    "linear_dx",
    "linear_dx_e4m3",
    "linear_kl",
    "linear_kl_with_losses",
    "qk_norm_rotary_backward",
    "qk_norm_rotary_backward_e4m3",
    "qk_norm_rotary_forward",
    "quantize_e4m3",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_backward_e4m3",
    "rms_norm_forward",
    "rotary",
    "rotary_backward",
    "rotary_backward_e4m3",
    "rotary_forward",
    "rotary_forward_",
    "rows_per_chunk",
    "select_attention_backend",
    "swiglu",
    "swiglu_backward",
    "swiglu_backward_",
    "swiglu_backward_e4m3",
    "swiglu_forward",
    "trainable_linear",
]
