"""However the ranks share the work, the model learns the same: one process, DDP, ZeRO-1, 2 and 3 on two real ranks."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.rank_cases import Case, run_cases
from tests.tiny_run import losses_of, tiny_run
from vlit.data.load import StepLoader
from vlit.data.tokenize import SampleTokenizer
from vlit.models.assemble import model_spec
from vlit.train.identity import open_mixture
from vlit.train.run import run_training

SHARED = ("ddp", "zero1", "zero2", "zero3")
FULL, LORA = "full", "{mode: lora, rank: 4, alpha: 8}"
STEPS = 20
BASE = (
    "stages.align=null",
    "stages.instruct.global_batch=5",  # does not divide by two ranks
    f"stages.instruct.max_steps={STEPS}",
    "stages.instruct.micro_batch_tokens=150",  # rows of one or two records; some ranks get none
    "stages.instruct.checkpoint.every_steps=1000",
    "runtime.hang_timeout_s=60",
    "data.share_images=off",
)


@dataclass(frozen=True)
class Setting:
    """One way to tune: what users of the published recipes combine."""

    name: str
    vision: str
    llm: str
    recompute: str
    precision: str = "fp32"
    bound: float = 1e-5  # largest relative difference of any step's loss
    more: tuple[str, ...] = ()
    decoder: str = "llama"

    def overrides(self, strategy: str) -> tuple[str, ...]:
        return (
            *BASE,
            f"stages.instruct.tuning={{connector: full, vision: {self.vision}, llm: {self.llm}}}",
            f"stages.instruct.gradient_checkpointing={self.recompute}",
            f"runtime.precision={self.precision}",
            f"runtime.strategy={strategy}",
            *self.more,
        )


SETTINGS = (
    Setting("frozen encoder, full", "frozen", FULL, "none"),
    Setting("frozen encoder, LoRA, recomputed", "frozen", LORA, "full"),
    Setting("trained encoder, full, recomputed in part", FULL, FULL, "selective"),
    Setting("trained encoder, LoRA, steps of one modality", FULL, LORA, "none", more=("data.group_by_modality=true",)),
    Setting("4 bits, LoRA", "frozen", LORA, "none", more=("model.llm.quantize=4bit",), decoder="llama_wide"),
    # sums of rounded gradients in another order; a step changes the loss by one to ten per cent
    Setting("bf16, trained encoder, full", FULL, FULL, "none", "bf16", 5e-3),
)
REST = (
    Setting("frozen encoder, full, recomputed", "frozen", FULL, "full"),
    Setting("frozen encoder, LoRA", "frozen", LORA, "none"),
    Setting("trained encoder, full", FULL, FULL, "none"),
    Setting("trained encoder, LoRA, recomputed", FULL, LORA, "full"),
    Setting("8 bits, LoRA, recomputed", FULL, LORA, "full", more=("model.llm.quantize=8bit",), decoder="llama_wide"),
    Setting("bf16, frozen encoder, LoRA", "frozen", LORA, "full", "bf16", 5e-3),
    Setting(
        "trained encoder, full, Q-Former",
        FULL,
        FULL,
        "none",
        more=("model.connector={type: qformer, num_queries: 4, width: 32, layers: 2, heads: 4}",),
    ),
)
"""The other half of the table: ``python -m tests.test_strategies`` runs all of it."""


def train_all(settings: tuple[Setting, ...], tiny_dir: Path, out: Path) -> dict[tuple[str, str], list[float]]:
    """(setting, strategy) -> loss of every step; the strategy of the run on one rank is ``none``."""
    losses: dict[tuple[str, str], list[float]] = {}
    for number, setting in enumerate(settings):
        run = tiny_run(tiny_dir, out / f"{number}-none", *setting.overrides("none"), llm=setting.decoder)
        run_training(run)
        losses[setting.name, "none"] = [loss for _, _, loss in losses_of(run)]
    cases = {
        (setting.name, strategy): Case(
            out / f"{number}-{strategy}", setting.overrides(strategy), options=(("llm", setting.decoder),)
        )
        for number, setting in enumerate(settings)
        for strategy in SHARED
    }
    done = run_cases(2, list(cases.values()), tiny_dir, out, timeout_s=900)
    assert done.returncode == 0, done.stdout[-4000:]
    return losses | {key: case.losses() for key, case in cases.items()}


def worst(losses: dict[tuple[str, str], list[float]], setting: Setting, strategy: str) -> float:
    """Largest relative difference to the run on one rank over all steps."""
    alone, shared = losses[setting.name, "none"], losses[setting.name, strategy]
    assert len(alone) == len(shared) == STEPS
    return max(abs(a - b) / a for a, b in zip(alone, shared, strict=True))


@pytest.fixture(scope="module")
def trained(
    tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[tuple[str, str], list[float]]]:
    out = tmp_path_factory.mktemp("strategies")
    return out, train_all(SETTINGS, tiny_dir, out)


@pytest.mark.parametrize("strategy", SHARED)
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_two_ranks_learn_what_one_learns(setting: Setting, strategy: str, trained) -> None:
    losses = trained[1]
    assert losses[setting.name, "none"][-1] < 0.9 * losses[setting.name, "none"][0]  # there was something to learn
    assert worst(losses, setting, strategy) <= setting.bound


@pytest.mark.parametrize("strategy", SHARED)
def test_the_model_folder_holds_the_same_weights_whoever_trained_it(strategy: str, trained) -> None:
    out = trained[0]
    alone, shared = (load_model_files(out / f"0-{name}" / "instruct" / "model") for name in ("none", strategy))
    assert alone.keys() == shared.keys()
    assert len(alone) > 20
    for name in alone:
        torch.testing.assert_close(shared[name], alone[name], rtol=1e-3, atol=2e-5, msg=name)


def test_the_runs_met_uneven_ranks_and_a_text_only_rank_beside_one_with_images_only(
    tiny_dir: Path, tmp_path: Path
) -> None:
    run = tiny_run(tiny_dir, tmp_path, *BASE)
    mixture, tokenizer = open_mixture(run, "instruct", progress=False), SampleTokenizer(model_spec(run.model), run.data)
    per_rank = []
    for rank in range(2):
        loader = StepLoader(
            mixture, tokenizer, run.data, global_batch=5, micro_batch_tokens=150, rank=rank, world_size=2,
            total_steps=STEPS,
        )  # fmt: skip
        per_rank.append([step.micro_batches for step in loader])
    uneven, apart, nothing = 0, 0, 0
    for left, right in zip(*per_rank, strict=True):
        assert len(left) == len(right)
        uneven += sum(row.num_samples for row in left) != sum(row.num_samples for row in right)
        for pair in zip(left, right, strict=True):
            images = sorted(row.num_images for row in pair)
            apart += images[0] == 0 and images[1] > 0 and all(row.num_tokens for row in pair)
            nothing += any(row.num_tokens == 0 for row in pair)
    assert min(uneven, apart, nothing) > 0, (uneven, apart, nothing)


def load_model_files(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{f.relative_to(folder)}:{n}": t for f in files for n, t in load_file(f).items()}


def main() -> None:
    """The whole table, printed."""
    out = Path(sys.argv[1])
    everything = SETTINGS + REST
    losses = train_all(everything, out / "tiny", out)
    print(f"{'largest relative difference of a loss to one rank, 20 steps':<62}" + "".join(f"{s:>10}" for s in SHARED))
    for setting in everything:
        print(f"{setting.name:<62}" + "".join(f"{worst(losses, setting, s):>10.1e}" for s in SHARED))


if __name__ == "__main__":
    main()
