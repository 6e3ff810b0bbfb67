"""The operations of a Llama-family decoder, forward and backward, each aware of which of its inputs are frozen.

Every op is a pair of plain tensor functions, ``X_forward`` and ``X_backward``, for a caller that writes its own
backward and decides itself what is kept; and on top an autograd op ``X`` for everybody else.

=====================  ===================================================  ================================
op                     what the autograd op keeps for backward              for a frozen weight
=====================  ===================================================  ================================
rms_norm               x, rstd (one number a token)                         no dW computed
add_rms_norm           the sum, rstd                                        no dW computed
swiglu                 gate_up                                              –
rotary                 positions and tables                                 –
trainable_linear       x where the weight trains, W where x needs dX        x not kept, no dW
linear_cross_entropy   dX, dW, made together with the loss                  two products, no dW
attention              q, k, v, o, lse                                      –
linear_kl              nothing: a meter, forward only                       –
=====================  ===================================================  ================================

``qk_norm_rotary``, the norm on each head of q and k with the rotation behind it, is a pair only. ``linear``,
``linear_dx``, ``linear_dw``, ``linear_dbias`` and ``linear_dscale`` are the products of a linear layer one by one.

Backward functions are told what is wanted (``need_dweight``): what is not wanted is neither computed nor allocated.

CUDA tensors, or any under ``TRITON_INTERPRET=1``, get the kernels in ``triton_kernels``; others, and all of fp64, plain
PyTorch in ``reference.py``. Products are PyTorch's, attention is a backend's. The functional ops are registered as
``torch.ops.llama_pro_kernels``, so ``torch.compile`` keeps them whole and ``FlopCounterMode`` counts their products.

Precision: an op computes in ``accumulation_dtype(x.dtype)``, at least fp32, and rounds its result once. A weight may
have higher precision than the activations (an fp32 master weight beside bf16); its gradient comes back in its own dtype
and is never bf16 on the way. Names that end in an underscore write over an input. The autograd ops are differentiable
once.
"""

from .attention import attention, attention_backward, attention_forward
from .attention_selection import select_attention_backend
from .library import implementation_name
from .linear import linear, linear_dbias, linear_dscale, linear_dw, linear_dx, trainable_linear
from .linear_cross_entropy import (
    LinearCrossEntropyOutput,
    linear_cross_entropy,
    linear_cross_entropy_backward,
    linear_cross_entropy_backward_,
    linear_cross_entropy_forward,
    rows_per_chunk,
)
from .linear_kl import linear_kl
from .qk_norm_rotary import QKNormRotaryOutput, qk_norm_rotary_backward, qk_norm_rotary_forward
from .reference import accumulation_dtype
from .rms_norm import add_rms_norm, add_rms_norm_forward, rms_norm, rms_norm_backward, rms_norm_forward
from .rotary import rotary, rotary_backward, rotary_forward, rotary_forward_
from .swiglu import swiglu, swiglu_backward, swiglu_backward_, swiglu_forward

__all__ = [
    "LinearCrossEntropyOutput",
    "QKNormRotaryOutput",
    "accumulation_dtype",
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
    "linear_dbias",
    "linear_dscale",
    "linear_dw",
    "linear_dx",
    "linear_kl",
    "qk_norm_rotary_backward",
    "qk_norm_rotary_forward",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_forward",
    "rotary",
    "rotary_backward",
    "rotary_forward",
    "rotary_forward_",
    "rows_per_chunk",
    "select_attention_backend",
    "swiglu",
    "swiglu_backward",
    "swiglu_backward_",
    "swiglu_forward",
    "trainable_linear",
]
