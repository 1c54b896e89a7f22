"""The page of a run that is finished, of one that is under way, and of one that went wrong."""

import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from dpt_search.config import RunConfig
from dpt_search.costs_table import write_costs
from dpt_search.evidence import read_run
from dpt_search.report import headline, missing, write_report
from dpt_search.store import BadRun, Finished, Proposed, RunStore, TrialLog
from dpt_search.summary import result_table
from search_spaces.plan import Ranking
from search_spaces.ratios import Cell
from trainables.settings import DataSettings, ModelSettings

RANKING = Ranking((10, 4, 7, 11, 5, 3, 8, 6, 9, 2, 1, 0), (9, 8, 10, 7, 6, 11, 5, 4, 3, 2, 1, 0))
CELLS = [(0, 0), (4, 0), (0, 4), (0, 10), (10, 0), (2, 6), (4, 4), (3, 7), (2, 6), (1, 5), (5, 5), (2, 4)]
ERROR = "Diverged: <script>alert('loss')</script> is not finite"


def truth(n_attn: int, n_act: int) -> float:
    a, g = n_attn / 12, n_act / 12
    return 0.86 - 0.10 * a**2 - 0.06 * g**3 - 0.05 * a * g - 0.2 * (n_attn == 12) - 0.12 * (n_act == 12)


def write_head(store: RunStore) -> None:
    config = RunConfig(ModelSettings("vit_tiny_patch7_28"), DataSettings("package:dpt_search/embedded/fashion_mnist"))
    run = {"config": asdict(config), "versions": {"python": "3.12.1", "torch": "2.13.0"}, "commit": "abc1234"}
    store.write_json("run.json", {**run, "created": 1.76e9, "command": "dpt-search run --run-dir runs/default"})


def write_dense(store: RunStore) -> None:
    accuracy = {"accuracy": 0.857, "low": 0.844, "high": 0.869}
    units = {"attn": list(range(12)), "act": list(range(12))}
    warning = "the data has no val split, so it was taken from the training images"
    rest = {"classes": 10, "chance": 0.1, "device": "Xeon", "adapted_epochs": 0, "warnings": [warning], "units": units}
    store.write_json("dense/dense.json", {**accuracy, "images": 3000, **rest})


def write_profile(store: RunStore) -> None:
    one = {"spread_1": 1e-5, "spread_64": 1e-4}
    dense = {"kind": "dense", "index": -1, "macs": 1.06e7, "params": 6.1e5, "seconds_1": 6e-3, "seconds_64": 5e-2}
    saved = {"attn": (3.2e5, 1.7e4, 2.5e-4, 2.1e-3), "act": (5e5, 2.9e4, 1e-4, 1.7e-3)}
    names = ("macs", "params", "seconds_1", "seconds_64")
    units = [
        {"kind": kind, "index": i, **dict(zip(names, costs, strict=True)), **one}
        for kind, costs in saved.items()
        for i in range(12)
    ]
    write_costs(store, "Xeon", [{**dense, **one}, *units])


def write_rank(store: RunStore) -> None:
    values = [0.002 * 1.5**i for i in range(12)]
    importance = {"attn": values, "act": [3 * v for v in values]}
    order = {"attn": list(RANKING.attn), "act": list(RANKING.act)}
    store.write_json("ranking.json", {"method": "taylor", **order, "importance": importance})


def write_trials(store: RunStore) -> None:
    log, rng = TrialLog(store), np.random.default_rng(0)
    for number, (a, g) in enumerate([*CELLS, (12, 2), (1, 9)]):
        plan, last = str(RANKING.plan(Cell(a, g))), truth(a, g) + rng.normal(0, 0.003)
        seen = max(0, number - 2)
        log.propose(Proposed(number, plan, "dense", number, seen, "map", {"n_attn": a, "n_act": g}, 1.76e9))
        if number < len(CELLS):
            removed = max(0.1, last - 0.03 * a - 0.06 * g)
            record = Finished(number, plan, "dense", "finished", removed, [last - 0.01 * g**0.5, last])
            log.finish(replace(record, cost=1e12 - 2e10 * a, seconds=30 - a, device="Xeon"))
    log.finish(Finished(12, str(RANKING.plan(Cell(12, 2))), "dense", "failed", 0.11, [], error=ERROR))


