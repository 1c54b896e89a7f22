"""The worked example of docs/adding-a-family.md does what the page says."""

import copy
import re
import sys
import types
from pathlib import Path

import pytest
import torch

import search_spaces
from search_spaces import family_of, offered
from search_spaces.plan import PruningPlan
from search_spaces.timm_compat import timm

PAGE = (Path(__file__).parents[1] / "docs/adding-a-family.md").read_text()
EXAMPLE = re.findall(r"```python\n(.*?)```", PAGE, re.S)[0]


@pytest.fixture
def model(monkeypatch):
    module = types.ModuleType("my_models")
    monkeypatch.setitem(sys.modules, "my_models", module)
    exec(compile(EXAMPLE, "docs/adding-a-family.md", "exec"), module.__dict__)
    monkeypatch.setitem(search_spaces.FAMILIES, "my_models", "my_models")
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=28, patch_size=7, embed_dim=32, depth=3, num_heads=2, block_fn=module.MyBlock
    ).eval()


def test_the_example_is_short():
    assert len(EXAMPLE.splitlines()) < 60


@torch.no_grad()
def test_the_example_is_a_family(model):
    assert offered(model) == search_spaces.Offer((0, 1, 2), (0, 1, 2))
    pixels, dense = torch.randn(2, 3, 28, 28), copy.deepcopy(model)
    family_of(model).remove(model, PruningPlan.parse("attn:1 act:0,1"), "zero")
    dense.blocks[1].look.register_forward_hook(lambda module, given, out: torch.zeros_like(out))
    for index in (0, 1):
        dense.blocks[index].think.act.register_forward_hook(lambda module, given, out: given[0])
    assert torch.allclose(model(pixels), dense(pixels), atol=1e-6)
    assert "blocks.1.look.qkv.weight" not in model.state_dict()
    assert torch.allclose(family_of(model).merge(model)(pixels), dense(pixels), atol=1e-5)
