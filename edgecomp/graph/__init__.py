"""The canonical graph: capture a torch module, know its patterns, run it fake-quantized."""

from edgecomp.graph.capture import capture
from edgecomp.graph.patterns import fused_into

__all__ = ["capture", "fused_into"]
