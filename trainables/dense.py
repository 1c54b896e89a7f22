"""The dense model: built from its settings, its weights read, its accuracy checked before anything is paid for."""

from __future__ import annotations

import difflib
import io
from dataclasses import replace
from typing import Any

import safetensors.torch
import torch

from search_spaces import BadInput, first_line
from search_spaces.gated import make_plain
from search_spaces.timm_compat import timm
from trainables.locations import read_bytes
from trainables.settings import ModelSettings


class BadModel(BadInput):
    """The model or its checkpoint cannot be used; the message says what to do."""


def build_model(settings: ModelSettings, *, seed: int = 0, drop_path: float = 0.0) -> torch.nn.Module:
    """Build the dense model with its weights, in evaluation mode, on the CPU.

    Args:
        settings: which model; where its gated MLPs are absorbed, the checkpoint is that of the plain ones.
        seed: of weights that no checkpoint gives.
        drop_path: stochastic depth rate of the last block, for training.

    Raises:
        BadModel: timm does not know the name or an argument, or the checkpoint does not fit.
    """
    if not timm.is_model(settings.name):
        near = difflib.get_close_matches(settings.name, timm.list_models(), 5)
        hint = f"; similar: {', '.join(near)}" if near else ""
        raise BadModel(f"timm has no model {settings.name!r}: see timm.list_models(){hint}")
    rate = {"drop_path_rate": drop_path} if drop_path else {}
    # The caller's own random state is left as it is.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _created(settings, {**settings.kwargs, **rate})
    if settings.gated == "absorb":
        make_plain(model)
    if settings.checkpoint not in ("", "pretrained"):
        state = read_weights(settings.checkpoint)
        if settings.new_head:
            state |= {k: v for k, v in model.state_dict().items() if k.startswith(_classifiers(model))}
        model = _resampled(model, state, settings, rate) or model
        load_weights(model, state, settings.checkpoint)
    return model.eval()


def _created(settings: ModelSettings, kwargs: dict[str, Any]) -> Any:
    """Return timm's model; its `pretrained_cfg` then has the size of the images that this one takes."""
    pretrained, size = settings.checkpoint == "pretrained", kwargs.get("img_size")
    try:
        try:
            model: Any = timm.create_model(settings.name, pretrained=pretrained, **kwargs)
        except TypeError as error:
            # Models that take images of any size have no such argument.
            if size is None or "img_size" not in str(error):
                raise
            rest = {name: value for name, value in kwargs.items() if name != "img_size"}
            model = timm.create_model(settings.name, pretrained=pretrained, **rest)
        _take_images_of(model, kwargs.get("in_chans"), size)
    except Exception as error:  # each model has its own kinds of error
        raise BadModel(f"timm cannot build {settings.name} with {settings.kwargs}: {first_line(error)}") from None
    return model


def _resampled(model: Any, state: dict[str, torch.Tensor], settings: ModelSettings, rate: dict[str, float]) -> Any:
    """Return the model with weights that are of another image or patch size, made to fit by timm; None if they are not.

    What timm knows to resample are position embeddings, tables of relative positions and patch embeddings. `state` is
    then what the model has.
    """
    own = model.state_dict()
    if state.keys() != own.keys() or all(own[name].shape == weight.shape for name, weight in state.items()):
        return None
    source = {"state_dict": dict(state), "num_classes": model.num_classes}
    given = replace(settings, checkpoint="pretrained")
    try:
        fitted = _created(given, {**settings.kwargs, **rate, "pretrained_cfg_overlay": source})
    except BadModel:
        return None
    del fitted.pretrained_cfg["state_dict"]
    state.update(fitted.state_dict())
    return fitted


def _take_images_of(model: Any, channels: int | None, size: Any) -> None:
    """Write down what images the model takes, where timm looks for it, and see that it takes a given size."""
    made_for = model.pretrained_cfg["input_size"]
    asked = (channels or made_for[0], *(timm.layers.to_2tuple(size) if size else made_for[1:]))
    if asked != tuple(made_for):
        model.pretrained_cfg["input_size"] = asked
        place = next(model.parameters()).device
        with torch.no_grad():
            model.eval()(torch.zeros(1, *asked, device=place))


def _classifiers(model: torch.nn.Module) -> tuple[str, ...]:
    """Return the prefixes of the classifier's weights, as timm names them."""
    names = model.pretrained_cfg["classifier"]
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def read_weights(location: str) -> dict[str, torch.Tensor]:
    """Read a state dict from safetensors, or from what `torch.load(weights_only=True)` reads.

    Raises:
        BadModel: there is no such file, or it is neither.
    """
    try:
        content = read_bytes(location)
        if location.endswith(".safetensors"):
            return safetensors.torch.load(content)
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise BadModel(f"model.checkpoint {location!r} does not exist") from None
    except Exception as error:  # each reader has its own kinds of error
        raise BadModel(f"cannot read weights from {location!r}: {first_line(error)}") from None
    for key in ("state_dict_ema", "state_dict", "model"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise BadModel(f"{location!r} has no weights by name (a state dict)")
    return dict(state)


def load_weights(model: torch.nn.Module, state: dict[str, torch.Tensor], where: str) -> None:
    """Load a state dict of exactly this model.

    Raises:
        BadModel: names or shapes do not fit.
    """
    expected = model.state_dict()
    wrong = [k for k, v in state.items() if k in expected and v.shape != expected[k].shape]
    if wrong:
        name = wrong[0]
        raise BadModel(
            f"{where!r} does not fit the model: {name} has shape {tuple(state[name].shape)}, the model's is "
            f"{tuple(expected[name].shape)} ({len(wrong)} such): give the model.name and model.kwargs it was made with"
        )
    missing, unknown = expected.keys() - state.keys(), state.keys() - expected.keys()
    if missing or unknown:
        example = sorted(missing or unknown)[0]
        raise BadModel(
            f"{where!r} does not fit the model: {len(missing)} weights are missing and {len(unknown)} unknown "
            f"(such as {example}): give the model.name and model.kwargs it was made with"
        )
    model.load_state_dict(state)
