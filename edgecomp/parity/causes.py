"""The usual reasons why a deployed model sees or says something else: each as a change that can be tried."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import numpy as np

from edgecomp.numerics.metrics import softmax
from edgecomp.spec import Preprocessing, TensorSpec

Arrays = tuple[np.ndarray, ...]

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Cause:
    """One hypothesis: what the deployed side does, and how to do the same here.

    Exactly one of these is set. `preprocessing`: prepare the raw pictures so; `inputs`: change the prepared
    inputs so; `outputs`: change the outputs so.
    """

    name: str
    says: str
    preprocessing: Preprocessing | None = None
    inputs: Callable[[Arrays], Arrays] | None = None
    outputs: Callable[[Arrays], Arrays] | None = None


def all_causes(
    how: Preprocessing | None,
    specs: Sequence[TensorSpec],
    inputs: Sequence[np.ndarray],
    outputs: Sequence[np.ndarray],
    *,
    pictures: bool,
) -> list[Cause]:
    """Every cause that makes sense for inputs and outputs of these shapes.

    `how`: the right preprocessing, where known; `specs`: the artifact's inputs; `pictures`: raw pictures can
    be prepared again.
    """
    found = []
    if how is not None and how.sample_rate is None:
        if pictures:
            found += picture_causes(how)
        if inputs[0].ndim == 4:
            found += value_causes(how)
    found += shape_causes(inputs[0]) if inputs[0].ndim == 4 else []
    found += door_causes(specs)
    found += order_causes(inputs, outputs)
    return found + output_causes(outputs[0])


def picture_causes(how: Preprocessing) -> list[Cause]:
    """Resize kernel, antialias and crop: only the raw picture can show them."""
    if how.size is None and how.resize is None:
        return []
    variants: list[tuple[str, str, dict[str, Any]]] = [
        (f"resize kernel {k}", f"pictures are resized with the {k} kernel, not {how.kernel}", {"kernel": k})
        for k in ("nearest", "bilinear", "bicubic", "lanczos")
        if k != how.kernel and (how.antialias or k != "lanczos")
    ]
    other = "without" if how.antialias else "with"
    if how.kernel in ("bilinear", "bicubic"):
        variants.append(
            ("antialias", f"pictures are resized {other} antialias", {"antialias": not how.antialias})
        )
        if how.antialias:
            for k in {"bilinear", "bicubic"} - {how.kernel}:
                name = f"resize kernel {k} without antialias"
                says = f"pictures are resized with the {k} kernel and without antialias"
                variants.append((name, says, {"kernel": k, "antialias": False}))
    if how.size is not None:
        if how.crop == "centre":
            says = "pictures are stretched to the input size, not cropped"
            variants.append(("crop", says, {"crop": "none", "resize": None}))
        else:
            variants.append(("crop", "pictures are cropped at the centre, not stretched", {"crop": "centre"}))
        if how.resize is not None:
            says = f"pictures are resized to cover the input, not to a shorter side of {how.resize}"
            variants.append(("crop fraction", says, {"resize": None}))
        elif how.crop == "centre":
            side = round(min(how.size) / 0.875)
            says = f"pictures are resized to a shorter side of {side} before the crop"
            variants.append(("crop fraction", says, {"resize": side}))
    return [Cause(n, s, preprocessing=replace(how, **changes)) for n, s, changes in variants]


def value_causes(how: Preprocessing) -> list[Cause]:
    """Colour order, scale, mean and std: undone and redone on the prepared inputs."""
    axis = -1 if how.layout == "NHWC" else 1

    def like(values: tuple[float, ...], array: np.ndarray) -> np.ndarray:
        shape = [1] * array.ndim
        shape[axis] = len(values)
        return np.asarray(values, np.float64).reshape(shape)

    def pixels(x: np.ndarray) -> np.ndarray:
        return (x * like(how.std, x) + like(how.mean, x)) / how.rescale

    def redone(rescale: float, mean: tuple[float, ...], std: tuple[float, ...]) -> Callable[[Arrays], Arrays]:
        def change(inputs: Arrays) -> Arrays:
            x = pixels(inputs[0])
            return _first(inputs, (x * rescale - like(mean, x)) / like(std, x))

        return change

    def swapped(inputs: Arrays) -> Arrays:
        """Channels exchanged before the normalization, which stays in its place."""
        x = np.flip(pixels(inputs[0]), axis)
        return _first(inputs, (x * how.rescale - like(how.mean, x)) / like(how.std, x))

    def twice(inputs: Arrays) -> Arrays:
        x = inputs[0]
        return _first(inputs, (x * how.rescale - like(how.mean, x)) / like(how.std, x))

    def normalized_twice(inputs: Arrays) -> Arrays:
        return _first(inputs, (inputs[0] - like(how.mean, inputs[0])) / like(how.std, inputs[0]))

    def inverted(inputs: Arrays) -> Arrays:
        x = 255 - pixels(inputs[0])
        return _first(inputs, (x * how.rescale - like(how.mean, x)) / like(how.std, x))

    found = [
        Cause(name, says, inputs=redone(rescale, mean, std))
        for name, says, rescale, mean, std in normalizations(how)
    ]
    found += [
        Cause("normalized twice", "mean and std are applied twice", inputs=normalized_twice),
        Cause("prepared twice", "scale, mean and std are applied twice", inputs=twice),
        Cause("inverted", "black and white are exchanged", inputs=inverted),
    ]
    if how.colour_order != "L":
        other = "BGR" if how.colour_order == "RGB" else "RGB"
        says = f"colours come in the order {other}, not {how.colour_order}"
        found.append(Cause(other, says, inputs=swapped))
    return found


def normalizations(
    how: Preprocessing,
) -> list[tuple[str, str, float, tuple[float, ...], tuple[float, ...]]]:
    """Name, sentence, rescale, mean and std of the usual normalizations, the right one left out."""
    zero, one = (0.0,), (1.0,)
    usual = [
        ("scale 255", "pixels are not divided by 255", 1.0, how.mean, how.std),
        ("scale twice", "pixels are divided by 255 twice", how.rescale / 255, how.mean, how.std),
        ("raw pixels", "pixels from 0 to 255 reach the model", 1.0, zero, one),
        ("no mean and std", "pixels are scaled to 0 to 1, mean and std are not applied", 1 / 255, zero, one),
        ("no std", "the mean is subtracted, std is not applied", how.rescale, how.mean, one),
        ("no mean", "std is applied, the mean is not subtracted", how.rescale, zero, how.std),
        ("-1 to 1", "pixels are scaled to -1 to 1", 1 / 127.5, one, one),
        ("mean 0.5, std 0.25", "mean 0.5 and std 0.25 are applied", 1 / 255, (0.5,), (0.25,)),
    ]
    if how.colour_order != "L":
        usual.append(("ImageNet mean and std", "ImageNet's mean and std are applied", 1 / 255, *IMAGENET))
    right = how.rescale, how.mean, how.std
    return [u for u in usual if u[2:] != right]


def shape_causes(x: np.ndarray) -> list[Cause]:
    """Layout and orientation of pictures [N, C, H, W] (or NHWC)."""
    channels, height, width = x.shape[1:] if x.shape[1] in (1, 3, 4) else (x.shape[3], *x.shape[1:3])
    first = x.shape[1] in (1, 3, 4)
    rows, columns = (2, 3) if first else (1, 2)

    def as_last(inputs: Arrays) -> Arrays:
        a = inputs[0] if first else np.moveaxis(inputs[0], -1, 1)
        return _first(inputs, np.moveaxis(a, 1, -1).reshape(inputs[0].shape))

    def as_first(inputs: Arrays) -> Arrays:
        a = inputs[0].reshape(len(inputs[0]), height, width, channels)
        return _first(inputs, np.moveaxis(a, -1, 1).reshape(inputs[0].shape))

    found = []
    if channels > 1:
        says = "the values lie in memory as height, width, channels, and are read as channels first"
        found.append(Cause("NHWC read as NCHW", says, inputs=as_last))
        says = "the values lie in memory as channels, height, width, and are read as channels last"
        found.append(Cause("NCHW read as NHWC", says, inputs=as_first))
    if height == width:
        found.append(
            Cause(
                "height and width",
                "height and width are exchanged",
                inputs=lambda i: _first(i, np.swapaxes(i[0], rows, columns)),
            )
        )
        for turns in (1, 3):
            says = f"pictures are turned by {90 * turns} degrees (EXIF orientation)"
            found.append(Cause(f"turned {90 * turns}", says, inputs=_turn(turns, rows, columns)))
    found.append(
        Cause("mirrored", "left and right are exchanged", inputs=lambda i: _first(i, np.flip(i[0], columns)))
    )
    found.append(
        Cause("upside down", "pictures stand on their head", inputs=lambda i: _first(i, np.flip(i[0], rows)))
    )
    return found


def _turn(turns: int, rows: int, columns: int) -> Callable[[Arrays], Arrays]:
    return lambda inputs: _first(inputs, np.rot90(inputs[0], turns, (rows, columns)))


def door_causes(specs: Sequence[TensorSpec]) -> list[Cause]:
    """Wrong quantization parameters at the input: scale or zero point left out, or of another dtype."""
    if not specs or specs[0].scale is None:
        return []
    scale, zero_point = specs[0].scale, specs[0].zero_point or 0

    def stored(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays], Arrays]:
        """Change the stored integers (before clipping), and go back to real values."""

        def apply(inputs: Arrays) -> Arrays:
            q = np.rint(inputs[0] / scale) + zero_point
            limits = np.iinfo(specs[0].dtype)
            changed = np.clip(change(q), limits.min, limits.max)
            return _first(inputs, (changed - zero_point) * scale)

        return apply

    return [
        Cause(
            "input zero point left out",
            f"inputs are stored as round(x / {scale:.6g}), the zero point {zero_point} is not added",
            inputs=stored(lambda q: q - zero_point),
        ),
        Cause(
            "input not quantized",
            "real values are cast to integers without scale and zero point",
            inputs=stored(lambda q: np.trunc((q - zero_point) * scale)),
        ),
        Cause(
            "input offset of 128",
            "uint8 values are given where int8 is expected (an offset of 128)",
            inputs=stored(lambda q: (q + 128 + 128) % 256 - 128),
        ),
    ]


def order_causes(inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> list[Cause]:
    """Inputs or outputs of equal shape in another order."""
    found = []
    if 1 < len(inputs) < 5:
        for order in list(permutations(range(len(inputs))))[1:]:
            if all(inputs[i].shape == inputs[j].shape for i, j in enumerate(order)):
                says = f"inputs come in the order {order}"
                found.append(Cause(f"swapped inputs {order}", says, inputs=_permute(order)))
    if 1 < len(outputs) < 5:
        for order in list(permutations(range(len(outputs))))[1:]:
            if all(outputs[i].shape == outputs[j].shape for i, j in enumerate(order)):
                says = f"outputs come in the order {order}"
                found.append(Cause(f"swapped outputs {order}", says, outputs=_permute(order)))
    return found


def _permute(order: Sequence[int]) -> Callable[[Arrays], Arrays]:
    return lambda arrays: tuple(arrays[i] for i in order)


def output_causes(output: np.ndarray) -> list[Cause]:
    """Softmax once too often or missing, labels shifted, logits in place of probabilities."""
    if output.ndim != 2 or output.shape[1] < 2:
        return []
    already = output.min() >= 0 and np.allclose(output.sum(axis=1), 1, atol=0.1)
    name = "double softmax" if already else "softmax"
    says = "softmax is applied to probabilities" if already else "softmax is applied to the logits"
    found = [Cause(name, says, outputs=lambda o: _first(o, softmax(o[0])))]
    if already:
        says = "the outputs are logits: softmax is missing (compared up to a constant)"
        found.append(
            Cause("softmax missing", says, outputs=lambda o: _first(o, np.log(np.maximum(o[0], 1e-6))))
        )
    for offset in (1, -1):
        says = f"labels are shifted by {offset:+d} (a background class, or counting from 1)"
        found.append(Cause(f"label offset {offset:+d}", says, outputs=_roll(offset)))
    return found


def _roll(offset: int) -> Callable[[Arrays], Arrays]:
    return lambda outputs: _first(outputs, np.roll(outputs[0], offset, axis=1))


def _first(arrays: Arrays, changed: np.ndarray) -> Arrays:
    return (np.ascontiguousarray(changed).astype(arrays[0].dtype), *arrays[1:])
