"""What a model offers for removal, told for a user."""

from __future__ import annotations

from typing import Any

import torch

from search_spaces import UnsupportedModel, offered
from trainables.dense import build_model
from trainables.settings import ModelSettings


def describe_offer(settings: ModelSettings) -> dict[str, Any]:
    """Build a model without memory for its weights, and say what of it can be removed.

    Returns:
        `about`, the class, parameters and input size; `units`, by kind the indices of the layers that can be removed;
        `refused`, by reason the units that it holds for; `no_family`, why the model as a whole cannot be pruned, else
        empty.

    Raises:
        BadModel: timm does not know the name or an argument.
    """
    with torch.device("meta"):
        model: Any = build_model(settings)
    count = sum(weight.numel() for weight in model.parameters())
    size = " x ".join(str(side) for side in model.pretrained_cfg["input_size"])
    found: dict[str, Any] = {
        "about": f"{type(model).__name__}, {count / 1e6:.1f} M parameters, made for images of {size}",
        "units": {"attn": [], "act": []},
        "refused": {},
        "no_family": "",
    }
    try:
        offer = offered(model)
    except UnsupportedModel as error:
        return {**found, "no_family": str(error)}
    for unit, reason in offer.refused.items():
        found["refused"].setdefault(reason, []).append(unit)
    return {**found, "units": {"attn": list(offer.attn), "act": list(offer.act)}}
