"""Checkpoints are whole or not there; the log keeps exactly the lines of a checkpoint."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import raywm
from raywm import checkpoint
from raywm.log import Console, RunLog


def save(path: Path, step: int, value: float = 1.0) -> Path:
    return checkpoint.save(
        path,
        step,
        tensors={"model": {"w": torch.full((3, 2), value), "half": torch.ones(2, dtype=torch.bfloat16)}},
        arrays={"es": {"mean": np.full(4, value), "told": np.arange(6).reshape(2, 3)}},
        state={"turn": step, "best": -math.inf, "names": ["a"]},
    )


def test_what_is_saved_comes_back(tmp_path):
    path = save(tmp_path, 12, 0.5)
    assert path.name == "000012" and checkpoint.latest(tmp_path) == 12
    back = checkpoint.load(tmp_path)
    assert back.made_by == raywm.__version__
    assert back.step == 12 and back.state == {"turn": 12, "best": -math.inf, "names": ["a"]}
    assert torch.equal(back.tensors["model"]["w"], torch.full((3, 2), 0.5))
    assert back.tensors["model"]["half"].dtype == torch.bfloat16
    assert np.array_equal(back.arrays["es"]["told"], np.arange(6).reshape(2, 3))


def test_the_last_two_are_kept_and_a_step_can_be_replaced(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    save(tmp_path, 3, 7.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000002", "000003"]
    assert checkpoint.load(tmp_path).arrays["es"]["mean"][0] == 7.0
    assert checkpoint.load(tmp_path, 2).step == 2
    with pytest.raises(FileNotFoundError, match="no checkpoint 1 in .*there are 2, 3"):
        checkpoint.load(tmp_path, 1)


def test_tied_and_strided_tensors(tmp_path):
    w = torch.arange(6.0).reshape(2, 3)
    checkpoint.save(tmp_path, 1, tensors={"m": {"a": w, "b": w, "c": w.t()}})
    assert torch.equal(checkpoint.load(tmp_path).tensors["m"]["c"], w.t())


def test_leftovers_of_killed_saves_are_ignored_and_cleared(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".tmp-000002-99").mkdir()
    (tmp_path / ".tmp-000002-99" / "state.json").write_text("{}")
    assert checkpoint.load(tmp_path).step == 1
    assert [p.name for p in tmp_path.iterdir()] == ["000001"]
    # killed between the two renames of a replaced step
    os.rename(tmp_path / "000001", tmp_path / ".old-000001")
    assert checkpoint.load(tmp_path).step == 1


def test_kill_9_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    code = (
        "import sys, numpy as np\nfrom raywm import checkpoint\nn = (checkpoint.latest(sys.argv[1]) or 0) + 1\n"
        "for i in range(10**6):\n"
        "    checkpoint.save(sys.argv[1], n + i // 3, arrays={'a': {'x': np.full(20000, n + i // 3)}})"
    )
    for wait in (0.02, 0.11, 0.2):
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
        newest = max((p.name for p in tmp_path.glob("0*")), default="")
        while max((p.name for p in tmp_path.glob("0*")), default="") == newest:
            assert process.poll() is None
            time.sleep(0.005)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        back = checkpoint.load(tmp_path)
        assert (back.arrays["a"]["x"] == back.step).all()
        assert not list(tmp_path.glob(".*"))


def test_damage_and_foreign_formats_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        checkpoint.load(tmp_path / "none")
    path = save(tmp_path, 1)
    manifest = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(
        ValueError, match=f"format 99, written by raywm {raywm.__version__}; .* reads formats 1 to 2; use"
    ):
        checkpoint.load(tmp_path)
    first = {k: v for k, v in manifest.items() if k != "raywm"}
    (path / "state.json").write_text(json.dumps({**first, "format": 1}))
    assert checkpoint.load(tmp_path).made_by == checkpoint.OLDEST
    (path / "state.json").write_text(json.dumps(manifest))
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        checkpoint.load(tmp_path)
    (path / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"state\.json is damaged"):
        checkpoint.load(tmp_path)


def npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode() + b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


@pytest.mark.parametrize("how", [zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, "encrypted"])
@pytest.mark.parametrize("shape", ["(100,)", "(10000000000000,)", f"({10**30},)", "(-1,)", "(((", "(" * 4000])
def test_arrays_that_no_honest_file_has_are_a_value_error(how, shape):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED if how == "encrypted" else how) as opened:
        opened.writestr("x.npy", npy(f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}}}", bytes(9) * 40))
    data = bytearray(file.getvalue())
    if how == "encrypted":
        data[6] |= 1
        data[data.rfind(b"PK\x01\x02") + 8] |= 1
    elif how != zipfile.ZIP_STORED:
        data[60:70] = bytes(byte ^ 255 for byte in data[60:70])
    with pytest.raises(ValueError, match=r"its member 'x' is no (plain )?array"), checkpoint.open_npz(bytes(data)) as x:
        x["x"]
    with pytest.raises(FileNotFoundError), checkpoint.open_npz("no-such-file.npz"):
        pass


def test_nothing_is_executed_on_load(tmp_path):
    with pytest.raises(ValueError, match="holds objects"):
        checkpoint.save(tmp_path, 1, arrays={"a": {"x": np.array([object()])}})
    with pytest.raises(ValueError, match="not JSON serializable"):
        checkpoint.save(tmp_path, 1, state={"x": object()})
    with pytest.raises(ValueError, match="expected letters"):
        checkpoint.save(tmp_path, 1, arrays={"../a": {}})
    assert not list(tmp_path.iterdir())

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "boom"),)

    path = checkpoint.save(tmp_path, 1, arrays={"a": {"x": np.zeros(1)}})
    np.savez(path / "a.npz", x=np.array([Bomb()], dtype=object))
    data = (path / "a.npz").read_bytes()
    manifest = json.loads((path / "state.json").read_text())
    manifest["files"]["a.npz"] = {"bytes": len(data), "crc32": zlib.crc32(data)}
    (path / "state.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"a\.npz is none that raywm wrote: .* pickled objects could run any code"):
        checkpoint.load(tmp_path)
    (path / "a.npz").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError):
        checkpoint.load(tmp_path)
    assert not (tmp_path / "boom").exists()


def test_a_full_disk_is_said_and_harms_nothing(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="the disk is full, could not write .*free some space") as error:
            save(tmp_path, 2)
        assert error.value.errno == errno.ENOSPC
        with pytest.raises(OSError, match="the disk is full"):
            checkpoint.atomic_write_text(tmp_path / "x.json", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["000001"]
    assert checkpoint.load(tmp_path).step == 1


def test_json_is_strict(tmp_path):
    data = {
        "a": math.nan,
        "b": np.float32(2),
        "c": torch.tensor([1, 2]),
        "d": (np.int64(3), None, True),
        "e": -math.inf,
    }
    checkpoint.atomic_write_json(tmp_path / "s.json", data)
    text = (tmp_path / "s.json").read_text()
    assert json.loads(text) == {"a": None, "b": 2.0, "c": [1, 2], "d": [3, None, True], "e": None}
    assert "NaN" not in text
    with pytest.raises(ValueError, match="expected something that JSON can hold"):
        checkpoint.plain({"x": object()})


def test_log_lines_and_events(tmp_path):
    with RunLog(tmp_path, console=False) as log:
        log.write("fit", iteration=1, nll=np.float32(0.5), bad=math.nan)
        log.write("evolve", generation=0, best=3)
        assert log.rows == 2
        (row, _) = log.read()
    assert row["kind"] == "fit" and row["nll"] == 0.5 and row["bad"] is None and row["time"] > 0
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert list((tmp_path / "tensorboard").glob("*tfevents*"))


def events(path: Path) -> list[tuple[str, int]]:
    """(tag, step) of every scalar in TensorBoard's files: length, crc, protobuf, crc."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted(path.glob("*tfevents*")):
        data = file.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            found += [(value.tag, event.step) for value in event.summary.value]
            data = data[16 + length :]
    return found


