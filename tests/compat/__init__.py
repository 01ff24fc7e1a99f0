"""Compatibility: popular architectures × tasks × tuning, each from raw rows to plain `transformers`."""
