"""Dependencies point one way: Ray stays at the edge, and `import raywm` is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import raywm

ROOT = Path(raywm.__file__).parent
RAY_ALLOWED = ("runtime/", "bench/", "rllib.py", "tune.py", "serve.py", "cli.py")


def imported(path: Path) -> set[str]:
    """Every module that a file imports anywhere, functions included; relative imports resolved."""
    package = ("raywm", *path.relative_to(ROOT).parts[:-1])
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            names.add(f"{base}{node.module or ''}".rstrip("."))
            names |= {f"{base}{node.module or ''}.{alias.name}".replace("..", ".") for alias in node.names}
    return names


def of(names: set[str], package: str) -> set[str]:
    return {n for n in names if n == package or n.startswith(package + ".")}


FILES = {str(p.relative_to(ROOT)): p for p in sorted(ROOT.rglob("*.py"))}


def test_only_the_edge_imports_ray():
    offenders = {n: of(imported(p), "ray") for n, p in FILES.items() if not n.startswith(RAY_ALLOWED)}
    assert not {n: found for n, found in offenders.items() if found}


def test_the_core_does_not_import_the_edge():
    # the loops get their executor as an argument; only the command line picks the one on Ray
    for name, path in FILES.items():
        if not name.startswith((*RAY_ALLOWED, "export.py")):
            assert not of(imported(path), "raywm.runtime"), name


def test_config_imports_nothing_of_raywm():
    assert not of(imported(ROOT / "config.py"), "raywm")


def test_algorithms_do_not_see_the_config():
    for name, path in FILES.items():
        if name.startswith(("models/", "learners/", "data/")) or name in ("dream.py", "controllers.py", "spaces.py"):
            assert not of(imported(path), "raywm.config"), f"{name}: config ends at the door"


def modules_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_import_raywm_is_light():
    assert not modules_after("import raywm") & {"ray", "torch"}


def test_the_command_line_starts_without_torch_and_ray():
    assert not modules_after("import raywm.cli") & {"ray", "torch", "gymnasium", "matplotlib"}
