"""The files of an export: written, and opened again by the program that users will open them with."""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raywm.export.step import AgentStep, grouped

Arrays = dict[str, np.ndarray]  # by Field.name
Call = Callable[[Arrays], Arrays]


def program_of(step: AgentStep) -> torch.export.ExportedProgram:
    """The step as torch.export sees it, for batches of any size."""
    example = step.example(2)  # 0 and 1 would be taken for constants
    batch = torch.export.Dim("batch", min=1)
    shapes = tuple({k: {0: batch} for k in part} if isinstance(part, dict) else {0: batch} for part in example)
    with torch.no_grad(), _quiet():
        return torch.export.export(step, example, dynamic_shapes=shapes)


class TorchExport:
    """step.pt2: ``torch.export.load`` opens it, torch alone runs it, on any device it is moved to."""

    name, file, packages = "torch-export", "step.pt2", ("torch",)

    @staticmethod
    def write(step: AgentStep, path: Path) -> None:
        with _quiet():
            torch.export.save(program_of(step), path)

    @staticmethod
    def load(step: AgentStep, path: Path) -> Call:
        run: Any = torch.export.load(path).module()
        names = [f.name for f in step.outputs]

        @torch.inference_mode()
        def call(inputs: Arrays) -> Arrays:
            action, state = run(*grouped({f.name: torch.from_numpy(inputs[f.name]) for f in step.inputs}))
            return dict(zip(names, [t.numpy() for t in (action, *state.values())], strict=True))

        return call


class ONNX:
    """step.onnx: onnxruntime and others run it, in whatever language."""

    name, file, packages = "onnx", "step.onnx", ("onnx", "onnxruntime", "onnxscript")

    @staticmethod
    def write(step: AgentStep, path: Path) -> None:
        import onnx

        names = [[f.name for f in fields] for fields in (step.inputs, step.outputs)]
        table: Any = {torch.ops.aten.searchsorted.Tensor: _searchsorted()}
        with torch.no_grad(), _quiet():
            made: Any = torch.onnx.export(
                program_of(step),
                dynamo=True,
                input_names=names[0],
                output_names=names[1],
                custom_translation_table=table,
                verbose=False,
            )
            made.save(path)
        onnx.checker.check_model(path, full_check=True)

    @staticmethod
    def load(step: AgentStep, path: Path) -> Call:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [f.name for f in step.outputs]
        return lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))


FORMATS: dict[str, Any] = {kind.name: kind for kind in (TorchExport, ONNX)}


def format_named(name: str) -> Any:
    """The format of that name. Raises ValueError for an unknown one, and where the packages it needs are missing."""
    if name not in FORMATS:
        raise ValueError(f"--format {name}: expected one of {', '.join(FORMATS)}")
    kind = FORMATS[name]
    for package in kind.packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ValueError(f'--format {name} needs {package} ({error}); pip install "raywm[export]"') from None
    return kind


def _searchsorted() -> Any:
    """torch.searchsorted(heap, values, right=True) for ONNX, which has none: how many are not greater than a value."""
    from onnxscript import INT64, opset18

    op: Any = opset18

    # as `raywm.models.heads.draw` calls it: heap (..., K), values (..., 1)
    def searchsorted(heap: Any, values: Any, out_int32: Any = False, right: Any = False, **rest: Any) -> Any:
        if not right or out_int32 or any(v is not None for v in rest.values()):
            raise ValueError(f"searchsorted with right={right}, {rest} has no ONNX form; write one beside this")
        smaller = op.Cast(op.LessOrEqual(heap, values), to=INT64.dtype)
        return op.ReduceSum(smaller, op.Constant(value_ints=[-1]), keepdims=1)

    return searchsorted


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' own chatter, of packages that nobody asked for."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            log.setLevel(before)
