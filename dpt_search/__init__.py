"""dpt-search: make a Vision Transformer faster by removing whole layers, and search on Ray for which ones.

`dpt_search.load_pruned(path)` loads an exported model; importing this package imports neither torch nor ray.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainables.export import load_pruned

__version__ = "0.1.0"
__all__ = ["load_pruned"]


def __getattr__(name: str) -> Any:
    if name == "load_pruned":
        from trainables.export import load_pruned

        return load_pruned
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
