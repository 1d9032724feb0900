"""Sweeps: a study file becomes runs (``study``), an engine trains them (``engines``)."""
