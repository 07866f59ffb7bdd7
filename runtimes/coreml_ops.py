"""All MIL operations that the reference executor knows, by name."""

from __future__ import annotations

from edgecomp.runtimes import (
    coreml_ops_activation,
    coreml_ops_conv,
    coreml_ops_elementwise,
    coreml_ops_gather,
    coreml_ops_image,
    coreml_ops_linear,
    coreml_ops_norm,
    coreml_ops_quantize,
    coreml_ops_recurrent,
    coreml_ops_reduce,
    coreml_ops_shape,
)
from edgecomp.runtimes.coreml_args import Table

OPS: Table = {
    **coreml_ops_activation.OPS,
    **coreml_ops_conv.OPS,
    **coreml_ops_elementwise.OPS,
    **coreml_ops_gather.OPS,
    **coreml_ops_image.OPS,
    **coreml_ops_linear.OPS,
    **coreml_ops_norm.OPS,
    **coreml_ops_quantize.OPS,
    **coreml_ops_recurrent.OPS,
    **coreml_ops_reduce.OPS,
    **coreml_ops_shape.OPS,
}

# Parameters that MIL passes as a tuple of values, even when it holds one.
TUPLE_PARAMETERS = {"values", "ref_tensors", "begins", "ends", "end_masks", "loop_vars"}
