"""Nothing that is loaded runs code: for every door a crafted file, a clear error, and a canary that is never made."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import raywm
from raywm import checkpoint
from raywm import config as configs
from raywm.cli import app
from raywm.data import commands
from raywm.data.dataset import Dataset
from raywm.data.episode import to_table
from raywm.data.store import EpisodeStore
from raywm.envs import make_env
from raywm.log import Console

TINY = (
    "collect.initial_steps=200 fit.memory_steps=4 fit.evaluate_every=2 evolve.generations=1 evolve.population=8 "
    "evolve.rollouts=2 dream.unit=8 dream.horizon=10 iterations=1 target.episodes=2 evaluate.episodes=2 "
    "model.hidden=8 fit.threads=1 log.tensorboard=false"
).split()
QUIET = Console(enabled=False)


@pytest.fixture
def canary(tmp_path):
    """A file that crafted inputs try to make; it must not be there in the end."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "code ran"


class Bomb:
    def __init__(self, canary: Path):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


def test_the_canary_would_be_seen(tmp_path):
    """These payloads work where somebody loads them."""
    pickle.loads(pickle.dumps(Bomb(tmp_path / "a")))
    assert (tmp_path / "a").is_dir()
    import gymnasium as gym

    with pytest.raises(Exception):  # noqa: B017  # it made the directory, but is no environment
        gym.make(gym.envs.registration.EnvSpec.from_json(spec_that_runs(tmp_path / "b")))
    assert (tmp_path / "b").is_dir()


def spec_that_runs(canary: Path) -> str:
    """A gymnasium EnvSpec whose constructor is os.mkdir."""
    spec = {"id": "Evil-v0", "entry_point": "os:mkdir", "reward_threshold": None, "nondeterministic": False}
    spec |= {"max_episode_steps": None, "order_enforce": False, "disable_env_checker": True}
    spec |= {"kwargs": {"path": str(canary)}, "additional_wrappers": [], "vector_entry_point": None}
    return json.dumps(spec)


def command(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def line(result) -> str:
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, (result.output, result.exception)
    return result.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "done"
    result = command("train", "cartpole", *TINY, "--in-process", "--out", out)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def copy(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "run"))


def plant(copy: Path, name: str, data: bytes) -> None:
    """Put a file into the newest checkpoint, with the checksum of an honest one."""
    newest = max((copy / "checkpoints").iterdir())
    (newest / name).write_bytes(data)
    manifest = json.loads((newest / "state.json").read_text())
    manifest["files"][name] = {"bytes": len(data), "crc32": zlib.crc32(data)}
    (newest / "state.json").write_text(json.dumps(manifest))


def npz_of(canary: Path, path: Path) -> bytes:
    np.savez(path, theta=np.array([Bomb(canary)], dtype=object), best=np.zeros(1))
    return path.read_bytes()


@pytest.mark.parametrize("name", ["controller.npz", "best_model.safetensors", "extra.npz", "model.pt"])
@pytest.mark.parametrize("kind", ["pickle", "npz of objects", "npy", "torch", "zip"])
def test_checkpoints(copy, canary, tmp_path, name, kind):
    import torch

    torch.save({"x": Bomb(canary)}, tmp_path / "x.pt")
    np.save(tmp_path / "x.npy", np.array([Bomb(canary)], dtype=object), allow_pickle=True)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr("theta.npy", pickle.dumps(Bomb(canary)))
    crafted = {
        "pickle": pickle.dumps(Bomb(canary)),
        "npz of objects": npz_of(canary, tmp_path / "x.npz"),
        "npy": (tmp_path / "x.npy").read_bytes(),
        "torch": (tmp_path / "x.pt").read_bytes(),
        "zip": (tmp_path / "x.zip").read_bytes(),
    }
    plant(copy, name, crafted[kind])
    with pytest.raises(ValueError, match="is none that raywm wrote"):
        checkpoint.load(copy / "checkpoints")
    for words in (["evaluate", copy], ["report", copy], ["export", copy, "--format", "torch-export"]):
        assert name in line(command(*words))
    assert name in line(command("train", "cartpole", *TINY, "iterations=2", "--in-process", "--resume", "--out", copy))


