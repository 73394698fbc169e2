"""A trained agent as one function in a file that runs without raywm: ``raywm export``."""

from raywm.export.run import FORMATS, export_run

__all__ = ["FORMATS", "export_run"]
