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


def test_every_name_imported_from_vlit_is_there_also_in_programs_that_only_slow_tests_start() -> None:
    names: dict[str, set[str]] = {}
    for path in (ROOT / "vlit").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        names[module] = top_level_names(ast.parse(path.read_text(encoding="utf-8")))
    folders = ("vlit", "tests", "scripts", "benchmarks")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 400
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}: from {node.module} import {alias.name}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vlit"
        for alias in node.names
        if alias.name not in names.get(str(node.module), ()) and f"{node.module}.{alias.name}" not in names
    ]
    assert wrong == []


def top_level_names(tree: ast.Module) -> set[str]:
    """What a module defines or imports outside of functions and classes."""
    found: set[str] = set()
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        waiting.extend(ast.iter_child_nodes(node))
    return found


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
