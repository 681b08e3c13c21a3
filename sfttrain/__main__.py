"""`python -m sfttrain`, also under `accelerate launch -m` and `torchrun -m`."""

import sys

from sfttrain.cli import main

sys.exit(main())