def write_recommendation(store: RunStore) -> None:
    mean = [[truth(a, g) for g in range(13)] for a in range(13)]
    near = [[min((a - x) ** 2 + (g - y) ** 2 for x, y in CELLS) for g in range(13)] for a in range(13)]
    sd = [[0.002 + 0.003 * d**0.5 for d in row] for row in near]
    rows = []
    for units, (a, g), status in [(4, (0, 4), "observed"), (6, (1, 5), "observed"), (8, (2, 6), "confirmed"),
                                  (10, (2, 8), "predicted")]:  # fmt: skip
        m, s = mean[a][g], sd[a][g]
        rows.append(
            {
                "budget": f"units={units}", "cell": [a, g], "plan": str(RANKING.plan(Cell(a, g))), "mean": m, "sd": s,
                "low": m - 1.96 * s, "high": m + 1.96 * s, "probability_best": 0.71, "status": status,
                "speedup": {"1": 1 + 0.04 * a + 0.02 * g, "64": 1 / (1 - 0.042 * a - 0.034 * g)},
            }
        )  # fmt: skip
    surface = {"n_attn": 12, "n_act": 12, "mean": mean, "sd": sd}
    store.write_json("recommendation.json", {"budgets": rows, "surface": surface, "observations": len(CELLS)})


def write_finetune(store: RunStore) -> None:
    epochs = [
        {"epoch": e, "loss": 0.9 - 0.03 * e, "accuracy": 0.852 - 0.05 / e, "seconds": 20.0, "images_per_second": 1234.5}
        for e in range(1, 11)
    ]
    plan = str(RANKING.plan(Cell(2, 8)))
    rest = {"workers": 2, "device": "Xeon", "versions": {}, "inputs": "x", "accuracy": 0.847}
    store.write_json(
        "finetune/finetune.json", {"plan": plan, "budget": "units=10", "start": "dense", "epochs": epochs, **rest}
    )


def write_export(store: RunStore) -> None:
    dense = {"accuracy": 0.8555, "low": 0.8443, "high": 0.8661, "images": 4000, "params": 610_000, "macs": 1.06e7}
    merged = {"accuracy": 0.8495, "low": 0.8381, "high": 0.8602, "images": 4000, "params": 344_000, "macs": 5.96e6}
    timing = {
        "1": {"dense_seconds": 6e-3, "merged_seconds": 4.9e-3, "speedup": 1.22, "low": 0.98, "high": 1.31},
        "64": {"dense_seconds": 5e-2, "merged_seconds": 3.5e-2, "speedup": 1.43, "low": 1.41, "high": 1.46},
    }
    rest = {"largest_logit_difference": 3.1e-7, "device": "Xeon", "threads": 2, "dtype": "float32", "compiled": False}
    summary = {"plan": str(RANKING.plan(Cell(2, 8))), "budget": "units=10", "dense": dense, "merged": merged}
    change = {"mean": -0.006, "low": -0.0118, "high": -0.0002}
    row = {**merged, "device": "cpu", "agreement": 0.99975, "largest_logit_difference": 4.1e-7}
    speeds = {batch: {"seconds": t["merged_seconds"] / 2, "speedup": 2 * t["speedup"], "low": 2.1, "high": 3.1}
              for batch, t in timing.items()}  # fmt: skip
    formats = {"pt2": {**row, "file": "model.pt2", "timing": speeds}}
    formats["onnx"] = {**row, "file": "model.onnx", "images": 1000, "timing": {}}
    measured = {"difference": change, "timing": timing, "formats": formats}
    store.write_json("export/summary.json", {**summary, **measured, **rest, "versions": {}})


STAGES = {
    "dense": write_dense,
    "profile": write_profile,
    "rank": write_rank,
    "search": write_trials,
    "recommend": write_recommendation,
    "finetune": write_finetune,
    "export": write_export,
}
SECONDS = {"dense": 6, "profile": 21, "rank": 4, "search": 341, "recommend": 0.4, "finetune": 207, "export": 33}


def write_run(folder: Path, stages: list[str]) -> RunStore:
    store = RunStore(str(folder))
    write_head(store)
    for order, name in enumerate(stages):
        STAGES[name](store)
        stamp = {"stage": name, "inputs": "x", "seconds": SECONDS[name], "finished_at": 1.76e9 + order}
        store.write_json(f"stages/{name}.json", stamp)
    return store


