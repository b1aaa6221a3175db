"""How much memory traffic an operator that is no matrix product makes, forward and backward, eager and fused."""

from __future__ import annotations

from collections.abc import Sequence

from hwmodels.workload import Pass

# Move no data, or too little to matter, or only make room.
IGNORED = frozenset(
    [
        "as_strided_",
        "detach",
        "empty",
        "empty_like",
        "empty_strided",
        "zeros",
        "zeros_like",
        "ones",
        "ones_like",
        "full",
        "full_like",
        "new_zeros",
        "new_empty",
        "new_empty_strided",
        "new_full",
        "arange",
        "scalar_tensor",
        "fill_",
        "zero_",
        "lift_fresh",
        "alias",
        "is_same_size",
        "sym_size",
        "sym_numel",
        "_local_scalar_dense",
        "nll_loss_forward",
        "nll_loss2d_forward",
        "requires_grad_",
        "set_",
        "resize_",
        "linspace",
        "eye",
        "tril",
        "triu",
        "expand",
        "view",
    ]
)
NORMS = frozenset(
    [
        "native_group_norm",
        "native_layer_norm",
        "native_batch_norm",
        "cudnn_batch_norm",
        "_native_batch_norm_legit",
        "_batch_norm_with_update",
        "_fused_rms_norm",
    ]
)
SOFTMAX = frozenset(["_softmax", "_safe_softmax", "_log_softmax"])
# Their gradient passes through: nothing is read or written.
LINEAR = frozenset(["add", "add_", "sub", "sub_", "neg", "rsub"])
SCALED = frozenset(["mul", "div", "mul_", "div_", "masked_fill", "where", "bernoulli_", "_to_copy"])
COPIES = frozenset(
    [
        "cat",
        "stack",
        "clone",
        "copy_",
        "constant_pad_nd",
        "repeat",
        "roll",
        "flip",
        "index",
        "select_scatter",
        "slice_scatter",
        "index_select",
        "gather",
        "_to_copy",
        "im2col",
        "col2im",
        "reflection_pad2d",
        "replication_pad2d",
        "upsample_nearest2d",
        "upsample_bilinear2d",
        "pixel_shuffle",
        "repeat_interleave",
        "split_with_sizes_copy",
        "scatter",
        "index_put",
    ]
)
REDUCTIONS = frozenset(
    [
        "mean",
        "sum",
        "amax",
        "amin",
        "max",
        "min",
        "var",
        "var_mean",
        "std",
        "logsumexp",
        "avg_pool2d",
        "avg_pool1d",
        "avg_pool3d",
        "_adaptive_avg_pool2d",
        "_adaptive_avg_pool3d",
        "max_pool2d_with_indices",
        "max_pool3d_with_indices",
        "adaptive_max_pool2d",
        "adaptive_max_pool3d",
        "linalg_vector_norm",
        "norm",
        "argmax",
        "argmin",
        "cumsum",
    ]
)


def classify(
    name: str,
    read: Sequence[int],
    written: int,
    grads: int,
    *,
    pointwise: bool,
    batched: bool,
    in_attention: bool,
) -> tuple[str, Pass]:
    """The kind of an operator and the traffic it makes.

    Norms read their input twice (moments, then values) unless fused, and twice again with the gradient in the
    backward pass. A fused pointwise operation costs only its further operands, and backward the values it needs.

    Args:
        name: the operator's name.
        read: elements of each operand.
        written: elements of all results.
        grads: how many operands need a gradient.
        pointwise: works element by element.
        batched: elements are per example.
        in_attention: inside a scaled dot-product attention, whose kernel keeps everything on the chip.
    """
    total = sum(read) + written
    first = read[0] if read else 0
    back = 1.0 if grads else 0.0
    kind, forward, backward, fused, fused_back = "unknown", float(total), back * total, float(total), back * total
    kernels, back_kernels, fused_kernels = 1, int(grads > 0), 1
    if name in NORMS:
        kind, forward, backward, fused, fused_back = (
            "norm",
            3.0 * first,
            5 * back * first,
            2.0 * first,
            3 * back * first,
        )
        kernels, back_kernels = 2, 3 * int(grads > 0)
    elif name == "embedding":
        kind, forward, backward, fused, fused_back = "embedding", 2.0 * written, 0.0, 2.0 * written, 0.0
        back_kernels = 0  # the gradient of the table is counted with the weights' gradients
    elif name in SOFTMAX:
        kind, forward, backward, fused, fused_back = "softmax", total, 3 * back * written, total, 3 * back * written
    elif name in COPIES:
        kind, fused, backward, fused_back = "copy", float(total), back * total, back * total
    elif name in REDUCTIONS:
        kind, backward, fused_back = "reduction", back * total, back * total
    elif pointwise or name in LINEAR or name in SCALED or name == "native_dropout":
        kind, fused_kernels = "pointwise", 0
        fused = float(sum(sorted(read)[:-1])) if len(read) > 1 else 0.0
        fused = 0.0 if fused < written / 64 else fused  # a bias or a scale
        needed = 0 if name in LINEAR else grads
        backward = float((2 + (name not in SCALED or grads > 1)) * written * needed) if needed else 0.0
        back_kernels = needed
        fused_back = float(written * needed) if name not in SCALED or grads > 1 else 0.0
    if in_attention:  # eager PyTorch has one kernel for an attention too
        forward = backward = fused = fused_back = 0.0
        kernels = back_kernels = int(kind == "softmax")
        fused_kernels = 0
    return kind, Pass(
        operation=name,
        forward=forward,
        backward=backward,
        fused_forward=fused,
        fused_backward=fused_back,
        kernels_forward=kernels,
        kernels_backward=back_kernels,
        fused_kernels_forward=fused_kernels,
        fused_kernels_backward=min(back_kernels, fused_kernels),
        batched=batched,
    )
