"""raywm: world models and the agents that learn inside them, on Ray."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["load_agent"]


def __getattr__(name: str) -> Any:
    # on demand, so that `import raywm` imports neither torch nor an environment
    if name == "load_agent":
        from raywm.agent import load_agent

        return load_agent
    raise AttributeError(f"module 'raywm' has no attribute {name!r}")
