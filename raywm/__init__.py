"""raywm: world models and the agents that learn inside them, on Ray."""

__version__ = "0.1.0"
