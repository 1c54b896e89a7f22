"""What can be removed from a Vision Transformer, how many ways, and at what gain.

Importing this package imports no torch; a family's module is imported when `family_of` meets one of its models.
"""

import importlib
from dataclasses import dataclass, field
from types import ModuleType

FAMILIES = {
    "timm.models.beit": "search_spaces.families.beit",
    "timm.models.cait": "search_spaces.families.cait",
    "timm.models.coat": "search_spaces.families.coat",
    "timm.models.convit": "search_spaces.families.convit",
    "timm.models.csatv2": "search_spaces.families.csatv2",
    "timm.models.davit": "search_spaces.families.davit",
    "timm.models.deepseek_vit": "search_spaces.families.deepseek",
    "timm.models.deit": "search_spaces.families.vit",
    "timm.models.efficientformer": "search_spaces.families.efficientformer",
    "timm.models.eva": "search_spaces.families.eva",
    "timm.models.gcvit": "search_spaces.families.gcvit",
    "timm.models.gemma4_vit": "search_spaces.families.gemma",
    "timm.models.hiera": "search_spaces.families.hiera",
    "timm.models.hieradet_sam2": "search_spaces.families.hieradet",
    "timm.models.levit": "search_spaces.families.levit",
    "timm.models.maxxvit": "search_spaces.families.maxxvit",
    "timm.models.metaformer": "search_spaces.families.metaformer",
    "timm.models.mvitv2": "search_spaces.families.mvit",
    "timm.models.nest": "search_spaces.families.nest",
    "timm.models.pvt_v2": "search_spaces.families.pvt",
    "timm.models.swin_transformer": "search_spaces.families.swin",
    "timm.models.swin_transformer_v2": "search_spaces.families.swin",
    "timm.models.swin_transformer_v2_cr": "search_spaces.families.swin",
    "timm.models.tiny_vit": "search_spaces.families.tiny_vit",
    "timm.models.tnt": "search_spaces.families.tnt",
    "timm.models.twins": "search_spaces.families.twins",
    "timm.models.vision_transformer": "search_spaces.families.vit",
    "timm.models.vision_transformer_relpos": "search_spaces.families.relpos",
    "timm.models.vision_transformer_sam": "search_spaces.families.sam",
    "timm.models.volo": "search_spaces.families.volo",
    "timm.models.xcit": "search_spaces.families.xcit",
}
"""Module with classes of blocks or models -> the family's file, which describes them; lazily imported."""


class BadInput(ValueError):
    """What the user gave cannot be used; the message is one line that says what to do about it."""


def first_line(error: BaseException) -> str:
    """Return what an error says, short enough for a message of one line; the name of its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class UnsupportedModel(BadInput):
    """The model, or one of its blocks, has a structure this method cannot remove units from."""


@dataclass(frozen=True)
class Offer:
    """What of a model can be removed, and why the rest cannot.

    Attributes:
        attn: indices of the attentions that can be removed.
        act: indices of the activations that can be removed.
        refused: by unit, such as `act:3`, the reason why it is no unit, which names the class of the module seen.
    """

    attn: tuple[int, ...]
    act: tuple[int, ...]
    refused: dict[str, str] = field(default_factory=dict)


def offered(model: object) -> Offer:
    """Say what of a model can be removed, and of every other attention and activation why it cannot.

    Raises:
        UnsupportedModel: no family knows the model.
    """
    found: Offer = family_of(model).offered(model)
    return found


def family_of(model: object) -> ModuleType:
    """Return the module with the verbs `units`, `gates`, `remove`, `merge` and `fade`, for a model with known blocks.

    Raises:
        UnsupportedModel: no family describes any of the model's blocks.
    """
    surgery = importlib.import_module("search_spaces.surgery")
    surgery.check(model)
    return surgery
