"""`RowOrder`: where the rows of a cache have gone since somebody noted something about them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class RowOrder:
    """Follows the rows of a batch as they are repeated, selected or reordered.

    Attributes:
        before: how many rows there were at first.
        rows: for every row of now, which of those it was.
    """

    def __init__(self, before: int) -> None:
        """Start with `before` rows in their own places."""
        self.before, self.rows = before, tuple(range(before))

    @property
    def unmoved(self) -> bool:
        """Whether every row is where it was, and none has been added or dropped."""
        return self.rows == tuple(range(self.before))

    def move(self, rows: Sequence[int]) -> None:
        """Row i is now what row `rows[i]` was."""
        self.rows = tuple(self.rows[row] for row in rows)

    def pick(self, noted: Tensor) -> Tensor:
        """What was noted of the rows at first, for the rows of now.

        Args:
            noted: `[P, ...]`, one entry for each row or, where rows had been repeated before it was noted,
                for each `before / P` rows in turn.

        Returns:
            `noted` itself while nothing has moved, else `[B, ...]`.
        """
        if self.unmoved:
            return noted
        each = self.before // len(noted)
        return noted[[row // each for row in self.rows]]