def test_a_resumed_log_drops_what_the_checkpoint_does_not_know(tmp_path):
    with RunLog(tmp_path, console=False) as log:
        for i in range(5):
            log.write("g", x=i)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "g", "x"')  # killed in the middle of a line
    with RunLog(tmp_path, console=False) as log:
        assert log.rows == 5
        log.truncate(3)
        log.write("g", x=30)
        assert [r["x"] for r in log.read("g")] == [0, 1, 2, 30] and log.rows == 4
    assert events(tmp_path / "tensorboard") == [("g/x", i) for i in range(4)]


def test_a_full_disk_leaves_no_part_of_a_line(tmp_path):
    log = RunLog(tmp_path, tensorboard=False, console=False)
    log.write("a", x=1)

    class Full:
        """The file, with room for five more bytes."""

        def __init__(self, file, room=5):
            self.file, self.room = file, room

        def write(self, data):
            if self.room == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            data, self.room = data[: self.room], 0
            return self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

    whole, log._file = log._file, Full(log._file)
    with pytest.raises(OSError, match="the disk is full"):
        log.write("a", x=2)
    log._file = whole
    log.write("a", x=3)
    assert [r["x"] for r in log.read()] == [1, 3] and log.rows == 2


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    console = Console(stream=stream)
    with console.progress("memory", 100) as bar, console.progress("inner"):
        for _ in range(100):
            now[0] += 0.5
            bar.set(nll=0.25)
            bar.advance(1)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "memory: 20/100, 1.905/s, 0:42 left, nll 0.25"
    assert len(lines) == 5 and lines[-1] == "memory: 100/100, 2/s, nll 0.25, 0:50 in all"


def test_progress_in_a_terminal_and_none_when_off(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    stream = io.StringIO()
    console = Console(stream=stream)
    with console.progress("outer", 3) as bar, console.progress("inner") as inner:
        inner.advance()
        bar.advance(2)
        bar.set(loss=0.5)
        console.say("[a line]")
    assert "outer" in stream.getvalue() and "[a line]" in stream.getvalue() and console.live is None
    silent = io.StringIO()
    console = Console(enabled=False, stream=silent)
    with console.progress("x", 3) as bar:
        bar.advance()
        console.say("y")
    assert silent.getvalue() == ""
