"""Every fuzzer for many minutes with seeds of its own: ``python -m tests.fuzz.soak --minutes 10``.

Prints how many examples each property has seen. A failure is printed with its smallest example and ends with exit code 1.
With ``--atheris`` the JSON splitter and the record parser run under coverage-guided fuzzing instead (Linux, where the
package atheris is installed).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import random
import sys
import time
import traceback
from collections import Counter

from tests.fuzz.common import Property, peak_memory

MODULES = ("test_fuzz_records", "test_fuzz_images", "test_fuzz_config", "test_fuzz_weights")
EXAMPLES_A_TURN = 200


def all_properties() -> list[Property]:
    """The properties of every fuzzer."""
    return [fuzz for name in MODULES for fuzz in importlib.import_module(f"tests.fuzz.{name}").PROPERTIES]


def soak(minutes: float, *, seed: int, only: str = "") -> bool:
    """Turn by turn through all properties until the time is over. True when all held."""
    draw, ends = random.Random(seed), time.monotonic() + 60 * minutes
    seen: Counter[str] = Counter()
    properties = [fuzz for fuzz in all_properties() if only in fuzz.name]
    failed: set[str] = set()
    while time.monotonic() < ends and len(failed) < len(properties):
        for fuzz in properties:
            if fuzz.name in failed or time.monotonic() >= ends:
                continue
            number = draw.randrange(1 << 32)
            noise = io.StringIO()
            try:
                with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
                    seen[fuzz.name] += fuzz.run(examples=min(EXAMPLES_A_TURN, 2 * fuzz.examples), seed=number)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                failed.add(fuzz.name)
                print(f"FAILED {fuzz.name} (seed {number})", flush=True)
                traceback.print_exception(error)
    for fuzz in properties:
        print(f"{seen[fuzz.name]:>9,} examples  {fuzz.name}{'  FAILED' if fuzz.name in failed else ''}")
    print(f"{seen.total():>9,} examples in {minutes:g} minutes, seed {seed}, peak memory {peak_memory() >> 20} MiB")
    return not failed


def guided(minutes: float) -> int:
    """Coverage-guided fuzzing of the splitter and the parser of records."""
    try:
        import atheris
    except ImportError:
        print("atheris is not installed (pip install atheris); nothing was run", file=sys.stderr)
        return 0
    with atheris.instrument_imports(include=["vlit.data.json_stream", "vlit.data.formats.llava", "vlit.data.images"]):
        from tests.fuzz.guided import check_bytes, seeds
    folder = seeds()
    options = [
        f"-max_total_time={int(60 * minutes)}",
        "-timeout=20",
        "-rss_limit_mb=0",
        f"-artifact_prefix={folder}/found-",
    ]
    atheris.Setup([sys.argv[0], str(folder), *options], check_bytes)
    atheris.Fuzz()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time")
    parser.add_argument("--only", default="", help="part of a property's name")
    parser.add_argument("--atheris", action="store_true", help="coverage-guided, splitter and parser of records only")
    args = parser.parse_args()
    if args.atheris:
        return guided(args.minutes)
    seed = random.SystemRandom().randrange(1 << 32) if args.seed is None else args.seed
    return 0 if soak(args.minutes, seed=seed, only=args.only) else 1


if __name__ == "__main__":
    sys.exit(main())
