"""How torch's threads wait; set before torch is loaded."""

from __future__ import annotations

import os


def wait_without_spinning() -> None:
    """Let OpenMP threads sleep at barriers instead of spinning (OpenMP 5.2, section 21.7).

    On a machine whose cores are busy, spinning threads take the very core that the last one needs: an epoch
    of the demo then takes many times longer. What the user has set stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
