"""From the ledger to a report that stands by itself: `write(ledger, folder)`."""

from edgecomp.report.page import write

__all__ = ["write"]
