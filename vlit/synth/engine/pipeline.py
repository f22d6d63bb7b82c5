"""Runs a recipe's stages: parallel, resumable, counted. What a run leaves in its folder::

run.json            settings of the last run
calls.jsonl         every request, reply and cost (calls.py)
stages/NN-name.jsonl   outcome of every item (stages.py)
dataset.jsonl       the records, in the order of the inputs; complete or absent
rejected.jsonl      what was left out, and why
report.json         counts and costs
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlit.data.progress import phase
from vlit.data.record import from_json, write_records
from vlit.durable import make_folder, replace_file
from vlit.errors import ConfigError, SynthError
from vlit.synth.engine.calls import NANO, CallLog
from vlit.synth.engine.client import PICTURE, Client, Unanswered
from vlit.synth.engine.recipe import Inputs
from vlit.synth.engine.report import Report, StageCount
from vlit.synth.engine.settings import SynthConfig
from vlit.synth.engine.stages import (
    AskEach,
    Item,
    Items,
    JournalItems,
    Outcome,
    Select,
    SelectedItems,
    StageStore,
    Whole,
    WorkStage,
    item_key,
    unique,
    work_on,
)  # fmt: skip
from vlit.synth.engine.teacher import Teacher

WINDOW = 4
"""Items handed to the threads ahead of time, for each thread."""


def build_teachers(settings: SynthConfig) -> dict[str, Teacher]:
    """The teachers by role; one object when both roles are the same."""
    text = settings.teacher.build()
    vision = settings.vision_teacher.build() if settings.vision_teacher else text
    if settings.budget_usd is not None:
        for teacher in (text, vision):
            if teacher.is_remote and not (teacher.limits.nano_per_token_in or teacher.limits.nano_per_token_out):
                raise ConfigError(
                    "budget_usd is set, but a teacher has no prices. Set its usd_per_million_in and usd_per_million_out."
                )
    return {"text": text, "vision": vision}


def inputs_of(settings: SynthConfig, teachers: dict[str, Teacher]) -> Inputs:
    """The inputs of a run; ConfigError when an image folder is missing."""
    if settings.images and not Path(settings.images).is_dir():
        raise ConfigError(
            f"images: {settings.images} is not a folder. Give the folder that image paths are relative to."
        )
    domains = teachers["text"].known_domains()
    return Inputs(
        tuple(Path(p) for p in settings.annotations),
        Path(settings.images),
        tuple(Path(p) for p in settings.records),
        Path(settings.out),
        settings.seed,
        settings.max_items,
        None if domains is None else frozenset(domains),
    )


def run(settings: SynthConfig, *, show: bool = True) -> Report:
    """Run all stages and write the dataset. The same call continues a run that was stopped in whatever way.

    Raises:
        BudgetExhausted: the rest does not fit into the budget; what is done is kept.
        SynthError: too many requests failed in a row, or another process writes here.
    """
    teachers = build_teachers(settings)
    inputs = inputs_of(settings, teachers)
    out = Path(settings.out)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out: {out} is a file. Give the folder of the run, or a name that is not taken.")
    try:
        make_folder(out)
    except OSError as error:
        raise ConfigError(f"out: {out} cannot be made ({error.strerror}). Give another folder.") from error
    cap = None if settings.budget_usd is None else round(settings.budget_usd * NANO)
    log = CallLog(Path(settings.calls) if settings.calls else out / "calls.jsonl", cap_nano=cap)
    try:
        _begin(settings, out, log, show=show)
        clients = {role: Client(teacher, log, seed=settings.seed) for role, teacher in teachers.items()}
        if teachers["text"] is teachers["vision"]:
            clients["vision"] = clients["text"]
        items: Items = list(unique(settings.recipe.inputs(inputs)))
        rejected: list[dict[str, Any]] = []
        report = Report([], log.totals)
        stages = settings.recipe.stages(inputs)
        origin = _origin(settings) if settings.recipe.is_author and any(isinstance(s, AskEach) for s in stages) else {}
        try:
            for number, stage in enumerate(stages, start=1):
                if isinstance(stage, Select):
                    before, items = len(items), SelectedItems(stage, items)
                    report.stages.append(StageCount(stage.name, before, len(items)))
                    continue
                runner = _StageRun(stage, StageStore(out, number, stage.name), clients, settings, show=show)
                report.stages.append(runner.count)
                items = runner.run(items, rejected)
            if not report.unanswered or settings.write_partial:
                report.records = write_records(
                    out / "dataset.jsonl",
                    (replace(record, provenance=origin | record.provenance) for record in map(from_json, items)),
                )
        finally:
            replace_file(out / "rejected.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rejected))
            replace_file(out / "report.json", json.dumps(report.to_json(), indent=2))
        return report
    finally:
        log.close()


def _origin(settings: SynthConfig) -> dict[str, str]:
    """Who wrote the records: type and model of the teachers."""
    roles = {"teacher": settings.teacher, "vision_teacher": settings.vision_teacher}
    return {
        role: ":".join(str(word) for word in (config.type, getattr(config, "model", None)) if word)
        for role, config in roles.items()
        if config is not None
    }


def _begin(settings: SynthConfig, out: Path, log: CallLog, *, show: bool) -> None:
    """Note the settings; a dataset of other settings is taken away, since it would be read as this run's."""
    now = json.dumps(settings.model_dump(mode="json"), indent=2)
    held = (out / "run.json").read_text(encoding="utf-8") if (out / "run.json").is_file() else now
    if held != now and (out / "dataset.jsonl").is_file():
        (out / "dataset.jsonl").unlink()
        if show:
            print(
                f"synth: settings differ from the last run in {out}; finished work that still applies is reused",
                file=sys.stderr,
            )
    replace_file(out / "run.json", now)
    if log.orphans and show:
        print(
            f"synth: {log.orphans} requests of earlier runs have no outcome and stay reserved "
            f"(${sum(log.totals.open.values()) / NANO:.4f})",
            file=sys.stderr,
        )


