"""ONNX Runtime's own 4-bit methods on the weights of a decoder: RTN, HQQ and GPTQ, called weight by weight.

The functions are those of `onnxruntime.quantization`: MLAS's blockwise rounding (what
DefaultWeightOnlyQuantConfig runs), HQQWeightOnlyQuantizer.quantize_internal, and the GPTQ of its
neural_compressor folder, which gets the second moments of the same calibration text, layer by layer, each
after the layers before it were rounded. Every peer gets our group size in every layer: the same bits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from onnxruntime.quantization import matmul_nbits_quantizer as ort
from onnxruntime.quantization.neural_compressor.weight_only import gptq

from edgecomp.compress import group_stream
from edgecomp.graph import capture, constants
from edgecomp.language.decoder import Decoder
from edgecomp.numerics import groupwise

aten = torch.ops.aten
Rounding = Callable[[np.ndarray, int], np.ndarray]


def rtn(symmetric: bool) -> Rounding:
    """weight [out, in], group -> restored, by MLAS."""

    def rounded(weight: np.ndarray, group: int) -> np.ndarray:
        config = ort.DefaultWeightOnlyQuantConfig(block_size=group, is_symmetric=symmetric)
        packed, scale, zero = ort.DefaultWeightOnlyQuantizer(config).qbits_block_quant(
            np.ascontiguousarray(weight.T)
        )
        values = _unpacked(packed.reshape(len(weight), -1))[:, : weight.shape[1]]
        zeros = 8 if symmetric else _unpacked(zero)[:, : scale.shape[1]].astype(np.float32)[..., None]
        parts = values.reshape(*scale.shape, group).astype(np.float32) - zeros
        return (parts * scale[..., None]).reshape(weight.shape)

    return rounded


def _unpacked(packed: np.ndarray) -> np.ndarray:
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)


def hqq(weight: np.ndarray, group: int) -> np.ndarray:
    """Its zero points are float numbers, which MatMulNBits takes: more bits than ours."""
    quantizer = ort.HQQWeightOnlyQuantizer(ort.HQQWeightOnlyQuantConfig(block_size=group))
    values, scale, zero = quantizer.quantize_internal(torch.from_numpy(weight), group_size=group)
    parts = values.reshape(len(weight), -1, group).float() - zero.reshape(len(weight), -1, 1)
    return (parts * scale.reshape(len(weight), -1, 1)).reshape(weight.shape).numpy()


@torch.no_grad()
def alone(decoder: Decoder, method: Rounding, group_size: int) -> Decoder:
    """A copy with every matrix rounded on its own; a tied head shares the embedding's."""
    result = copy.deepcopy(decoder)
    for parameter in result.parameters():
        if parameter.dim() == 2:
            group = groupwise.group_for(parameter.shape[1], group_size)
            parameter.copy_(torch.from_numpy(method(parameter.numpy(), group)))
    return result


@torch.no_grad()
def by_gptq(decoder: Decoder, rows: list[torch.Tensor], group_size: int, symmetric: bool) -> Decoder:
    """A copy rounded by ONNX Runtime's GPTQ at its defaults (no act-order, no mse); embedding by RTN.

    In 1.31.1 it gives what RTN gives: its updates read the upper triangular factor below the diagonal.
    """
    graph = capture(decoder, (rows[0],))
    linears = [n for n in graph.graph.nodes if n.target is aten.linear.default]
    restored: dict[str, torch.Tensor] = {}
    for node in graph.graph.nodes:
        if node.target is aten.embedding.default:
            table = constants.value_of(graph, node.args[0]).numpy()
            group = groupwise.group_for(table.shape[1], group_size)
            restored[str(node.args[0].target)] = torch.from_numpy(rtn(symmetric)(table, group))

    def decide(stage: group_stream.Stage) -> None:
        flat = torch.cat([x.reshape(-1, x.shape[-1]) for x in stage.inputs])
        hessian = (2.0 / len(flat) * (flat.T @ flat)).double().numpy()
        for layer in stage.layers:
            name = str(layer.args[1].target)
            if name in restored:  # the tied head
                continue
            weight = constants.value_of(graph, layer.args[1]).double().numpy()
            group = groupwise.group_for(weight.shape[1], group_size)
            scheme = "sym" if symmetric else "asym"
            found = gptq(weight.T.copy(), hessian.copy(), 4, group, scheme)
            restored[name] = torch.from_numpy(np.ascontiguousarray(found.T)).float()

    group_stream.run(graph, [(r,) for r in rows], linears, restored, decide)
    result = copy.deepcopy(decoder)
    result.load_state_dict(restored, strict=False)
    return result
