"""What a result must reach, as a user writes it: `units=8`, `speedup=1.5`, `macs=0.6`, `params=40M`."""

import math
import re
from dataclasses import dataclass

from search_spaces.costs import Cost

DEFAULT_BATCH = 64
"""Batch size of a `speedup` that names none."""
_SUFFIXES = {"K": 1e3, "M": 1e6, "G": 1e9}
_FORM = re.compile(r"(units|speedup|macs|params)(?:@(\d+))?=(.+)")
_EXAMPLES = "units=8, speedup=1.5, speedup@1=1.3, macs=0.6 or params=40M, or several: units=4,6 speedup=1.5"


@dataclass(frozen=True)
class Budget:
    """What a result must reach.

    Attributes:
        value: `units`: exactly so many units of either kind removed. `speedup`: at least so many times faster.
            `macs`, `params`: at most so many left; up to 1 it is a share of the dense model's.
        quantity: `units`, `speedup`, `macs` or `params`.
        batch: batch size of a speedup, in images; 0 for the others.

    >>> [str(budget) for budget in parse_budgets("units=6,4 speedup@1=1.3 params=40M")]
    ['units=4', 'units=6', 'speedup@1=1.3', 'params=40M']
    """

    value: float
    quantity: str = "units"
    batch: int = 0

    def __post_init__(self) -> None:
        if not math.isfinite(self.value) or self.value < 0:
            raise ValueError(f"a budget cannot be negative: {self}")
        if self.quantity == "units" and self.value != int(self.value):
            raise ValueError(f"units are counted in whole numbers: {self}")
        if self.quantity == "speedup" and (self.value < 1 or self.batch < 1):
            raise ValueError(f"a speedup is at least 1, at a batch size of at least 1: {self}")
        if self.quantity in ("macs", "params") and not self.value:
            raise ValueError(f"no model is left without {self.quantity}: {self}")

    def __str__(self) -> str:
        return f"{self.about}={_written(self.value)}"

    @property
    def about(self) -> str:
        """The quantity as it is written, with the batch size where that is not the default: `speedup@1`."""
        return f"{self.quantity}@{self.batch}" if self.batch not in (0, DEFAULT_BATCH) else self.quantity

    @property
    def strictness(self) -> float:
        """Grows with how much has to go; compares budgets of one quantity only."""
        return -self.value if self.quantity in ("macs", "params") else self.value

    def limit(self, dense: Cost) -> float:
        """Return the most that a plan may cost: seconds a batch, MACs an image or parameters.

        Raises:
            KeyError: seconds at this batch size are not known.
            ValueError: the budget is one of units, which no cost limits.
        """
        if self.quantity == "units":
            raise ValueError(f"{self} limits no cost")
        if self.quantity == "speedup":
            return dense.seconds[self.batch] / self.value
        return self.value * self.of(dense) if self.value <= 1 else self.value

    def of(self, cost: Cost) -> float:
        """Return what `limit` limits."""
        if self.quantity == "speedup":
            return cost.seconds[self.batch]
        return cost.macs if self.quantity == "macs" else cost.params

    def reached(self, cost: Cost, dense: Cost) -> float:
        """Return what a plan of that cost reaches, in the unit of `value`.

        It is nan where savings add up to all that the dense model takes: such a prediction tells nothing.
        """
        if self.of(cost) <= 1e-9 * self.of(dense):
            return math.nan
        if self.quantity == "speedup":
            return dense.seconds[self.batch] / cost.seconds[self.batch]
        return self.of(cost) / self.of(dense) if self.value <= 1 else self.of(cost)

    def is_met_by(self, reached: float) -> bool:
        """Say whether that much, in the unit of `value`, is enough."""
        return reached >= self.value if self.quantity == "speedup" else reached <= self.value


def parse_budgets(text: str) -> tuple[Budget, ...]:
    """Read one budget or several, `units=4,6 speedup=1.3,1.5`, with spaces or semicolons between quantities.

    Returns:
        Each once: quantities in the order in which they are first named, the mildest budget of each first.

    Raises:
        ValueError: the text is not of that form.
    """
    found: dict[tuple[str, int], set[Budget]] = {}
    parts = re.sub(r"\s*([=,])\s*", r"\1", text).replace(";", " ").split()
    for part in parts or [text]:
        form = _FORM.fullmatch(part)
        if form is None or (form[2] and form[1] != "speedup"):
            raise ValueError(f"unknown budget {part!r}; write {_EXAMPLES}")
        batch = int(form[2] or DEFAULT_BATCH) if form[1] == "speedup" else 0
        try:
            budgets = {Budget(_number(value, form[1]), form[1], batch) for value in form[3].split(",")}
        except ValueError as error:
            raise ValueError(f"cannot read budget {part!r} (expected {_EXAMPLES}): {error}") from None
        found.setdefault((form[1], batch), set()).update(budgets)
    return tuple(budget for each in found.values() for budget in sorted(each, key=lambda budget: budget.strictness))


def _number(text: str, quantity: str) -> float:
    if quantity == "units":
        return int(text)
    scale = _SUFFIXES.get(text[-1:].upper(), 1.0) if quantity != "speedup" else 1.0
    return float(text[:-1] if scale > 1 else text) * scale


def _written(value: float) -> str:
    """Return a number as short as reads back to the same."""
    for suffix, scale in sorted(_SUFFIXES.items(), key=lambda pair: -pair[1]):
        short = f"{value / scale:.12g}"
        if value >= scale and "e" not in short and float(short) * scale == value:
            return short + suffix
    return f"{value:.12g}" if float(f"{value:.12g}") == value else repr(value)
