"""A trial, and the Ray Tune Trainable around it, neither with Ray running."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ray import tune

from search_spaces.plan import PruningPlan
from trainables.devices import NoDevice, device_problem
from trainables.engine import evaluate
from trainables.pruning_trial import PruningTrial, error_location
from trainables.settings import Recipe
from trainables.tasks import TrialTask
from trainables.timing import count_macs
from trainables.trial import Trial
from trainables.workspace import Workspace

PLAN = PruningPlan.parse("attn:1 act:2")
RECIPE = Recipe(epochs=3, batch_size=32, lr=0.02, ema=0.9, distillation="soft")


@pytest.fixture
def task(tiny, tiny_data, tmp_path):
    return TrialTask(tiny, tiny_data, 0, "cpu", 1, "zero", RECIPE, str(tmp_path / "states"))


@pytest.fixture
def elsewhere(task, tmp_path):
    """The same task with another folder of states."""
    return replace(task, checkpoints=str(tmp_path / "elsewhere"))


def begin(task: TrialTask, number: int = 0, plan: PruningPlan = PLAN) -> Trial:
    return Trial(Workspace(task, drop_path=task.recipe.drop_path), task, number, plan, seed=11)


def measured(record: dict) -> dict:
    """Return what of a record does not depend on the clock."""
    return {name: value for name, value in record.items() if name != "seconds"}


def test_a_step_is_an_epoch_and_the_record_grows(task):
    trial = begin(task)
    for epoch in (1, 2, 3):
        assert not trial.done
        record = trial.step()
        assert record["epoch"] == len(record["accuracies"]) == epoch
    assert trial.done
    assert record["plan"] == "attn:1 act:2"
    assert record["seconds"] > 0
    assert set(record["versions"]) == {"python", "torch", "timm"}
    assert all(0 <= accuracy <= 1 for accuracy in record["accuracies"])


def test_a_trial_that_is_done_trains_no_further(task):
    trial = begin(task)
    last = [trial.step() for _ in range(3)][-1]
    assert trial.step() == last


def test_a_record_given_out_does_not_change_later(task):
    trial = begin(task)
    first = trial.step()
    trial.step()
    assert len(first["accuracies"]) == 1


def test_the_first_accuracy_is_that_right_after_removal(task):
    workspace = Workspace(task)
    right = evaluate(workspace.pruned(PLAN), workspace.images("val"), workspace.device)
    assert begin(task).step()["removed_accuracy"] == float(right.mean())


def test_cost_is_images_times_macs_of_training_teacher_and_evaluation(task):
    workspace = Workspace(task)
    size = workspace.view.input_size
    pruned, dense = count_macs(workspace.pruned(PLAN), size), count_macs(workspace.dense, size)
    trial = begin(task)
    records = [trial.step() for _ in range(3)]
    for epochs, record in enumerate(records, 1):
        assert record["cost"] == pytest.approx(epochs * 96 * (3 * pruned + dense) + (epochs + 1) * 48 * pruned)
    alone = begin(replace(task, recipe=replace(RECIPE, distillation="none")), 1)
    assert alone.step()["cost"] == pytest.approx(96 * 3 * pruned + 2 * 48 * pruned)


@pytest.mark.parametrize("stopped_after", [1, 2, 3])
def test_a_trial_begun_again_ends_as_one_that_never_stopped(task, elsewhere, stopped_after):
    whole = begin(task)
    expected = [whole.step() for _ in range(3)][-1]
    stopped = begin(elsewhere)
    for _ in range(stopped_after):
        stopped.step()
    resumed = begin(elsewhere)
    assert resumed.done == (stopped_after == 3)
    found = [resumed.step() for _ in range(max(1, 3 - stopped_after))][-1]
    assert measured(found) == measured(expected)


def test_saving_and_restoring_by_hand_does_the_same(task, elsewhere, tmp_path):
    first, second = begin(task), begin(elsewhere)
    first.step()
    first.save(str(tmp_path / "by_hand.pt"))
    second.restore(str(tmp_path / "by_hand.pt"))
    assert measured(second.step()) == measured(first.step())


def test_a_state_holds_tensors_and_plain_data_only(task):
    trial = begin(task)
    trial.step()
    state = torch.load(trial.location, weights_only=True)
    assert state["record"]["accuracies"]


def test_trials_do_not_take_up_each_others_states(task):
    begin(task, 0).step()
    assert begin(task, 1).step()["epoch"] == 1
    assert begin(task, 0, PruningPlan.parse("attn:0")).step()["epoch"] == 1


@pytest.mark.parametrize("content", [b"", b"no state", "half"])
def test_a_broken_state_is_reported_and_the_trial_begun_again(task, content):
    trial = begin(task)
    expected = trial.step()
    place = Path(trial.location)
    place.write_bytes(place.read_bytes()[: place.stat().st_size // 2] if content == "half" else content)
    with pytest.warns(UserWarning, match=r"beginning again, because .*000000\.pt is broken"):
        again = begin(task)
    assert measured(again.step()) == measured(expected)


def test_a_trial_leaves_the_dense_model_as_it_is(task):
    workspace = Workspace(task)
    before = {name: tensor.clone() for name, tensor in workspace.dense.state_dict().items()}
    Trial(workspace, task, 0, PLAN, seed=11).step()
    after = workspace.dense.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


@pytest.fixture
def trainable(task):
    """Make the Trainable as Tune does, without Tune."""

    def make(plan: str = str(PLAN), number: int = 0, **changes) -> PruningTrial:
        bound = tune.with_parameters(PruningTrial, task=replace(task, **changes))
        return bound({"trial": number, "plan": plan, "seed": 11})

    return make


def test_the_trainable_reports_what_the_trial_finds(trainable, elsewhere):
    trial, running = begin(elsewhere), trainable()
    for last in (False, False, True):
        record, result = trial.step(), running.train()
        assert result["accuracies"] == record["accuracies"]
        assert result["accuracy"] == record["accuracies"][-1]
        assert (result["done"], result["error"], result["cost"]) == (last, "", record["cost"])


def test_an_actor_used_again_finds_what_a_fresh_one_does(trainable, elsewhere):
    expected = begin(elsewhere, 1, PruningPlan.parse("act:0,1,2,3")).step()
    running = trainable()
    running.train()
    assert running.reset({"trial": 1, "plan": "act:0,1,2,3", "seed": 11})
    found = running.train()
    assert found["plan"] == "act:0,1,2,3"
    assert found["accuracies"] == expected["accuracies"]


@pytest.mark.parametrize(
    ("plan", "changes", "said"),
    [
        ("attn:1", {"recipe": replace(RECIPE, lr=1e30)}, "Diverged: the loss became "),
        ("attn:77", {}, "the model has no removable attn:77"),
        ("attn;1", {}, "cannot read the plan"),
        ("attn:1", {"recipe": replace(RECIPE, batch_size=1000)}, "96 training images are fewer than one batch"),
    ],
)
def test_a_trial_that_fails_says_why_in_its_result_and_the_actor_lives_on(trainable, plan, changes, said):
    running = trainable(plan, **changes)
    result = running.train()
    assert result["done"]
    assert math.isnan(result["accuracy"])
    assert result["error"].startswith(said)
    assert "\n" not in result["error"]
    if not changes:
        running.reset({"trial": 1, "plan": "act:0", "seed": 11})
        assert running.train()["error"] == ""


@pytest.mark.skipif(not device_problem("npu"), reason="there is an NPU here")
def test_a_process_that_cannot_use_its_accelerator_is_let_go_and_leaves_the_reason(trainable, task):
    with pytest.raises(NoDevice):
        trainable(device="npu").train()
    assert Path(error_location(task, 0)).read_text() == device_problem("npu")


def test_a_trial_that_runs_too_long_says_so_and_keeps_its_record(trainable):
    result = trainable(timeout=1e-6).train()
    assert result["done"]
    assert result["error"] == "ran longer than 0 s"
    assert math.isnan(result["accuracy"])
    assert len(result["accuracies"]) == 1


def test_a_trial_that_ends_in_time_in_its_last_epoch_is_no_failure(trainable):
    result = trainable(timeout=1e-6, recipe=replace(RECIPE, epochs=1)).train()
    assert (result["done"], result["error"]) == (True, "")


def test_a_checkpoint_of_tunes_is_gone_on_from(trainable, task, tmp_path):
    folder = tmp_path / "tune"
    folder.mkdir()
    running = trainable()
    running.train()
    running.save_checkpoint(str(folder))
    expected = running.train()["accuracies"]
    other = trainable(number=5)
    other.load_checkpoint(str(folder))
    assert other.train()["accuracies"] == expected
