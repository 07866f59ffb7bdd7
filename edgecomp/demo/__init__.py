"""The embedded model and recipe of `make demo`."""
