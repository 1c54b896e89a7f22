"""The census of timm's models on models whose answer is known, and on planted ones that must not count."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from search_spaces import Offer
from search_spaces.timm_compat import timm

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
census, sweep = importlib.import_module("census"), importlib.import_module("model_sweep")
structure = importlib.import_module("structure").structure
sweep_page = importlib.import_module("sweep_page")
WIDTH = 8


class Attention(nn.Module):
    """Softmax attention, with the parts that tests vary."""

    def __init__(self, kind: str = "softmax") -> None:
        super().__init__()
        self.qkv, self.proj, self.kind = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), kind
        self.heads = nn.Linear(4, 4)
        self.table = nn.Sequential(nn.Linear(1, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.kind == "fused":
            return self.proj(F.scaled_dot_product_attention(q, k, v))
        if self.kind == "linear":
            return self.proj(q.relu() @ (k.relu().transpose(-2, -1) @ v))
        if self.kind == "factorised":
            return self.proj(q @ (k.softmax(dim=1).transpose(-2, -1) @ v))
        scores = q @ k.transpose(-2, -1)
        if self.kind == "talking":
            scores = self.heads(scores)
        if self.kind == "position table":
            scores = scores + self.table(torch.zeros(4, 4, 1, device=x.device)).squeeze(-1)
        weights = torch.sigmoid(scores) if self.kind == "sigmoid" else scores.softmax(dim=-1)
        return self.proj(weights @ v)


class Mlp(nn.Module):
    def __init__(self, kind: str = "module") -> None:
        super().__init__()
        self.fc1, self.fc2, self.kind = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH), kind
        self.act = {"scaled": StarReLU(), "prelu": nn.PReLU(), "none": nn.Identity()}.get(kind, nn.GELU())
        self.norm = nn.LayerNorm(2 * WIDTH) if kind == "norm" else nn.Dropout(0.1)
        self.gate = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.fc1(x)
        hidden = F.gelu(hidden) if self.kind == "function" else self.act(hidden)
        if self.kind == "gate":
            hidden = hidden * self.gate(x)
        return self.fc2(self.act(self.norm(hidden)) if self.kind == "twice" else self.norm(hidden))


class StarReLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.relu = nn.Parameter(torch.ones(1)), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.relu(x) ** 2


class Block(nn.Module):
    def __init__(self, attn: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.attn, self.mlp = attn, mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


class InlineBlock(nn.Module):
    """A block whose own forward is the attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.mlp = nn.Linear(WIDTH, 3 * WIDTH), Mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).split(WIDTH, dim=-1)
        return x + F.scaled_dot_product_attention(q, k, v) + self.mlp(x)


def blocks_of(*blocks: nn.Module, device: str = "cpu") -> list[str]:
    with torch.device(device):
        image = torch.ones(2, 4, WIDTH)
    model = nn.ModuleDict({"blocks": nn.Sequential(*blocks).to_empty(device=device)})
    model.forward = model["blocks"].forward
    return structure(model, image).blocks()


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("attn", ["softmax", "fused", "talking", "position table"])
def test_blocks_with_any_softmax_attention_are_found(attn: str, device: str) -> None:
    blocks = [Block(Attention(attn), Mlp()) for _ in range(3)]
    assert blocks_of(*blocks, device=device) == ["blocks.0", "blocks.1", "blocks.2"]


@pytest.mark.parametrize("mlp", ["module", "function", "scaled", "prelu"])
def test_blocks_with_any_activation_between_two_linear_layers_are_found(mlp: str) -> None:
    assert blocks_of(Block(Attention(), Mlp(mlp)), InlineBlock()) == ["blocks.0", "blocks.1"]


@pytest.mark.parametrize("attn", ["linear", "sigmoid", "factorised"])
def test_an_attention_without_a_softmax_over_queries_and_keys_makes_no_block(attn: str) -> None:
    assert blocks_of(Block(Attention(attn), Mlp()), Block(Attention(), Mlp())) == ["blocks.1"]


@pytest.mark.parametrize("mlp", ["norm", "gate", "none", "twice"])
def test_an_mlp_with_other_things_than_one_activation_between_makes_no_block(mlp: str) -> None:
    assert blocks_of(Block(Attention(), Mlp(mlp)), Block(Attention(), Mlp())) == ["blocks.1"]


def test_a_table_of_positions_is_no_mlp_of_a_block() -> None:
    assert blocks_of(Block(Attention("position table"), nn.Linear(WIDTH, WIDTH))) == []


TINY = {"img_size": 64, "num_classes": 3}


