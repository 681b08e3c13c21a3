"""`sfttrain`, and `python -m sfttrain`, also under `accelerate launch -m` and `torchrun -m`."""

import sys


def command() -> int:
    """Run the command of this process; Ctrl-C while it is imported is one line, too."""
    try:
        from sfttrain.cli import main

        return main()
    except KeyboardInterrupt:
        print("Interrupted; nothing was begun.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(command())
