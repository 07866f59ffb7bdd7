"""Giving a module's tensors new shapes, and making the module's own attributes follow them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edgecomp.errors import ModelError

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_RECURRENT = (nn.RNN, nn.LSTM, nn.GRU)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def replace_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors of any shape in place of parameters and buffers, by dotted name, then `sync`.

    A parameter shared by several modules stays shared.
    """
    shared: dict[int, nn.Parameter] = {}
    names = dict(module.named_parameters(remove_duplicate=False))
    buffers = dict(module.named_buffers(remove_duplicate=False))
    wanted = {id(names[n]): t for n, t in tensors.items() if n in names}
    for name, old in names.items():
        if id(old) not in wanted:
            continue
        fresh = shared.setdefault(
            id(old), nn.Parameter(wanted[id(old)].detach().clone(), requires_grad=old.requires_grad)
        )
        owner, leaf = _owner(module, name)
        setattr(owner, leaf, fresh)
    for name, tensor in tensors.items():
        if name in buffers:
            owner, leaf = _owner(module, name)
            setattr(owner, leaf, tensor.detach().clone())
    sync(module)


def sync(module: nn.Module) -> None:
    """Set channel counts and groups of every known layer from the shapes of its tensors."""
    layers: Iterable[Any] = module.modules()
    for layer in layers:
        if isinstance(layer, _CONVOLUTIONS + _TRANSPOSED):
            _sync_convolution(layer)
        elif isinstance(layer, nn.Linear):
            layer.out_features, layer.in_features = layer.weight.shape
        elif isinstance(layer, _BATCH_NORMS) and layer.running_mean is not None:
            layer.num_features = len(layer.running_mean)
        elif isinstance(layer, nn.LayerNorm) and layer.weight is not None:
            layer.normalized_shape = tuple(layer.weight.shape)
        elif isinstance(layer, nn.GroupNorm) and layer.weight is not None:
            layer.num_channels = len(layer.weight)
        elif isinstance(layer, nn.PReLU):
            layer.num_parameters = len(layer.weight)
        elif isinstance(layer, nn.Embedding):
            layer.num_embeddings, layer.embedding_dim = layer.weight.shape
        elif isinstance(layer, _RECURRENT):
            recurrent: Any = layer
            recurrent.input_size = recurrent.weight_ih_l0.shape[1]
            recurrent.hidden_size = recurrent.weight_hh_l0.shape[1]


def _sync_convolution(layer: Any) -> None:
    outer, inner = layer.weight.shape[:2]
    transposed = isinstance(layer, _TRANSPOSED)
    depthwise = layer.groups > 1 and layer.groups == layer.in_channels
    if depthwise:
        multiplier = layer.out_channels // layer.groups
        layer.groups = outer if transposed else outer // multiplier
    if transposed:
        layer.in_channels, layer.out_channels = outer, inner * layer.groups
    else:
        layer.out_channels, layer.in_channels = outer, inner * layer.groups


def adopt(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict whose tensors may be smaller than the module's: the module shrinks to fit.

    Raises ModelError when names differ, or a tensor has another number of dimensions or is larger.
    """
    own = module.state_dict()
    _check_names(own, state)
    smaller = {}
    for name, tensor in state.items():
        if own[name].shape == tensor.shape:
            continue
        if own[name].ndim != tensor.ndim or any(
            a < b for a, b in zip(own[name].shape, tensor.shape, strict=True)
        ):
            raise ModelError(
                f"{name!r} has shape {tuple(tensor.shape)} in the checkpoint, {tuple(own[name].shape)} in "
                "the model; a pruned tensor can only be smaller: give the model that the checkpoint came from"
            )
        smaller[name] = tensor
    if smaller:
        replace_tensors(module, smaller)
    with torch.no_grad():
        module.load_state_dict(dict(state))


def _check_names(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    missing = [n for n in own if n not in state]
    strangers = [n for n in state if n not in own]
    if missing or strangers:
        facts = []
        if missing:
            facts.append(f"lacks {len(missing)} tensors of the model (first: {missing[0]!r})")
        if strangers:
            facts.append(f"has {len(strangers)} that the model does not know (first: {strangers[0]!r})")
        raise ModelError(
            f"the checkpoint {' and '.join(facts)}; expected the state dict of this very model: check MODEL "
            "and its settings"
        )


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf
