"""Parity: an artifact against the float model it was made from."""

from edgecomp.parity.entry import compare, document

__all__ = ["compare", "document"]
