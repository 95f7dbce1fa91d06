"""The samples of a packed batch, known on the host: what attention needs in place of a mask."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Documents:
    """Lengths of all samples of a batch, row after row; the padding at a row's end counts as one more sample."""

    lengths: tuple[int, ...]
    """They sum to rows x tokens of the batch."""
    borders: torch.Tensor
    """int32 ``[len(lengths) + 1]``: 0 and the running sums, which kernels for many lengths read on the device."""
    longest: int
    """Of the lengths, or more."""

    @classmethod
    def of(cls, lengths: list[int]) -> "Documents":
        borders = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        borders[1:] = torch.tensor(lengths).cumsum(0)
        return cls(tuple(lengths), borders, max(lengths))

    def rounded(self) -> "Documents":
        """The same for kernels, of few shapes: empty samples at the end up to a power of two (at least 8), ``longest``
        the next power of two. ``lengths`` is empty: it would differ from batch to batch."""
        count = len(self.borders) - 1
        empty = self.borders[-1:].expand(max(8, power_of_two(count)) - count)
        return Documents((), torch.cat([self.borders, empty]), power_of_two(self.longest))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Documents":
        """As of a tensor."""
        return Documents(self.lengths, self.borders.to(device, non_blocking=non_blocking), self.longest)

    def pin_memory(self) -> "Documents":
        """As of a tensor."""
        return Documents(self.lengths, self.borders.pin_memory(), self.longest)


def power_of_two(count: int) -> int:
    """The least that is not less than ``count``."""
    return 1 << (count - 1).bit_length()
