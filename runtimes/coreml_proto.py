"""Core ML's protobuf messages, imported without the noise that coremltools makes on its way in."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings

with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
    # Untested torch versions and native parts that only exist on a Mac: nothing that a reader of
    # packages depends on.
    warnings.simplefilter("ignore")
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        import coremltools
        from coremltools.proto import MIL_pb2, Model_pb2
    finally:
        logging.disable(previous)

VERSION: str = coremltools.__version__

__all__ = ["VERSION", "MIL_pb2", "Model_pb2", "coremltools"]
