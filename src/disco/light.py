"""Light mode (ScionLight, Pethick et al., arXiv:2502.07529): ``.grad`` holds the momentum, and this watches over it.

backward() adds the gradient G to what the last step left: B <- B + G. The step takes the LMO of B, to whose size it is
invariant, and leaves B <- momentum B. With M <- momentum M + (1 - momentum) G, as Scion keeps it otherwise,

    .grad = M / (1 - momentum)            after backward(), before the step
    .grad = M momentum / (1 - momentum)   after the step
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

TAMPERED = (
    "light mode keeps the momentum in .grad, but something other than backward() changed or dropped it "
    "(gradient clipping, zero_grad() of the model, a .grad set by hand); use light=False for that"
)
SAMPLE = 8
"""Entries of a DTensor's shard that are compared."""


@dataclass
class _Seen:
    """``.grad`` of one parameter after the last step or backward(): the tensor and its version counter."""

    grad: Tensor
    version: int
    momentum: float = 0.0  # what the last step multiplied it by; 0 before the first step
    fresh: bool = True  # backward() has added to it since
    changed: bool = False  # by something else
    sample: Tensor | None = None  # after backward(), see ``_sample``

    def look(self, param: Tensor) -> None:
        """Notices whether something has replaced or written to ``.grad``."""
        self.changed |= param.grad is not self.grad or self.grad._version != self.version


class GradMomentum:
    """The momentum in the ``.grad`` of the parameters it watches."""

    def __init__(self) -> None:
        self._seen: dict[Tensor, _Seen] = {}

    def watch(self, param: Tensor) -> None:
        """Notes what backward() does, and what others do between."""
        param.register_hook(lambda _: self._before_backward(param))
        param.register_post_accumulate_grad_hook(self._after_backward)

    def _before_backward(self, param: Tensor) -> None:
        if self.holds(param):
            self._seen[param].look(param)

    def _after_backward(self, param: Tensor) -> None:
        assert param.grad is not None
        if self.holds(param):
            self._seen[param].fresh, self._seen[param].version = True, param.grad._version
        else:
            self._seen[param] = _Seen(param.grad, param.grad._version)
        self._seen[param].sample = _sample(param.grad)

    def holds(self, param: Tensor) -> bool:
        """Whether a step has left momentum in ``.grad``."""
        return param in self._seen and self._seen[param].momentum > 0

    def is_fresh(self, param: Tensor, momentum: float) -> bool:
        """Whether backward() has added a gradient since the last step.

        Raises:
            RuntimeError: something other than backward() has changed ``.grad``, or the momentum is another than before.
        """
        if param.grad is None and not self.holds(param):
            return False
        seen = self._seen.get(param)
        if seen is not None:
            seen.look(param)
        if seen is None or seen.changed:
            raise RuntimeError(TAMPERED)
        if seen.momentum not in (0, momentum):
            raise RuntimeError(
                f"in light mode momentum cannot change from {seen.momentum} to {momentum}; use light=False for that"
            )
        return seen.fresh

    def compare(self, params: Iterable[Tensor]) -> None:
        """Raises RuntimeError if gradients that backward() has just written to are not as it left them, as far as their
        samples tell."""
        before, now = [], []
        for seen in (self._seen[param] for param in params):
            sample = _sample(seen.grad)
            if sample is not None and seen.sample is not None:
                before.append(seen.sample)
                now.append(sample)
        if before and not torch.equal(torch.cat(before).nan_to_num(), torch.cat(now).nan_to_num()):  # one comparison
            raise RuntimeError(TAMPERED)

    def put(self, param: Tensor, grad: Tensor, momentum: float) -> None:
        """Takes ``grad``, what a step with this momentum leaves behind, as the momentum; drops it if that is 0."""
        if momentum:
            param.grad = grad
            self._seen[param] = _Seen(grad, grad._version, momentum, fresh=False)
        else:
            self.drop(param)

    def drop(self, param: Tensor) -> None:
        """Clears ``.grad`` and forgets its momentum."""
        param.grad = None
        self._seen.pop(param, None)

    def load(self, param: Tensor, state: dict[str, Tensor], momentum: float) -> None:
        """Takes the momentum out of a loaded state, of either mode, into ``.grad``."""
        self.drop(param)
        average, grad = state.pop("momentum", None), state.pop("grad", None)
        if average is not None and momentum:
            grad = average / to_average(momentum)
        if grad is not None:
            self.put(param, grad.clone(), momentum)  # backward() writes to it, and must not write to the loaded state

    def average(self, param: Tensor, momentum: float) -> Tensor | None:
        """M, which after backward() has the new gradient in it; None if there is neither momentum nor gradient."""
        seen = self._seen.get(param)
        if seen is None:
            return None
        return seen.grad * ((1 - momentum) if seen.fresh else to_average(seen.momentum))

    def saved(self, param: Tensor, momentum: float) -> Tensor | None:
        """A copy of ``.grad`` to be given to ``put`` later.

        Raises:
            RuntimeError: as ``is_fresh``, or between backward() and step(), when momentum and gradient are one sum.
        """
        if not self.holds(param):
            return None
        if self.is_fresh(param, momentum):
            raise RuntimeError("in light mode the momentum can only be saved after step(), not after backward()")
        return self._seen[param].grad.detach().clone()

    def reattach(self, params: Iterable[Tensor]) -> None:
        """After copying: watches the copies of the parameters, and gives them their ``.grad``, which copies lack."""
        for param, seen in self._seen.items():
            param.grad, seen.version = seen.grad, seen.grad._version
        for param in params:
            self.watch(param)


def _sample(grad: Tensor) -> Tensor | None:
    """A few entries of a DTensor's shard, whose version counter misses in-place foreach operations such as those of
    gradient clipping (torch 2.13); None of a plain tensor, whose counter does not."""
    local = getattr(grad, "_local_tensor", None)
    return None if local is None else local.reshape(-1)[:: max(1, local.numel() // SAMPLE)].clone()


def to_average(momentum: float) -> float:
    """M over what a step leaves in ``.grad``."""
    return (1 - momentum) / momentum
