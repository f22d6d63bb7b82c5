"""torchrun with meaningful exit codes: `python scripts/launch.py --nproc-per-node 8 scripts/train.py --config FILE`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vlit.train.cluster.launch import launch

if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
