"""The two tiny base models of the embedded world: where they lie, whether they are whole, and how to rebuild them.

    python -m vlit.synth.digits.bases --out vlit/synth/digits/bases          # both, about half an hour on 2 cores
    python -m vlit.synth.digits.bases --out /tmp/bases --quick               # both, seconds, knows nothing

``clip/`` and ``llama/`` are ordinary Hugging Face folders; ``manifest.json`` holds the recipe, versions, seconds, scores
on held-out data, and the SHA-256 of every file. Only the training handwriting is used, and no picture for the LLaMA.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vlit.errors import ModelError

PARTS = ("clip", "llama")
STEPS = {"clip": 2000, "llama": 2500}
QUICK_STEPS = 2
PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "scikit-learn")
REBUILD = "python -m vlit.synth.digits.bases --out"


def bases_folder() -> Path:
    """The bases that come with the package."""
    return Path(__file__).with_name("bases")


def check_bases(folder: Path | None = None) -> dict[str, Any]:
    """Return the manifest after comparing every file with its SHA-256; ``ModelError`` names the first that differs."""
    root = folder or bases_folder()
    try:
        manifest: dict[str, Any] = json.loads((root / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{root}/manifest.json: {error}. Rebuild the bases: {REBUILD} {root}") from error
    for part in PARTS:
        for name, wanted in manifest.get("bases", {}).get(part, {}).get("files", {"config.json": "any"}).items():
            path = root / part / name
            found = _sha256(path) if path.is_file() else "missing"
            if found != wanted:
                raise ModelError(f"{path}: SHA-256 is {found}, the manifest says {wanted}. Rebuild: {REBUILD} {root}")
    return manifest


def build_bases(
    out: Path, *, quick: bool = False, seed: int = 0, only: Sequence[str] = PARTS, progress: bool = True
) -> dict[str, Any]:
    """Pretrain the bases into ``out`` and write the manifest; return it.

    Each base is built aside and renamed when it is whole, so that an interrupted build keeps the previous one. ``quick``
    takes two steps each: the files have their final form and the models know nothing. ``only`` names the bases to build.
    """
    from vlit.synth.digits.clip import pretrain_clip
    from vlit.synth.digits.llama import pretrain_llama

    pretrain = {"clip": pretrain_clip, "llama": pretrain_llama}
    out.mkdir(parents=True, exist_ok=True)
    path = out / "manifest.json"
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"bases": {}}
    for part in only:
        building = out / f".{part}.building"
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        size: dict[str, Any] = {"steps": QUICK_STEPS, "score_size": 10} if quick else {"steps": STEPS[part]}
        about = pretrain[part](building, **size, seed=seed, progress=progress)
        files = {file.name: _sha256(file) for file in sorted(building.iterdir())}
        versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
        shutil.rmtree(out / part, ignore_errors=True)
        building.rename(out / part)
        manifest["bases"][part] = {**about, "versions": versions, "files": files}
        manifest["command"] = f"{REBUILD} vlit/synth/digits/bases"
        path.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m vlit.synth.digits.bases", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write clip/, llama/ and manifest.json to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="build these bases only")
    parser.add_argument("--quick", action="store_true", help="two steps each, for tests")
    options = parser.parse_args(arguments)
    manifest = build_bases(options.out, quick=options.quick, seed=options.seed, only=options.only)
    for part, about in manifest["bases"].items():
        print(f"{part}: {about['parameters']:,} parameters, {about['seconds']} s, scores {json.dumps(about['scores'])}")


if __name__ == "__main__":
    main()
