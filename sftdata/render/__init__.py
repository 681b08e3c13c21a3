"""Canonical rows to text: chat templates, rendered as transformers renders them, with the author of each character."""
