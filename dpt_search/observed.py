"""Which trials of the log are a search's, and which of those tell of the surface.

The trials of a refinement are in the same log and under the same numbers, and serve its own decision alone. Most have
plans that are not the ranking's, so they say nothing of their cell; and if its repeats of the ranking's plan counted,
every refinement could move the recommendation that it refines.
"""

from __future__ import annotations

from dpt_search.store import Finished, Proposed, TrialLog
from search_spaces.plan import PruningPlan, Ranking

REFINE = "refine"
"""What stands in place of the sampler's name in the trials of a refinement."""


def searched(log: TrialLog) -> list[Proposed]:
    """Return the trials that a search proposed, by number."""
    return [log.proposed[n] for n in sorted(log.proposed) if log.proposed[n].sampler != REFINE]


def unfinished(log: TrialLog) -> list[Proposed]:
    """Return the trials that a search proposed and that have no end yet, oldest first."""
    return [each for each in searched(log) if each.trial not in log.finished]


def ended(log: TrialLog) -> list[Finished]:
    """Return the ends of a search's trials, failed ones too, by number."""
    refined = {n for n, each in log.proposed.items() if each.sampler == REFINE}
    return [log.finished[n] for n in sorted(log.finished) if n not in refined]


def surface_trials(log: TrialLog, ranking: Ranking) -> list[Finished]:
    """Return the ends of a search's trials whose plan is the ranking's for its cell, failed ones too, by number."""
    return [each for each in ended(log) if PruningPlan.parse(each.plan) in ranking]
