"""How well do unit costs that add up predict the measured latency of a plan?

    python benchmarks/cost_model.py [--models embedded,deit_small_patch16_224] [--batches 1,64] [--plans 30] [--seed 0]
        [--profile-seconds 20] [--seconds 60] [--fewest 7] [--compiled] [--device cpu] [--out FILE]

For each model the profile is taken as `dpt-search profile` takes it. Then so many random plans (every number of
attentions and of activations alike, and then every choice of them) are built, merged and timed, five of them in turn
with the dense model, which takes `--seconds` for all. Of a plan's predicted seconds over the measured ones, less 1, the
report has the mean of the absolute values (`error`, the goal is at most 0.05), the mean (`bias`) and the largest
(`worst`); `covered` is the share of the plans that measured within the spread that the profile states for them.
Predicted is the share of the dense model's seconds, as budgets use it, times what the dense model took beside the plan;
`error_absolute` takes the profile's seconds as they are, so the machine's drift between the two counts as error.
float32 and one thread on CPUs, where seconds are CPU time (`trainables.timing.clock_of`); mixed precision elsewhere.
"""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from merge_overhead import result_file, write_result

from dpt_search.costs_table import costs_of
from dpt_search.options import read_config
from search_spaces.costs import UnitCosts
from search_spaces.plan import PruningPlan, Unit
from trainables.compiling import compiled
from trainables.devices import DEVICES, torch_device
from trainables.profiling import profile
from trainables.settings import DataSettings, ModelSettings
from trainables.tasks import ProfileTask
from trainables.timing import FEWEST, calls_of, calls_within, merged_without
from trainables.workspace import Workspace

GOAL = 0.05
TOGETHER = 5
"""Plans that are timed in turn with one dense model."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="embedded,deit_small_patch16_224", help="timm names, or `embedded`")
    parser.add_argument("--batches", default="1,64")
    parser.add_argument("--plans", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the plans")
    parser.add_argument("--profile-seconds", type=float, default=20.0, help="for the profile, at every batch size")
    parser.add_argument("--seconds", type=float, default=60.0, help="for all plans of a model at a batch size")
    parser.add_argument("--fewest", type=int, default=FEWEST, help="rounds to take though they take longer")
    parser.add_argument("--compiled", action="store_true", help="of compiled models")
    parser.add_argument("--device", default="cpu", choices=list(DEVICES))
    parser.add_argument("--out", type=Path, default=None, help="left out: results/cost_model-HARDWARE-TORCH.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch_device(args.device)
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    rows, out = [], args.out or result_file("cost_model", device)
    for name in args.models.split(","):
        for row in predictions(name, args):
            print(line_of(row), flush=True)
            rows.append(row)
            # After every row: large batches take minutes a round on a slow core.
            write_result(out, device, {"settings": settings, "goal": GOAL, "rows": rows})
    print(f"largest error: {max(row['error'] for row in rows):.3f} (goal: at most {GOAL}); written to {out}")


def predictions(name: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield predicted against measured of one model, by batch size."""
    for batch in map(int, args.batches.split(",")):
        task = ProfileTask(
            *settings_of(name), 0, args.device, 1, "zero", (batch,), args.profile_seconds, compiled=args.compiled
        )
        found = profile(task)
        costs = costs_of(found["device"], found["rows"], found["compiled"])
        plans = random_plans(list(costs.saved), args.plans, args.seed)
        measured = [row for i in range(0, len(plans), TOGETHER) for row in timed(plans[i : i + TOGETHER], task, args)]
        about = {"model": name, "batch": batch, "profile_rounds": found["rounds"][str(batch)]}
        yield {**about, **compared(costs, plans, measured, batch), "warnings": found["warnings"]}


def settings_of(name: str) -> tuple[ModelSettings, DataSettings]:
    if name == "embedded":
        config = read_config("run", [])
        return config.model, config.data
    return ModelSettings(name), DataSettings()


def random_plans(units: list[Unit], count: int, seed: int) -> list[PruningPlan]:
    rng, plans = random.Random(seed), []
    kinds = [[unit for unit in units if unit.kind == kind] for kind in ("attn", "act")]
    for _ in range(count):
        plans.append(PruningPlan.of(u for kind in kinds for u in rng.sample(kind, rng.randint(0, len(kind)))))
    return plans


def timed(plans: list[PruningPlan], task: ProfileTask, args: argparse.Namespace) -> list[dict[str, float]]:
    """Time plans in turn with the dense model; their seconds, and those of the dense model, medians over rounds."""
    workspace = Workspace(task)
    dense, device = workspace.dense, workspace.device
    models = [merged_without(dense, plan, task.attention).to(device) for plan in (PruningPlan(), *plans)]
    calls = calls_of([compiled(model) if task.compiled else model for model in models], pixels_of(workspace, task))
    seconds = calls_within(args.seconds * len(plans) / args.plans, calls, device, fewest=args.fewest)
    return [
        {
            "rounds": len(seconds),
            "dense": float(np.median(seconds[:, 0])),
            "seconds": float(np.median(seconds[:, column])),
            "share": float(np.median(seconds[:, column] / seconds[:, 0])),
        }
        for column in range(1, len(models))
    ]


def pixels_of(workspace: Workspace, task: ProfileTask) -> torch.Tensor:
    return torch.randn(task.batches[0], *workspace.view.input_size, device=workspace.device)


def compared(
    costs: UnitCosts, plans: list[PruningPlan], measured: list[dict[str, float]], batch: int
) -> dict[str, Any]:
    dense = costs.dense.seconds[batch]
    predicted = np.array([costs.of(plan).seconds[batch] for plan in plans])
    spreads = np.array([costs.spread(plan, batch) for plan in plans])
    shares, seconds = (np.array([row[name] for row in measured]) for name in ("share", "seconds"))
    errors = predicted / dense / shares - 1
    return {
        "error": float(np.abs(errors).mean()),
        "bias": float(errors.mean()),
        "worst": float(errors[np.abs(errors).argmax()]),
        "covered": float(np.mean(np.abs(predicted / dense - shares) <= spreads / dense)),
        "spread": float(np.mean(spreads / predicted)),
        "error_absolute": float(np.abs(predicted / seconds - 1).mean()),
        "dense_seconds": dense,
        "saved": {str(unit): saved.seconds[batch] for unit, saved in costs.saved.items()},
        "plans": [
            {"plan": str(plan), "predicted_share": float(p / dense), "spread_share": float(s / dense), **row}
            for plan, p, s, row in zip(plans, predicted, spreads, measured, strict=True)
        ],
    }


def line_of(row: dict[str, Any]) -> str:
    rounds = min(plan["rounds"] for plan in row["plans"])
    return (
        f"{row['model']} batch {row['batch']}: mean absolute error {row['error']:.1%} over {len(row['plans'])} plans, "
        f"bias {row['bias']:+.1%}, worst {row['worst']:+.1%}; {row['covered']:.0%} within their spread of "
        f"{row['spread']:.1%}; with the profile's own seconds {row['error_absolute']:.1%} ({rounds} rounds)"
    )


if __name__ == "__main__":
    main()
