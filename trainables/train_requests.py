"""Where Ray keeps what Ray Train asks of an autoscaler. Imports no torch."""


def keep_here() -> None:
    """Have it kept on this node, unless it is kept on another one already.

    Ray has an actor for it, which outlives its driver and would begin on the node of whoever trains first: that node
    would never idle again.
    """
    try:
        from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
            get_or_create_autoscaling_coordinator,
        )
    except ImportError:
        # A version of Ray that has no such actor.
        return
    get_or_create_autoscaling_coordinator()
