"""The language tests import transformers, which warns on import about what it does not need here."""

from __future__ import annotations

import logging
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    import transformers

transformers.logging.set_verbosity_error()
