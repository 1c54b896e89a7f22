"""What can be removed from a Vision Transformer, how many ways, and at what gain.

Importing this package imports no torch; a family's module is imported when `family_of` meets one of its models.
"""

import importlib
from types import ModuleType

FAMILIES = {
    "VisionTransformer": "search_spaces.vit",
    "VisionTransformerDistilled": "search_spaces.vit",
}
"""Model class name -> module with the four verbs `units`, `gates`, `remove`, `merge`."""


class BadInput(ValueError):
    """What the user gave cannot be used; the message is one line that says what to do about it."""


class UnsupportedModel(BadInput):
    """The model, or one of its blocks, has a structure this method cannot remove units from."""


def family_of(model: object) -> ModuleType:
    """Return the module whose four verbs handle `model`.

    Raises:
        UnsupportedModel: no family is written for the model's class.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES:
            return importlib.import_module(FAMILIES[cls.__name__])
    known = ", ".join(FAMILIES)
    raise UnsupportedModel(f"no family handles {type(model).__name__}; known model classes: {known}")
