"""One stage of a tiny run, ready to save: its engine after a few updates, without the time of a whole run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from tests.tiny_run import tiny_run
from vlit.config.schema import CheckpointConfig, RunConfig
from vlit.data.tokenize import SampleTokenizer
from vlit.models.assemble import model_spec
from vlit.train.checkpoint import Position, clear_leftovers, newest_state
from vlit.train.distributed import Ranks, start_ranks
from vlit.train.engine import Engine
from vlit.train.fragments import FragmentReader
from vlit.train.identity import open_mixture
from vlit.train.prepare import Tuned, make_engine, model_of_stage
from vlit.train.saving import StateSaver
from vlit.train.stage import StageRun


@dataclass
class ReadyStage:
    """What a run holds while it trains ``align``."""

    run: RunConfig
    ranks: Ranks
    tuned: Tuned
    engine: Engine
    stage: StageRun

    def update(self) -> None:
        """One optimizer step on random gradients: new masters, new states."""
        for parameter in self.tuned.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn_like(parameter)
        self.engine.step(1.0, None, torch.tensor(1.0))

    def saver(self, root: Path, **settings: object) -> StateSaver:
        config = CheckpointConfig.model_validate({"keep": 2, **settings})
        return StateSaver(root, {"what": "a test"}, config, self.ranks, "none")

    def save(self, root: Path, step: int, **settings: object) -> None:
        """Save as step ``step`` and wait for it."""
        with self.saver(root, **settings) as saver:
            saver.begin(self.engine, Position(step=step))
            saver.finish()

    def values(self) -> dict[str, torch.Tensor]:
        """What a checkpoint of this moment holds."""
        return {f"{f.kind} {f.parameter}": f.values.clone() for f in self.engine.fragments()}


def ready_stage(tiny_dir: Path, output: Path) -> ReadyStage:
    run = tiny_run(tiny_dir, output)
    ranks = start_ranks(run.runtime)
    tuned = model_of_stage(run, "align", None, torch.float32, "none", ranks)
    mixture = open_mixture(run, "align", progress=False)
    identity = {"what": "a test"}
    tokenizer = SampleTokenizer(model_spec(run.model), run.data_for("align"))
    stage = StageRun("align", run.stages["align"], output / "align", mixture, tokenizer, 6, identity, "none")
    ready = ReadyStage(run, ranks, tuned, make_engine(tuned, run, "align", torch.float32, "none", ranks), stage)
    ready.update()
    return ready


def usable_state(root: Path, ranks: Ranks) -> tuple[int, dict[str, torch.Tensor]] | None:
    """(step, values) of the checkpoint that a new start of the run would use; everything is read."""
    clear_leftovers(root)
    found = newest_state(root, ranks)
    if found is None:
        return None
    folder, state = found
    reader = FragmentReader([folder / name for name in state["files"]])
    kinds = ("master", "exp_avg", "exp_avg_sq")
    values = {f"{kind} {name}": reader.whole(name, kind).flatten() for name in reader.parameters for kind in kinds}
    return state["position"]["step"], values


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Whether two states are equal, bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def flip(path: Path, place: int = -3) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))