@pytest.mark.parametrize(
    ("name", "kwargs", "blocks", "attention"),
    [
        ("vit_tiny_patch16_224", {"embed_dim": 32, "depth": 4, "num_heads": 2}, 4, "Attention"),
        ("vit_tiny_patch16_224", {"embed_dim": 32, "depth": 3, "num_heads": 2, "global_pool": "map"}, 3, "Attention"),
        ("swinv2_tiny_window8_256", {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 2)}, 4, "WindowAttention"),
        ("eva02_tiny_patch14_224", {"img_size": 56, "embed_dim": 32, "depth": 4, "num_heads": 2}, 0, "EvaAttention"),
        ("xcit_nano_12_p16_224", {"embed_dim": 32, "depth": 4, "num_heads": 2}, 6, "XCA"),
        ("mixer_s32_224", {}, 0, ""),
    ],
)
def test_models_of_timm_have_as_many_blocks_as_they_are_built_with(name, kwargs, blocks, attention) -> None:
    with torch.device("meta"), census.NoInitialisation():
        model = timm.create_model(name, **{**TINY, **kwargs})
        seen = structure(model, torch.empty(1, 3, kwargs.get("img_size", 64), kwargs.get("img_size", 64)))
    row = census.judged(model, seen)
    assert row["blocks"] == blocks
    assert row["counts"] == (blocks >= 4)
    assert attention in row["attention_class"].split() or not attention
    assert bool(row["why_not"]) != row["counts"]


def test_the_same_model_has_the_same_fingerprint_and_a_setting_changes_it() -> None:
    def digest(**kwargs: object) -> str:
        with torch.device("meta"):
            return census.fingerprint(timm.create_model("vit_tiny_patch16_224", embed_dim=24, depth=2, **kwargs))

    assert digest() == digest()
    assert len({digest(), digest(num_heads=2), digest(qk_norm=True), digest(init_values=0.1)}) == 4


@pytest.mark.parametrize(
    ("attn", "act", "refused", "unknown", "verdict"),
    [
        (range(4), range(4), {}, [], "supported"),
        (range(4), (), {"act:0": "GluMlp: a gate"}, [], "attention only"),
        ((), range(4), {"attn:0": "Block: two streams"}, [], "activation only"),
        (range(3), range(4), {"attn:3": "ClassAttn: the class token"}, [], "partly"),
        ((), (), {"attn:0": "Odd: no"}, [], "refused"),
        (range(3), range(3), {}, ["Inner"], "partly"),
    ],
)
def test_a_verdict_says_what_is_lacking_and_why(attn, act, refused, unknown, verdict) -> None:
    said, reason = sweep.judged(Offer(tuple(attn), tuple(act), refused), 4, unknown)
    assert said == verdict
    assert reason == next(iter(refused.values()), "".join(f"{name}: no family describes it" for name in unknown))


def test_blocks_that_no_family_describes_are_told_by_their_class() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=1, num_heads=2)
    assert sweep.not_described(model, ["Block", "Inner"]) == ["Inner"]


def test_a_model_is_tried_with_weights_and_a_wrong_removal_is_seen(monkeypatch) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=4, num_heads=2).eval()
    with torch.no_grad():
        model.head.weight.normal_()
    model.pretrained_cfg["input_size"] = (3, 32, 32)
    offer = Offer(tuple(range(4)), tuple(range(4)))
    assert float(sweep.difference(model, offer)) < sweep.TOLERANCE
    pruned = sweep.family_of(model)
    monkeypatch.setattr(pruned, "merge", lambda model: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1))
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=4, num_heads=2).eval()
    model.pretrained_cfg["input_size"] = (3, 32, 32)
    with pytest.raises(ValueError, match="merge: the output differs"):
        sweep.difference(model, offer)


def test_the_page_counts_names_by_verdict() -> None:
    def row(name: str, counts: bool, verdict: str, tried: str, reason: str = "") -> dict[str, object]:
        return {
            "name": name, "class": "Vit", "counts": counts, "verdict": verdict, "reason": reason, "tried": tried,
            "difference": "1.0e-07" if tried == "64 px" else "",
        }  # fmt: skip

    rows = [
        row("a", True, "supported", "64 px"), row("b", True, "supported", "meta"),
        row("c", True, "partly", "meta", "Odd: no"), row("d", True, "refused", "", "Odd: no"),
        row("e", False, "attention only", "meta", "Glu: gate"),
    ]  # fmt: skip
    seen = {r["name"]: {"name": r["name"], "attentions": 4, "why_not": ""} for r in rows}
    page = sweep_page.page(rows, seen)
    assert "4 of the 5 names" in page
    assert "3 of these 4, 75.0%" in page
    assert "2 of them, 50.0%" in page
    assert "| Vit | 2 | supported | 1 | 1 |  |" in page
    assert "| Vit | 1 | partly | 0 | 1 | Odd: no |" in page
    assert sweep_page.summary(rows)[-1].endswith("3 have units of both kinds (75.0%)")
