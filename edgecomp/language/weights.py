"""The decoder behind a candidate, with the weights and the integers that the steps decided."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from edgecomp.errors import ModelError
from edgecomp.language.decoder import Decoder, from_transformers
from edgecomp.numerics import affine
from edgecomp.spec import Candidate, TensorQuantization

_TIED = ("embed.weight", "head.weight")


@dataclass(frozen=True, eq=False)
class DecoderWeights:
    """`decoder`: float weights as the steps left them. `plan`: integers by name, tied under both."""

    decoder: Decoder
    plan: Mapping[str, TensorQuantization]

    def restored(self) -> Decoder:
        """The decoder with every weight of the plan rounded: what an artifact computes."""
        result = copy.deepcopy(self.decoder)
        with torch.no_grad():
            for name, value in result.named_parameters():
                q = self.plan.get(name)
                if q is not None and q.values is not None:
                    value.copy_(torch.from_numpy(affine.dequantize(q.values, q)))
        return result


def as_decoder(module: nn.Module) -> Decoder:
    """A Decoder as it is; a causal model of transformers converted. Raises ModelError for anything else."""
    if isinstance(module, Decoder):
        return module
    return from_transformers(module)


def of(candidate: Candidate) -> DecoderWeights:
    """Raises ModelError when the candidate did not start from a decoder, or its plan rounds activations."""
    start = candidate.original if candidate.original is not None else candidate.module
    decoder = copy.deepcopy(as_decoder(start))
    plan = candidate.quantization
    if plan is None:
        if isinstance(candidate.module, Decoder):
            decoder = copy.deepcopy(candidate.module)
        return DecoderWeights(decoder.eval(), {})
    if plan.activations:
        raise ModelError(
            "a decoder with a cache stores integer weights and float activations; quantize it with "
            "quantize-weights (edgecomp quantize --groups), not with quantize"
        )
    known = set(decoder.state_dict())
    stored = {n: v for n, v in candidate.module.state_dict().items() if n in known}
    decoder.load_state_dict(stored, strict=False)
    integers = dict(plan.weights)
    if decoder.architecture.tied:
        shared = next((integers[n] for n in _TIED if n in integers), None)
        integers.update(dict.fromkeys(_TIED, shared) if shared is not None else {})
    return DecoderWeights(decoder.eval(), integers)
