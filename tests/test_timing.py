"""What models and units cost: counted, measured side by side, and with what interval."""

import numpy as np
import pytest
import torch

from search_spaces import family_of
from search_spaces.plan import PruningPlan, Unit
from search_spaces.timm_compat import timm
from trainables.intervals import accuracy_interval, median_interval, paired_difference
from trainables.profiling import profile
from trainables.tasks import ProfileTask
from trainables.timing import count_macs, count_params, interleaved_seconds, merged_without
from trainables.workspace import Workspace


@pytest.mark.parametrize(
    ("name", "gigamacs", "megaparams"),
    [
        ("deit_tiny_patch16_224", 1.26, 5.7),  # as published: Touvron et al. 2021, table 5, and timm's results
        ("deit_small_patch16_224", 4.6, 22.1),
        ("deit_base_patch16_224", 17.6, 86.6),
    ],
)
def test_macs_and_parameters_are_the_published_ones(name, gigamacs, megaparams):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert count_macs(model, (3, 224, 224)) / 1e9 == pytest.approx(gigamacs, rel=0.01)
    assert count_params(model) / 1e6 == pytest.approx(megaparams, rel=0.01)


def test_units_save_the_macs_of_their_layers(tiny, tiny_data):
    dense, tokens, width = Workspace(ProfileTask(tiny, tiny_data, 0, "cpu", 1, "zero")).dense, 17, 32
    whole = count_macs(dense, (1, 28, 28))
    saved = {
        kind: whole - count_macs(merged_without(dense, PruningPlan.of([Unit(kind, 2)]), "zero"), (1, 28, 28))
        for kind in ("attn", "act")
    }
    assert saved["attn"] == 4 * tokens * width**2 + 2 * tokens**2 * width
    assert saved["act"] == (8 - 1) * tokens * width**2


def test_a_profile_has_the_dense_model_and_every_unit(tiny, tiny_data):
    found = profile(ProfileTask(tiny, tiny_data, 0, "cpu", 1, "zero", batches=(1, 8), seconds=0.5))
    whole, *rows = found["rows"]
    dense = Workspace(ProfileTask(tiny, tiny_data, 0, "cpu", 1, "zero")).dense
    assert [Unit(row["kind"], row["index"]) for row in rows] == list(family_of(dense).units(dense))
    assert (whole["macs"], whole["params"]) == (count_macs(dense, (1, 28, 28)), count_params(dense))
    assert sum(row["macs"] for row in rows) < whole["macs"]
    assert whole["seconds_1"] > 0
    assert 0 < sum(row["seconds_8"] for row in rows) < whole["seconds_8"]


def test_timing_is_taken_of_every_model_in_every_round(tiny, tiny_data):
    dense = Workspace(ProfileTask(tiny, tiny_data, 0, "cpu", 1, "zero")).dense
    seconds = interleaved_seconds(
        [dense, merged_without(dense, PruningPlan(), "zero")], torch.randn(2, 1, 28, 28), repeats=4
    )
    assert seconds.shape == (4, 2)
    assert (seconds > 0).all()


def test_intervals_hold_their_estimate_and_shrink_with_more_images():
    right = np.arange(100) % 5 > 0
    small, large = accuracy_interval(right), accuracy_interval(np.tile(right, 25))
    assert small["accuracy"] == large["accuracy"] == pytest.approx(0.8)
    # Wilson 1927 for 80 of 100, as tables have it.
    assert (small["low"], small["high"]) == (pytest.approx(0.7112, abs=1e-3), pytest.approx(0.8666, abs=1e-3))
    assert large["high"] - large["low"] < 0.25 * (small["high"] - small["low"])
    assert accuracy_interval(np.ones(20, bool))["high"] == pytest.approx(1)
    assert paired_difference(right, right) == {"mean": 0, "low": 0, "high": 0}
    assert paired_difference(right, ~right)["mean"] == pytest.approx(-0.6)
    assert median_interval([3, 1, 2]) == (2, 1, 3)
    assert median_interval(range(101)) == (50, 40, 61)
