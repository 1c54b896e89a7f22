"""Stands in for the module of Ascend's CANN that Ray counts a host's NPUs with."""

from pathlib import Path


class rt:
    @staticmethod
    def get_device_count() -> tuple[int, int]:
        return int(Path(__file__).with_name("npus.txt").read_text()), 0


def get_soc_name() -> str:
    return "Ascend910B"
