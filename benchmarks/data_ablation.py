"""Does the quality card predict anything? The same training on a clean set and on sets with planted faults.

    vlit synth build --no-review
    python -m benchmarks.data_ablation --build outputs/build --out outputs/data-ablation stages.instruct.max_steps=120

Every set is made from the built one and has as many records (repeating records where a fault leaves fewer), is measured by
``vlit synth quality``, and trains stage 2 for as many steps from the same aligned model; the model then answers the held-out
*validation* questions. ``p`` is that of a sign test against the clean set, paired by question and seed. Runs
that are finished are skipped, so the command can be stopped and started again.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import orjson

from vlit.data.record import Record, from_json, write_records
from vlit.serve.demo import evaluation_command, run_command, training_command
from vlit.serve.quality import measure_quality
from vlit.synth.digits.questions import DIGITS, LETTERS
from vlit.synth.digits.scenes import COLOUR_NAMES, POSITIONS

CONFIG = "configs/stage2_built.yaml"
FIRST_WORDING = (
    (r"What digit do you see at the|Name the digit at the", "Which digit is at the"),
    (r"Which color do you see at the|Name the color at the", "What color is the digit at the"),
    (r"How many digits do you see\?|Count the digits\.", "How many digits are there?"),
    (r"Which digit is painted in|Name the digit that is(?! the)", "Which digit is"),
    (r"Where do you see|Name the place of the digit that is", "Where is the digit that is"),
    (r"What does the picture show in detail\?|Describe all you see\.", "Describe the picture in detail."),
    (r"Which of the digits is the|Find the digit that is the", "Which digit is the"),
    (r"Add up all digits\.|What do all digits add up to\?", "What is the sum of all digits?"),
)
"""Other wordings of the world's questions -> the first one."""
VALUES = (DIGITS, COLOUR_NAMES, POSITIONS)
VALUE = re.compile("|".join(rf"(?<![\w-])(?:{'|'.join(values)})(?![\w-])" for values in VALUES))


def wrong_answer(answer: str, rng: Random) -> str:
    """The answer with its conclusion turned round, or else one of its values replaced by another value of its kind."""
    for word, other in (("yes", "no"), ("no", "yes")):
        if answer.endswith(f"so {word}."):
            return answer.removesuffix(f"{word}.") + f"{other}."
    if found := re.search(r"so ([A-D])\.$", answer):
        return answer[: found.start(1)] + rng.choice([x for x in LETTERS if x != found[1]]) + "."
    found = rng.choice(list(VALUE.finditer(answer)))
    kind = next(values for values in VALUES if found[0] in values)
    return answer[: found.start()] + rng.choice([v for v in kind if v != found[0]]) + answer[found.end() :]


def with_wrong_answers(records: Sequence[Record], rng: Random, *, share: float) -> list[Record]:
    """``share`` of all answers replaced by wrong ones."""

    def of(record: Record) -> Record:
        turns = [
            replace(turn, text=wrong_answer(turn.text, rng))
            if turn.role == "assistant" and rng.random() < share
            else turn
            for turn in record.turns
        ]
        return replace(record, turns=tuple(turns))

    return [of(record) for record in records]


def repeated(records: Sequence[Record], count: int) -> list[Record]:
    """``records`` again and again until they are ``count``, each copy with an id of its own."""
    return [replace(records[n % len(records)], id=f"{records[n % len(records)].id}-{n}") for n in range(count)]


def few_often(records: Sequence[Record], rng: Random, *, share: float) -> list[Record]:
    """A random ``share`` of the records, repeated."""
    return repeated(rng.sample(list(records), max(1, round(share * len(records)))), len(records))


def first_wording(records: Sequence[Record], rng: Random) -> list[Record]:
    """Every question in its first wording; answers as they are."""

    def of(text: str) -> str:
        for pattern, first in FIRST_WORDING:
            text = re.sub(pattern, first, text)
        return text

    return [
        replace(r, turns=tuple(replace(t, text=of(t.text)) if t.role == "user" else t for t in r.turns))
        for r in records
    ]


def one_template(records: Sequence[Record], rng: Random) -> list[Record]:
    """Detailed descriptions alone, all asked for in the same words, repeated."""
    return repeated([r for r in first_wording(records, rng) if r.kind == "detail"], len(records))


@dataclass(frozen=True, slots=True)
class Variant:
    """One set: what was planted, and the function that plants it."""

    name: str
    what: str
    make: Callable[[Sequence[Record], Random], list[Record]]


VARIANTS = (
    Variant("clean", "as built and filtered", lambda records, rng: list(records)),
    *(
        Variant(
            f"wrong-{p}", f"{p} % of the answers wrong", lambda r, rng, p=p: with_wrong_answers(r, rng, share=p / 100)
        )
        for p in (10, 30, 50)
    ),
    Variant("duplicates-10", "a tenth of the records, ten times each", lambda r, rng: few_often(r, rng, share=0.1)),
    Variant("duplicates-100", "a hundredth, a hundred times each", lambda r, rng: few_often(r, rng, share=0.01)),
    Variant("one-wording", "one wording of every question", first_wording),
    Variant("one-template", "a single template: descriptions", one_template),
)


