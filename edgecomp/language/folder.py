"""A causal model from its folder (config.json, *.safetensors), checked before a byte of it is loaded."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from edgecomp.errors import ModelError
from edgecomp.language import architecture, checks
from edgecomp.language.decoder import Decoder, from_transformers

_COPIES = 2
"""The model as transformers loads it, and the decoder made of it, both float32 for a moment."""


def load(folder: Path | str) -> Decoder:
    """The decoder of a folder that transformers wrote or that was downloaded.

    Raises ModelError, before anything is loaded, when the architecture is not supported, a file of weights is
    missing or cut short, or float32 copies of the weights do not fit the free memory (with both figures).
    """
    place = Path(folder)
    if not (place / "config.json").is_file():
        raise ModelError(f"{place} has no config.json; expected the folder of a model of transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(place, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{place / 'config.json'} is not a model's config: {str(error)[:200]}") from error
    architecture.read(config)
    checks.weight_bytes(place)
    checks.check_memory(4 * _COPIES * checks.elements(place), f"loading {place} in float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        place, config=config, dtype=torch.float32, local_files_only=True
    )
    return from_transformers(model)
