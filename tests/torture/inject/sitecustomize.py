"""Python runs this when it starts with this folder on its path: break the process as SFT_FAULT says (see faults.py)."""

import json
import os

if os.environ.get("SFT_FAULT"):
    from tests.torture.faults import Fault, Tap

    _said = json.loads(os.environ["SFT_FAULT"])
    Tap(_said.pop("folder"), Fault(**_said)).install()