def test_a_checkpoint_names_no_files_elsewhere(copy, tmp_path, canary):
    (tmp_path / "out.npz").write_bytes(npz_of(canary, tmp_path / "x.npz"))
    for name in ("../../../out.npz", str(tmp_path / "out.npz")):
        plant(copy, name, (tmp_path / "out.npz").read_bytes())
        with pytest.raises(ValueError, match=r"state\.json is damaged"):
            checkpoint.load(copy / "checkpoints")


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"format": 2}',
        '{"format": "2", "files": {}}',
        '{"format": 2, "files": [], "state": {}, "step": 1}',
        '{"format": 2, "files": {"a.npz": 3}, "state": {}, "step": 1}',
        '{"format": 2, "files": {}, "state": [], "step": 1}',
        '{"format": 2, "files": {}, "state": {}}',
        '{"format": 2, "files": {"a.npz": ["bytes", "crc32"]}, "state": {}, "step": 1}',
        pytest.param("[" * 100_000, id="deep"),
        '{"format": {"py/object/apply": "os.system"}}',
    ],
)
def test_manifests_of_other_shapes(copy, text):
    (max((copy / "checkpoints").iterdir()) / "state.json").write_text(text)
    assert "checkpoints" in line(command("evaluate", copy))


YAML = [
    "!!python/object/apply:os.mkdir [{canary}]",
    "!!python/object/new:os.mkdir [{canary}]",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!python/object/apply:subprocess.Popen [[mkdir, {canary}]]",
    "!!python/tuple [1]",
]


@pytest.mark.parametrize("tag", YAML)
def test_configs(copy, tmp_path, canary, tag):
    value = tag.format(canary=canary)
    crafted = tmp_path / "evil.yaml"
    for text in (
        value,
        f"env: {{id: CartPole-v1}}\nseed: {value}",
        f"env: {{id: CartPole-v1, kwargs: {{x: {value}}}}}",
    ):
        crafted.write_text(text)
        with pytest.raises(ValueError, match="bad YAML"):
            configs.load(crafted)
        assert "bad YAML" in line(command("train", crafted, "--in-process", "--out", tmp_path / "out"))
        assert "bad YAML" in line(command("collect", crafted, "--episodes", 1, "--out", tmp_path / "out"))
        (copy / "config.yaml").write_text(text)
        for words in (["evaluate"], ["report"], ["dream"], ["export", "--format", "onnx"]):
            assert "bad YAML" in line(command(words[0], copy, *words[1:]))
    assert "bad YAML" in line(command("train", "cartpole", f"seed={value}", "--out", tmp_path / "out"))


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        '{"action": {"type": "os.system"}}',
        '{"action": {"type": "Box", "dtype": "O", "shape": [1], "low": 0}}',
    ],
)
def test_spaces(copy, text):
    (copy / "spaces.json").write_text(text)
    for words in (["evaluate"], ["dream"], ["report"]):
        assert "spaces.json is damaged" in line(command(words[0], copy, *words[1:]))


# ------------------------------------------------------------------------------------------------ datasets


@pytest.fixture(scope="module")
def episode(run):
    with EpisodeStore(run / "episodes", read_only=True) as store:
        return store.get(store.ids()[0])


EXTENSIONS = [
    "arrow.py_extension_type",
    "ray.data.arrow_tensor",
    "ray.data.arrow_tensor_v2",
    "ray.data.arrow_pickled_object",
]


