"""``leave.py CODE``: end with an exit code right after a collective, while gloo's thread still holds its tensors."""

from __future__ import annotations

import sys

import torch

from vlit.config.schema import RuntimeConfig
from vlit.train.distributed import start_ranks

ranks = start_ranks(RuntimeConfig(device="cpu"))
for _ in range(3):
    ranks.sum(torch.ones(1000))
    ranks.share("held")
sys.exit(int(sys.argv[1]))
