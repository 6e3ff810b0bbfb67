"""The Triton bodies of the ops, under the names and signatures that :mod:`llama_pro_kernels.reference` has.

Imported only where Triton is used. Every kernel casts what it loads to fp32 at once, computes in fp32 and rounds once,
at the store; scalars are fp32; offsets into a tensor are 64-bit from the row on, so tensors may hold more than 2³¹
elements. What cannot be addressed by strides is made contiguous first, never read wrongly.
"""

from .adamw import adamw_
from .e4m3 import quantize_e4m3
from .linear_dscale import linear_dscale
from .losses import cross_entropy_, cross_entropy_kl_, kl_divergence
from .qk_norm_rotary import qk_norm_rotary_backward, qk_norm_rotary_backward_e4m3, qk_norm_rotary_forward
from .rms_norm import add_rms_norm_forward, rms_norm_backward, rms_norm_backward_e4m3, rms_norm_forward
from .rotary import rotary_backward, rotary_backward_e4m3, rotary_forward, rotary_forward_
from .swiglu import swiglu_backward, swiglu_backward_, swiglu_backward_e4m3, swiglu_forward

__all__ = [
    "adamw_",
    "add_rms_norm_forward",
    "cross_entropy_",
    "cross_entropy_kl_",
    "kl_divergence",
    "linear_dscale",
    "qk_norm_rotary_backward",
    "qk_norm_rotary_backward_e4m3",
    "qk_norm_rotary_forward",
    "quantize_e4m3",
    "rms_norm_backward",
    "rms_norm_backward_e4m3",
    "rms_norm_forward",
    "rotary_backward",
    "rotary_backward_e4m3",
    "rotary_forward",
    "rotary_forward_",
    "swiglu_backward",
    "swiglu_backward_",
    "swiglu_backward_e4m3",
    "swiglu_forward",
]
