"""`python -m sftdata`."""

import sys

from sftdata.cli import main

if __name__ == "__main__":
    sys.exit(main())
