"""edgecomp: take a PyTorch model to phones and boards, and prove that it still behaves.

This module stays import-light: it loads no torch, no converter and no runtime.
"""

__version__ = "0.1.0"
