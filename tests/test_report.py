"""The report, the videos and load_agent, on tiny runs of the real loop."""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from raywm import checkpoint, load_agent
from raywm import config as configs
from raywm.data.store import EpisodeStore
from raywm.evaluate import encoded_actions, fold
from raywm.log import RunLog
from raywm.loops.executor import InProcess
from raywm.loops.vmc import train
from raywm.report import dream_summary, dream_video, measure, plots, write_report
from raywm.report.load import Run
from raywm.report.page import reward_to_go, words
from raywm.report.videos import shown_episode

SMALL = [
    "collect.envs=2",
    "fit.threads=1",
    "fit.evaluate_every=10",
    "fit.memory_steps=40",
    "fit.batch=8",
    "fit.sequence=16",
    "model.hidden=16",
    "model.head_hidden=16",
    "evolve.generations=3",
    "evolve.population=4",
    "evolve.rollouts=2",
    "dream.unit=4",
    "dream.horizon=20",
    "target.episodes=2",
    "target.real_return=null",
    "budget.real_steps=null",
    "evaluate.episodes=3",
    "log.tensorboard=false",
]


class Pictures(gym.Env):
    """A bright square that an action moves left or right over a dark image; ends at the edges."""

    observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = int(self.np_random.integers(24, 40))
        return self._draw(), {}

    def step(self, action):
        self.x += 4 if action else -4
        return self._draw(), 1.0, not 4 <= self.x < 56, False, {}

    def _draw(self):
        image = np.full((64, 64, 3), 20, np.uint8)
        image[28:36, max(self.x, 0) : self.x + 8] = (250, 180, 60)
        return image


def play(out: Path, *overrides: str) -> Path:
    torch.set_num_threads(1)
    config = configs.load("cartpole", [*SMALL, *overrides])
    out.mkdir()
    configs.save(config, out / "config.yaml")
    with RunLog(out, tensorboard=False, console=False) as log, InProcess(config, out) as executor:
        train(config, out, executor, log)
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return play(tmp_path_factory.mktemp("runs") / "vector", "iterations=2", "collect.initial_steps=300")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return play(
        tmp_path_factory.mktemp("runs") / "images",
        f"env={{id: '{__name__}:Pictures', time_limit: 30}}",
        "iterations=1",
        "collect.initial_steps=60",
        "collect.episodes=2",
        "fit.vision_steps=20",
        "fit.vision_batch=16",
        "model.latent=4",
    )


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return write_report(run).read_text()


def test_page_is_whole_and_offline(run, page):
    summary = json.loads((run / "summary.json").read_text())
    for title in ("How far to trust this dream", "Fitness and reality", "Training V and M", "The latent space"):
        assert title in page
    assert "could not be drawn" not in page and "Not there yet" not in page
    (again,) = re.findall("<code>raywm (train .*)</code>", page)
    _, name, *given = shlex.split(html.unescape(again))
    assert given[-2:] == ["--out", f"{run}-again"]
    assert configs.load(name, given[:-2]) == configs.load(run / "config.yaml")
    assert plots.png(np.zeros((2, 2, 3), np.uint8)).startswith("data:image/png;base64,")
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', page)
    assert "@import" not in page and "<script" not in page
    assert f"{summary['random_return_mean']:,.1f}" in page
    assert page.count("<svg") >= 12


def test_charts_of_one_page_keep_their_ids_and_colours_apart(page):
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"(?:url\(#|href=\"#)([^\")]+)", page))
    assert used and used <= set(ids)
    assert not re.findall(r"#(0[1-8])\1\1\b", page)  # placeholders that the page's colours should have replaced


def test_report_only_adds_the_page(run):
    def files():
        every = (p for p in run.rglob("*") if p.is_file() and p.name != "report.html")
        return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in every}

    before = files()
    write_report(run)
    assert files() == before


