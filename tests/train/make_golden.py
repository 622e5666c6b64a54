"""Write golden_losses.json anew: `python tests/train/make_golden.py`, after a change that is
meant to change the losses.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

from golden_case import FILE, losses

with tempfile.TemporaryDirectory() as folder:
    rows = losses(Path(folder))
FILE.write_text(
    json.dumps(
        {key: [float(f"{value:.8g}") for value in values] for key, values in rows.items()}, indent=1
    )
    + "\n"
)