def page_of(store: RunStore) -> str:
    return Path(write_report(store)).read_text().replace("\u00a0", " ")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunStore, str]:
    store = write_run(tmp_path_factory.mktemp("full"), list(STAGES))
    return store, page_of(store)


def test_page_needs_nothing_from_elsewhere(full):
    _, page = full
    sources = re.findall(r"""(?:src|srcset|href|data|poster)\s*=\s*["']([^"']*)""", page)
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"<(link|script|iframe|object)\b|@import|url\(|https?://", page)


def test_plots_lie_beside_the_page(full):
    store, page = full
    assert store.names("plots") == ["finetune.png", "plan.png", "recovery.png", "surface.png", "tradeoff.png"]
    assert all(store.read(f"plots/{name}").startswith(b"\x89PNG") for name in store.names("plots"))
    assert page.count("<img") == len(store.names("plots"))


@pytest.mark.parametrize(
    "figure",
    [
        "<h1>1.43x faster at batch 64, 0.6 points lost (95 % interval 0.0 to 1.2)</h1>",
        "85.5 %", "84.4 to 86.6 %", "85.0 %", "−0.60 points", "−1.18 to −0.02", "2 attentions and 8 activations",
        "1.41x to 1.46x", "1,280", "0.34 M", "5.96 M", "−43.8 %",
        "attn:4,10 act:4,5,6,7,8,9,10,11", "confirmed", "units=10", "abc1234", "torch 2.13.0", "6 min",
        "vit_tiny_patch7_28", "finetune.distillation", "no val split", "1 of 13 trials failed", "unfinished",
        "at batch 1 the speedup cannot be told from none",
    ],
)  # fmt: skip
def test_page_has_the_key_figures(full, figure):
    assert figure in full[1]


def test_page_follows_the_order_of_a_readers_questions(full):
    titles = re.findall(r"<h2>(.*?)</h2>", full[1])
    assert titles == [
        "What the search learnt", "Accuracy against speedup", "How trials recovered", "The long fine-tune",
        "Recommendations", "Trials", "The plan, block by block", "Time by stage", "What was run",
    ]  # fmt: skip


def test_text_from_outside_is_escaped(full):
    assert "<script" not in full[1]
    assert "Diverged: &lt;script&gt;" in full[1]


def test_same_run_gives_the_same_page(full):
    store, page = full
    assert page_of(store) == page


@pytest.mark.parametrize("left_out", list(STAGES))
def test_a_missing_stage_is_named_with_its_command(tmp_path, left_out):
    store = write_run(tmp_path / "a run", [name for name in STAGES if name != left_out])
    assert [command for _, command in missing(read_run(store))] == [f"dpt-search {left_out} '{tmp_path}/a run'"]
    assert f"dpt-search {left_out} " in page_of(store)


@pytest.mark.parametrize("done", range(len(STAGES)))
def test_a_run_under_way_has_a_page(tmp_path, done):
    store = write_run(tmp_path, list(STAGES)[:done])
    page = page_of(store)
    assert "This run is not complete" in page
    assert page.count("dpt-search export") == 1


@pytest.mark.parametrize(
    ("done", "expected"),
    [
        (4, "No result yet"),
        (5, "Predicted: 1.55x faster at batch 64, 83.4 % on val after a short fine-tune"),
        (6, "84.7 % on val after the long fine-tune, predicted: 1.55x faster at batch 64"),
    ],
)
def test_headline_says_what_is_only_predicted(tmp_path, done, expected):
    assert headline(read_run(write_run(tmp_path, list(STAGES)[:done]))).replace("\u00a0", " ") == expected


@pytest.mark.parametrize(
    ("mean", "speedup", "expected"),
    [
        (0.004, 1.2, "1.20x faster at batch 8, 0.4 points gained (95 % interval −0.2 to 1.0)"),
        (-0.004, 0.9, "0.90x the speed, so slower, at batch 8, 0.4 points lost (95 % interval −0.2 to 1.0)"),
    ],
)
def test_headline_does_not_flatter(tmp_path, mean, speedup, expected):
    store = write_run(tmp_path, list(STAGES))
    summary = store.read_json("export/summary.json")
    summary["difference"] = {"mean": mean, "low": mean - 0.006, "high": mean + 0.006}
    summary["timing"] = {"8": {**summary["timing"]["64"], "speedup": speedup}}
    store.write_json("export/summary.json", summary)
    assert headline(read_run(store)).replace("\u00a0", " ") == expected


