"""Exports do what the agents do, say so, and run without raywm."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

import raywm
from raywm import config as configs
from raywm.cli import app
from raywm.data.store import EpisodeStore
from raywm.envs import make_env
from raywm.export import export_run, formats
from raywm.export.card import data_of
from raywm.export.example import _arguments, _image, _input
from raywm.export.parity import Parity
from raywm.export.step import Field, TorchCodec, grouped, step_of
from raywm.loops.saved import open_run
from raywm.spaces import ActionCodec

pytest.importorskip("onnxruntime")

VMC = (
    "collect.initial_steps=200 fit.memory_steps=4 fit.evaluate_every=2 evolve.generations=1 evolve.population=8 "
    "evolve.rollouts=2 dream.unit=8 dream.horizon=10 iterations=1 target.episodes=2 evaluate.episodes=2 "
    "model.hidden=8 fit.threads=1 fit.vision_steps=2 fit.vision_batch=8 log.tensorboard=false log.console=false"
).split()
DREAMER = [
    "collect.envs=2",
    "rssm={size: nano, deter: 16, stoch: 4, classes: 4, units: 16, hidden: 16, depth: 2, bins: 21}",
    "dreamer={batch: 2, sequence: 8, threads: 1, actor_layers: 1, horizon: 3}",
    "online={steps: 120, prefill: 60, train_ratio: 2, evaluate_every: 0}",
    "target.real_return=null",
    "evaluate.episodes=2",
    "log.tensorboard=false",
    "log.console=false",
]
IMAGES = ["env={id: 'squares:Square', time_limit: 30}", "model.latent=4"]
BOTH = ["env={id: 'squares:Both', time_limit: 40, crop: [0, 32, 0, 0], resize: [64, 64], grayscale: true}"]
RUNS = {
    "vmc": ["cartpole", *VMC],
    "vmc-images": ["cartpole", *VMC, *IMAGES],
    "vmc-both": ["cartpole", *VMC, *BOTH, "env.action_repeat=2", "model.latent=4", "controller.kind=mlp"],
    "dreamer": ["dreamer-cartpole", *DREAMER],
    "dreamer-actions": ["dreamer-pendulum", *DREAMER, "rssm.blocks=2"],
    "dreamer-gaussian": ["dreamer-cartpole", *DREAMER, *BOTH, "rssm.latent=gaussian"],
}


def command(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def train(out: Path, name: str, *more: str) -> Path:
    done = command("train", *RUNS[name], *more, "--in-process", "--out", out)
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    made: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in made:
            made[name] = train(tmp_path_factory.mktemp("runs") / name, name)
        return made[name]

    return run


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
    """The folder of an export that was checked over the usual 1,000 steps."""
    made: dict[tuple[str, str], Path] = {}

    def export(name: str, format: str) -> Path:
        if (name, format) not in made:
            out = made[name, format] = tmp_path_factory.mktemp("exports") / f"{name}-{format}"
            done = command("export", runs(name), "--format", format, "--out", out, "--json")
            assert done.exit_code == 0, done.output
            result, card = json.loads(done.stdout), json.loads((out / "card.json").read_text())
            assert result["parity"] == card["parity"]["max_abs_difference"] and result["steps"] >= 1000
        return made[name, format]

    return export


def alone(example: Path, *blocked: str) -> str:
    """What an example prints where raywm and the other modules named cannot be imported."""
    code = f"import runpy, sys\nsys.modules.update(dict.fromkeys({['raywm', 'ray', *blocked]}))\n"
    code += f"runpy.run_path({str(example)!r}, run_name='__main__')"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("vmc", "onnx"),
        ("vmc", "torch-export"),
        ("dreamer", "onnx"),
        pytest.param("vmc-images", "torch-export", marks=pytest.mark.slow),
        pytest.param("vmc-images", "onnx", marks=pytest.mark.slow),
        pytest.param("dreamer", "torch-export", marks=pytest.mark.slow),
        pytest.param("dreamer-actions", "onnx", marks=pytest.mark.slow),
        pytest.param("vmc-both", "onnx", marks=pytest.mark.slow),
        pytest.param("vmc-both", "torch-export", marks=pytest.mark.slow),
        pytest.param("dreamer-actions", "torch-export", marks=pytest.mark.slow),
        pytest.param("dreamer-gaussian", "onnx", marks=pytest.mark.slow),
        pytest.param("dreamer-gaussian", "torch-export", marks=pytest.mark.slow),
    ],
)
def test_an_export_does_what_the_agent_does(exported, name, format):
    """Over 1,000 real steps; and its example plays without raywm, the ONNX one without torch as well."""
    out = exported(name, format)
    card = json.loads((out / "card.json").read_text())
    assert card["parity"]["steps"] >= 1000 and card["parity"]["comparisons"] >= 2000
    assert card["parity"]["max_abs_difference"] <= 1e-4
    assert sorted(p.name for p in out.iterdir()) == sorted(["MODEL_CARD.md", "card.json", "example.py", card["file"]])
    assert alone(out / "example.py", *(["torch"] if format == "onnx" else ["onnxruntime"])).startswith("return ")


@pytest.mark.parametrize("format", ["onnx", pytest.param("torch-export", marks=pytest.mark.slow)])
def test_the_example_plays_what_the_agent_plays(runs, exported, format):
    agent, env = raywm.load_agent(runs("vmc")), gym.make("CartPole-v1")
    agent.reset()
    (obs, _), total, over = env.reset(seed=0), 0.0, False
    while not over:
        obs, reward, terminated, truncated, _ = env.step(agent.act(obs))
        total, over = total + float(reward), terminated or truncated
    example = exported("vmc", format) / "example.py"
    assert alone(example) == f"return {total:g}\n"
    assert sum(bool(line.strip()) for line in example.read_text().splitlines()) <= 30


def test_an_environment_that_takes_raywm(tmp_path):
    run = train(tmp_path / "run", "vmc", "env={id: raywm/LinearWorld-v0, time_limit: 20}", "controller.features=z")
    assert export_run(run, "onnx", tmp_path / "out", steps=9)["steps"] == 12  # whole rounds of 4 environments
    text = (tmp_path / "out" / "example.py").read_text()
    assert "raywm makes raywm/LinearWorld-v0 its own way" in text
    assert alone(tmp_path / "out" / "example.py", "torch", "gymnasium").count("\n") == 100


def test_the_card_says_what_it_is(runs, exported):
    run, out = runs("vmc"), exported("vmc", "onnx")
    card = json.loads((out / "card.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    assert card["metrics"] == summary and card["config"]["model"]["hidden"] == 8
    assert card["real_returns"][-1]["return_mean"] == summary["real_return_mean"]
    assert card["dream"]["dream_gap"] == pytest.approx(card["dream"]["dream_return_mean"] - summary["real_return_mean"])
    assert card["versions"]["raywm"] == card["versions"]["trained_by"] == raywm.__version__
    assert card["command"] == f"raywm export {run} --format onnx --out {out}"
    named = {f["name"]: f for f in card["inputs"]}
    assert set(named) == {"obs.vector", "state.action", "state.c", "state.h", "state.z", "is_first", "noise.z"}
    assert named["obs.vector"]["shape"] == ["batch", 4]
    text = (out / "MODEL_CARD.md").read_text()
    for said in (card["command"], card["data"]["sha256"], "CartPole-v1", "Dream gap: ", "hidden: 8"):
        assert said in text
    assert configs.parse(yaml.safe_load(text.split("```yaml")[1].split("```")[0])) == configs.parse(card["config"])


def test_the_hash_is_of_the_data(runs, tmp_path):
    for name in ("vmc", "dreamer"):
        copy = Path(shutil.copytree(runs(name), tmp_path / name))
        before = data_of(open_run(copy))
        assert len(before["sha256"]) == 64 and before == data_of(open_run(runs(name)))
        with EpisodeStore(copy / "episodes", read_only=True) as store:
            ids = open_run(copy).state.get("accepted", store.ids())  # a V-M-C run has played more than it has used
            assert before["episodes"] == len(ids) and before["steps"] == sum(store.get(id).steps for id in ids)
        shutil.rmtree(copy / "episodes")
        assert data_of(open_run(copy))["sha256"] is None
    again = train(tmp_path / "again", "vmc")
    assert data_of(open_run(again)) == data_of(open_run(runs("vmc")))
    other = train(tmp_path / "other", "vmc", "seed=5")
    assert data_of(open_run(other))["sha256"] != data_of(open_run(again))["sha256"]


def test_a_run_without_its_episodes_has_a_card_all_the_same(runs, tmp_path):
    copy = Path(shutil.copytree(runs("dreamer"), tmp_path / "run"))
    for gone in ("episodes", "summary.json", "metrics.jsonl"):
        shutil.rmtree(copy / gone, ignore_errors=True)
        (copy / gone).unlink(missing_ok=True) if (copy / gone).is_file() else None
    export_run(copy, "torch-export", steps=4)
    text = (copy / "export" / "torch-export" / "MODEL_CARD.md").read_text()
    assert "Never measured in the real environment" in text and "cannot be read here" in text


@pytest.mark.parametrize("name", ["vmc", "dreamer"])
def test_a_wrong_export_is_an_error_and_leaves_nothing(runs, tmp_path, monkeypatch, name):
    real = formats.program_of

    def broken(step):
        with torch.no_grad():
            for weight in step.layers if name == "vmc" else [step.model.post_out.weight]:
                weight.neg_()
        return real(step)

    monkeypatch.setattr(formats, "program_of", broken)
    with pytest.raises(ValueError, match=r"the export (differs from the agent in|draws other classes)"):
        export_run(runs(name), "torch-export", tmp_path / "out", steps=400)
    assert not (tmp_path / "out").exists() and not list(tmp_path.iterdir())


def test_a_draw_on_an_edge_is_drawn_again_but_not_many(runs):
    run = open_run(runs("dreamer"))
    agent = run.agent()
    step = step_of(agent, run.columns)
    often = [5]

    def call(inputs):
        with torch.inference_mode():
            action, state = step(*grouped({k: torch.from_numpy(v) for k, v in inputs.items()}))
        out = {f"next.{k}": v.numpy().copy() for k, v in state.items()} | {"action": action.numpy()}
        calls.append(0)
        if len(calls) % often[0] == 0:
            out["next.stoch"] = 1 - out["next.stoch"]
        return out

    for often[0], fine in ((299, True), (6, False)):
        calls: list[int] = []
        if fine:
            assert 0 < Parity(step, agent, call, 0).play(run.config.env, 400)["draws_on_an_edge"] <= 8
        else:
            with pytest.raises(ValueError, match="draws other classes"):
                Parity(step, agent, call, 0).play(run.config.env, 400)


SPACES = {
    "box": gym.spaces.Box(np.array([-3, 0, 1], np.float32), np.array([2, 1e4, 1], np.float32)),
    "box 2d": gym.spaces.Box(-1, 1, (2, 3), np.float64),
    "box of halves": gym.spaces.Box(-1.1, 1.1, (2,), np.float16),
    "box of bytes": gym.spaces.Box(0, 255, (4,), np.uint8),
    "box of shorts": gym.spaces.Box(-3, 300, (2,), np.int16),
    "discrete": gym.spaces.Discrete(5, start=-2),
    "multi discrete": gym.spaces.MultiDiscrete([3, 2, 4], start=[1, 0, -3]),
    "multi discrete 2d": gym.spaces.MultiDiscrete([[3, 2], [4, 5]]),
    "multi binary": gym.spaces.MultiBinary([2, 3]),
}


@pytest.mark.parametrize("name", SPACES)
def test_the_codec_in_torch_gives_the_same_bits(name):
    codec = ActionCodec(SPACES[name])
    torch_codec = TorchCodec(codec)
    vector = np.random.default_rng(0).normal(size=(200, codec.dim)).astype(np.float32)
    action = codec.decode(vector)
    mine = torch_codec.decode(torch.from_numpy(vector)).numpy()
    assert mine.dtype == codec.dtype and np.array_equal(mine, action)
    assert np.array_equal(torch_codec.encode(torch.from_numpy(action)).numpy(), codec.encode(action))


class BothWays(torch.nn.Module):
    """What steps do with actions, of all codecs."""

    def __init__(self, codecs):
        super().__init__()
        self.codecs = torch.nn.ModuleList(map(TorchCodec, codecs))

    def forward(self, vectors):
        actions = [codec.decode(vector) for codec, vector in zip(self.codecs, vectors)]
        return actions, [codec.encode(action) for codec, action in zip(self.codecs, actions)]


def test_onnx_knows_every_action_space(tmp_path):
    """Of every dtype: not each runtime has each operation for all of them."""
    import onnxruntime

    codecs, path = [ActionCodec(space) for space in SPACES.values()], tmp_path / "codec.onnx"
    with formats._quiet():
        example, batch = [torch.zeros(2, codec.dim) for codec in codecs], torch.export.Dim("batch", min=1)
        shapes = ([{0: batch}] * len(codecs),)
        program = torch.export.export(BothWays(codecs), (example,), dynamic_shapes=shapes)
        torch.onnx.export(program, dynamo=True, input_names=list(SPACES), verbose=False).save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for rows in (1, 200):
        rng = np.random.default_rng(0)
        vectors = [rng.normal(size=(rows, codec.dim)).astype(np.float32) for codec in codecs]
        found = session.run(None, dict(zip(SPACES, vectors)))
        for codec, vector, action, encoded in zip(codecs, vectors, found, found[len(codecs) :], strict=False):
            assert action.dtype == codec.dtype and np.array_equal(action, codec.decode(vector)), codec
            assert np.array_equal(encoded, codec.encode(action)), codec


def test_what_acting_does_not_need_is_left_out(runs):
    for name in ("vmc-images", "dreamer"):
        run = open_run(runs(name))
        agent = run.agent()
        step = step_of(agent, run.columns)
        program = formats.program_of(step)
        used = {node.target for node in program.graph.nodes if node.op == "placeholder" and node.users}
        idle = [n for n in program.graph_signature.parameters if not any(n.replace(".", "_") in str(u) for u in used)]
        assert not idle, idle
        assert not [n for n in program.state_dict if "decoder" in n or "deconvs" in n or "mixture" in n]
        assert agent.model.state_dict().keys() == run.agent().model.state_dict().keys()  # the agent keeps all its parts


def line(result) -> str:
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    return result.stderr


def test_what_goes_wrong_is_one_line(runs, tmp_path, monkeypatch):
    run = runs("vmc")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    assert "expected one of torch-export, onnx" in line(command("export", run, "--format", "tflite"))
    assert "not empty" in line(command("export", run, "--format", "onnx", "--out", tmp_path / "full", "--steps", 4))
    assert (tmp_path / "full" / "mine").read_text() == "x"
    assert "no run in" in line(command("export", tmp_path / "none", "--format", "onnx"))
    empty = Path(shutil.copytree(run, tmp_path / "empty"))
    shutil.rmtree(empty / "checkpoints")
    assert "no checkpoint" in line(command("export", empty, "--format", "onnx"))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert 'pip install "raywm[export]"' in line(command("export", run, "--format", "onnx"))


def test_making_the_environment_again_is_needed_and_said(runs, tmp_path):
    copy = Path(shutil.copytree(runs("vmc-images"), tmp_path / "run"))
    text = (copy / "config.yaml").read_text().replace("squares:Square", "squares_gone:Square")
    (copy / "config.yaml").write_text(text)
    assert "there is no module 'squares_gone'" in line(command("export", copy, "--format", "torch-export"))
    assert not list((copy / "export").iterdir())


def test_the_example_makes_images_as_they_are_stored():
    run = configs.load("cartpole", [*BOTH])
    code, scope = _image(run.env), {"np": np, "cv2": pytest.importorskip("cv2")}
    exec(code, scope)
    mine, raw = (make_env(e).reset(seed=3)[0]["seen"] for e in (run.env, {"id": run.env.id}))
    assert mine.shape == (64, 64, 1) and np.array_equal(
        np.asarray(scope["image"](raw), np.uint8).reshape(64, 64, 1), mine
    )


def test_a_config_writes_no_code_into_the_example():
    hostile = {"x=print('code')": 1, "None": 2, "size": '"""'}
    code = f"found = dict({_arguments(hostile)})"
    scope: dict = {"print": lambda *_: pytest.fail("code ran")}
    exec(code, scope)
    assert scope["found"] == hostile


@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_the_example_takes_images_that_are_flipped_views(format):
    name, frame = 'a "front" view', np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)[::-1]
    field = Field(f"obs.{name}", frame.shape, "uint8", "observation")
    scope = {"np": np, "torch": torch, "inputs": {}, "obs": {}, "seen": {name: frame}}
    exec(_input(format, field, configs.load("cartpole").env, True, True), scope)
    found = scope["inputs"][f"obs.{name}"] if format == "onnx" else scope["obs"][name].numpy()
    assert np.array_equal(found, frame[None])
