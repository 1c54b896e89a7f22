"""What a plan saves: MACs, parameters and measured seconds, unit by unit."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from search_spaces.plan import Attention, PruningPlan, Unit


@dataclass(frozen=True)
class Cost:
    """What one forward pass costs.

    Attributes:
        macs: multiply-accumulates per image.
        params: number of parameters, after merging.
        seconds: wall-clock seconds per batch, by batch size.
    """

    macs: float
    params: float
    seconds: Mapping[int, float]

    def minus(self, other: "Cost") -> "Cost":
        """Subtract quantity by quantity."""
        seconds = {batch: s - other.seconds[batch] for batch, s in self.seconds.items()}
        return Cost(self.macs - other.macs, self.params - other.params, seconds)


@dataclass(frozen=True)
class UnitCosts:
    """Cost of the dense model and what removing (and merging) each unit saves.

    Savings of units add up: nothing a unit's removal does changes the shape of what stays.

    Attributes:
        dense: cost of the model as built.
        saved: what each removable unit saves.
        device: name of the hardware on which the seconds were measured.
        spreads: how far off what each unit saves may be, in seconds by batch size, by noise (a 95 % interval's half
            width) and by what else is gone; none where they are not known.
        compiled: whether the seconds are those of models as torch compiles them.
    """

    dense: Cost
    saved: Mapping[Unit, Cost]
    device: str
    spreads: Mapping[Unit, Mapping[int, float]] = field(default_factory=dict)
    compiled: bool = False

    def of(self, plan: PruningPlan) -> Cost:
        """Return the predicted cost of the merged model of `plan`."""
        cost = self.dense
        for unit in plan.units:
            cost = cost.minus(self.saved[unit])
        return cost

    def training_macs(self, plan: PruningPlan, attention: Attention) -> float:
        """Return the MACs of a forward pass while a plan is trained.

        An activation's removal saves none, as the layers merge later; nor does that of an attention which fades.
        """
        return self.dense.macs if attention == "double" else self.of(PruningPlan(attn=plan.attn)).macs

    def spread(self, plan: PruningPlan, batch: int) -> float:
        """Return how far off the predicted seconds of a plan may be at one batch size.

        Units that were measured together err together, so spreads add up as savings do.
        """
        return sum(self.spreads.get(unit, {}).get(batch, 0.0) for unit in plan.units)

    def speedup(self, plan: PruningPlan, batch: int) -> float:
        """Return predicted dense seconds over predicted pruned seconds at one batch size.

        It is nan where savings add up to all that the dense model takes: such a prediction tells nothing.
        """
        dense, left = self.dense.seconds[batch], self.of(plan).seconds[batch]
        return dense / left if left > 1e-9 * dense else math.nan
