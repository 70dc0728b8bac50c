"""A stretch of the decoder between two taps, run forward and backward by hand."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lpl.perceptual.convolution import Operation, Upsampling
from lpl.perceptual.frozen import Identity


class Segment:
    """From one tap to the next: the upsampling that makes the earlier tap's map, then operations up to the next one.

    A tap's map may be the output of an upsampling, four times the size of its input. What is handed from segment to
    segment (a "boundary") is that input: it is what is worth keeping, and the map is made again where it is needed.

    Args:
        head: from the boundary to the tap's map.
        operations: from there to the next boundary.
    """

    def __init__(self, head: Identity | Upsampling, operations: Sequence[Operation]) -> None:
        self.head, self.operations = head, operations

    def open(self, boundary: Tensor) -> Tensor:
        """The earlier tap's map."""
        return self.head.forward(boundary, keep=False)[0]

    def run(self, x: Tensor) -> Tensor:
        """The next boundary, from the earlier tap's map; keeps nothing."""
        for operation in self.operations:
            x, _ = operation.forward(x, keep=False)
        return x

    def run_and_keep(self, boundary: Tensor, checkpoint: str) -> tuple[Tensor, list[Any]]:
        """The next boundary, and what `backward` needs.

        Args:
            checkpoint: "none" keeps what the operations need; "segment" keeps the boundary alone and runs forward once
                more in backward; "operation" keeps the input of every operation, to do the same one at a time.
        """
        if checkpoint == "segment":
            return self.run(self.open(boundary)), [boundary]
        x = self.open(boundary)
        saved: list[Any] = [x] if checkpoint == "none" else []
        for operation in self.operations:
            if checkpoint == "operation":
                saved.append(x if saved else boundary)
                x, _ = operation.forward(x, keep=False)
            else:
                x, kept = operation.forward(x, keep=True)
                saved.append(kept)
        return x, saved

    def backward(self, saved: list[Any], grads: list[Tensor], checkpoint: str) -> tuple[Tensor, Tensor]:
        """The map of the earlier tap, and the gradient with respect to it.

        Args:
            saved: from run_and_keep; emptied.
            grads: the gradient with respect to the next boundary, alone in a list that is emptied, so that it is freed
                on the way.
            checkpoint: as there.
        """
        grad, remaining = grads.pop(), self.operations
        if checkpoint == "operation":
            for operation in reversed(self.operations[1:]):
                kept = operation.forward(saved.pop(), keep=True)[1]
                grad = operation.backward(kept, grad)
            remaining = self.operations[:1]
        if checkpoint == "none":
            x = saved[0]
        else:
            x = self.open(saved.pop())
            saved, y = [x], x
            for operation in remaining:
                y, kept = operation.forward(y, keep=True)
                saved.append(kept)
            del y
        for operation in reversed(remaining):
            grad = operation.backward(saved.pop(), grad)
        saved.clear()
        return x, grad
