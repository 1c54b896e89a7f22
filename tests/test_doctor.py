"""What `doctor` says of a model: its units, every reason once, and one line for a name that there is not."""

import json

import pytest

from dpt_search.cli import main
from dpt_search.doctor import offer_lines, spans
from trainables.dense import BadModel
from trainables.offers import describe_offer
from trainables.settings import ModelSettings

SMALL = {"img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 3}


def test_all_units_of_a_plain_model_are_told() -> None:
    found = describe_offer(ModelSettings("vit_tiny_patch16_224", SMALL))
    assert found["about"].startswith("VisionTransformer, 0.0 M parameters, made for images of 3 x 28 x 28")
    said = [("attn: 3 of 3 can be removed", True), ("act: 3 of 3 can be removed", True)]
    assert list(offer_lines(found)) == said


@pytest.mark.parametrize("flag", ["--model", "--model.name"])
def test_the_command_line_hands_on_the_model_and_its_arguments(capsys, monkeypatch, flag) -> None:
    asked: list[ModelSettings] = []
    monkeypatch.setattr(
        "dpt_search.doctor.examine", lambda model: asked.append(model) or [("fine", True), ("not", False)]
    )
    assert main(["doctor", flag, "vit_tiny_patch16_224", "--model.kwargs", json.dumps(SMALL)]) == 1
    assert asked == [ModelSettings("vit_tiny_patch16_224", SMALL)]
    assert capsys.readouterr().out == "ok   fine\nNO   not\n"


@pytest.mark.timeout(180)
def test_an_unknown_name_gets_one_line_with_close_matches(capsys) -> None:
    assert main(["doctor", "--model", "vit_tinny_patch16_224"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "similar: vit_tiny_patch16_224" in said.err


def test_an_unknown_argument_is_named() -> None:
    with pytest.raises(BadModel, match="deepth"):
        describe_offer(ModelSettings("vit_tiny_patch16_224", {"deepth": 3}))


def test_a_reason_is_told_once_with_the_units_it_holds_for() -> None:
    found = describe_offer(ModelSettings("vit_giant_patch14_dinov2", {"depth": 4}))
    assert found["units"] == {"attn": [0, 1, 2, 3], "act": []}
    assert list(found["refused"].values()) == [["act:0", "act:1", "act:2", "act:3"]]
    lines = list(offer_lines(found))
    assert lines[:2] == [("attn: 4 of 4 can be removed", True), ("act: 0 of 4 can be removed", True)]
    assert len(lines) == 3
    assert lines[2][0].startswith("not act:0-3: ")
    assert "GluMlp" in lines[2][0]


def test_a_model_without_units_names_what_was_seen() -> None:
    found = describe_offer(ModelSettings("resnet10t"))
    assert found["units"] == {"attn": [], "act": []}
    assert "ResNet" in found["no_family"]


def test_units_are_written_shortly() -> None:
    assert spans(["act:0", "act:1", "act:2", "act:5", "attn:3"]) == ["act:0-2,5", "attn:3"]
    assert spans(["act:7"]) == ["act:7"]


def test_nothing_to_remove_at_all_is_not_as_it_should_be() -> None:
    found = {"units": {"attn": [], "act": []}, "refused": {"Odd: no": ["attn:0"]}}
    assert [ok for _, ok in offer_lines(found)] == [False, False, True]
