"""The house rules a reader relies on: imports only go down, a light top-level import, files one can hold in the head."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    "types": 0,
    "errors": 0,
    "durable": 0,
    "registry": 0,
    "config": 0,
    "kernels": 1,
    "models": 2,
    "data": 2,
    "answer": 3,
    "plan": 4,
    "train": 4,
    "eval": 4,
    "synth": 4,
    "serve": 5,
    "cli": 6,
}


def room_of(module: str) -> str | None:
    """``vlit.data.load`` -> ``data``; None for the package itself and for other packages."""
    parts = module.split(".")
    return parts[1] if parts[0] == "vlit" and len(parts) > 1 else None


def imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative imports hide the floor"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names if node.module == "vlit")
    return found


def test_imports_only_go_down_and_never_sideways() -> None:
    files = sorted((ROOT / "vlit").rglob("*.py"))
    assert len(files) > 60
    wrong = []
    for path in files:
        here = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        if here is None or here == "__init__":
            continue
        for module in imported(path):
            there = room_of(module)
            if there is None or there == here or there == "__version__":
                continue
            if FLOORS[there] > FLOORS[here] or FLOORS[there] == FLOORS[here] != 0:
                wrong.append(
                    f"{path.relative_to(ROOT)} (floor {FLOORS[here]}) imports {module} (floor {FLOORS[there]})"
                )
    assert wrong == []


def test_every_room_has_a_floor() -> None:
    rooms = {p.stem for p in (ROOT / "vlit").iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    assert rooms - {"__init__"} == set(FLOORS)


def test_importing_vlit_and_its_configuration_loads_no_heavy_library() -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'open_clip', 'timm', 'wandb', 'deepspeed', 'triton', 'accelerate'}"
    code = f"import sys, vlit, vlit.config, vlit.cli; print(sorted({heavy} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_no_file_is_too_long_to_hold_in_the_head() -> None:
    lengths = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in (ROOT / "vlit").rglob("*.py")}
    assert len(lengths) > 60
    assert {str(p.relative_to(ROOT)): n for p, n in lengths.items() if n > 400} == {}


def test_nothing_is_unpickled_and_no_remote_code_runs_unasked() -> None:
    for path in (ROOT / "vlit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name == "torch.load":
                assert keywords.get("weights_only") == "True", f"{path}:{node.lineno}"
            assert name not in {"pickle.load", "pickle.loads", "yaml.load_all", "eval", "exec"}, f"{path}:{node.lineno}"
            assert keywords.get("trust_remote_code") != "True", f"{path}:{node.lineno}"
