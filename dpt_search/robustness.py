"""How steady decisions are: the trials are disturbed by noise again and again, and all is decided anew each time.

A draw adds noise to the accuracy of every trial. Whatever the decision rests on is learnt again from the disturbed
trials, hyperparameters and weights of models too: they are part of how it was made, and a draw that kept them would
show another procedure. Hints and the dense model's accuracy, which are no trials, stay as they are. What a move costs
is judged by the undisturbed surface.

Disturbed trials carry noise twice, their own and the draw's, and what is learnt from them knows: it trusts each trial
less. So a near tie may tip to one side in most draws; its cost tells that it was one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dpt_search.map_predictor import Array
from search_spaces.goals import Goal
from search_spaces.ratios import Cell, RatioSpace

POINT = 0.01


@dataclass(frozen=True)
class Noise:
    """Normal noise of one trial, in units of accuracy.

    Attributes:
        sd: its standard deviation.
        clip: no disturbance is larger than this.
    """

    sd: float
    clip: float = math.inf

    def draw(self, generator: np.random.Generator, count: int) -> Array:
        """Return the disturbances of so many trials, [count]."""
        return np.clip(self.sd * generator.standard_normal(count), -self.clip, self.clip)

    def __str__(self) -> str:
        clipped = f", clipped at {self.clip / POINT:.3g}" if self.clip < math.inf else ""
        return f"sd {self.sd / POINT:.3g} points{clipped}"


@dataclass(frozen=True)
class Samples:
    """Trials, and how decisions follow from their accuracies.

    Attributes:
        name: what they are, for the reader.
        space: the lattice.
        budgets: what is decided unless other budgets are asked for.
        accuracies: [n] of the trials.
        believe: given accuracies [n], returns the believed accuracy of every cell, [cells], and the sd of one trial's
            noise.
    """

    name: str
    space: RatioSpace
    budgets: tuple[Goal, ...]
    accuracies: Array
    believe: Callable[[Array], tuple[Array, float]]


@dataclass(frozen=True)
class Stability:
    """What became of one budget's decision.

    Attributes:
        budget: the budget.
        cell: what is decided undisturbed.
        moves: [draws] by how many cells the decision moved along the budget's line, or front.
        costs: [draws] what the move loses by the undisturbed surface, in units of accuracy.
    """

    budget: Goal
    cell: Cell
    moves: np.ndarray
    costs: Array

    @property
    def outcomes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """[draws] each: whether the decision stayed, moved by one, moved by more."""
        return self.moves == 0, self.moves == 1, self.moves > 1

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of the draws with each outcome."""
        return tuple(float(np.mean(each)) for each in self.outcomes)


def study(samples: Samples, budgets: Sequence[Goal], noise: Noise, draws: int, seed: int) -> list[Stability]:
    """Disturb the samples and decide, again and again.

    Args:
        samples: the trials.
        budgets: what is decided, each with the cells it is decided among.
        noise: of one trial.
        draws: how often.
        seed: of the disturbances.
    """
    index = {cell: i for i, cell in enumerate(samples.space)}
    lines = [budget.cells for budget in budgets]
    places = [np.array([index[cell] for cell in line]) for line in lines]
    generator = np.random.default_rng(seed)
    undisturbed = samples.believe(samples.accuracies)[0]
    disturbed = (samples.accuracies + noise.draw(generator, len(samples.accuracies)) for _ in range(draws))
    found = np.array([_decisions(samples.believe(each)[0], places) for each in disturbed])
    results = []
    for number, best in enumerate(_decisions(undisturbed, places)):
        values, moved = undisturbed[places[number]], found[:, number]
        # Neighbours on a line differ by one unit of each kind.
        results.append(
            Stability(budgets[number], lines[number][best], np.abs(moved - best), values[best] - values[moved])
        )
    return results


def _decisions(believed: Array, places: Sequence[np.ndarray]) -> list[int]:
    """Return the position of the best cell on every budget's line."""
    return [int(believed[line].argmax()) for line in places]
