"""Comparing runs, and all pages in a real browser: on a desk and on a phone, in light and in dark."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from browser import FAINT, OVERFLOW, Browser
from test_dreamer_report import SMALL as DREAMER
from test_report import play
from typer.testing import CliRunner

from raywm import config as configs
from raywm.cli import app
from raywm.report import dreamer_measure, write_report
from raywm.report.compare import Result, grouped, write_comparison


def dreamer(out: Path, *overrides: str) -> Path:
    done = CliRunner().invoke(
        app, ["train", "dreamer-cartpole", *DREAMER, *overrides, "--in-process", "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dreamer_measure, "EPISODES", 3)
        patch.setattr(dreamer_measure, "STEPS", 20)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """V-M-C with two seeds, V-M-C with another controller, Dreamer."""
    folder, short = tmp_path_factory.mktemp("runs"), ("iterations=2", "collect.initial_steps=200")
    vmc = [play(folder / f"vmc{seed}", *short, f"seed={seed}") for seed in (3, 4)]
    return [*vmc, play(folder / "mlp", *short, "controller.kind=mlp"), dreamer(folder / "dreamer")]


@pytest.fixture(scope="module")
def page(runs) -> Path:
    return write_comparison(runs, runs[0].parent / "out" / "comparison.html")


def test_seeds_are_grouped_and_what_differs_is_told(runs):
    groups = grouped([Result(run) for run in runs])
    assert [len(g.runs) for g in groups] == [2, 1, 1]
    assert [g.label for g in groups] == [
        "A: V-M-C, controller.kind=linear",
        "B: V-M-C, controller.kind=mlp",
        "C: Dreamer",
    ]
    assert groups[0].values["controller.kind"] == "linear" and "controller.kind" not in groups[2].values
    assert "rssm.size" not in groups[2].values  # all groups that use it agree
    assert not any(key.startswith(("seed", "log.")) for key in groups[0].values)


def test_page_has_the_means_and_ranges_of_the_summaries(runs, page):
    text = page.read_text().replace("\u00a0", " ")
    one, two = (json.loads((run / "summary.json").read_text()) for run in runs[:2])
    low, high = sorted([one["real_return_mean"], two["real_return_mean"]])
    shown = [f"{x:,.1f}" if x != int(x) else f"{int(x)}" for x in ((low + high) / 2, low, high)]
    if low < 10:
        shown = [
            f"{x:,.2f}" if abs(x) < 10 and x != int(x) else s for x, s in zip(((low + high) / 2, low, high), shown)
        ]
    assert f"{shown[0]} ({shown[1]} to {shown[2]})" in text
    steps = sorted([one["real_env_steps"], two["real_env_steps"]])
    assert f"({steps[0]:,} to {steps[1]:,})" in text
    assert "could not" not in text and "No dream gap" not in text
    assert text.count("<svg") == 2 and not re.findall(r"#(0[1-9a-f])\1\1\b", text)
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', text) and "<script" not in text
    assert 'href="../dreamer/report.html"' in text and "raywm train cartpole seed=4" in text


def test_curves_begin_with_the_first_policy_and_end_with_the_last_measurement(runs):
    for run in runs:
        result, summary = Result(run), json.loads((run / "summary.json").read_text())
        random = summary["random_return_mean"]  # None: none of the first policy's episodes has ended
        assert random is None or result.points[0].tolist() == [0, 0, random]
        assert result.points[-1, 0] == summary["real_env_steps"] and result.points[-1, 2] == summary["real_return_mean"]
        assert (np.diff(result.points[:, :2], axis=0) >= 0).all()
        assert result.points[-1, 1] == pytest.approx(summary["wall_seconds"], abs=2)


def test_logs_without_seconds_are_timed_by_their_stamps(runs, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(runs[0], old)
    rows = [json.loads(line) for line in (old / "metrics.jsonl").read_text().splitlines()]
    told = "".join(json.dumps({k: v for k, v in row.items() if k != "wall_seconds"}) + "\n" for row in rows)
    (old / "metrics.jsonl").write_text(told)
    np.testing.assert_allclose(Result(old).points[:, 1], Result(runs[0]).points[:, 1], atol=1.0)


def test_unfinished_runs_and_other_environments_are_told(runs, tmp_path):
    part = tmp_path / "part"
    shutil.copytree(runs[0], part)
    (part / "summary.json").unlink()
    text = (part / "config.yaml").read_text()
    (part / "config.yaml").write_text(text.replace("CartPole-v1", "Acrobot-v1"))
    page = write_comparison([runs[1], part], tmp_path / "c.html").read_text()
    assert "different environments" in page and "Not finished" in page and "do not overlap" not in page
    started = tmp_path / "started"
    started.mkdir()
    for name in ("config.yaml", "spaces.json"):
        shutil.copy(runs[0] / name, started)
    page = write_comparison([started, part], tmp_path / "d.html").read_text()
    assert "–" in page


def test_command_and_its_wrong_arguments(runs, tmp_path):
    def report(*arguments):
        return CliRunner().invoke(app, ["report", *map(str, arguments)])

    out = tmp_path / "new" / "c.html"
    done = report(runs[0], runs[1], "--out", out)
    assert done.exit_code == 0 and str(out) in done.output and out.is_file()
    for wrong, said in (
        ((runs[0], runs[0]), "different runs"),
        ((runs[0], tmp_path), "no run in"),
        ((runs[0], "--out", out), "got one run"),
        ((runs[0], runs[1], "--out", tmp_path), "got a directory"),
    ):
        done = report(*wrong)
        assert done.exit_code == 2 and said in done.output, done.output


@pytest.mark.parametrize("preset", ["cartpole", "dreamer-cartpole", "doom-take-cover"])
def test_the_command_gives_the_config(preset):
    overrides = ["seed=7", "env.id=X-v0", "env.kwargs={a: [1, 'b c']}", "log.console=false", "target.real_return=null"]
    config = configs.load(preset, [*overrides, "env.resize=[32, 32]", "evaluate.episodes=3"])
    name, *given = configs.command(config)
    assert configs.load(name, given) == config and name == preset and len(given) <= 7


@pytest.fixture(scope="module")
def pages(runs, page) -> list[Path]:
    """A comparison, a Dreamer's page and V-M-C's."""
    return [page, runs[-1] / "report.html", write_report(runs[0])]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


def test_the_browser_sees_what_is_wrong(browser, tmp_path):
    """A page with every fault: the checks below can fail."""
    page = tmp_path / "bad.html"
    meta = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    wide = '<p style="width:900px;color:#eee">wide and faint</p><img src="http://127.0.0.1:9/x.png">'
    page.write_text(f"<!doctype html>{meta}{wide}<script>missing()</script>")
    browser.open(page, 375, "light")
    assert browser.ask(OVERFLOW) and browser.ask(FAINT)
    assert browser.requests() == ["http://127.0.0.1:9/x.png"] and browser.complaints()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1200])
def test_pages_in_a_browser(browser, pages, width, scheme):
    """No request, no complaint, nothing that sticks out or cannot be read. RAYWM_SHOTS: a folder for screenshots."""
    for path in pages:
        browser.open(path, width, scheme)
        assert browser.requests() == [] and browser.complaints() == [], path
        assert browser.ask("document.documentElement.scrollWidth") <= width
        assert browser.ask(OVERFLOW) == [] and browser.ask(FAINT) == [], path
        assert browser.ask("[...document.querySelectorAll('nav a')].every(a => document.querySelector(a.hash))")
        ground = browser.ask("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground))) < 200) == (scheme == "dark")
        # a duration stays on one line
        assert browser.ask("[...document.querySelectorAll('.tile:last-child b')].every(b => b.clientHeight < 40)")
        if shots := os.environ.get("RAYWM_SHOTS"):
            browser.screenshot(Path(shots) / f"{path.parent.name}-{width}-{scheme}.png")
