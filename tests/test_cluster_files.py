"""cluster/: what can be known of it without a cloud. Ray's schema, a lint of the manifests, shellcheck, and every raywm
command line parsed by raywm's own command line."""

import re
import shlex
import shutil
import stat
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from raywm import cli
from raywm import config as configs

CLUSTER = Path(__file__).parent.parent / "cluster"
MANIFESTS = ("kuberay-raycluster.yaml", "kuberay-rayjob.yaml")
PINNED = re.search(r"(?m)^ray==(\S+)$", (CLUSTER.parent / "constraints.txt").read_text()).group(1)


def text(name):
    return (CLUSTER / name).read_text()


def blocks(markdown):
    """Fenced and indented code, continued lines joined."""
    joined = markdown.replace("\\\n", " ")
    fenced = re.findall(r"(?ms)^```\n(.*?)^```$", joined)
    return [line.strip() for line in "\n".join(fenced + re.findall(r"(?m)^    (.*)$", joined)).splitlines()]


def raywm_lines():
    """(where, arguments) of every raywm command in this folder, those that go through a script included."""
    found = []
    sources = {path.name: path.read_text() for path in CLUSTER.iterdir()}
    lines = {name: blocks(source) if name.endswith(".md") else [] for name, source in sources.items()}
    for name in ("submit.sh", "slurm.sh"):
        lines[name] = [sources[name].splitlines()[1].removeprefix("# ").partition(": a Ray cluster")[0]]
    for name in MANIFESTS:
        for document in yaml.safe_load_all(sources[name]):
            lines[name].append(document["spec"].get("entrypoint", ""))
    starts = ("raywm ", "cluster/submit.sh ", "sbatch cluster/slurm.sh ")
    for name, its in lines.items():
        for line in its:
            start = next((s for s in starts if line.startswith(s)), None)
            if start:
                found.append((name, shlex.split(line.removeprefix(start))))
    return found


def test_there_are_command_lines_everywhere():
    assert {name for name, _ in raywm_lines()} == {"README.md", "kuberay-rayjob.yaml", "slurm.sh", "submit.sh"}
    assert len(raywm_lines()) >= 7


@pytest.mark.parametrize(("where", "arguments"), raywm_lines())
def test_every_raywm_command_line_parses(where, arguments):
    name, *rest = arguments
    command = get_command(cli.app).commands[name]
    values = command.make_context(name, list(rest)).params
    config = configs.load(values["preset"], values["overrides"])
    assert config.collect.workers >= 1
    assert not values["address"] or values["address"] == "auto"


@pytest.mark.parametrize("name", ["aws.yaml", "hosts.yaml"])
def test_rays_own_schema(name, monkeypatch):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(text(name))
    prepared = prepare_config(config)
    validate_config(prepared)
    broken = {**prepared, "max_wrokers": 3}
    with pytest.raises(Exception, match="max_wrokers"):
        validate_config(broken)
    for start in ("head_start_ray_commands", "worker_start_ray_commands"):
        (command,) = config[start]
        assert "RAY_AUTH_MODE=token" in command and "ulimit -n" in command
    assert "~/.ray/auth_token" in config["file_mounts"]
    install = " ".join(config["setup_commands"])
    assert "constraints.txt" in install and "[cluster]" in install