@pytest.mark.parametrize("stage", ["started", "collected", "no summary"])
def test_unfinished_run_says_what_is_missing(run, tmp_path, stage):
    part = tmp_path / "run"
    shutil.copytree(run, part)
    (part / "summary.json").unlink()
    if stage == "started":
        shutil.rmtree(part / "checkpoints")
        shutil.rmtree(part / "episodes")
        (part / "metrics.jsonl").write_text("")
    if stage == "collected":
        shutil.rmtree(part / "checkpoints")
        first = (part / "metrics.jsonl").read_text().splitlines()[0]
        (part / "metrics.jsonl").write_text(first + '\n{"kind": "fit", "tim')  # killed while it wrote
    page = write_report(part).read_text()
    assert "could not be drawn" not in page
    assert ("Not there yet" in page) == (stage != "no summary")
    assert "<b>–</b>" in page if stage != "no summary" else "best trial so far" in page


def test_no_run_directory_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.yaml, expected the directory of a run"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match=r"has no config\.yaml"):
        load_agent(tmp_path)


def test_load_agent_acts_as_the_run_did(run):
    """The last turn's trial episodes, played again from their observations alone, give the very same actions."""
    store = EpisodeStore(run / "episodes", read_only=True)
    of = Run(run)
    live = load_agent(run)
    assert of.trials
    for episode in of.trials:
        live.reset()
        for t in range(len(episode) - 1):
            assert live.act(episode.obs["vector"][t]) == episode.action[t + 1]
    store.close()


def test_load_agent_takes_many_at_once(run):
    episodes = Run(run).held_out[:1] * 2
    single, both = load_agent(run), load_agent(run)
    both.reset(2)
    for t in range(len(episodes[0])):
        obs = episodes[0].obs["vector"][t]
        action = both.act({"vector": np.stack([obs, obs])})
        assert action.shape == (2,) and action[0] == action[1] == single.act(obs)


def test_load_agent_needs_neither_ray_nor_the_environment(run, tmp_path):
    part = tmp_path / "run"
    shutil.copytree(run, part)
    text = (part / "config.yaml").read_text()
    (part / "config.yaml").write_text(text.replace("CartPole-v1", "NotInstalled-v7"))
    code = (
        "import sys, raywm; assert not {'torch', 'ray', 'gymnasium'} & set(sys.modules);"
        f"agent = raywm.load_agent({str(part)!r}); agent.reset(); print(agent.act([0.0, 0.0, 0.0, 0.0]));"
        "assert 'ray' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("0", "1")


def test_reading_a_live_run_leaves_its_checkpoints_alone(run, tmp_path):
    """A checkpoint that is being written is nobody's to clear but its writer's."""
    part = tmp_path / "run"
    shutil.copytree(run, part)
    writing = part / "checkpoints" / ".tmp-000099-1"
    writing.mkdir()
    load_agent(part)
    assert writing.is_dir()
    checkpoint.load(part / "checkpoints")
    assert not writing.exists()


def test_foreign_model_is_a_clear_error(run, tmp_path):
    part = tmp_path / "run"
    shutil.copytree(run, part)
    (part / "config.yaml").write_text((part / "config.yaml").read_text().replace("hidden: 16", "hidden: 24"))
    with pytest.raises(ValueError, match="holds other parameters than raywm .* of another shape is memory"):
        load_agent(part)


def test_posteriors_are_what_folding_an_episode_gives(run):
    of = Run(run)
    episodes = sorted(of.held_out, key=len)[-2:]
    rows = max(len(e) for e in episodes)
    states, exists = measure.posteriors(of, episodes, rows, None)
    for b, episode in enumerate(episodes):
        last = len(episode) - 1
        assert exists[:, b].sum() == len(episode)
        obs = {k: torch.tensor(np.asarray(v)) for k, v in episode.obs.items()}
        folded = fold(of.model, obs, torch.from_numpy(encoded_actions(episode, of.codec)), 0, last)
        for name, leaf in folded.items():
            torch.testing.assert_close(states[name][last, b], leaf[0], atol=1e-5, rtol=1e-4)


def test_replays_begin_in_reality(run):
    of = Run(run)
    episode = max(of.held_out, key=len)
    replay = measure.replay(of, episode, 10, 5)
    start = replay.decoded(of.model)["vector"][0]
    np.testing.assert_allclose(start, np.repeat(episode.obs["vector"][:1], 5, 0), atol=1e-5)
    assert replay.states["z"].shape[:2] == (min(10, len(episode)), 5)
    assert (np.diff(replay.alive, axis=0) <= 0).all()


def test_calibration_tells_a_right_forecast_from_wrong_ones():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(2000, 1))
    right = measure.Predictions(rng.normal(size=(2000, 200, 1)), truth).pit
    sure = measure.Predictions(0.3 * rng.normal(size=(2000, 200, 1)), truth).pit
    shifted = measure.Predictions(rng.normal(size=(2000, 200, 1)) + 1, truth).pit
    assert abs(np.mean((right > 0.05) & (right < 0.95)) - 0.9) < 0.03 and abs(right.mean() - 0.5) < 0.03
    assert np.mean((sure > 0.05) & (sure < 0.95)) < 0.6
    assert shifted.mean() < 0.35


