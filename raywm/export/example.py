"""The program that comes with an export: it plays an episode with neither raywm nor Ray."""

from __future__ import annotations

import json
import keyword
import textwrap
from typing import Any

import gymnasium as gym

from raywm.envs.make import ATARI, PLUGINS
from raywm.export.step import AgentStep, Field

ONNX = '''
"""{what} {pip}"""

from pathlib import Path

{imports}
import numpy as np
import onnxruntime
{before}
SHAPES = {state}
step = onnxruntime.InferenceSession(Path(__file__).with_name("step.onnx"))
rng = np.random.default_rng(0)
state = {{name: np.zeros((1, *shape), np.float32) for name, shape in SHAPES.items()}}
{start}
{loop}
    inputs = {{**state, "is_first": np.array([first])}}
{inputs}
    action, *leaves = step.run(None, inputs)
    state, first = dict(zip(state, leaves)), False
{act}
{end}
'''

TORCH = '''
"""{what} {pip}"""

from pathlib import Path

{imports}
import numpy as np
import torch
{before}
SHAPES = {state}
step = torch.export.load(Path(__file__).with_name("step.pt2")).module()
rng = np.random.default_rng(0)
state = {{name: torch.zeros(1, *shape) for name, shape in SHAPES.items()}}
{start}
{loop}
    obs, noise = {{}}, {{}}
{inputs}
    with torch.no_grad():
        action, state = step(obs, state, torch.tensor([first]), noise)
    action, first = action.numpy(), False
{act}
{end}
'''

START = """
env = {make}
seen, total, over, first = env.reset(seed=0)[0], 0.0, False, True
"""

ACT = """
    seen, reward, terminated, truncated, _ = env.step(action[0])
    total, over = total + float(reward), terminated or truncated
"""

REPEAT = """
    for _ in range({times}):
        seen, reward, terminated, truncated, _ = env.step(action[0])
        total, over = total + float(reward), terminated or truncated
        if over:
            break
"""

DRAWS = {"zeros": "np.zeros({}, np.float32)", "uniform": "rng.random({}, np.float32)"}
DRAWS["normal"] = "rng.standard_normal({}, np.float32)"


def example(format: str, step: AgentStep, env: Any, several: bool) -> str:
    """A program that plays `env` (an EnvConfig) with a file of `format`. `several`: observations are a dict.

    raywm makes some environments in a way of its own; for these the program says so and makes observations up.
    """
    make, imports = _made(env)
    fields = {"make": make, "times": env.action_repeat}
    before = _image(env) if make and any(_processed(env, f) for f in step.inputs) else ""
    if make:
        parts = [START, "while not over:", ACT if env.action_repeat == 1 else REPEAT, 'print(f"return {total:g}")']
        what = f"Plays an episode of {env.id} with this export, without raywm."
    else:
        parts = ["first = True", "for _ in range(100):", "    print(action[0])", ""]
        what = f"Steps this export without raywm. raywm makes {env.id} its own way: put what you observe for the noise."
    start, loop, act = (part.strip("\n").format_map(fields) for part in parts[:3])
    lines = [_input(format, f, env, several, bool(make)) for f in step.inputs if f.fill not in ("state", "flag")]
    onnx = format == "onnx"
    state = {f.name if onnx else f.name.partition(".")[2]: f.shape for f in step.inputs if f.fill == "state"}
    packages = ["onnxruntime" if onnx else "torch", "numpy", *(["gymnasium"] if make else [])]
    text = (ONNX if onnx else TORCH).format(
        what=what,
        pip="pip install " + " ".join([*packages, *(["opencv-python-headless"] if "cv2" in before else [])]),
        imports="\n".join([*(["import cv2"] if "cv2" in before else []), *imports]),
        before=before,
        state=state,
        start=start,
        loop=loop,
        inputs="\n".join(f"    {line}" for line in lines),
        act=act,
        end=parts[3],
    )
    return text.strip("\n") + "\n"


