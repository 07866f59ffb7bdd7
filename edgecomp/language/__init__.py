"""Causal language models: decoders with a cache, tokenizers, generation."""
