"""The lattice of pruning ratios: how many units of each kind are removed."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Cell:
    """A pair of counts: `n_attn` attentions and `n_act` activations removed."""

    n_attn: int
    n_act: int

    def __post_init__(self) -> None:
        if self.n_attn < 0 or self.n_act < 0:
            raise ValueError(f"a cell counts removed units, so it cannot be negative: {self}")

    def __str__(self) -> str:
        return f"({self.n_attn},{self.n_act})"

    @property
    def total(self) -> int:
        """Number of units removed."""
        return self.n_attn + self.n_act


@dataclass(frozen=True)
class RatioSpace:
    """All cells of a model with `n_attn` removable attentions and `n_act` removable activations."""

    n_attn: int
    n_act: int

    def __contains__(self, cell: Cell) -> bool:
        return cell.n_attn <= self.n_attn and cell.n_act <= self.n_act

    def __iter__(self) -> Iterator[Cell]:
        """Cells in lexicographic order, `(0,0)` first."""
        return (Cell(a, g) for a in range(self.n_attn + 1) for g in range(self.n_act + 1))

    def __len__(self) -> int:
        return (self.n_attn + 1) * (self.n_act + 1)

    @property
    def total(self) -> int:
        """Number of removable units of both kinds."""
        return self.n_attn + self.n_act

    def ratios(self, cell: Cell) -> tuple[float, float]:
        """Return the pruning ratios (m_a, m_g) of a cell, each in [0, 1]; a kind without units has ratio 0."""
        return cell.n_attn / max(self.n_attn, 1), cell.n_act / max(self.n_act, 1)

    def line(self, total: int) -> list[Cell]:
        """Return the cells that remove exactly `total` units, by growing `n_attn`; empty if there are none."""
        first, last = max(0, total - self.n_act), min(self.n_attn, total)
        return [Cell(a, total - a) for a in range(first, last + 1)]


def within(cells: Iterable[Cell]) -> list[Cell]:
    """Return every cell that removes no more of either kind than one of these does, in lexicographic order."""
    most: dict[int, int] = {}
    for cell in cells:
        for n_attn in range(cell.n_attn + 1):
            most[n_attn] = max(most.get(n_attn, 0), cell.n_act)
    return [Cell(n_attn, n_act) for n_attn in sorted(most) for n_act in range(most[n_attn] + 1)]


def spread(space: RatioSpace, cells: Iterable[Cell], most: int = 0) -> list[Cell]:
    """Order cells so that each is as far as can be from all before it, in pruning ratios; the dense model first.

    Args:
        space: the lattice.
        cells: to order.
        most: of them to return; 0 for all.
    """
    left = {cell: float("inf") for cell in sorted(cells)}
    ordered: list[Cell] = []
    while left and (not most or len(ordered) < most):
        # Of equally far ones, that with the fewest units.
        chosen = max(left, key=lambda cell: (left[cell], -cell.total))
        ordered.append(chosen)
        del left[chosen]
        for cell in left:
            left[cell] = min(left[cell], _distance(space, chosen, cell))
    return ordered


def _distance(space: RatioSpace, one: Cell, other: Cell) -> float:
    pairs = zip(space.ratios(one), space.ratios(other), strict=True)
    return sum((a - b) ** 2 for a, b in pairs)
