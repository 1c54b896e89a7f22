"""The stage between recommendation and fine-tune: swaps of one unit, tried on the plan that will be fine-tuned.

The ranking compares units one by one and in a model that is not trained on; a trial sees what they do together. A swap
puts a removed unit back and takes a kept one of its kind instead, so the cell stays, and with it the budget.

Every swap is tried once. The one that does best is tried a second time, and the ranking's plan until it has two trials;
the swap replaces the plan where it then is better by more than `needed_gain`. Everything is a function of the trial
log: a start that goes on, or one with more swaps, runs the trials that are missing and decides anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist, fmean
from typing import Any

from dpt_search.costs_table import read_costs
from dpt_search.decisions import cell_costs
from dpt_search.observed import REFINE, surface_trials
from dpt_search.remote import call_each
from dpt_search.run import Run, identity_of, read_ranking
from dpt_search.search_stages import chosen_row, decide, speedups
from dpt_search.store import Finished, Proposed, TrialLog
from search_spaces.budgets import Budget
from search_spaces.costs import UnitCosts
from search_spaces.plan import KINDS, PruningPlan, Ranking, Unit
from search_spaces.ratios import Cell

NAME = "refine.json"
RISK = 0.05
"""How often plans that are no better than the ranking's may replace it."""
REPEATS = 2
"""Trials that the ranking's plan and the best swap are judged by, at least."""


@dataclass(frozen=True)
class Verdict:
    """What came of a refinement.

    Attributes:
        plan: text form of the ranking's plan.
        chosen: text form of the plan to be fine-tuned: that, or a swap.
        accuracies: those of the ranking's plan, by trial.
        swaps: accuracies by trial of every swap, by its plan; none where its trial failed.
        candidate: the swap that was judged; empty where there was none worth it.
        gain: mean accuracy of the candidate less that of the ranking's plan.
        needed: the gain above which it replaces the plan.
        noise: standard deviation of one trial, as learnt from the search.
    """

    plan: str
    chosen: str
    accuracies: list[float]
    swaps: dict[str, list[float]]
    candidate: str
    gain: float
    needed: float
    noise: float


def refine(run: Run) -> None:
    """Try swaps on the recommended plan, where the configuration asks for some; one that is better takes its place.

    Raises:
        BadRun: there is no recommendation yet.
    """
    if not run.config.refine:
        return
    ranking, cell = read_ranking(run), Cell(*chosen_row(run)["cell"])
    plan, budget, costs = ranking.plan(cell), run.config.chosen_budget, read_costs(run.store)
    swaps = [swap for swap in swapped_plans(ranking, cell) if _keeps(budget, costs, plan, swap)][: run.config.refine]

    def work(_: str) -> None:
        found = _judged(run, ranking, plan, swaps)
        run.store.write_json(NAME, asdict(found))
        _recommend(run, found)
        run.say(_said(found))

    # A recommendation that was made anew, of whatever, has the ranking's plan again.
    made = (run.store.read_json("stages/recommend.json") or {}).get("finished_at")
    about = [str(plan), *map(str, swaps)]
    run.stage("refine", [about, str(run.config.chosen_budget), made, identity_of(run.config)], NAME, work)


def _keeps(budget: Budget, costs: UnitCosts | None, plan: PruningPlan, swap: PruningPlan) -> bool:
    """Say whether a swap costs no more than the budget allows, or than the plan that was found to meet it."""
    if budget.quantity == "units" or costs is None:
        return True
    allowed = max(budget.limit(costs.dense), budget.of(costs.of(plan)))
    return budget.of(costs.of(swap)) <= allowed * (1 + 1e-9)


def swapped_plans(ranking: Ranking, cell: Cell) -> list[PruningPlan]:
    """Return all plans that differ from the ranking's plan of a cell by one swap, the most promising first.

    First comes the most important removed unit of a kind for the least important kept one, then pairs that are further
    from that border. Distance is counted in places, not in importance: the values of two kinds are on different scales,
    and a conditional ranking's are of different models.
    """
    removed, found = set(ranking.plan(cell).units), []
    for number, (kind, order, n) in enumerate(
        zip(KINDS, (ranking.attn, ranking.act), (cell.n_attn, cell.n_act), strict=True)
    ):
        for inside, back in enumerate(reversed(order[:n])):
            for outside, out in enumerate(order[n:]):
                plan = PruningPlan.of((removed - {Unit(kind, back)}) | {Unit(kind, out)})
                found.append(((inside + outside, inside, number), plan))
    return [plan for _, plan in sorted(found, key=lambda pair: pair[0])]


def needed_gain(noise: float, swaps: int, plan: int, candidate: int) -> float:
    """Return the difference of means, in units of accuracy, above which a swap replaces the ranking's plan.

    The candidate is the best of several, so its first trial flatters it. A one-sided normal test at `RISK` over the
    number of swaps (Bonferroni) holds for whichever of them it is: were none better than the plan, one would replace it
    in at most `RISK` of all refinements. The plan's own trials flatter it too, since it was recommended by them, which
    makes the test more cautious, not less.

    Args:
        noise: standard deviation of one trial.
        swaps: number of swaps tried.
        plan: trials of the ranking's plan.
        candidate: trials of the swap.
    """
    return NormalDist().inv_cdf(1 - RISK / swaps) * noise * math.sqrt(1 / plan + 1 / candidate)


