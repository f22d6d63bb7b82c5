"""vlit doctor at the size of LLaVA-1.5's mix665k: python tests/scale/doctor_665k.py [--records N] [--faults N] [--workers N]

Writes a LLaVA-like JSON of 665,298 records over 30,000 distinct image files to a temporary folder, plants 1,000 faults of
all kinds in it, runs the real command, and compares its manifest with what was planted: record by record, check by check.
Prints one JSON object with seconds and the peak memory of every kind of process; exits with 1 when anything differs.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 600.0
FOLDERS = {  # share of mix665k's records, exchanges
    "coco/train2017": (0.547, (1, 9)),
    "ocr_vqa/images": (0.120, (3, 6)),
    "gqa/images": (0.108, (4, 12)),
    "vg/VG_100K": (0.130, (4, 10)),
    "textvqa/train_images": (0.033, (1, 3)),
    "": (0.061, (1, 6)),  # text only
}
SENTENCE = (
    "the a man red dog cat on in table with two people standing near large window tree street sign holding plate of food "
    "what is color how many there image shows left right side small blue green white umbrella playing field"
)
Fault = Callable[[dict[str, Any]], str]


@dataclass
class Planted:
    """What was written: the check each bad record must be found by, and the notes that must be counted."""

    records: int
    faults: dict[int, str] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)


class World:
    """Images, records and faults under one folder; the same for the same arguments."""

    def __init__(self, folder: Path, *, records: int, images: int, faults: int) -> None:
        self.folder = folder
        self.rng = random.Random(0)
        self.images = folder / "images"
        self.count, self.num_images, self.num_faults = records, images, faults
        self.serial = itertools.count()
        words = SENTENCE.split()
        self.pool = [" ".join(self.rng.choices(words, k=self.rng.randint(3, 22))) for _ in range(20_000)]
        self.pictures: list[bytes] = []

    def write(self) -> Planted:
        """Write everything; ``train.json`` beside the folder ``images``."""
        self.pictures = [self._jpeg(seed) for seed in range(200)]
        names = {name: self._write_images(name, share) for name, (share, _) in FOLDERS.items() if name}
        planted = Planted(self.count)
        kinds = list(self.kinds().items())
        places = self.rng.sample(range(50, self.count), self.num_faults)
        bad = {place: kinds[number % len(kinds)] for number, place in enumerate(places)}
        earlier: dict[str, Any] = {}
        folders, shares = list(FOLDERS), [share for share, _ in FOLDERS.values()]
        with (self.folder / "train.json").open("w", encoding="utf-8") as file:
            file.write("[")
            for number in range(self.count):
                name = self.rng.choices(folders, shares)[0]
                if number in bad and not name:
                    name = folders[0]
                record = self.record(number, name, names)
                if number in bad:
                    check, spoil = bad[number]
                    if check == "duplicate":
                        record = dict(earlier)
                    else:
                        spoil(record)
                    planted.faults[number] = check.split(":")[0]
                elif number % 997 == 3 and earlier:
                    record["id"] = earlier["id"]
                    planted.notes["same_id"] += 1
                elif name:
                    earlier = record
                file.write((",\n" if number else "") + json.dumps(record, indent=1 if number % 2 else None))
            file.write("]")
        return planted

    def record(self, number: int, name: str, names: dict[str, list[str]]) -> dict[str, Any]:
        """A good record."""
        low, high = FOLDERS[name][1]
        turns = []
        for turn in range(self.rng.randint(low, high)):
            image = "<image>\n" if name and turn == 0 else ""
            turns.append({"from": "human", "value": f'{image}{self.rng.choice(self.pool)}? "quoted"'})
            turns.append({"from": "gpt", "value": f"{self.rng.choice(self.pool)}."})
        record: dict[str, Any] = {"id": f"{number:012d}", "conversations": turns}
        if name:
            record["image"] = self.rng.choice(names[name])
        return record

    def kinds(self) -> dict[str, Fault]:
        """How to spoil a record, by the check that must find it; what follows a colon tells several of one check apart."""

        def turns(record: dict[str, Any]) -> Any:
            return record["conversations"]

        def image(suffix: str, content: bytes | Callable[[], bytes] | None) -> Fault:
            def spoil(record: dict[str, Any]) -> str:
                record["image"] = f"broken/{next(self.serial)}{suffix}"
                if content is not None:
                    self._put(record["image"], content if isinstance(content, bytes) else content())
                return ""

            return spoil

        def act(change: Callable[[dict[str, Any]], Any]) -> Fault:
            def spoil(record: dict[str, Any]) -> str:
                change(record)
                return ""

            return spoil

        return {
            "json:nan": act(lambda r: r.update(score=float("nan"))),
            "json:infinity": act(lambda r: r.update(score=float("inf"))),
            "fields": act(lambda r: r.update(id=[1])),
            "turns:missing": act(lambda r: r.pop("conversations")),
            "turns:empty": act(lambda r: r.update(conversations=[])),
            "turns:role": act(lambda r: turns(r)[0].update({"from": "bard"})),
            "turns:order": act(lambda r: turns(r).insert(0, turns(r)[1])),
            "turns:silent": act(lambda r: turns(r)[1].update(value=" ")),
            "turns:unanswered": act(lambda r: turns(r).pop()),
            "placeholders:two": act(lambda r: turns(r)[0].update(value="<image><image> What?")),
            "placeholders:none": act(lambda r: turns(r)[0].update(value="What?")),
            "image_path:escape": act(lambda r: r.update(image="../../etc/passwd")),
            "image_path:remote": act(lambda r: r.update(image="https://example.org/a.jpg")),
            "image_missing": image(".jpg", None),
            "image_missing:extension": act(self._with_sibling),
            "image_no_file": act(self._folder),
            "image_empty": image(".jpg", b""),
            "image_not_image:page": image(".jpg", b"<!DOCTYPE html><title>404</title>"),
            "image_not_image:text": image(".png", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
            "image_damaged:jpeg": image(".jpg", lambda: self._cut(self._jpeg(1))),
            "image_damaged:png": image(".png", lambda: self._cut(self._encoded("PNG"), spare=32)),
            "image_damaged:webp": image(".webp", lambda: self._cut(self._encoded("WEBP"), first=32)),
            "image_too_large": image(".png", self._bomb),
            "image_outside": act(self._link_out),
            "no_supervision": act(lambda r: turns(r)[0].update(value="<image>\n" + "what is this and that " * 1200)),
            "duplicate": act(lambda r: None),
        }

    def _write_images(self, name: str, share: float) -> list[str]:
        (self.images / name).mkdir(parents=True)
        paths = [f"{name}/{number:09d}.jpg" for number in range(max(3, round(share * self.num_images)))]
        for path in paths:
            (self.images / path).write_bytes(self.rng.choice(self.pictures))
        return paths

    def _put(self, name: str, content: bytes) -> None:
        path = self.images / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)

    def _pixels(self, seed: int) -> Image.Image:
        return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8))

    def _jpeg(self, seed: int) -> bytes:
        return self._encoded("JPEG", seed)

    def _encoded(self, kind: str, seed: int = 0) -> bytes:
        buffer = io.BytesIO()
        self._pixels(seed).save(buffer, kind)
        return buffer.getvalue()

    def _cut(self, content: bytes, *, first: int = 4, spare: int = 1) -> bytes:
        return content[: self.rng.randrange(first, len(content) - spare)]

    def _bomb(self) -> bytes:
        """A PNG whose header announces 60,000 by 60,000 pixels."""
        import struct
        import zlib

        def chunk(name: bytes, body: bytes) -> bytes:
            return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

        header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
        data = chunk(b"IDAT", zlib.compress(bytes(60_000)))
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")

    def _with_sibling(self, record: dict[str, Any]) -> None:
        record["image"] = f"broken/{next(self.serial)}.jpg"
        self._put(record["image"].replace(".jpg", ".gif"), self._encoded("GIF"))

    def _folder(self, record: dict[str, Any]) -> None:
        record["image"] = f"broken/{next(self.serial)}.jpg"
        (self.images / record["image"]).mkdir(parents=True)

    def _link_out(self, record: dict[str, Any]) -> None:
        record["image"] = f"broken/{next(self.serial)}.jpg"
        outside = self.folder / "outside.jpg"
        outside.write_bytes(self._jpeg(2))
        (self.images / "broken").mkdir(exist_ok=True)
        (self.images / record["image"]).symlink_to(outside)


def write_config(folder: Path) -> Path:
    """A run on tiny model parts with a LLaMA-like tokenizer of 32,000 pieces, over the world's records."""
    from tests.data_fixtures import build_spm
    from tests.tiny import build_encoder, build_llm

    (folder / "spm").mkdir()
    build_spm(folder / "spm")
    encoder, llm = build_encoder("clip", folder / "clip"), build_llm("llama", folder / "llama")
    width = json.loads((llm / "config.json").read_text())
    (llm / "config.json").write_text(json.dumps(width | {"vocab_size": 32_000}))  # no weights are loaded
    config = {
        "name": "scale",
        "output_dir": str(folder / "run"),
        "model": {
            "encoder": {"type": "hf", "path": str(encoder)},
            "connector": {"type": "mlp"},
            "llm": {"type": "hf", "path": str(llm), "tokenizer": str(folder / "spm")},
        },
        "data": {"cache_dir": str(folder / "cache"), "on_bad_sample": "quarantine"},
        "stages": {
            "instruct": {
                "data": [{"path": str(folder / "train.json"), "images": str(folder / "images"), "name": "mix"}],
                "lr": 1e-3,
                "global_batch": 8,
            }
        },
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    return path


def read_manifest(folder: Path) -> dict[int, str]:
    """Record -> check."""
    lines = (folder / "run" / "doctor" / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    assert len({entry["record"] for entry in entries}) == len(entries), "a record is listed twice"
    return {entry["record"]: entry["check"] for entry in entries}


def differences(planted: Planted, found: dict[int, str]) -> list[str]:
    """What was planted and not found, found and not planted, or found by another check; at most ten lines."""

    def lines() -> Iterator[str]:
        for record in sorted(planted.faults.keys() | found.keys()):
            want, got = planted.faults.get(record), found.get(record)
            if want != got:
                yield f"record {record}: planted {want}, found {got}"

    return list(itertools.islice(lines(), 10))


def own_mb(pid: int) -> float:
    """Memory that a process alone has written, in MB; neither what it shares nor pages of the memory-mapped index."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"process {pid} has no Private_Dirty")


def watch(process: subprocess.Popen[bytes]) -> dict[str, float]:
    """Peak of :func:`own_mb` until the process ends: of the command, of the process that workers are forked from (what
    they share is held there once), and of the largest worker.
    """
    import psutil

    peaks: dict[str, float] = dict.fromkeys(("command", "fork_server", "worker"), 0.0)
    root = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            for member in [root, *root.children(recursive=True)]:
                kind = "command" if member == root else "fork_server" if member.ppid() == root.pid else "worker"
                peaks[kind] = max(peaks[kind], own_mb(member.pid))
        except (psutil.Error, OSError):  # it has just ended
            pass
        time.sleep(1.0)
    return {name: round(value) for name, value in peaks.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=665_298)
    parser.add_argument("--images", type=int, default=30_000)
    parser.add_argument("--faults", type=int, default=1_000)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world = World(folder, records=arguments.records, images=arguments.images, faults=arguments.faults)
        planted = world.write()
        command = [sys.executable, "-m", "vlit.cli", "doctor", "--config", str(write_config(folder))]
        started = time.perf_counter()
        process = subprocess.Popen(
            [*command, "--workers", str(arguments.workers)], env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        memory = watch(process)
        seconds = time.perf_counter() - started
        summary = json.loads((folder / "run" / "doctor" / "summary.json").read_text())
        wrong = differences(planted, read_manifest(folder))
        megabytes = (folder / "train.json").stat().st_size / 1e6
    if process.returncode != 1:
        wrong.append(f"exit code {process.returncode}, expected 1")
    counted = summary["checks"].get("same_id", {"records": 0})["records"]
    if counted != planted.notes["same_id"]:
        wrong.append(f"{counted} records share an id with another one, planted {planted.notes['same_id']}")
    if seconds > LIMIT_S:
        wrong.append(f"{seconds:.0f} s, more than {LIMIT_S:.0f}")
    result = {
        "records": arguments.records,
        "megabytes": round(megabytes),
        "distinct_images": summary["images"],
        "planted": len(planted.faults),
        "found": summary["bad_records"],
        "workers": arguments.workers,
        "seconds": {**summary["seconds"], "command": round(seconds, 1)},
        "peak_mb": memory,
    }
    print(json.dumps(result, indent=2))
    print("\n".join(wrong) if wrong else "exactly the planted records were found", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
