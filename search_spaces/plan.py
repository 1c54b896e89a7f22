"""Units, plans and rankings: which layers are removed."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from search_spaces.ratios import Cell, RatioSpace

KINDS = ("attn", "act")
"""`attn`: the attention of a block. `act`: the activation between the two linear layers of its MLP."""
Attention = Literal["zero", "identity", "double"]
"""What the attention half `x + attn(norm1(x))` of a block becomes without its attention.

`zero`: nothing, `x`. `identity`: `x + norm1(x)`, as in HetDPT's code. `double`: `2 x`, reached in training by a decay,
as in NOSE ("MLP can be a good transformer learner", CVPR 2024).
"""


@dataclass(frozen=True, order=True)
class Unit:
    """One removable layer, written `attn:3` or `act:7`; `index` counts the blocks from the input, 0 first."""

    kind: str
    index: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind of unit {self.kind!r}; use one of {', '.join(KINDS)}")
        if self.index < 0:
            raise ValueError(f"a unit's index cannot be negative: {self.index}")

    def __str__(self) -> str:
        return f"{self.kind}:{self.index}"


@dataclass(frozen=True)
class PruningPlan:
    """The exact units removed. Equal sets of units are equal plans.

    >>> str(PruningPlan.parse("act:9,8 attn:3,0"))
    'attn:0,3 act:8,9'
    >>> str(PruningPlan())
    'dense'
    """

    attn: tuple[int, ...] = ()
    act: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for kind in KINDS:
            indices = getattr(self, kind)
            if any(i < 0 for i in indices):
                raise ValueError(f"a unit's index cannot be negative: {kind}:{min(indices)}")
            object.__setattr__(self, kind, tuple(sorted(set(indices))))

    @classmethod
    def of(cls, units: Iterable[Unit]) -> "PruningPlan":
        """Make the plan that removes `units`."""
        units = list(units)
        return cls(*(tuple(u.index for u in units if u.kind == kind) for kind in KINDS))

    @classmethod
    def parse(cls, text: str) -> "PruningPlan":
        """Read the text form; the empty text and `dense` are the empty plan.

        Raises:
            ValueError: `text` is not of the form `attn:0,3 act:8,9`.
        """
        units: list[Unit] = []
        for part in text.split() if text.strip() != "dense" else []:
            kind, _, indices = part.partition(":")
            try:
                units += [Unit(kind, int(i)) for i in indices.split(",")]
            except ValueError as error:
                raise ValueError(f"cannot read the plan {text!r} (expected 'attn:0,3 act:8,9'): {error}") from None
        return cls.of(units)

    def __str__(self) -> str:
        parts = [f"{kind}:{','.join(map(str, getattr(self, kind)))}" for kind in KINDS if getattr(self, kind)]
        return " ".join(parts) or "dense"

    def __len__(self) -> int:
        return len(self.attn) + len(self.act)

    @property
    def units(self) -> tuple[Unit, ...]:
        """The removed units, attentions first, by index."""
        return tuple(Unit(kind, i) for kind in KINDS for i in getattr(self, kind))

    @property
    def cell(self) -> Cell:
        """How many units of each kind the plan removes."""
        return Cell(len(self.attn), len(self.act))


@dataclass(frozen=True)
class Ranking:
    """Order of the removable units within each kind, least important (first to go) first.

    The plans it gives are nested: a cell with more units of a kind removes a superset.
    """

    attn: tuple[int, ...]
    act: tuple[int, ...]

    def __post_init__(self) -> None:
        for kind in KINDS:
            indices = getattr(self, kind)
            if len(set(indices)) != len(indices):
                raise ValueError(f"the ranking names a unit twice: {kind}:{','.join(map(str, indices))}")

    def __contains__(self, plan: PruningPlan) -> bool:
        """Say whether a plan is the one that the ranking gives for the plan's cell."""
        return plan.cell in self.space and plan == self.plan(plan.cell)

    @property
    def space(self) -> RatioSpace:
        """The lattice over the ranked units."""
        return RatioSpace(len(self.attn), len(self.act))

    def plan(self, cell: Cell) -> PruningPlan:
        """Return the plan that removes the least important units of each kind.

        Raises:
            ValueError: the cell asks for more units than there are.
        """
        if cell not in self.space:
            raise ValueError(
                f"cell {cell} removes more units than there are: {len(self.attn)} attn, {len(self.act)} act"
            )
        return PruningPlan(self.attn[: cell.n_attn], self.act[: cell.n_act])