def figures_of(card: dict[str, Any]) -> dict[str, float]:
    """What the card says on the axes that were tampered with."""
    varied = card["diversity"]
    return {
        "correctness": card["correctness"]["mean"],
        "duplicates": varied["duplicates"] / card["records"],
        "templates": varied["templates"]["effective"],
        "quality": card["quality"]["mean"],
    }


def run_variant(
    variant: Variant, records: Sequence[Record], out: Path, *, images: Path, annotations: list[str], aligned: Path,
    seeds: int, overrides: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """Plant, measure, train and score once a seed."""
    folder = out / variant.name
    data = folder / "data.jsonl"
    if not (folder / "card.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_records(data, variant.make(records, Random(0)))
        measure_quality(data, images=images, annotations=annotations, out=folder)
    row: dict[str, Any] = {"what": variant.what, **figures_of(orjson.loads((folder / "card.json").read_bytes()))}
    while (folder / f"seed{seeds}" / "evaluation" / "results.json").is_file():
        seeds += 1  # of an earlier call that asked for more
    scores = [score(folder / f"seed{seed}", data, aligned, seed, overrides) for seed in range(seeds)]
    row["accuracy"] = [result["accuracy"] for result in scores]
    row["ci"] = [[result["ci_low"], result["ci_high"]] for result in scores]
    row["per_kind"] = {
        kind: statistics.fmean(result["per_kind"][kind]["accuracy"] for result in scores)
        for kind in scores[0]["per_kind"]
    }
    row["answers"] = [answers_of(folder / f"seed{seed}") for seed in range(seeds)]
    return row


def answers_of(folder: Path) -> dict[str, bool]:
    """Whether each validation question was answered rightly."""
    lines = (folder / "evaluation" / "predictions.jsonl").read_bytes().splitlines()
    return {row["question_id"]: bool(row["correct"]) for row in map(orjson.loads, lines)}


def sign_test(ours: Sequence[dict[str, bool]], theirs: Sequence[dict[str, bool]]) -> float:
    """Two-sided exact sign test over the questions that only one of two models got right, paired by question and seed.

    Seeds that only one of them has are left out.
    """
    pairs = [(a[name], b[name]) for a, b in zip(ours, theirs, strict=False) for name in a]
    wins, losses = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    if wins == losses:
        return 1.0
    tail = sum(math.comb(wins + losses, n) for n in range(min(wins, losses) + 1))
    return float(min(1.0, 2 * tail / 2 ** (wins + losses)))


def score(folder: Path, data: Path, aligned: Path, seed: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Train stage 2 from the aligned model, answer the validation questions."""
    results = folder / "evaluation" / "results.json"
    if not results.is_file():
        words = [
            "stages.align=null", f"model.init_from={aligned}", f"seed={seed}", f"output_dir={folder}",
            f"stages.instruct.data.0.path={data}", *overrides,
        ]  # fmt: skip
        run_command(training_command(CONFIG, words), [])
        command = evaluation_command(
            folder / "instruct" / "model",
            results.parent,
            rows="image",
            split="validation",
            world="outputs/world/digits",
        )
        run_command(command, [])
    return dict(orjson.loads(results.read_bytes()))


def table(rows: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| set | what | correctness | duplicates | effective templates | quality | held-out accuracy, by seed | mean | p |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        scores = " · ".join(f"{100 * value:.1f}" for value in row["accuracy"])
        lines.append(
            f"| {name} | {row['what']} | {row['correctness']:.3f} | {100 * row['duplicates']:.0f} % | {row['templates']:.1f} | "
            f"{row['quality']:.3f} | {scores} | {100 * statistics.fmean(row['accuracy']):.1f} | {row.get('p', '-')} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=Path("outputs/build"))
    parser.add_argument("--out", type=Path, default=Path("outputs/data-ablation"))
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--only", help="comma-separated names of sets")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    world = Path("outputs/world/digits")
    records = [from_json(orjson.loads(line)) for line in (args.build / "train.jsonl").read_bytes().splitlines()]
    aligned = args.out / "aligned" / "align" / "model"
    if not (aligned / "manifest.json").is_file():
        run_command(training_command("configs/stage1.yaml", [f"output_dir={args.out / 'aligned'}"]), [])
    rows: dict[str, Any] = {}
    for variant in VARIANTS:
        if args.only is None or variant.name in args.only.split(","):
            rows[variant.name] = run_variant(
                variant, records, args.out, images=world / "images", aligned=aligned, seeds=args.seeds,
                annotations=[f"train/={world / 'annotations' / 'instances_train.json'}"], overrides=args.overrides,
            )  # fmt: skip
            if variant.name != "clean" and "clean" in rows:
                rows[variant.name]["p"] = float(
                    f"{sign_test(rows['clean']['answers'], rows[variant.name]['answers']):.1e}"
                )
            print(table(rows))
            kept = {name: {k: v for k, v in row.items() if k != "answers"} for name, row in rows.items()}
            for path in [args.out / "data_ablation.json", *([args.json] if args.json else [])]:
                path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
            (args.out / "data_ablation.md").write_text(table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
