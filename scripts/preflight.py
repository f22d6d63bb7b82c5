"""`vlit preflight` as a script (so that torchrun can start it)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vlit.cli import main

if __name__ == "__main__":
    sys.exit(main(command="preflight"))
