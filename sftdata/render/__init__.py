"""Canonical rows to text: chat templates rendered as transformers does, with the author of each character."""