def disguised(table: pa.Table, column: str, extension: str, canary: Path) -> pa.Table:
    """A table one of whose columns says that it is of an extension type, whose metadata is a pickle."""
    at = table.schema.get_field_index(column)
    said = {b"ARROW:extension:name": extension.encode(), b"ARROW:extension:metadata": pickle.dumps(Bomb(canary))}
    tensor = "tensor" in extension
    value = [1.0] if tensor else pickle.dumps(Bomb(canary))
    kind = pa.large_list(pa.float32()) if extension.endswith("v2") else pa.list_(pa.float32())
    values = pa.array([value] * table.num_rows, kind if tensor else pa.large_binary())
    field = pa.field(column, values.type, metadata=said)
    return table.set_column(at, field, values)


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_segments(episode, tmp_path, canary, extension):
    """Ray Data's types are registered here, as they are where RLlib was imported."""
    import ray.data  # noqa: F401

    table = disguised(to_table(episode), "reward", extension, canary)
    folder = tmp_path / "data"
    folder.mkdir()
    head = json.dumps(
        {
            "pieces": [{"id": "a", "first_row": 0, "rows": table.num_rows, "last": True, "info": {}}],
            "common": {},
            "rows": table.num_rows,
            "crc": 0,
        }
    )
    with (
        pa.OSFile(str(folder / "segment-00000000.arrows"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        meta = {b"raywm": head.encode(), b"raywm.crc": str(zlib.crc32(head.encode())).encode()}
        writer.write_batch(table.to_batches()[0], custom_metadata=meta)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is set aside
        with contextlib.suppress(ValueError), Dataset(folder) as dataset:
            assert not list(dataset)
        result = command("data", "verify", folder)
    assert result.exit_code in (1, 2) and isinstance(result.exception, SystemExit), result.output


@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize("column", ["reward", "episode_id"])
def test_parquet(run, tmp_path, canary, extension, column):
    import ray.data  # noqa: F401

    commands.export(str(run), str(tmp_path / "good"), "parquet", QUIET)
    part = tmp_path / "good" / "part-00000.parquet"
    table = pq.read_table(part)
    (tmp_path / "bad").mkdir()
    pq.write_table(disguised(table, column, extension, canary), tmp_path / "bad" / "part-00000.parquet")
    with pytest.raises((ValueError, OSError)):
        commands.import_(str(tmp_path / "bad"), str(tmp_path / "out"), "parquet", QUIET)
    result = command("data", "import", tmp_path / "bad", tmp_path / "out", "--format", "parquet")
    assert "part-00000" in line(result) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["pickle", "objects", "zip"])
def test_rollouts(tmp_path, canary, kind):
    folder = tmp_path / "rollouts"
    folder.mkdir()
    path = folder / "rollout_0.npz"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb(canary)))
    elif kind == "zip":
        path.write_bytes(b"PK\x03\x04 nothing")
    else:
        bombs = np.array([Bomb(canary)] * 3, dtype=object)
        np.savez(path, observations=bombs, rewards=np.zeros(3), actions=np.zeros(3), terminals=np.zeros(3))
    said = line(command("data", "import", folder, tmp_path / "out", "--format", "world-models"))
    assert "rollout_0.npz" in said and "allow_pickle" not in said and "npz" in said


def test_minari(tmp_path, canary):
    pytest.importorskip("minari")
    folder = tmp_path / "minari" / "data"
    folder.mkdir(parents=True)
    metadata = {"dataset_id": "evil/x-v0", "data_format": "hdf5", "total_episodes": 1, "total_steps": 1}
    metadata |= {"minari_version": "0.5.4", "env_spec": spec_that_runs(canary)}
    for spaces in ({}, {"observation_space": None, "action_space": 3}, {"action_space": "{}"}):
        (folder / "metadata.json").write_text(json.dumps(metadata | spaces))
        said = line(command("data", "import", tmp_path / "minari", tmp_path / "out", "--format", "minari"))
        assert "env_spec" in said
        said = line(
            command(
                "data", "import", tmp_path / "minari", tmp_path / "out", "--format", "minari", "--env", "CartPole-v1"
            )
        )
        assert "env_spec" in said


def test_minari_by_its_id(tmp_path, canary, monkeypatch):
    pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "place"))
    folder = tmp_path / "place" / "evil" / "x-v0" / "data"
    folder.mkdir(parents=True)
    (folder / "metadata.json").write_text(
        json.dumps({"dataset_id": "evil/x-v0", "data_format": "hdf5", "env_spec": spec_that_runs(canary)})
    )
    assert "env_spec" in line(command("data", "import", "evil/x-v0", tmp_path / "out", "--format", "minari"))


def test_a_dataset_card_is_json(run, tmp_path, canary):
    folder = Path(shutil.copytree(run / "episodes", tmp_path / "data"))
    (folder / "dataset.json").write_bytes(pickle.dumps(Bomb(canary)))
    assert "dataset.json is damaged" in line(command("data", "info", folder))


# ------------------------------------------------------------------------------------------------ environments


