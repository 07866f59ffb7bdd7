"""Plans whose activations mix 8 and 16 bits by node, as a search for precision makes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch.fx import Node

from edgecomp.compress import plan, scales
from edgecomp.graph.vocabulary import FIXED_16
from edgecomp.numerics import affine
from edgecomp.spec import Candidate, TensorQuantization


def widened(node: Node, found: TensorQuantization) -> TensorQuantization:
    """The same range in 16 bits; what a function prescribes where it does."""
    spec = plan.activation_spec(16)
    if node.target in FIXED_16:
        return affine.fixed(*FIXED_16[node.target], spec)
    low, high = (float((q - found.zero_point) * found.scale) for q in (found.spec.qmin, found.spec.qmax))
    return affine.from_range(low, high, spec)


def mixed(made: Candidate, wide: Callable[[int], bool]) -> Candidate:
    """A candidate quantized to 8 bits with 16 in every scale group whose position `wide` picks.

    What a function prescribes has its own scale in either width, and `log_softmax` stays in 8 bits.
    """
    assert made.quantization is not None
    nodes = {n.name: n for n in made.module.graph.nodes}
    decided = dict(made.quantization.activations)
    for position, names in enumerate(scales.group(made.module, 8).members().values()):
        for name in names if wide(position) else ():
            if name in decided:
                decided[name] = widened(nodes[name], decided[name])
    return replace(made, quantization=replace(made.quantization, activations=decided))