def test_formats_are_listed_with_what_they_are_worth(full):
    store, page = full
    for text in (page, result_table(store)):
        rows = " ".join(text.split())
        for words in ("model.pt2", "3,657", "2.86x", "99.98", "model.onnx", "not timed"):
            assert words in rows, words
    assert "<small>1,000 images</small>" in page


def test_an_export_of_before_the_formats_still_has_a_page(tmp_path):
    store = write_run(tmp_path, list(STAGES))
    summary = store.read_json("export/summary.json")
    del summary["formats"]
    store.write_json("export/summary.json", summary)
    assert "model.pt2" not in page_of(store) + result_table(store)


def with_baseline(store: RunStore) -> None:
    run = store.read_json("run.json")
    store.write_json("run.json", {**run, "config": {**run["config"], "baseline": True}})
    store.write_json("baseline/baseline.json", {"plan": "dense", "inputs": "x"})


def test_what_pruning_costs_is_told_against_the_same_training(tmp_path):
    store = write_run(tmp_path, list(STAGES))
    with_baseline(store)
    assert "the export was made without it: export again" in page_of(store)
    summary = store.read_json("export/summary.json")
    summary["baseline"] = {**summary["dense"], "accuracy": 0.8625, "low": 0.851, "high": 0.873}
    summary["baseline"]["difference"] = {"mean": -0.013, "low": -0.019, "high": -0.007}
    summary["difference"] = {"mean": 0.004, "low": 0.001, "high": 0.007}
    store.write_json("export/summary.json", summary)
    page, text = page_of(store), result_table(store)
    assert "1.3 points lost to the same training of the dense model (95 % interval 0.7 to 1.9)</h1>" in page
    for words in ("dense, same training", "86.2 %", "−1.30 points", "+0.40 points"):
        assert words in page, words
    assert "--baseline" not in page and "export again" not in page
    header, _, accuracy, parameters = text.splitlines()[2:6]
    assert header.split("  ")[0] == "" and "dense, same training" in header
    assert "86.25%" in accuracy and "-1.30 points" in accuracy
    assert parameters.split("  ")[-1] == "1.77x fewer"


def test_extra_training_that_hides_the_loss_names_the_flag(tmp_path):
    store = write_run(tmp_path, list(STAGES))
    summary = store.read_json("export/summary.json")
    store.write_json("export/summary.json", {**summary, "difference": {"mean": 0.004, "low": 0.001, "high": 0.007}})
    assert "--baseline gives the dense model the same" in page_of(store)


def test_a_baseline_that_was_asked_for_is_missing_until_it_is_there(tmp_path):
    store = write_run(tmp_path, list(STAGES))
    with_baseline(store)
    store.delete("baseline/baseline.json")
    assert [command for _, command in missing(read_run(store))] == [f"dpt-search baseline {tmp_path}"]


def test_results_of_an_older_plan_are_called_out(tmp_path):
    store = write_run(tmp_path, list(STAGES))
    finetune = store.read_json("finetune/finetune.json")
    store.write_json("finetune/finetune.json", {**finetune, "plan": "attn:1 act:2"})
    page = page_of(store)
    assert "what was fine-tuned, attn:1 act:2, is not what is recommended now" in page
    assert "is not what was fine-tuned last" in page


def test_only_failed_trials_still_make_a_page(tmp_path):
    store = write_run(tmp_path, ["dense", "profile", "rank"])
    TrialLog(store).finish(Finished(0, "attn:1", "dense", "failed", error="out of memory"))
    page = page_of(store)
    assert "out of memory" in page and "missing: a finished trial" in page


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(BadRun, match=r"is no run directory: it has no run\.json"):
        write_report(RunStore(str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_reporting_imports_neither_torch_nor_ray():
    code = "import sys, dpt_search.report, dpt_search.plots; print({'torch', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
