"""What the documentation shows is run, and what it names is there."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from test_report import SMALL
from typer.testing import CliRunner

import raywm
from raywm import config as configs
from raywm.cli import app
from raywm.loops.saved import Saved

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "docs" / "examples"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TINY = [*SMALL, "iterations=1", "collect.initial_steps=200", "log.console=false", "fit.memory_steps=30"]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A user's directory with the examples importable."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for name in [name for name, m in sys.modules.items() if str(getattr(m, "__file__", "")).startswith(str(EXAMPLES))]:
        del sys.modules[name]


def said(example: str, start: str) -> list[str]:
    """The command in an example's docstring that begins like this, its arguments."""
    text = ast.get_docstring(ast.parse((EXAMPLES / example).read_text())) or ""
    return shlex.split(next(line for line in text.splitlines() if line.strip().startswith(start)))


def run(*arguments: str) -> str:
    torch.set_num_threads(1)
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, done.output
    return done.output


def script(name: str, *arguments: str) -> None:
    sys.argv[1:], before = list(arguments), sys.argv[1:]
    try:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    finally:
        sys.argv[1:] = before


def test_custom_environment(tmp_path):
    command = said("custom_environment.py", "raywm train")[1:]
    run(*command, *[key for key in TINY if not key.startswith("target.real_return")], "--in-process", "--out", "run")
    assert (tmp_path / "run" / "summary.json").is_file()


def test_custom_world_model_goes_through_everything(tmp_path, monkeypatch):
    command = said("custom_world_model.py", "raywm train")[1:]
    own = [key for key in TINY if not key.startswith("model.")]
    run(*command, *own, "fit.memory_steps=120", "--in-process", "--out", "run")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "could not be drawn" not in page and "custom_world_model:Drift" in page
    assert page.count("Not drawn: custom_world_model:Drift") == 3  # what only V and M have
    assert "Error of dreams under the real actions" in page and "alive" in page
    assert "dream_return_mean" in run("dream", "run", "--episodes", "5")
    assert Path(run("dream", "run", "--video").split()[-1]).is_file()
    run("evaluate", "run", "--episodes", "2")
    saved = Saved("run")
    assert type(saved.model).__name__ == "Drift" and saved.model.net[0].out_features == 64
    lines = (EXAMPLES / "custom_world_model.py").read_text().partition("class Drift")[2].splitlines()
    assert len(lines) <= 62
    # what is loaded does not import code: a stranger's run may name any module
    del sys.modules["custom_world_model"]
    with pytest.raises(ValueError, match="import custom_world_model first, if you trust it"):
        raywm.load_agent("run")


def test_custom_world_model_learns_the_cartpole():
    """The example's model is no toy: fitted to random play, it foresees CartPole better than "nothing changes"."""
    from raywm.loops.executor import InProcess

    fast = [
        "fit.memory_steps=400",
        "fit.threads=1",
        "collect.initial_steps=1500",
        "model.kind=custom_world_model:Drift",
    ]
    config = configs.load("cartpole", fast)
    with InProcess(config, Path("run")) as executor:
        torch.manual_seed(0)
        executor.rollouts.set_agent(executor.parts.first_agent())
        list(executor.rollouts.collect(range(60), "collect"))
        executor.rollouts.settle()
        ids = sorted(executor.rollouts.store.ids())
        done = executor.fit(executor.parts.weights, {}, ids, 0, lambda **_: None)
    assert done["quality"]["open_loop_5"] < 0.6 * done["quality"]["persist_5"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.kind=rssm"], "model.kind: got 'rssm', expected vm, or module:Class"),
        (["model.kind=no_such_module:X"], "no_such_module cannot be imported"),
        (["model.kind=custom_world_model:Drfit"], "has no 'Drfit'"),
        (["model.kind=os:getcwd"], "expected a subclass of raywm.models.base.WorldModel"),
        (["model.kind=custom_world_model:WorldModel"], "lacks"),
        (["model.kind=custom_world_model:Drift", "model.kwargs.hiden=3"], "hiden"),
        (["model.kind=custom_world_model:Drift", "model.hidden=3"], "model.hidden: got a value with model.kind"),
        (["model.kind=custom_world_model:Drift", "controller.features=z"], "controller.features"),
        (["model.kwargs.hidden=3"], "model.kwargs: got"),
    ],
)
def test_wrong_world_models_are_one_line(overrides, message, tmp_path):
    done = CliRunner().invoke(app, ["train", "cartpole", *overrides, "--in-process", "--out", "run"])
    assert done.exit_code == 2 and message in done.output and len(done.output.strip().splitlines()) == 1, done.output
    assert not (tmp_path / "run").exists()


def test_custom_learner(capsys):
    run("train", "cartpole", *TINY, "--in-process", "--out", "run")
    script("custom_learner.py", "run")
    out = capsys.readouterr().out
    fitness = [float(x) for x in re.findall(r"generation \d+: ([\d.]+) in the dream", out)]
    assert len(fitness) == 15 and max(fitness[-3:]) > fitness[0] and "in reality" in out


def test_offline_dataset(capsys):
    command = said("offline_dataset.py", "raywm collect")[1:]
    command[command.index("--episodes") + 1] = "20"
    run(*command, "--in-process", "log.console=false")
    script("offline_dataset.py", "data/cartpole", "40")
    assert re.findall(r"hidden (\d+): open_loop_1 0\.\d", capsys.readouterr().out) == ["16", "64"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_cluster_launch(tmp_path):
    import subprocess

    tiny = [*TINY, "dream.workers=1", "collect.workers=2", "--out", str(tmp_path / "run")]
    command = [sys.executable, str(EXAMPLES / "cluster_launch.py"), *tiny]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_what_there_is(page):
    """Links lead somewhere; config keys, presets and commands exist."""
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), link
    known = set(configs.keys())
    sections = set(configs.SECTIONS)
    for key in re.findall(r"`([a-z_]+\.[a-z_]+)(?:=[^`]*)?`", text):
        if key.partition(".")[0] in sections and not key.endswith((".py", ".json", ".yaml", ".png")):
            assert key in known or (ROOT / "raywm" / key.replace(".", "/")).with_suffix(".py").is_file(), key
    names = {command.name for command in app.registered_commands} | {g.name for g in app.registered_groups}
    names |= {command.callback.__name__ for command in app.registered_commands if command.callback}
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL)).replace("`", "")
    for command in re.findall(r"^raywm ([a-z]+)", code, re.MULTILINE):
        assert command in names, command
    for line in re.findall(r"^raywm train ([^\n#]+)", code, re.MULTILINE):
        parts = shlex.split(line)
        if parts[0] in configs.presets():
            configs.load(parts[0], [p for p in parts[1:] if "=" in p and not p.startswith(("-", "."))])
