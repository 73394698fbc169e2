"""The wheel: what is in it, and that it works where there is no checkout."""

from __future__ import annotations

import email
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built as pip builds it, of the files that git has; without a network where setuptools is there."""
    here = tmp_path_factory.mktemp("wheel")
    source = here / "source"
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("no git checkout to build from")
    for name in filter(None, files.stdout.splitlines()):
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pytest.importorskip("setuptools", minversion="77")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(here), "."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(here.glob("raywm-*.whl"))


@pytest.mark.slow
def test_wheel_holds_everything_and_says_what_it_is(wheel):
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
        told = email.message_from_bytes(packed.read(next(n for n in names if n.endswith("/METADATA"))))
    for path in (ROOT / "raywm").rglob("*"):
        if path.is_file() and path.suffix in (".py", ".yaml", ".html", ".typed") and "__pycache__" not in path.parts:
            assert path.relative_to(ROOT).as_posix() in names, path
    assert not [n for n in names if n.startswith(("tests/", "docs/", "build/"))]
    assert told["License-Expression"] == "Apache-2.0" and told["License-File"] == "LICENSE"
    assert "Typing :: Typed" in told.get_all("Classifier") and told["Requires-Python"] == ">=3.10"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_wheel_trains_in_a_fresh_environment_elsewhere(wheel, tmp_path):
    """A new environment with this one's libraries behind it: raywm must come from the wheel."""
    home, place = tmp_path / "venv", tmp_path / "place"
    place.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    python = home / "bin" / "python"
    site = next(home.glob("lib/python*/site-packages"))
    libraries = sysconfig.get_paths()["purelib"]
    pip = [sys.executable, "-m", "pip", f"--python={python}", "install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True)
    (site / "libraries.pth").write_text(f"{libraries}\n")  # its .pth files, an editable raywm's too, are not read
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    where = subprocess.run(
        [python, "-c", "import raywm; print(raywm.__file__)"], cwd=place, env=clean, capture_output=True, text=True
    )
    assert where.stdout.startswith(str(site)), where.stdout + where.stderr
    tiny = ["iterations=1", "collect.initial_steps=200", "fit.memory_steps=20", "evolve.generations=2"]
    tiny += ["evaluate.episodes=2", "target.episodes=1", "collect.workers=1", "dream.workers=1"]
    command = [str(home / "bin" / "raywm"), "train", "cartpole", *tiny]
    done = subprocess.run(command, cwd=place, env=clean, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (place / "runs" / "cartpole-seed0" / "report.html").is_file()
