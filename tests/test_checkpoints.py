"""States of a long training: when they are written, which are kept, and which is gone on from."""

from typing import Any

import pytest

from dpt_search.progress import EpochLines
from dpt_search.store import RunStore
from trainables import checkpoints
from trainables.checkpoints import Checkpoints


def state(epoch: int, inputs: str = "mine") -> dict[str, Any]:
    return {"inputs": inputs, "training": {"epochs_done": epoch}}


def offered(made: Checkpoints, *epochs: int) -> None:
    for epoch in epochs:
        made.offer(epoch, lambda epoch=epoch: state(epoch))


def is_mine(found: dict[str, Any]) -> bool:
    return found["inputs"] == "mine"


@pytest.mark.parametrize(("every", "written"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4]), (7, [])])
def test_a_state_is_written_no_oftener_than_asked(tmp_path, every, written):
    made, found = Checkpoints(str(tmp_path / "state.pt"), every), []
    for epoch in range(1, 6):
        made.offer(epoch, lambda epoch=epoch: found.append(epoch) or state(epoch))
    assert found == written
    assert made.newest == (written or [0])[-1]


def test_a_state_is_written_no_oftener_than_every_so_many_seconds(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now[0])
    made, found = Checkpoints(str(tmp_path / "state.pt"), seconds=60), []
    for epoch in range(1, 9):
        now[0] += 25
        made.offer(epoch, lambda epoch=epoch: found.append(epoch) or state(epoch))
    assert found == [3, 6]


@pytest.mark.parametrize(
    ("kept", "files"),
    [(1, ["state.pt"]), (2, ["state-000003.pt", "state.pt"]),
     (9, ["state-000001.pt", "state-000002.pt", "state-000003.pt", "state.pt"])],
)  # fmt: skip
def test_the_newest_are_kept(tmp_path, kept, files):
    offered(Checkpoints(str(tmp_path / "state.pt"), kept=kept), 1, 2, 3, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == files


def test_the_newest_whole_state_of_the_same_training_is_gone_on_from(tmp_path):
    place = f"file://{tmp_path}/state.pt"
    offered(Checkpoints(place, kept=3), 1, 2, 3)
    again = Checkpoints(place, kept=3)
    assert again.load(is_mine) == state(3)
    assert again.newest == 3
    (tmp_path / "state.pt").write_bytes(b"half of it")
    with pytest.warns(UserWarning, match="broken"):
        assert Checkpoints(place).load(is_mine) == state(2)
    assert Checkpoints(str(tmp_path / "none" / "state.pt")).load(is_mine) is None
    (tmp_path / "state.pt").unlink()
    assert Checkpoints(place).load(lambda found: found["inputs"] == "another") is None


def test_what_comes_after_the_newest_state_is_told_again(tmp_path):
    store, said = RunStore(str(tmp_path)), []
    records = [
        {"epoch": n, "loss": 1.0, "accuracy": 0.5, "images_per_second": 9.0, "seconds": 1.0} for n in range(1, 6)
    ]
    store.write_json("progress.json", {"inputs": "mine", "epochs": records[:4], "saved": 2})
    lines = EpochLines(said.append, store, "progress.json", "mine", 5)
    lines.show()
    assert said == ["going on after epoch 2"]
    store.write_json("progress.json", {"inputs": "mine", "epochs": records[:3], "saved": 2})
    lines.show()
    store.write_json("progress.json", {"inputs": "mine", "epochs": records, "saved": 4})
    lines.show()
    lines.show()
    assert [line.split(":")[0] for line in said[1:]] == ["epoch 3 of 5", "epoch 4 of 5", "epoch 5 of 5"]
    others: list[str] = []
    EpochLines(others.append, store, "progress.json", "another", 5).show()
    assert others == []