def test_ray_up_labels_are_those_of_the_readme():
    types = yaml.safe_load(text("aws.yaml"))["available_node_types"]
    assert types["head"]["resources"]["CPU"] == 0
    labels = {name: kind.get("labels") for name, kind in types.items()}
    assert labels == {"head": None, "collect": {"raywm": "collect"}, "learn": {"raywm": "learn"}}
    assert "echo learn || echo collect" in text("hosts.yaml")


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests(name):
    (document,) = yaml.safe_load_all(text(name))
    kind = {"kuberay-raycluster.yaml": "RayCluster", "kuberay-rayjob.yaml": "RayJob"}[name]
    assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", kind)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", document["metadata"]["name"])
    spec = document["spec"] if kind == "RayCluster" else document["spec"]["rayClusterSpec"]
    assert set(spec) <= {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
    assert spec["rayVersion"] == PINNED and spec["authOptions"] == {"mode": "token", "secretName": "raywm-token"}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = spec["workerGroupSpecs"]
    assert {group["groupName"]: group["labels"] for group in groups} == {
        "collect": {"raywm": "collect"},
        "learn": {"raywm": "learn"},
    }
    gpus = {}
    for group in [spec["headGroupSpec"], *groups]:
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"] == "raywm:gpu"
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert requests == limits and {"cpu", "memory"} <= set(limits)  # Ray takes a pod's size from its limits
        assert re.fullmatch(r"\d+Gi", limits["memory"]) and all(isinstance(v, str) for v in limits.values())
        gpus[group.get("groupName", "head")] = limits.get("nvidia.com/gpu")
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    assert gpus == {"head": None, "collect": None, "learn": "1"}
    for group in groups:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_rayjob_fits_its_own_cluster():
    """The check that raywm itself makes first, against the pods of the manifest."""
    from raywm.runtime.executor import needs_of
    from raywm.runtime.needs import missing

    spec = yaml.safe_load(text("kuberay-rayjob.yaml"))["spec"]
    name, *arguments = shlex.split(spec["entrypoint"])
    values = get_command(cli.app).commands["train"].make_context("train", arguments[1:]).params
    config = configs.load(values["preset"], values["overrides"])
    assert name == "raywm" and values["resume"] and config.replay.storage.startswith("s3://")
    nodes = []
    for group in spec["rayClusterSpec"]["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        memory = int(limits["memory"].removesuffix("Gi")) * 2**30
        gpus = float(limits.get("nvidia.com/gpu", 0))
        resources = {"CPU": float(limits["cpu"]), "GPU": gpus, "memory": memory}
        nodes += [{"Resources": resources, "Labels": group["labels"]}] * group["replicas"]
    assert missing(needs_of(config, threads=1), nodes) == []


def test_the_two_manifests_describe_one_cluster():
    cluster, job = (yaml.safe_load(text(name))["spec"] for name in MANIFESTS)
    assert job["rayClusterSpec"] == cluster


@pytest.mark.parametrize("name", ["slurm.sh", "submit.sh"])
def test_shellcheck(name):
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, str(CLUSTER / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert (CLUSTER / name).stat().st_mode & stat.S_IXUSR


def test_dockerfile():
    lines = text("Dockerfile").replace("\\\n", " ").splitlines()
    words = [line.split()[0] for line in lines if line and not line.startswith("#")]
    assert set(words) <= {"ARG", "FROM", "WORKDIR", "COPY", "RUN"} and words.count("FROM") == 1
    base = re.search(r"^ARG BASE=(\S+)$", "\n".join(lines), re.M).group(1)
    assert base == f"rayproject/ray:{PINNED}-py311-cpu"  # a tag, never "latest"
    for line in lines:
        if line.startswith("COPY"):
            for source in line.split()[2:-1]:
                assert (CLUSTER.parent / source).exists(), source
        if "pip install" in line:
            assert "-c constraints.txt" in line and "--no-cache-dir" in line
    extras = re.search(r"^ARG EXTRAS=(\S+)$", "\n".join(lines), re.M).group(1).split(",")
    pyproject = (CLUSTER.parent / "pyproject.toml").read_text()
    assert all(re.search(rf"(?m)^{extra} = ", pyproject) for extra in extras)
    for build in re.findall(r"rayproject/ray:([\w.]+)-", text("README.md") + text("Dockerfile")):
        assert build == PINNED


def test_one_version_of_ray_everywhere():
    assert version("ray") == PINNED or pytest.skip("another Ray is installed")
    for path in CLUSTER.iterdir():
        for found in re.findall(r"Ray\s+(\d+\.\d+\.\d+)", path.read_text()):
            assert found == PINNED, path
        if path.suffix in (".sh", ".yaml") and "rayjob" not in path.name:
            assert f"Ray {PINNED}" in path.read_text(), path


def submit(*arguments, tmp_path, **env):
    """submit.sh with a `ray` that says what it was called with."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    fake = tmp_path / "bin" / "ray"
    fake.write_text('#!/bin/bash\nprintf "%s\\n" "$RAY_API_SERVER_ADDRESS" "$@"\n')
    fake.chmod(0o755)
    return subprocess.run(
        ["bash", str(CLUSTER / "submit.sh"), *arguments],
        env={"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", **env},
        capture_output=True,
        text=True,
    )


def test_submit_is_ray_job_submit(tmp_path):
    done = submit("train", "cartpole", "seed=1", "--out", "/big/run 1", tmp_path=tmp_path, RAYWM_JOB="--no-wait")
    address, *words = done.stdout.splitlines()
    assert done.returncode == 0 and address == "http://127.0.0.1:8265"
    assert words[:4] == ["job", "submit", "--working-dir", "."] and "--no-wait" in words[: words.index("--")]
    entry = words[words.index("--") + 1 :]
    assert entry == ["raywm", "train", "cartpole", "seed=1", "--out", "/big/run 1", "--address", "auto", "--resume"]


@pytest.mark.parametrize("out", [(), ("--out", "runs/a"), ("--out=runs/a",), ("-o", "."), ("--out",)])
def test_submit_refuses_directories_that_go_with_the_job(out, tmp_path):
    done = submit("train", "cartpole", *out, tmp_path=tmp_path)
    assert done.returncode == 2 and "absolute path" in done.stderr and not done.stdout