def _judged(run: Run, ranking: Ranking, plan: PruningPlan, swaps: Sequence[PruningPlan]) -> Verdict:
    """Run what trials are missing, and decide."""
    log, noise = TrialLog(run.store), float(decide(run, (run.config.chosen_budget,))["surface"]["noise"])
    _measure(run, log, ranking, [*swaps, plan] if swaps else [], 1)
    first = {swap: known[0] for swap in swaps if (known := accuracies_of(log, swap))}
    candidate = max(first, key=lambda swap: first[swap], default=None)
    if candidate is not None and (ours := accuracies_of(log, plan)) and first[candidate] > fmean(ours):
        _measure(run, log, ranking, [candidate, plan], REPEATS)
    else:
        candidate = None
    return _verdict(log, plan, swaps, candidate, noise)


def _verdict(
    log: TrialLog, plan: PruningPlan, swaps: Sequence[PruningPlan], candidate: PruningPlan | None, noise: float
) -> Verdict:
    ours, tried = accuracies_of(log, plan), {str(swap): accuracies_of(log, swap) for swap in swaps}
    chosen, gain, needed = plan, 0.0, 0.0
    if candidate is not None:
        theirs = tried[str(candidate)]
        gain, needed = fmean(theirs) - fmean(ours), needed_gain(noise, len(swaps), len(ours), len(theirs))
        # A candidate whose second trial failed is not to be relied on.
        chosen = candidate if gain > needed and len(theirs) >= REPEATS else plan
    return Verdict(str(plan), str(chosen), ours, tried, str(candidate or ""), gain, needed, noise)


def accuracies_of(log: TrialLog, plan: PruningPlan) -> list[float]:
    """Return the accuracies of a plan's trials, by number, whoever proposed them."""
    found = (log.finished[n] for n in sorted(log.finished) if log.finished[n].plan == str(plan))
    return [each.accuracy for each in found if each.accuracy is not None]


def _measure(run: Run, log: TrialLog, ranking: Ranking, plans: Sequence[PruningPlan], count: int) -> None:
    """Run trials until every plan has `count` of them; one that fails here is not repeated."""
    seen = sum(each.accuracy is not None for each in surface_trials(log, ranking))
    missing = [trial for plan in plans for trial in _missing(run, log, plan, count, seen)]
    if not missing:
        return
    run.start_ray()
    run.say(f"refine: {len(missing)} trials to run")
    task = run.trial_task(run.config.cpus_per_trial, "checkpoints")
    told = [(task, trial.trial, trial.plan, trial.seed) for trial in missing]
    for position, result in call_each(run.resources, "trainables.table_trial:run_trial", told):
        result = result or {"error": "its worker was lost"}
        ended = Finished.of(missing[position], result, result["error"])
        log.finish(ended)
        run.store.delete(f"checkpoints/{ended.trial:06d}.pt")
        how = f"failed: {ended.error}" if ended.accuracy is None else f"val {ended.accuracy:.1%}, {ended.seconds:.0f} s"
        run.say(f"trial {ended.trial} {ended.plan}: {how}")


def _missing(run: Run, log: TrialLog, plan: PruningPlan, count: int, seen: int) -> list[Proposed]:
    """Return the trials of a plan that are to be run: those that were begun, then new ones, recorded here."""
    own = [p for _, p in sorted(log.proposed.items()) if p.sampler == REFINE and p.plan == str(plan)]
    failed = [p for p in own if p.trial in log.finished and log.finished[p.trial].accuracy is None]
    left = max(0, count - len(accuracies_of(log, plan)) - len(failed))
    trials = [p for p in own if p.trial not in log.finished][:left]
    while len(trials) < left:
        number = log.next_trial
        trials.append(Proposed(number, str(plan), run.config.start, run.config.seed + number, seen, REFINE, {}))
        log.propose(trials[-1])
    return trials


def _recommend(run: Run, found: Verdict) -> None:
    """Write the plan that was chosen into the recommendation; a replaced one is named beside it."""
    recommendation, budget = run.store.read_json("recommendation.json"), str(run.config.chosen_budget)
    costs, plan = cell_costs(run.store), PruningPlan.parse(found.chosen)
    speed = speedups(costs.costs, plan, costs.measured) if costs is not None else {}
    told: dict[str, Any] = {"plan": found.chosen, "speedup": speed}
    if found.chosen != found.plan:
        told |= {"refined": True, "replaced": found.plan}
    for index, row in enumerate(recommendation["budgets"]):
        if row["budget"] == budget:
            kept = {name: value for name, value in row.items() if name not in ("refined", "replaced")}
            recommendation["budgets"][index] = kept | told
    run.store.write_json("recommendation.json", recommendation)


def _said(found: Verdict) -> str:
    if not found.swaps:
        return f"refine: {found.plan} has no unit to swap"
    if not found.accuracies:
        return f"refine: no trial of {found.plan} came to an accuracy, so it stays"
    if not found.candidate:
        return f"refine: none of {len(found.swaps)} swaps did better than {found.plan}"
    gain = f"{100 * found.gain:+.2f} points, {100 * found.needed:.2f} needed"
    if found.chosen == found.plan:
        return f"refine: {found.plan} stays; the best swap, {found.candidate}, is within the noise ({gain})"
    return f"refine: {found.chosen} replaces {found.plan} ({gain})"
