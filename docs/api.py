"""Builds the API reference from the docstrings: python docs/api.py OUT. Whatever pdoc warns of is an error."""

import importlib.util
import pkgutil
import sys
import warnings
from pathlib import Path

import pdoc

import raywm
import raywm.agent

# Modules that cannot be imported without an extra.
EXTRAS = {"raywm.envs.crafter": "crafter", "raywm.envs.dmc": "dm_control", "raywm.data.minari_io": "minari"}


def main(out: Path) -> None:
    raywm.load_agent = raywm.agent.load_agent  # found on demand otherwise, which pdoc does not look for
    modules = [f"raywm.{m.name}" for m in pkgutil.iter_modules(raywm.__path__)]  # and what is in them
    modules += [f"!{m}" for m, library in EXTRAS.items() if importlib.util.find_spec(library) is None]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="pdoc")
        # pdoc looks up the types of a NamedTuple's fields in the wrong module; the page shows them as they are written
        warnings.filterwarnings("ignore", r"Error parsing type annotation ForwardRef.* for \S+\.(__init__|__new__)\b")
        pdoc.render.configure(docformat="google", footer_text=f"raywm {raywm.__version__}")
        pdoc.pdoc("raywm", *modules, output_directory=out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
