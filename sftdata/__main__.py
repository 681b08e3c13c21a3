"""`python -m sftdata`."""

from sftdata.cli import command

if __name__ == "__main__":
    command()
