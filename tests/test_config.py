"""Configs: what is right is read, what is wrong is said in one line that names the key."""

from __future__ import annotations

import re

import pytest

from raywm import config as configs


def load(*overrides: str, source: str = "cartpole") -> configs.RunConfig:
    return configs.load(source, overrides)


@pytest.mark.parametrize("preset", configs.presets())
def test_presets_load_and_survive_a_save(preset, tmp_path):
    config = configs.load(preset)
    configs.save(config, tmp_path / "config.yaml")
    assert configs.load(tmp_path / "config.yaml") == config
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_the_presets_that_ship():
    promised = {"cartpole", "pendulum", "doom-take-cover", "doom-take-cover-small", "car-racing", "car-racing-small"}
    assert promised <= set(configs.presets())


def test_every_key_has_a_description():
    for key in configs.keys():
        section = configs.RunConfig
        *path, last = key.split(".")
        for part in path:
            section = section.model_fields[part].annotation
        assert section.model_fields[last].description, key


def test_overrides_are_yaml_and_later_ones_win():
    config = load(
        "seed=3",
        "fit.lr=1e-4",
        "dream.temperature=2",
        "env.crop=[1, 2, 3, 4]",
        "env.kwargs.gravity=5.0",
        "target.real_return=null",
        "evolve.separable=true",
        "collect.workers=3",
        "collect.workers=4",
    )
    assert config.seed == 3 and config.fit.lr == 1e-4 and config.env.crop == (1, 2, 3, 4)
    assert config.dream.temperature == 2.0 and isinstance(config.dream.temperature, float)
    assert config.env.kwargs == {"gravity": 5.0} and config.target.real_return is None
    assert config.evolve.separable is True and config.collect.workers == 4
    assert config.model == load().model


def test_a_file_is_like_a_preset(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("env: {id: Acrobot-v1}\nfit:\n  lr: 5e-4\nmodel:\n")
    config = configs.load(path, ["seed=1"])
    assert config.env.id == "Acrobot-v1" and config.fit.lr == 5e-4 and config.seed == 1
    assert config.model == configs.ModelConfig()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("collect.workerz=3", "unknown key 'collect.workerz'; did you mean 'collect.workers'?"),
        ("iteration=3", "unknown key 'iteration'; did you mean 'iterations'?"),
        ("horzion=3", "unknown key 'horzion'; did you mean 'dream.horizon'?"),
        ("colect.workers=3", "unknown key 'colect'; did you mean 'collect'?"),
        ("seed=abc", "seed: got 'abc', expected a whole number"),
        ("seed=1.0", "seed: got 1.0, expected a whole number"),
        ("seed=true", "seed: got true, expected a whole number"),
        ("seed.x=1", "seed: got {'x': 1}, expected a whole number"),
        ("iterations=0", "iterations: got 0, expected at least 1"),
        ("fit.lr=fast", "fit.lr: got 'fast', expected a number"),
        ("fit.lr=true", "fit.lr: got true, expected a number"),
        ("fit.lr=0", "fit.lr: got 0, expected more than 0"),
        ("fit.lr=.inf", "fit.lr: got inf, expected a finite number"),
        ("fit.held_out=1", "fit.held_out: got 1, expected less than 1"),
        ("model.joint=1", "model.joint: got 1, expected true or false"),
        ("collect.policy=greedy", "collect.policy: got 'greedy', expected one of 'mixed', 'random' or 'sticky'"),
        ("budget.real_steps=many", "budget.real_steps: got 'many', expected a whole number, or null"),
        ("env.crop=[1, 2]", "env.crop: got [1, 2], expected [top, bottom, left, right] in pixels, or null"),
        ("env.resize=[64, x]", "env.resize: got [64, 'x'], expected [height, width] in pixels, or null"),
        ("evolve.separable=maybe", "evolve.separable: got 'maybe', expected auto, true or false"),
        ("evolve.population=2", "evolve.population: got 2, expected at least 4"),
        ("env.id=3", "env.id: got 3, expected text"),
        ("env=null", "env.id is missing; set it, e.g. env.id=CartPole-v1"),
        ("collect=3", "collect: got 3, expected a section of keys"),
        ("seed", "override: got 'seed', expected key=value"),
        ("seed=[1", "override 'seed=[1': bad YAML at line 1"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(override, said):
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        load(override)
    assert "\n" not in str(error.value)


def test_stalls_are_found_before_an_answer_is_given_up():
    assert load("collect.stall_s=5", "collect.timeout_s=6").collect.stall_s == 5
    with pytest.raises(ValueError, match=r"collect\.stall_s: got 60, expected less than .*=60, .* lower"):
        load("collect.timeout_s=60")


def test_a_learner_that_cannot_work_where_it_is_sent():
    with pytest.raises(ValueError, match=r"evolve\.where"):
        load("evolve.learner=reinforce", "evolve.where=real")


def test_unknown_presets_and_files(tmp_path):
    with pytest.raises(ValueError, match="unknown preset 'cartpol'; did you mean 'cartpole'"):
        configs.load("cartpol")
    with pytest.raises(ValueError, match="no config file"):
        configs.load(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="directory"):
        configs.load(tmp_path)
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="expected a mapping"):
        configs.load(tmp_path / "list.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match="cannot be read|bad YAML"):
        configs.load(tmp_path / "bytes.yaml")


@pytest.mark.parametrize(
    "override",
    [
        "collect.workers=7",
        "dream.workers=7",
        "address=auto",
        "iterations=99",
        "budget.real_steps=5",
        "target.real_return=1.0",
        "evaluate.episodes=3",
        "log.console=false",
        "dream.timeout_s=5",
        "collect.timeout_s=90",
    ],
)
def test_a_resume_may_change_where_and_how_far(override):
    configs.diff_for_resume(load(), load(override))


@pytest.mark.parametrize(
    "override",
    ["seed=1", "env.id=Acrobot-v1", "env.kwargs.a=1", "collect.envs=4", "fit.lr=1.0", "dream.unit=8", "model.latent=3"],
)
def test_a_resume_may_not_change_what_is_computed(override):
    key = override.split("=")[0]
    with pytest.raises(ValueError, match=f"^{re.escape(key)}: got"):
        configs.diff_for_resume(load(), load(override))


def test_configs_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load().seed = 3


@pytest.mark.parametrize(
    ("more", "lr", "warmup"),
    [
        ({}, 1e-3, 100),
        ({"rssm": None, "dreamer": None}, 1e-3, 100),
        ({"rssm": {"size": "nano", "deter": 64}, "dreamer": {"warmup": 5}}, 1e-3, 5),
        ({"dreamer": {"lr": 4e-5}}, 4e-5, 100),
        ({"rssm": {"size": "1M"}}, 4e-5, 1000),
    ],
)
def test_small_dreamers_take_larger_steps_unless_told(more, lr, warmup):
    config = configs.parse({"algorithm": "dreamer", "env": {"id": "CartPole-v1"}, **more})
    assert (config.dreamer.lr, config.dreamer.warmup) == (lr, warmup)
