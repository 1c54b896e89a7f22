"""What a result must reach, and the cells that reach it."""

from dataclasses import dataclass

from search_spaces.ratios import Cell, RatioSpace


@dataclass(frozen=True, order=True)
class Budget:
    """Remove exactly `units` units of either kind, written `units=8`."""

    units: int

    def __post_init__(self) -> None:
        if self.units < 0:
            raise ValueError(f"a budget cannot be negative: {self}")

    def __str__(self) -> str:
        return f"units={self.units}"

    def feasible(self, space: RatioSpace) -> list[Cell]:
        """Return the cells that meet the budget, by growing `n_attn`.

        Raises:
            ValueError: the model has fewer removable units than the budget asks for.
        """
        cells = space.line(self.units)
        if not cells:
            raise ValueError(
                f"budget {self} is larger than the space: the model has {space.total} removable units "
                f"({space.n_attn} attn, {space.n_act} act); ask for at most units={space.total}"
            )
        return cells


def parse_budgets(text: str) -> tuple[Budget, ...]:
    """Read `units=8`, or several at once: `units=4,6,8`.

    Raises:
        ValueError: the text is not of that form.
    """
    quantity, _, values = text.partition("=")
    if quantity.strip() != "units":
        raise ValueError(f"unknown budget {text!r}; write units=8, or several at once: units=4,6,8")
    try:
        return tuple(sorted({Budget(int(v)) for v in values.split(",")}))
    except ValueError as error:
        raise ValueError(f"cannot read budget {text!r} (expected units=8 or units=4,6,8): {error}") from None
