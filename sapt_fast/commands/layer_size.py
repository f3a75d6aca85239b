"""The layer that `sapt-fast bench` times."""

from __future__ import annotations

from dataclasses import dataclass, field

from sapt_fast.checks import require_count

__all__ = ["LayerSize"]


@dataclass(frozen=True)
class LayerSize:
    """Sizes of a linear layer, of its adapters and of a batch.

    Raises:
        ValueError: if one is not a whole number of at least 1.
    """

    batch: int = field(default=8, metadata={"help": "Samples of the batch."})
    tokens: int = field(default=128, metadata={"help": "Tokens of each sample."})
    inputs: int = field(default=1024, metadata={"help": "Input width of the layer."})
    outputs: int = field(default=1024, metadata={"help": "Output width of the layer."})
    tasks: int = field(default=15, metadata={"help": "Number of adapters."})
    rank: int = field(default=4, metadata={"help": "Rank of each adapter."})

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            require_count(name, value)

    def bytes(self, itemsize: int) -> int:
        """Bytes that the tensors of a forward and backward pass take at least.

        Args:
            itemsize: bytes of a number.
        """
        rank, rows = self.tasks * self.rank, self.batch * self.tokens
        weights = self.inputs * self.outputs + rank * (self.inputs + self.outputs)
        return itemsize * (weights + 2 * rows * (self.inputs + self.outputs))