def test_a_run_brings_no_modules(copy, canary, monkeypatch):
    """`module:EnvClass` is imported from where Python finds modules, never from a run's or dataset's directory."""
    evil = f"import os\nos.mkdir({str(canary)!r})\n"
    for place in (copy, copy / "episodes", copy / "checkpoints"):
        (place / "evil_env.py").write_text(evil)
    config = (copy / "config.yaml").read_text().replace("CartPole-v1", "evil_env:Env")
    (copy / "config.yaml").write_text(config)
    for words in (["evaluate"], ["export", "--format", "torch-export"]):
        assert "there is no module 'evil_env'" in line(command(words[0], copy, *words[1:]))
    assert "there is no module 'evil_env'" in line(command("train", copy / "config.yaml", "--out", copy / "new"))
    # and what needs no environment does not ask for one
    raywm.load_agent(copy).act(np.zeros(4))
    assert command("dream", copy).exit_code == 0
    # nor does the command put the directory that it is called in on Python's path
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "PYTHONPATH": str(Path(raywm.__file__).parent.parent)
    }
    code = "from raywm.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, "evaluate", str(copy)] if sys.version_info >= (3, 11) else ["false"],
        cwd=copy,
        env=env,
        capture_output=True,
        text=True,
    )
    assert sys.version_info < (3, 11) or "there is no module 'evil_env'" in done.stderr, done.stderr


@pytest.mark.parametrize("id", ["os:mkdir", "os:system", "builtins:exec", "subprocess:Popen", "pathlib:Path"])
def test_only_environment_classes_are_called(id, canary):
    with pytest.raises(ValueError, match=r"has no gymnasium\.Env class"):
        make_env({"id": id, "kwargs": {"path": str(canary), "command": f"mkdir {canary}"}})


@pytest.mark.parametrize("key", ["vizdoom_path", "ViZDoom_Path", "vizdoompath"])
def test_a_config_names_no_program(tmp_path, canary, key):
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\nmkdir {canary}\n")
    program.chmod(0o755)
    with pytest.raises(ValueError, match="names a program to run"):
        make_env({"id": "VizdoomTakeCover-v1", "kwargs": {key: str(program)}})


# ------------------------------------------------------------------------------------------------ pages, and the future


def test_a_report_shows_what_it_finds_as_text(copy):
    script = "<script>document.title='ran'</script><img src=x onerror=alert(1)>"
    config = configs.load(copy / "config.yaml")
    env = config.env.model_copy(update={"id": script})
    configs.save(config.model_copy(update={"env": env, "address": script}), copy / "config.yaml")
    summary = json.loads((copy / "summary.json").read_text())
    for key in ("stopped", "env_id"):
        summary[key] = script
    (copy / "summary.json").write_text(json.dumps(summary))
    rows = [json.loads(row) for row in (copy / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {"phase": script} if "phase" in row else {}
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    newest = max((copy / "checkpoints").iterdir()) / "state.json"
    manifest = json.loads(newest.read_text())
    manifest["state"] |= {"stopped": script}
    newest.write_text(json.dumps(manifest))
    result = command("report", copy)
    assert result.exit_code == 0, result.output
    page = (copy / "report.html").read_text()
    assert "document.title=" in page or "document.title=&#x27;" in page
    assert "<script>document" not in page and "<img src=x" not in page


UNSAFE = {"pickle.load", "pickle.loads", "cloudpickle.load", "cloudpickle.loads", "torch.load", "joblib.load"}
UNSAFE |= {"yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all", "pandas.read_pickle", "pd.read_pickle"}
UNSAFE |= {"eval", "exec", "compile", "__import__", "marshal.loads", "shelve.open", "dill.load", "dill.loads"}
UNSAFE |= {"torch.jit.load", "torch.hub.load", "jsonpickle.decode", "os.system", "os.popen"}


def test_no_module_calls_what_runs_data():
    """So that a new door is seen: `np.load` only without pickles, `torch.export.load` only of what was just written."""
    found = []
    for path in sorted(Path(raywm.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name in UNSAFE or name in ("np.load", "numpy.load") and keywords.get("allow_pickle") != "False":
                found.append(f"{path.name}:{node.lineno}: {name}")
            if name == "torch.export.load" and path.parts[-2:] != ("export", "formats.py"):
                found.append(f"{path.name}:{node.lineno}: {name}")
            if keywords.get("allow_pickle") == "True" or keywords.get("shell") == "True":
                found.append(f"{path.name}:{node.lineno}: {keywords}")
    assert not found, found
