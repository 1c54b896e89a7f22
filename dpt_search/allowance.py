"""What trials and probe will cost, and what a search may: searches that are compared stop at the same cost.

Costs are images times MACs, as trial and probe count them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from dpt_search.store import Finished
from search_spaces.costs import UnitCosts
from search_spaces.plan import Attention, Ranking
from search_spaces.ratios import Cell
from trainables.settings import Recipe
from trainables.tasks import TRAINING_FORWARDS, ProbeTask


@dataclass(frozen=True)
class Prices:
    """What trials and probe will cost, known before they run.

    Attributes:
        costs: of the dense model and its units.
        ranking: translates a cell into a plan.
        recipe: of a trial.
        attention: what stays of a removed attention.
        images: how many count: `train` in an epoch, `val` and `probe` in an evaluation.
    """

    costs: UnitCosts
    ranking: Ranking
    recipe: Recipe
    attention: Attention
    images: Mapping[str, int]

    def trial(self, cell: Cell) -> float:
        """Return the cost of a trial."""
        plan = self.ranking.plan(cell)
        macs, removed = (self.costs.training_macs(plan, attention) for attention in (self.attention, "zero"))
        teacher = self.costs.dense.macs if self.recipe.distillation != "none" else 0.0
        epochs = self.recipe.epochs
        training = epochs * self.images["train"] * (TRAINING_FORWARDS * macs + teacher)
        # Once before the first epoch and after each.
        return training + self.images["val"] * (removed + epochs * macs)

    def probe(self, task: ProbeTask) -> float:
        """Return the cost of a probe: its training, taught by the dense model, and its cells as merged models."""
        passes = TRAINING_FORWARDS * task.passes + 1
        training = self.costs.dense.macs * task.recipe.epochs * self.images["train"] * passes
        return training + self.images["probe"] * sum(self.costs.of(self.ranking.plan(cell)).macs for cell in task.cells)

    @property
    def unit(self) -> float:
        """Cost of a trial of the dense model, which others are told in."""
        return self.trial(Cell(0, 0))

    @property
    def cheapest(self) -> float:
        """The least that a trial can cost."""
        return min(self.trial(cell) for cell in self.ranking.space)


@dataclass(frozen=True)
class Allowance:
    """A limit of cost.

    Attributes:
        most: what trials and probe may cost.
        prices: of trials.
        paid: cost of the probe, also while it still runs.
    """

    most: float
    prices: Prices
    paid: Callable[[], float]

    def spent(self, trials: Iterable[Finished]) -> float:
        """Return what the probe and these trials cost, failed ones counted."""
        return self.paid() + sum(each.cost for each in trials)

    def is_spent(self, trials: Iterable[Finished], running: Iterable[Cell]) -> bool:
        """Say whether no further trial can end within the limit, once those that run have ended as predicted."""
        committed = self.spent(trials) + sum(self.prices.trial(cell) for cell in running)
        # Costs that should be equal may differ by rounding.
        return committed + self.prices.cheapest > self.most * (1 + 1e-9)

    def told(self, cost: float) -> str:
        """Return a cost in trials of the dense model, as text."""
        return f"{cost / self.prices.unit:.2f}"
