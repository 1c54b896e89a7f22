"""CoaT: attention with convolutional position encodings; the blocks of several scales at once are left alone."""

from typing import Any

import torch

from search_spaces.blocks import Branch, Form


def _position(block: Any, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return block.cpe(x, size)


FORMS = {
    "SerialBlock": Form(
        (
            _position,
            Branch("factoratt_crpe", ("norm1",), ("drop_path",), ("size",), kind="attn"),
            Branch("mlp", ("norm2",), ("drop_path",), kind="mlp"),
        ),
        ("size",),
    )
}
