"""The scheduler of an engine, imported only where it is used. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from disco.sweep.clusters import RayConfig, SlurmConfig, read_cluster
from disco.sweep.engines._queue import Queue


def queue_of(engine: str, settings: Mapping[str, Any]) -> Queue:
    """The scheduler for ``engine``, with the settings of its section.

    Raises:
        UserError: a bad setting, or a scheduler that is not there.
    """
    config = read_cluster(engine, {engine: settings})
    if isinstance(config, SlurmConfig):
        from disco.sweep.engines.slurm import SlurmQueue

        return SlurmQueue(config)
    assert isinstance(config, RayConfig)
    from disco.sweep.engines.ray import RayQueue

    return RayQueue(config)
