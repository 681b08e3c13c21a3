"""The version of both packages: pyproject.toml reads it, and nothing needs to be installed to know it."""

__version__ = "0.2.0"
