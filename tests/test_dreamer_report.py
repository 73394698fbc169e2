"""The report, the dreams and the videos of tiny Dreamer runs, and their measurements on models that are known."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from raywm.cli import app
from raywm.data.episode import Episode
from raywm.data.store import EpisodeStore
from raywm.models.base import Step
from raywm.report import dream_summary, dream_video, dreamer_measure, write_report
from raywm.report.dreamer_measure import CONTEXT, OpenLoop, errors, open_loop, own_dreams, play, spread_of, windows
from raywm.report.dreamer_plots import thinned
from raywm.report.dreamer_videos import difference
from raywm.report.load import DreamerRun

SMALL = [
    "collect.envs=2",
    "rssm={size: nano, deter: 16, stoch: 4, classes: 4, units: 16, hidden: 16, depth: 2, bins: 21}",
    "dreamer={batch: 2, sequence: 8, threads: 1, actor_layers: 1, horizon: 3}",
    "online={steps: 120, prefill: 60, train_ratio: 2, evaluate_every: 40, evaluate_episodes: 2}",
    "target.real_return=null",
    "evaluate.episodes=2",
    "log.tensorboard=false",
    "log.console=false",
]


class Square(gym.Env):
    """A bright square that an action moves over a dark image; ends at the edges."""

    observation_space = gym.spaces.Box(0, 255, (16, 16, 3), np.uint8)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = 6
        return self._draw(), {}

    def step(self, action):
        self.x += 1 if self.np_random.random() < 0.5 else -1
        return self._draw(), 1.0, not 0 < self.x < 12, False, {}

    def _draw(self):
        image = np.full((16, 16, 3), 20, np.uint8)
        image[6:10, self.x : self.x + 4] = 250
        return image


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dreamer_measure, "EPISODES", 3)
        patch.setattr(dreamer_measure, "STEPS", 20)
        yield


def train(out: Path, *overrides: str) -> Path:
    done = CliRunner().invoke(app, ["train", "dreamer-cartpole", *SMALL, *overrides, "--in-process", "--out", str(out)])
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "vector")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "images", f"env={{id: '{__name__}:Square', time_limit: 30}}")


def test_training_ends_with_the_page(run):
    page = (run / "report.html").read_text()
    for title in ("By real steps", "By wall-clock", "The dream gap", "KL of posterior and prior", "Entropies", "Busy"):
        assert title in page
    assert "could not be drawn" not in page and "Not there yet" not in page
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', page)
    assert page.count("<svg") >= 18
    assert f"{json.loads((run / 'summary.json').read_text())['updates']}</b>" in page


def test_page_of_images(pictures):
    page = (pictures / "report.html").read_text()
    assert "could not be drawn" not in page
    assert page.count("data:video/mp4;base64,") == 2 and "seen 1, seen 3, seen 5, +1" in page


def test_new_episodes_are_new_cut_and_the_same_again(run):
    first, again = play(DreamerRun(run)), play(DreamerRun(run))
    store = EpisodeStore(run / "episodes", read_only=True)
    assert len(first) == 3 and not {e.id for e in first} & set(store.ids())
    store.close()
    for a, b in zip(first, again):
        assert a.steps <= 20
        np.testing.assert_array_equal(a.obs["vector"], b.obs["vector"])


def test_unfinished_run_says_what_is_missing(run, tmp_path):
    part = tmp_path / "run"
    shutil.copytree(run, part)
    (part / "summary.json").unlink()
    shutil.rmtree(part / "checkpoints")
    page = write_report(part).read_text()
    assert "could not be drawn" not in page and page.count("Not there yet") == 3
    with pytest.raises(ValueError, match="checkpoint"):
        dream_summary(part)


def test_dream_summary_and_its_command(run):
    dreamt = dream_summary(run, 7, seed=5)
    assert dreamt == dream_summary(run, 7, seed=5)
    assert dreamt["horizon"] == 20 and dreamt["dream_episodes"] == 7 and dreamt["real_episodes"] == 3
    assert dreamt["real_return_mean"] == np.mean([e.ret for e in play(DreamerRun(run))])
    assert dreamt["dream_gap"] == pytest.approx(dreamt["dream_return_mean"] - dreamt["real_return_mean"])
    done = CliRunner().invoke(app, ["dream", str(run), "--episodes", "7", "--seed", "5", "--json"])
    assert json.loads(done.output.strip().splitlines()[-1]) == pytest.approx(dreamt)


def test_vector_video(run):
    import imageio.v2 as imageio

    with imageio.get_reader(dream_video(run)) as film:
        frames = [np.asarray(frame) for frame in film]
    assert len(frames) > 3 and np.any(frames[0] != frames[-1])


def test_video_shows_the_truth_at_the_left(pictures):
    import imageio.v2 as imageio

    chosen = windows(play(DreamerRun(pictures)), 4)
    with imageio.get_reader(pictures / "videos" / "dream_vs_real.mp4") as film:
        frames = [np.asarray(frame) for frame in film]
    assert len(frames) == sum(min(len(e) - start, CONTEXT + dreamer_measure.AHEAD) for e, start in chosen)
    episode, start = chosen[0]
    panel = frames[3][26 + 8 : 26 + 256 : 16, 8 + 8 : 8 + 256 : 16]  # the middles of 16 x 16 enlarged pixels
    np.testing.assert_array_equal(panel[8, :, 0] > 130, episode.obs["image"][start + 3][8, :, 0] > 130)


# ------------------------------------------------------------------------------------------------ models that are known


class Known:
    """The state is the observation; a step of the dream adds the action times `drift`. Rewards are 1."""

    act_dim = 1

    def __init__(self, drift=1.0, cont=1.0):
        self.drift, self.cont = drift, cont

    def initial(self, batch):
        return {"x": torch.full((batch, 2), 99.0)}

    def noise(self, batch, rng):
        return {}

    def posterior(self, state, action, obs, first, noise):
        return {"x": obs["vector"].clone()}

    def imagine(self, state, action, noise, temperature=1.0):
        batch = len(action)
        return Step({"x": state["x"] + self.drift * action}, torch.ones(batch), torch.full((batch,), self.cont))

    def features(self, state):
        return state["x"]

    def decode(self, state):
        return {"vector": state["x"]}


def walk(steps: int, name: str = "a") -> Episode:
    """Both numbers grow by the action: 0.1, 0.2, ..."""
    action = np.arange(steps + 1, dtype=np.float32)[:, None] / 10
    flags = np.zeros((3, steps + 1), bool)
    flags[0, 0] = flags[1, -1] = True
    obs = {"vector": np.repeat(np.cumsum(action, 0), 2, 1).astype(np.float32)}
    return Episode(name, obs, action, np.ones(steps + 1, np.float32), *flags)


def known(model, episodes, horizon=20):
    actor = SimpleNamespace(sample=lambda features, noise: torch.ones(len(features), 1))
    return SimpleNamespace(
        trained=SimpleNamespace(model=model, actor=actor),
        played=episodes,
        horizon=horizon,
        codec=SimpleNamespace(encode=lambda action: action),
        seed=lambda *path: 0,
    )


def test_open_loop_of_a_true_model_is_true_and_of_a_dead_one_is_nothing_changes():
    episodes = [walk(40), walk(9, "b")]
    chosen = windows(episodes, 8, 20)
    assert {e.id for e, _ in chosen} == {"a", "b"} and len({start for e, start in chosen if e.id == "a"}) > 2
    spread = spread_of(episodes, "vector")
    np.testing.assert_allclose(spread, np.concatenate([e.obs["vector"] for e in episodes]).std(0), rtol=1e-5)
    true = open_loop(known(Known(), episodes), chosen, 20, 3)
    model, still = errors(true, "vector", spread)
    assert model.max() < 1e-5 and (np.diff(still) > 0).sum() > 10
    model, still = errors(open_loop(known(Known(drift=0.0), episodes), chosen, 20, 3), "vector", spread)
    np.testing.assert_allclose(model, still)


def test_open_loop_knows_where_episodes_end_and_what_it_has_seen():
    short = walk(9)
    loop = open_loop(known(Known(cont=0.5), [short]), [(short, 0)], 12, 2)
    assert loop.exists[:, 0].tolist() == [True] * 10 + [False] * 2
    np.testing.assert_array_equal(loop.truth["vector"][:10, 0], short.obs["vector"])
    assert (loop.alive[:CONTEXT] == 1).all() and loop.alive[CONTEXT + 1, 0, 0] == 0.25
    model, _ = errors(loop, "vector", spread_of([short], "vector"))
    assert np.isfinite(model).tolist() == [True] * 6 + [False] * 2


def test_error_of_an_image_is_of_all_its_pixels():
    truth = np.zeros((CONTEXT + 1, 1, 2, 2, 1), np.uint8)
    truth[-1, 0, 0, 0] = 100
    model = np.repeat(truth[:, :, None], 2, 2)
    model[-1] = 0
    loop = OpenLoop({"image": truth}, {"image": model}, np.ones((CONTEXT + 1, 1), bool), np.ones((CONTEXT + 1, 1, 2)))
    spread = np.zeros((2, 2, 1))
    spread[0, 0] = 25.0  # of one pixel in four: root mean square 12.5; the error is 100 in one of four, 50
    assert errors(loop, "image", spread)[0].tolist() == [0.0, 4.0]


@pytest.mark.parametrize(("cont", "expected"), [(1.0, 20), (0.0, 1)])
def test_dreams_count_what_comes_before_their_end(cont, expected):
    dreams = own_dreams(known(Known(cont=cont), [walk(9), walk(5)]), 6, 0)
    assert dreams.returns.tolist() == [expected] * 6 and dreams.lengths.tolist() == [expected] * 6
    assert dreams.first["x"][:, 0].tolist() == list(range(expected + 1))  # from the episode's 0, by the actor's 1


def test_difference_is_grey_where_images_agree():
    a = np.array([0, 100, 255], np.uint8)
    assert difference(a, a).tolist() == [127] * 3
    assert difference(np.uint8([255]), np.uint8([0])).tolist() == [0]
    assert difference(np.uint8([0]), np.uint8([255])).tolist() == [255]


def test_long_lines_are_thinned_to_means():
    np.testing.assert_allclose(thinned(np.arange(10.0), 5), [0.5, 2.5, 4.5, 6.5, 8.5])
    assert len(thinned(np.arange(5.0), 5)) == 5