def _input(format: str, field: Field, env: Any, several: bool, real: bool) -> str:
    """The line that fills an input."""
    shape = (1, *field.shape)
    group, _, key = field.name.partition(".")
    if group == "noise":
        value = DRAWS[field.fill].format(shape)
    elif not real:
        value = f"rng.integers(0, 256, {shape}, np.uint8)" if field.dtype == "uint8" else DRAWS["normal"].format(shape)
    else:
        at = f"[{_text(key)}]" if several else ""
        seen = f"image(seen{at})" if _processed(env, field) else f"seen{at}"
        if field.dtype != "uint8":  # choices are one-hots, as raywm.envs.make.Vectors has them
            seen = f"gym.spaces.flatten(env.observation_space{at}, {seen})"
        value = f"np.array({seen}, np.{field.dtype}).reshape{shape}"  # a copy: torch takes no flipped view
    if format == "onnx":
        return f"inputs[{_text(field.name)}] = {value}"
    return f"{group}[{_text(key)}] = torch.from_numpy({value})"


def _text(value: str) -> str:
    return json.dumps(value)  # in double quotes


def _made(env: Any) -> tuple[str, list[str]]:
    """The expression that makes the environment as raywm does, "" where it takes raywm; and what it imports."""
    module, colon, name = env.id.partition(":")
    kwargs = dict(env.kwargs)
    limit = {} if env.time_limit is None else {"max_episode_steps": env.time_limit}
    if module.partition(".")[0] == "raywm" or env.id.startswith(tuple(p[0] for p in PLUGINS if p[0] != "ALE/")):
        return "", []
    if colon and name not in gym.registry:
        made = f"{name}({_arguments(kwargs)})"
        made = f"gym.wrappers.TimeLimit({made}, {env.time_limit})" if limit else made
        return made, ["import gymnasium as gym", f"from {module} import {name}"]
    imports = ["import gymnasium as gym", *([f"import {module}"] if colon else [])]
    if str(gym.spec(name if colon else env.id).entry_point).startswith("raywm"):
        return "", []
    if not env.id.startswith("ALE/"):
        return f"gym.make({name or env.id!r}{_arguments(limit | kwargs, ', ')})", imports
    frames = {key: kwargs.pop(key) for key in ATARI if key in kwargs}
    imports.insert(0, "import ale_py  # brings the games")
    if not frames:
        return f"gym.make({env.id!r}{_arguments(limit | kwargs, ', ')})", imports
    frames = {"screen_size": 64, "grayscale_obs": False} | frames
    made = f"gym.make({env.id!r}{_arguments(limit | {'frameskip': 1} | kwargs, ', ')})"
    return f"gym.wrappers.AtariPreprocessing({made}{_arguments(frames, ', ')})", imports


def _arguments(values: dict[str, Any], before: str = "") -> str:
    text = ", ".join(
        # what is no name comes as data: a config may not write code into the program
        f"{key}={value!r}" if key.isidentifier() and not keyword.iskeyword(key) else f"**{ {key: value}!r}"
        for key, value in values.items()
    )
    return before + text if text else ""


def _processed(env: Any, field: Field) -> bool:
    """Whether raywm changes the images of a column before they are stored."""
    return field.dtype == "uint8" and field.fill == "observation" and bool(env.crop or env.resize or env.grayscale)


def _image(env: Any) -> str:
    lines = []
    if env.crop:
        top, bottom, left, right = env.crop
        lines.append(f"frame = frame[{top} : frame.shape[0] - {bottom}, {left} : frame.shape[1] - {right}]")
    if env.resize:
        height, width = env.resize
        lines.append("frame = np.ascontiguousarray(frame)")
        lines.append(f"frame = cv2.resize(frame, ({width}, {height}), interpolation=cv2.INTER_AREA)")
    if env.grayscale:
        lines.append("if frame.ndim == 3 and frame.shape[2] == 3:")
        lines.append("    frame = (frame.astype(np.uint32) @ np.array([299, 587, 114], np.uint32) + 500) // 1000")
    body = "\n".join([*lines, "return frame"])
    return f"\n\ndef image(frame):  # as it was stored for the training\n{textwrap.indent(body, '    ')}\n\n"