class _StageRun:
    """One pass over the items of one stage."""

    def __init__(
        self,
        stage: WorkStage,
        store: StageStore,
        clients: dict[str, Client],
        settings: SynthConfig,
        *,
        show: bool,
    ) -> None:
        self.stage, self.store, self.clients, self.settings, self.show = stage, store, clients, settings, show
        self.count = StageCount(stage.name)
        self._in_a_row = 0
        self._unseen: dict[str, Outcome] = {}
        """Outcomes for which a picture is the reason; not kept, since the next run may find it mended."""

    def run(self, items: Items, rejected: list[dict[str, Any]]) -> JournalItems:
        """The items for the next stage, in the order of the items that they came from."""
        self.count.items_in = len(items)
        try:
            if isinstance(self.stage, Whole):
                held = list(items)
                keys = [item_key(self.stage, held, self.clients)]
                if keys[0] in self.store:
                    self.count.reused = len(held)
                else:
                    self.store.put(keys[0], "*", Outcome(self.stage.work(held)))
            else:
                keys = [item_key(self.stage, item, self.clients) for item in items]
                self._work(items, keys)
            return self._gather(items, keys, rejected)
        finally:
            self.store.close()

    def _gather(self, items: Items, keys: list[str], rejected: list[dict[str, Any]]) -> JournalItems:
        """Where the outcomes stand; of items that share an id the first one counts."""
        found, seen = JournalItems(self.store.path), set[str]()
        names: Iterable[str] = ["*"] if isinstance(self.stage, Whole) else (item["id"] for item in items)
        for name, key in zip(names, keys, strict=True):
            if key not in self.store and key not in self._unseen:
                continue
            outcome = self._unseen.get(key) or self.store.get(key)
            for place, item in enumerate(outcome.items):
                if item["id"] not in seen:
                    seen.add(item["id"])
                    found.add(self.store.offset(key), place)
            if outcome.rejected:
                kind = outcome.rejected.split(":")[0]
                self.count.rejected[kind] += 1
                self.count.examples.setdefault(kind, outcome.rejected)
                rejected.append({"stage": self.stage.name, "id": name, "reason": outcome.rejected})
        self.count.items_out = len(found)
        return found

    def _work(self, items: Items, keys: list[str]) -> None:
        missing = {key for key in keys if key not in self.store}
        self.count.reused = sum(key not in missing for key in keys)
        if not missing:
            return
        todo = _first_of_each(missing, zip(keys, items, strict=True))
        is_asking = isinstance(self.stage, AskEach)
        threads = self.clients[self.stage.role].teacher.limits.concurrency if isinstance(self.stage, AskEach) else 1
        with phase(f"synth {self.stage.name}", total=len(missing), unit="items", show=self.show) as report:
            if not is_asking:
                for key, item in todo:
                    self._done(key, item, work_on(self.stage, item, self.clients))  # type: ignore[arg-type]
                    report(1)
                return
            flying: dict[Future[Outcome], tuple[str, Item]] = {}
            with ThreadPoolExecutor(threads, thread_name_prefix="teacher") as pool:
                try:
                    while self._submit(pool, todo, flying, WINDOW * threads):
                        finished, _ = wait(flying, return_when=FIRST_COMPLETED)
                        for future in finished:
                            self._settle(future, *flying.pop(future))
                            report(1)
                except BaseException:
                    self._stop(flying)
                    raise

    def _submit(
        self, pool: ThreadPoolExecutor, waiting: Iterator[tuple[str, Item]],
        flying: dict[Future[Outcome], tuple[str, Item]], window: int,
    ) -> bool:  # fmt: skip
        while len(flying) < window and (pair := next(waiting, None)) is not None:
            flying[pool.submit(work_on, self.stage, pair[1], self.clients)] = pair  # type: ignore[arg-type]
        return bool(flying)

    def _settle(self, future: Future[Outcome], key: str, item: Item) -> None:
        try:
            outcome = future.result()
        except Unanswered as error:
            self.count.unanswered += 1
            self.count.failures[str(error)] += 1
            self._in_a_row += 1
            if self._in_a_row >= self.settings.max_unanswered:
                raise SynthError(
                    f"{self._in_a_row} requests in a row were not answered, the last one: {error}. What is done is kept; "
                    "mend it and run the same command again."
                ) from error
            return
        self._in_a_row = 0
        self._done(key, item, outcome)

    def _done(self, key: str, item: Item, outcome: Outcome) -> None:
        if outcome.rejected.partition(":")[0] == PICTURE:
            self._unseen[key] = outcome
        else:
            self.store.put(key, item["id"], outcome)

    def _stop(self, flying: dict[Future[Outcome], tuple[str, Item]]) -> None:
        """Let nothing new leave, and keep what is still coming in."""
        for client in self.clients.values():
            client.stopped.set()
        for future in flying:
            future.cancel()
        for future, (key, item) in flying.items():
            if not future.cancelled() and future.exception() is None:
                self._done(key, item, future.result())


def _first_of_each(wanted: set[str], pairs: Iterable[tuple[str, Item]]) -> Iterator[tuple[str, Item]]:
    """The first item of every wanted key."""
    left = set(wanted)
    for key, item in pairs:
        if key in left:
            left.discard(key)
            yield key, item
