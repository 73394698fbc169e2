"""The command line, with stand-ins for what it runs: arguments, errors in one line, resumes, Ctrl-C."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
from typer.testing import CliRunner

from raywm import config as configs
from raywm.cli import app

ROOT = Path(__file__).parents[1]


class World:
    """Stand-ins for the modules that commands import, and what was asked of them."""

    def __init__(self, monkeypatch):
        self.calls: list[tuple] = []
        self.error: BaseException | None = None
        self._patch = monkeypatch
        self.module("raywm.loops.vmc", train=self.loop("train"), collect=self.loop("collect"))
        self.module("raywm.loops.executor", InProcess=lambda *a: self.executor("in-process", *a))
        self.module("raywm.runtime.executor", RayExecutor=lambda *a: self.executor("ray", *a))
        report = {"write_report": self.write_report, "dream_video": self.dream_video}
        self.module("raywm.report", dream_summary=self.dream_summary, **report)
        self.module("raywm.agent", load_agent=lambda run: types.SimpleNamespace(agent=f"agent of {run}"))
        self.module("raywm.evaluate", evaluate=self.evaluate)
        self.module("raywm.loops.parts", Parts=lambda config: None)
        self.module("raywm.loops.shared", share=lambda config, out: None)
        self.module("raywm.bench.dream", main=lambda **options: self.calls.append(("bench", options)))

    def module(self, name, **content):
        module = types.ModuleType(name)
        vars(module).update(content)
        self._patch.setitem(sys.modules, name, module)

    def executor(self, kind, *arguments):
        world = self

        class Executor:
            def __enter__(self):
                world.calls.append(("open", kind, arguments[2:]))
                return self

            def __exit__(self, *exc):
                world.calls.append(("close", kind))

        return Executor()

    def loop(self, name):
        def run(config, out, executor, log):
            self.calls.append((name, config, out))
            log.write("turn", iteration=1)
            if self.error:
                raise self.error
            return {"real_return_mean": 499.25, "seed": config.seed, "history": [1, 2]}

        return run

    def write_report(self, run):
        (run / "report.html").write_text("<html>")
        return run / "report.html"

    def dream_video(self, run):
        return run / "videos" / "dream.mp4"

    def evaluate(self, agent, env, seed, episodes, progress):
        self.calls.append(("evaluate", agent, env.id, seed, episodes))
        progress(episodes)
        return {"return_mean": float("nan"), "episodes": episodes}

    def dream_summary(self, run, episodes, seed):
        return {"dream_return_mean": 7.0}


@pytest.fixture
def world(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAYWM_DEBUG", raising=False)
    return World(monkeypatch)


def raywm(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def fails(*arguments: str) -> str:
    """The one line of a command that fails."""
    result = raywm(*arguments)
    assert result.exit_code == 2 and result.stdout == "" and result.stderr.count("\n") == 1, result.output
    assert result.stderr.startswith("error: ")
    return result.stderr


def test_train_makes_a_run(world):
    result = raywm("train", "cartpole", "seed=3", "collect.workers=4")
    out = Path("runs/cartpole-seed3")
    assert result.exit_code == 0, result.output
    kinds = [call[0] for call in world.calls]
    assert kinds == ["open", "train", "close"] and world.calls[0][1:] == ("ray", (None,))
    assert world.calls[1][1].collect.workers == 4
    assert configs.load(out / "config.yaml").seed == 3
    assert json.loads((out / "metrics.jsonl").read_text())["kind"] == "turn"
    assert "499.25" in result.stdout and str(out / "report.html") in result.stdout


def test_address_out_and_one_process(world):
    assert raywm("train", "cartpole", "--out", "a", "--address", "10.0.0.1:6379").exit_code == 0
    assert world.calls[0][1:] == ("ray", ("10.0.0.1:6379",))
    assert configs.load(Path("a/config.yaml")).address == "10.0.0.1:6379"
    assert raywm("train", "a/config.yaml", "--out", "b", "--in-process").exit_code == 0
    assert world.calls[-2][0] == "train" and world.calls[-1] == ("close", "in-process")


def test_a_run_is_not_overwritten_and_resume_serves_restarts(world):
    assert raywm("train", "cartpole", "--out", "a", "--resume").exit_code == 0  # nothing there yet: starts
    assert "already holds a run" in fails("train", "cartpole", "--out", "a")
    assert raywm("train", "cartpole", "iterations=20", "--out", "a", "--resume").exit_code == 0
    assert configs.load(Path("a/config.yaml")).iterations == 20
    assert "fit.lr: got 0.5, but the run was started with 0.003" in fails(
        "train", "cartpole", "fit.lr=0.5", "--out", "a", "--resume"
    )
    assert configs.load(Path("a/config.yaml")).fit.lr == 3e-3


def test_directories_that_are_no_runs(world):
    Path("full").mkdir()
    Path("full/thesis.tex").write_text("x")
    assert "holds no run" in fails("train", "cartpole", "--out", "full", "--resume")
    assert "got a file" in fails("train", "cartpole", "--out", "full/thesis.tex")
    Path("empty").mkdir()
    assert raywm("train", "cartpole", "--out", "empty").exit_code == 0
    assert not world.calls[-1][0] == "error" and os.listdir("full") == ["thesis.tex"]


def test_two_processes_do_not_write_one_run(world):
    inner = []
    world.module("raywm.loops.vmc", train=lambda *a: inner.append(fails("train", "cartpole", "--out", "a", "--resume")))
    raywm("train", "cartpole", "--out", "a")
    assert "is being written by another process" in inner[0]


def test_collect(world):
    made = []
    world.module("raywm.runtime.collect", collect_dataset=lambda *a, **k: made.append((a, k)) or {"episodes": 3})
    result = raywm("collect", "cartpole", "--out", "a b", "--episodes", "3", "collect.workers=4", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout) == {"episodes": 3}
    ((config, out), options) = made[0]
    assert out == "a b" and config.collect.workers == 4 and options["episodes"] == 3 and not options["resume"]
    assert "'a b'" in options["made_with"]
    assert raywm("collect", "Pendulum-v1", "seed=2").exit_code == 0
    assert made[1][0][0].env.id == "Pendulum-v1" and made[1][0][1] == "data/Pendulum-v1-seed2"

    def interrupted(*a, **k):
        raise KeyboardInterrupt

    world.module("raywm.runtime.collect", collect_dataset=interrupted)
    result = raywm("collect", "cartpole", "--steps", "5", "--fast")
    assert result.exit_code == 130 and "--steps 5 --fast --resume" in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("train", "cartpol"), "did you mean 'cartpole'"),
        (("train", "cartpole", "collect.workerz=3"), "did you mean 'collect.workers'?"),
        (("train", "cartpole", "seed=x"), "seed: got 'x', expected a whole number"),
        (("train", "none.yaml"), "no config file none.yaml"),
        (("evaluate", "runs/none"), "no run in runs/none"),
        (("report", "."), "no run in ."),
        (("dream", "nowhere/else"), "no run in nowhere/else"),
    ],
)
def test_bad_input_is_one_line(world, arguments, said):
    assert said in fails(*arguments)
    assert not list(Path().iterdir())


def test_a_run_with_a_typo_finds_its_neighbour(world):
    raywm("train", "cartpole")
    assert "did you mean runs/cartpole-seed0?" in fails("evaluate", "runs/cartpole-seed")


def test_errors_from_the_depths(world):
    class FromWorker(ValueError):
        cause = ValueError("episode 3, row 7: reward is nan")

    world.error = FromWorker("Traceback (remote)\n  many\n  lines")
    result = raywm("train", "cartpole", "--out", "a")
    assert result.exit_code == 2 and result.stderr.startswith("error: episode 3, row 7: reward is nan; ")
    assert result.stderr.endswith("continue with --resume\n") and result.stderr.count("\n") == 1
    world.error = OSError(errno.ENOSPC, "the disk is full, could not write x;\nfree some space and continue")
    result = raywm("train", "cartpole", "--out", "a", "--resume")
    assert (
        result.exit_code == 2
        and result.stderr == "error: the disk is full, could not write x; free some space and continue\n"
    )
    assert world.calls[-1] == ("close", "ray")
    world.error = KeyError("a bug")
    assert isinstance(raywm("train", "cartpole", "--out", "a", "--resume").exception, KeyError)


def test_debug_shows_the_traceback(world, monkeypatch):
    assert "Traceback" in raywm("--debug", "train", "cartpol").output
    assert "Traceback" not in raywm("train", "cartpol").output
    monkeypatch.setenv("RAYWM_DEBUG", "1")
    assert "Traceback" in raywm("train", "cartpol").output


def test_ctrl_c_names_the_command_that_continues(world):
    world.error = KeyboardInterrupt()
    result = raywm("train", "cartpole", "env.kwargs={a: 1}", "--address", "auto")
    assert result.exit_code == 130 and world.calls[-1] == ("close", "ray")
    command = "raywm train cartpole 'env.kwargs={a: 1}' --out runs/cartpole-seed0 --address auto --resume"
    assert f"continue with: {command}\n" in result.stderr
    world.error = None
    assert raywm("train", "cartpole", "env.kwargs={a: 1}", "--address", "auto", "--resume").exit_code == 0


def test_evaluate(world):
    raywm("train", "cartpole", "seed=5", "--out", "a")
    result = raywm("evaluate", "a", "--episodes", "3", "--json")
    assert json.loads(result.stdout) == {"return_mean": None, "episodes": 3}
    assert world.calls[-1] == ("evaluate", "agent of a", "CartPole-v1", 5, 3)
    result = raywm("evaluate", "a", "--seed", "0")
    assert world.calls[-1][3:] == (0, 100) and re.search(r"episodes\s+100", result.stdout)


def test_dream_report_and_bench(world):
    raywm("train", "cartpole", "--out", "a")
    assert json.loads(raywm("dream", "a", "--json").stdout) == {"dream_return_mean": 7.0}
    assert "dream.mp4" in raywm("dream", "a", "--video").stdout
    assert "a/report.html" in raywm("report", "a").stdout
    assert raywm("bench", "dream", "--seconds", "2").exit_code == 0
    assert world.calls[-1] == ("bench", {"seconds": 2.0, "as_json": False, "out": None})


@pytest.mark.parametrize(
    "command",
    [
        *[(), ("train",), ("collect",), ("evaluate",), ("dream",), ("report",)],
        *[("bench", what) for what in ("dream", "collect", "replay", "scale")],
    ],
)
def test_help_is_one_screen_with_an_example(command):
    result = raywm(*command, "--help")
    assert result.exit_code == 0 and len(result.stdout.splitlines()) <= 32
    assert f"raywm {' '.join(command)}" in result.stdout


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_the_real_command_stops_at_a_signal(tmp_path, sent):
    # a process of its own: what CliRunner cannot show is that a signal reaches us and the exit code is the shell's
    code = (
        "import sys, time, types\n"
        "def train(*a): print('training', flush=True); time.sleep(60)\n"
        "class E:\n"
        "    def __init__(self, *a): pass\n"
        "    def __enter__(self): return self\n"
        "    def __exit__(self, *a): pass\n"
        "parts = {'loops.vmc': {'train': train}, 'loops.executor': {'InProcess': E}, 'loops.parts': {'Parts': id}}\n"
        "parts['loops.shared'] = {'share': lambda *a: None}\n"
        "for name, content in parts.items():\n"
        "    module = sys.modules['raywm.' + name] = types.ModuleType(name); vars(module).update(content)\n"
        "from raywm.cli import main\n"
        "main()"
    )
    arguments = ["train", "cartpole", "log.tensorboard=false", "--in-process", "--out", str(tmp_path / "a")]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        # a shell's background jobs ignore SIGINT, and so would this child
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        while (line := process.stdout.readline()).strip() != "training":
            assert line, process.stderr.read()
        process.send_signal(sent)
        _, said = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 128 + sent and said.strip().endswith("--in-process --resume"), said
