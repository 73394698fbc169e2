"""Every preset's environment, as the preset makes it, where what it needs is installed."""

import pytest

from raywm import config as configs
from raywm.envs import make_env
from raywm.seeding import rng
from raywm.spaces import ActionCodec, is_image, obs_columns

NEEDS = {  # by the beginning of an id: the module, and the extra that brings it
    "Vizdoom": ("vizdoom", "doom"),
    "CarRacing": ("Box2D", "box2d"),
    "ALE/": ("ale_py", "atari"),
    "dm_control/": ("dm_control", "dmc"),
    "Crafter": ("crafter", "crafter"),
}


def skip_without(env_id):
    for begins, (module, extra) in NEEDS.items():
        if env_id.startswith(begins):
            pytest.importorskip(module, reason=f"needs raywm[{extra}]")


@pytest.mark.parametrize("preset", configs.presets())
def test_preset_environments_are_made_and_played(preset):
    config = configs.load(preset)
    skip_without(config.env.id)
    try:
        env = make_env(config.env)
    except ValueError as error:
        if "OpenGL renderer" in str(error):
            pytest.skip(str(error))
        raise
    columns, codec = obs_columns(env.observation_space), ActionCodec(env.action_space)
    obs, _ = env.reset(seed=0)
    for step in range(5):
        assert {name: column.shape for name, column in obs.items()} == {n: box.shape for n, box in columns.items()}
        obs, *_ = env.step(codec.sample(rng(0, f"step {step}")))
    for box in columns.values():
        assert not is_image(box) or box.shape == (64, 64, 3)
    env.close()


# Extended Data of the Nature 2025 paper: frames, and rows replayed a step of the agent.
PAPER = {
    "dreamer-dmc-proprio": (500_000, 512),
    "dreamer-dmc-vision": (1_000_000, 512),
    "dreamer-atari100k": (400_000, 128),
    "dreamer-crafter": (1_000_000, 512),
}


@pytest.mark.parametrize("preset", PAPER)
def test_dreamer_presets_spend_what_the_paper_does(preset):
    config = configs.load(preset)
    held = config.env.action_repeat * config.env.kwargs.get("frame_skip", 1)
    assert (config.online.steps * held, config.online.train_ratio) == PAPER[preset]
    assert (config.dreamer.batch, config.dreamer.sequence, config.dreamer.horizon) == (16, 64, 15)
    assert config.dreamer.lr == 4e-5
