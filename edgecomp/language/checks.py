"""What is found before long work: weights cut short by a broken download, models larger than memory."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

from edgecomp.errors import ModelError

_MEMINFO = Path("/proc/meminfo")
_LARGEST_HEADER = 100_000_000


def weight_bytes(folder: Path) -> int:
    """Bytes of the weights of a model's folder (`*.safetensors`), each file checked for its whole length.

    Raises ModelError when there are none, one is cut short, or the index names one that is not there.
    """
    found = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = set(json.loads(index.read_text()).get("weight_map", {}).values())
        lacking = sorted(named - {p.name for p in found})
        if lacking:
            raise ModelError(
                f"{folder} lacks {lacking[0]}, which its index names; the download is not complete"
            )
    if not found:
        raise ModelError(f"no .safetensors in {folder}; expected the folder of a model with its weights")
    for path in found:
        _check_length(path)
    return sum(p.stat().st_size for p in found)


def elements(folder: Path) -> int:
    """Numbers in all weights of a model's folder, of whatever type. Raises ModelError as `weight_bytes`."""
    tensors = [v for path in sorted(folder.glob("*.safetensors")) for v in _check_length(path).values()]
    return sum(math.prod(v["shape"]) for v in tensors)


def _check_length(path: Path) -> dict[str, Any]:
    """The tensors of a .safetensors file; its header says where the last one ends."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else _LARGEST_HEADER
        header = stream.read(length) if length < _LARGEST_HEADER else b""
    try:
        facts = {k: v for k, v in json.loads(header).items() if k != "__metadata__"}
        expected = 8 + length + max((v["data_offsets"][1] for v in facts.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is damaged or cut short ({size} bytes); download it again") from error
    if size != expected:
        raise ModelError(f"{path} has {size} bytes, its header says {expected}; download it again")
    return facts


def available_bytes() -> int | None:
    """Memory that can be had without swapping, None where the system does not say."""
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def check_memory(needed: int, what: str) -> None:
    """Raise ModelError, with both figures, when `needed` bytes are more than the memory that is free."""
    free = available_bytes()
    if free is not None and needed > free:
        raise ModelError(
            f"{what} needs about {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free; close "
            "other programs, or use a machine with more memory or a smaller model"
        )