def test_principal_components_of_a_line():
    t = np.linspace(-1, 1, 50)
    points, shares = measure.principal(np.stack([3 * t, 4 * t, 0 * t], 1))
    np.testing.assert_allclose(np.abs(points[:, 0]), np.abs(5 * t), atol=1e-9)
    np.testing.assert_allclose(shares, [1, 0], atol=1e-9)


def test_reward_to_go_is_what_is_still_to_come(run):
    episode = Run(run).held_out[0]
    assert reward_to_go(episode)[0] == episode.ret
    assert reward_to_go(episode)[-1] == 0


def test_verdicts():
    assert "close to reality" in words(0.05, "The dream", "")
    assert "flatters by 20%" in words(0.2, "The dream", "")
    assert "do not trust" in words(3.0, "The dream", "; it cheats") and "cheats" in words(
        3.0, "The dream", "; it cheats"
    )
    assert "too gloomy" in words(-0.5, "The dream", "; it cheats") and "cheats" not in words(-0.5, "x", "; it cheats")


def test_dream_summary(run):
    summary = json.loads((run / "summary.json").read_text())
    dreamt = dream_summary(run, 30, seed=5)
    assert dreamt == dream_summary(run, 30, seed=5)
    assert 1 <= dreamt["dream_length_mean"] <= 20 and dreamt["dream_episodes"] == 30
    assert dreamt["real_return_mean"] == summary["real_return_mean"]
    assert dreamt["dream_gap"] == pytest.approx(dreamt["dream_return_mean"] - summary["real_return_mean"])


def test_images_are_shown_and_filmed(pictures):
    import imageio.v2 as imageio

    page = write_report(pictures).read_text()
    assert "could not be drawn" not in page
    assert page.count("data:video/mp4;base64,") == 2
    assert "the worst frames" in page and "its reconstruction, the dream" in page
    first = pictures / "videos" / "dream_vs_real.mp4"
    with imageio.get_reader(first) as film:
        frames = [np.asarray(frame) for frame in film]
    episode = shown_episode(Run(pictures))
    assert len(frames) == len(episode)
    # the left panel is reality: the bright square is where the episode has it
    scale, row = 4, len(frames) // 2
    panel = frames[row][26 : 26 + 64 * scale : scale, 8 : 8 + 64 * scale : scale]
    seen, true = panel[30, :, 0] > 130, episode.obs["image"][row][30, :, 0] > 130
    assert true.sum() == 8 and np.mean(seen == true) > 0.95
    assert (pictures / "videos" / "dream.mp4").stat().st_size > 500
    assert not list((pictures / "videos").glob(".*"))


def test_vector_video(run):
    import imageio.v2 as imageio

    with imageio.get_reader(dream_video(run)) as film:
        frames = [np.asarray(frame) for frame in film]
    assert len(frames) > 3 and frames[0].shape[2] == 3
    assert np.any(frames[0] != frames[-1])
