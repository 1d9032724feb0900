"""Device meshes of the workers, each made once: gloo groups have threads, and hundreds of groups starve a machine."""

import functools

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@functools.cache
def mesh_of(*sizes: int, names: tuple[str, ...] | None = None) -> DeviceMesh:
    """All ranks must call this, and in the same order."""
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)
