"""Where a run says what happens: metrics.jsonl, TensorBoard events, the console, and what sinks there are.

metrics.jsonl is the record: one JSON object a line, in the hands of the operating system when `write` returns.
The TensorBoard events are made from it, and made anew when lines are taken back at a resume.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from raywm.checkpoint import clear_disk_errors, plain

_LINE_EVERY = 10.0  # seconds between progress lines where there is no terminal


class Bar:
    """The progress of one piece of work. `total` None: it is not known how much there is."""

    def __init__(self, console: Console, description: str, total: float | None):
        self._console, self.description, self.total = console, description, total
        self.done, self.fields = 0.0, {}  # type: float, dict[str, Any]
        self._start = self._line = time.monotonic()
        self._task = console.live.add_task(description, total=total, text="") if console.live else None

    def advance(self, n: float = 1) -> None:
        self.done += n
        self._show()

    def set(self, **fields: Any) -> None:
        """Figures shown beside the bar, e.g. loss=0.3."""
        self.fields |= fields
        self._show()

    @property
    def text(self) -> str:
        return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.fields.items())

    def _show(self) -> None:
        now = time.monotonic()
        if self._console.live is not None:
            self._console.live.update(self._task, completed=self.done, text=self.text)
        elif self._console.enabled and now - self._line > _LINE_EVERY:
            self._line = now
            self._console.say(self._summary(now))

    def _summary(self, now: float) -> str:
        rate = self.done / max(now - self._start, 1e-9)
        parts = [f"{self.done:g}" + (f"/{self.total:g}" if self.total else ""), f"{rate:.4g}/s"]
        if self.total and 0 < self.done < self.total:
            parts.append(f"{_clock((self.total - self.done) / rate)} left")
        return f"{self.description}: {', '.join(parts + ([self.text] if self.text else []))}"

    def _close(self, finished: bool) -> None:
        if self._console.live is not None:
            self._console.live.remove_task(self._task)
        elif finished and self._line > self._start:  # it had a line, so it gets a last one
            self._console.say(f"{self._summary(time.monotonic())}, {_clock(time.monotonic() - self._start)} in all")


class Console:
    """Lines and progress bars for a person: bars in a terminal, a line every 10 s elsewhere, nothing if not enabled."""

    def __init__(self, enabled: bool = True, stream: TextIO | None = None):
        from rich.console import Console as Rich

        self.enabled = enabled
        self.live: Any = None  # rich's display while bars are open in a terminal
        self._rich = Rich(file=stream or sys.stdout, highlight=False, soft_wrap=True)
        self._open = 0

    def say(self, text: str) -> None:
        if self.enabled:
            self._rich.print(text, markup=False)

    @contextlib.contextmanager
    def progress(self, description: str, total: float | None = None) -> Iterator[Bar]:
        """A Bar: .advance(n), .set(**fields). May be nested."""
        self._start_live()
        bar = Bar(self, description, total)
        finished = False
        try:
            yield bar
            finished = True
        finally:
            bar._close(finished)
            self._stop_live()

    def _start_live(self) -> None:
        self._open += 1
        if self.live is None and self.enabled and self._rich.is_terminal:
            from rich import progress as p

            columns = (
                p.TextColumn("{task.description}"),
                p.BarColumn(bar_width=24),
                p.MofNCompleteColumn(),
                _Rate(),
                p.TimeRemainingColumn(),
                p.TextColumn("{task.fields[text]}"),
            )
            self.live = p.Progress(*columns, console=self._rich, transient=True)
            self.live.start()

    def _stop_live(self) -> None:
        self._open -= 1
        if self.live is not None and self._open == 0:
            self.live.stop()
            self.live = None


def _Rate() -> Any:
    from rich.progress import ProgressColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:.4g}/s")

    return Rate()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class RunLog:
    """A run's log in directory `out`. Opening cuts off a last line that a killed run left unfinished.

    `sinks`: who else hears of every line, see ``raywm.sinks``; closed with the log.
    """

    def __init__(
        self,
        out: str | Path,
        tensorboard: bool = True,
        console: bool = True,
        stream: TextIO | None = None,
        sinks: Sequence[Any] = (),
    ):
        self.out = Path(out)
        self.path = self.out / "metrics.jsonl"
        self.console = Console(console, stream)
        self._events = _Events(self.out / "tensorboard") if tensorboard else None
        self._sinks, self._failed = list(sinks), False
        self._counts: Counter[str] = Counter()
        self._told: Counter[str] = Counter()  # lines of each kind that the sinks had heard of before a resume
        self.rows = 0
        with clear_disk_errors(self.path):
            self.out.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab", buffering=0)
        self._cut(None)

    def write(self, kind: str, **fields: Any) -> None:
        """One line {"kind": kind, "time": now, **fields}; NaN becomes null. Numbers also go to TensorBoard.

        Raises OSError when the disk is full; the line is then not there at all.
        """
        row = {"kind": kind, "time": round(time.time(), 3), **plain(fields)}
        data = (json.dumps(row, allow_nan=False) + "\n").encode()
        end = self._file.seek(0, os.SEEK_END)
        with clear_disk_errors(self.path):
            try:
                while data:
                    data = data[self._file.write(data) :]
            except OSError:
                self._file.truncate(end)
                raise
        self._record(row)

    def truncate(self, rows: int) -> None:
        """Keep the first `rows` lines: what a killed run wrote after its last checkpoint will be written again."""
        if rows < self.rows:
            self._told = self._told | self._counts  # the larger of both
            self._cut(rows)
            if self._events is not None:
                self._events.clear()
                self._counts.clear()
                for row in self.read():
                    self._count(row)

    def read(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The lines so far, of one kind or of all."""
        rows = [json.loads(line) for line in self.path.read_bytes().splitlines()]
        return [row for row in rows if kind is None or row["kind"] == kind]

    def say(self, text: str) -> None:
        self.console.say(text)

    def progress(self, description: str, total: float | None = None) -> contextlib.AbstractContextManager[Bar]:
        """Context manager of a Bar: .advance(n), .set(**fields)."""
        return self.console.progress(description, total)

    def finish(self, summary: dict[str, Any]) -> None:
        """Tell the sinks how the run ended."""
        self._tell(lambda sink: sink.finish(plain(summary)))

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()
        self._tell(lambda sink: sink.close(self._failed))
        self._sinks = []

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self._failed = kind is not None
        self.close()

    def _tell(self, word: Callable[[Any], None]) -> None:
        """To every sink; one that raises is heard of once and let go: metrics.jsonl has everything."""
        for sink in list(self._sinks):
            try:
                word(sink)
            except Exception as error:
                self._sinks.remove(sink)
                said = f"{type(error).__name__}: {error}"
                warnings.warn(f"{type(sink).__name__} hears no more of this run: {said}", stacklevel=2)

    def _cut(self, rows: int | None) -> None:
        """Keep `rows` lines, or all that end in a newline; count them."""
        lines = self.path.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        lines = lines[:rows]
        for number, line in enumerate(lines, 1):
            with contextlib.suppress(ValueError):
                if isinstance(json.loads(line), dict):
                    continue
            raise ValueError(
                f"{self.path}, line {number}: got {line[:40]!r}, expected a JSON object; restore that line"
            )
        self._file.truncate(sum(map(len, lines)))
        self.rows = len(lines)
        self._counts = Counter(json.loads(line)["kind"] for line in lines)

    def _record(self, row: dict[str, Any]) -> None:
        self.rows += 1
        self._count(row)

    def _count(self, row: dict[str, Any]) -> None:
        if self._events is not None:
            self._events.write(row, self._counts[row["kind"]])
        step = self._counts[row["kind"]]
        if step >= self._told[row["kind"]]:
            self._tell(lambda sink: sink.write(row, step))
        self._counts[row["kind"]] += 1


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last one that is being written at this moment is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class _Events:
    """TensorBoard events, written at once: a writer thread that meets a full disk would block the run instead."""

    def __init__(self, path: Path):
        self.path = path
        self._writer: Any = None
        self._broken = False

    def write(self, row: dict[str, Any], step: int) -> None:
        numbers = {k: float(v) for k, v in row.items() if k not in ("kind", "time") and isinstance(v, (int, float))}
        if self._broken or not numbers:
            return
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        try:
            if self._writer is None:
                from tensorboardX.event_file_writer import EventsWriter

                self.path.mkdir(parents=True, exist_ok=True)
                self._writer = EventsWriter(str(self.path / "events"), f".{os.getpid()}")
            for name, value in numbers.items():
                summary = scalar(f"{row['kind']}/{name}", value)
                self._writer.write_event(Event(wall_time=row["time"], step=step, summary=summary))
            self._writer.flush()
        except OSError as error:
            self._broken = True  # metrics.jsonl has everything: no reason to end the run
            warnings.warn(f"TensorBoard events stop here, {self.path} cannot be written: {error}", stacklevel=2)

    def clear(self) -> None:
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)

    def close(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
            self._writer = None
