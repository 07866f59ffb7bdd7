"""What a metric says when outputs or targets are not what it needs."""

from __future__ import annotations

import numpy as np

from edgecomp.errors import DataError


def expect(
    name: str,
    output: np.ndarray,
    wanted: str,
    fits: bool,
    targets: np.ndarray,
    target_shape: str,
    right: bool,
) -> None:
    """Raise DataError when outputs or targets have not the form that a metric needs."""
    if fits and right:
        return
    raise DataError(
        f"metric {name!r} needs outputs {wanted} and targets {target_shape}; outputs have shape "
        f"{output.shape}, targets {targets.shape}: choose another metric, or correct the data"
    )
