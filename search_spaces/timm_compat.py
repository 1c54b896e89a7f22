"""timm, imported so that it also loads beside a CPU build of torch.

torchvision's wheel on PyPI is a CUDA build. Beside a CPU build of torch its C extension does not load, and its Python
part then fails on two operators nobody has declared. Declaring them is enough: nothing here calls them.
"""

import torch

_declared = None

if not torch.cuda.is_available():
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        # Kept at module level: the declarations go when the library object does.
        _declared = torch.library.Library("torchvision", "FRAGMENT")
        _declared.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm  # noqa: E402
import timm.data  # noqa: E402
import timm.layers  # noqa: E402
import timm.optim  # noqa: E402
import timm.scheduler  # noqa: E402
import timm.utils  # noqa: E402

__all__ = ["timm"]
