"""The trial log: whatever happened before, the same records give the same log, and a broken file costs only itself."""

import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dpt_search.store import Finished, Proposed, RunStore, TrialLog


def proposed(trial: int, seen: int = 0) -> Proposed:
    return Proposed(trial, f"attn:{trial}", "dense", seed=trial, seen=seen, sampler="map", params={"n": 1}, time=1.0)


def finished(trial: int, time: float = 100.0, accuracy: float = 0.5) -> Finished:
    return Finished(trial, f"attn:{trial}", "dense", "finished", accuracies=[0.1, accuracy], cost=3.0, time=time)


def failed(trial: int, time: float = 100.0) -> Finished:
    return Finished(trial, f"attn:{trial}", "dense", "failed", error="Diverged", time=time)


def content(log: TrialLog) -> tuple[dict[int, Proposed], dict[int, Finished]]:
    return log.proposed, log.finished


def reread(folder: Path) -> TrialLog:
    return TrialLog(RunStore(str(folder)))


def filled(folder: Path, count: int = 6, ended: int = 4) -> TrialLog:
    """Write a log of `count` trials of which the first `ended` have an end, the odd ones a failed attempt before it."""
    log = reread(folder)
    for trial in range(count):
        log.propose(proposed(trial))
    for trial in range(ended):
        if trial % 2:
            log.finish(failed(trial, time=50.0))
        log.finish(finished(trial))
    return log


def trials_of(folder: Path) -> list[Path]:
    return sorted((folder / "trials").iterdir())


@pytest.fixture
def compacts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrialLog, "COMPACT_AT", 1)


class AnyHistory(RuleBasedStateMachine):
    """Trials are proposed and end, once or several times, while the driver restarts and compacts as it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.holder = tempfile.TemporaryDirectory()
        self.folder = Path(self.holder.name)
        self.log = reread(self.folder)
        self.proposals: dict[int, Proposed] = {}
        self.ends: dict[int, list[Finished]] = {}

    def teardown(self) -> None:
        self.holder.cleanup()

    @rule(seen=st.integers(0, 3))
    def propose(self, seen: int) -> None:
        record = proposed(self.log.next_trial, seen)
        assert record.trial not in self.proposals
        self.log.propose(record)
        self.proposals[record.trial] = record

    @precondition(lambda self: self.proposals)
    @rule(data=st.data(), accuracy=st.none() | st.floats(0, 1), time=st.integers(1, 99))
    def finish(self, data: st.DataObject, accuracy: float | None, time: int) -> None:
        trial = data.draw(st.sampled_from(sorted(self.proposals)))
        # Distinct times: of two records of one moment there is no latest.
        at = time + len(self.ends.get(trial, [])) / 1000
        record = failed(trial, at) if accuracy is None else finished(trial, at, accuracy)
        self.log.finish(record)
        self.ends.setdefault(trial, []).append(record)

    @rule()
    def restart(self) -> None:
        self.log = reread(self.folder)

    @rule()
    def compact(self) -> None:
        before = TrialLog.COMPACT_AT
        TrialLog.COMPACT_AT = 1
        self.log.compact()
        TrialLog.COMPACT_AT = before

    @invariant()
    def the_log_and_the_files_say_what_happened(self) -> None:
        ends = {trial: max(records, key=lambda r: r.time) for trial, records in self.ends.items()}
        again = reread(self.folder)
        for log in (self.log, again):
            assert content(log) == (self.proposals, ends)
            assert [r.trial for r in log.unfinished] == sorted(self.proposals.keys() - ends.keys())
            assert log.next_trial == len(self.proposals)
        assert again.broken == []


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)


@given(st.permutations(range(10)), st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
def test_records_written_and_listed_in_any_order_give_the_same_log(order: list[int], shuffler: random.Random) -> None:
    records = [*(proposed(t) for t in range(4)), finished(0, 5.0), failed(0, 9.0), failed(1, 2.0), finished(1, 10.0)]
    records += [finished(2, 3.0), finished(2, 4.0, 0.9)]
    with tempfile.TemporaryDirectory() as folder:
        store = RunStore(folder)
        for position in order:
            record = records[position]
            log = reread(Path(folder))
            log.propose(record) if isinstance(record, Proposed) else log.finish(record)
        names = store.names("trials")
        shuffler.shuffle(names)
        store.names = lambda _: names  # type: ignore[method-assign]
        log = TrialLog(store)
    assert log.proposed == {t: records[t] for t in range(4)}
    assert log.finished == {0: records[5], 1: records[7], 2: records[9]}
    assert [r.trial for r in log.unfinished] == [3]


def test_what_is_read_is_what_was_written_to_the_last_digit(tmp_path: Path) -> None:
    log = reread(tmp_path)
    end = Finished(
        0, "attn:0", "dense", "finished", 0.1 + 0.2, [1 / 3, 2 / 3], 1e20 / 7, 12.5, "a CPU", {"torch": "2"}, "", 1 / 7
    )
    log.propose(proposed(0))
    log.finish(end)
    assert reread(tmp_path).finished == {0: end}
    assert end.accuracy == 2 / 3


def test_a_failed_trial_has_an_end_and_no_accuracy(tmp_path: Path) -> None:
    log = filled(tmp_path, count=2, ended=0)
    log.finish(failed(0))
    assert [r.trial for r in reread(tmp_path).unfinished] == [1]
    assert reread(tmp_path).finished[0].accuracy is None


def test_a_record_cut_off_at_any_byte_is_reported_and_costs_nothing_else(tmp_path: Path) -> None:
    log = filled(tmp_path, count=3, ended=2)
    newest = tmp_path / "trials/000001-finished-100.000000.json"
    whole = newest.read_bytes()
    # The last byte is the line's end, without which the record is still whole.
    for length in range(len(whole) - 1):
        newest.write_bytes(whole[:length])
        read = reread(tmp_path)
        assert [b.partition(":")[0] for b in read.broken] == [newest.name], length
        assert read.proposed == log.proposed
        assert read.finished == {0: log.finished[0], 1: failed(1, 50.0)}, length
    newest.write_bytes(whole)
    assert content(reread(tmp_path)) == content(log)


@pytest.mark.parametrize("text", ["[]", "null", "7", '"status"', "{}", '{"status": 1, "trial": 3}', '{"unknown": 1}'])
def test_json_that_is_no_record_is_reported_and_skipped(tmp_path: Path, text: str) -> None:
    log = filled(tmp_path)
    for name in ("000009-proposed.json", "compacted-000009-1.json"):
        (tmp_path / "trials" / name).write_text(text)
    read = reread(tmp_path)
    assert sorted(b.partition(":")[0] for b in read.broken) == ["000009-proposed.json", "compacted-000009-1.json"]
    assert content(read) == content(log)


def test_a_file_that_is_still_being_written_is_no_record(tmp_path: Path) -> None:
    log = filled(tmp_path)
    (tmp_path / "trials/000009-proposed.json.0a1b.tmp").write_text("{")
    read = reread(tmp_path)
    assert read.broken == []
    assert content(read) == content(log)


def test_few_records_are_left_as_they_are(tmp_path: Path) -> None:
    log = filled(tmp_path)
    before = trials_of(tmp_path)
    log.compact()
    assert trials_of(tmp_path) == before


@pytest.mark.usefixtures("compacts_at_once")
def test_compaction_leaves_one_file_and_the_proposals_without_an_end(tmp_path: Path) -> None:
    log = filled(tmp_path)
    log.compact()
    names = [path.name for path in trials_of(tmp_path)]
    assert names[:2] == ["000004-proposed.json", "000005-proposed.json"]
    assert len(names) == 3
    assert content(reread(tmp_path)) == content(log)


@pytest.mark.usefixtures("compacts_at_once")
def test_compacting_again_at_once_loses_nothing(tmp_path: Path) -> None:
    log = filled(tmp_path)
    for _ in range(3):
        log.compact()
        assert content(reread(tmp_path)) == content(log)


def stops_after(count: int, action: Callable[[str], None]) -> Callable[[str], None]:
    """Return an action that a crash ends after so many times."""
    done = []

    def act(name: str) -> None:
        if len(done) == count:
            raise KeyboardInterrupt
        done.append(name)
        action(name)

    return act


@pytest.mark.usefixtures("compacts_at_once")
@pytest.mark.parametrize("deleted", range(10))
def test_a_compaction_that_crashed_between_any_two_deletions_loses_nothing(tmp_path: Path, deleted: int) -> None:
    log = filled(tmp_path)
    store = RunStore(str(tmp_path))
    store.delete = stops_after(deleted, store.delete)  # type: ignore[method-assign]
    crashing = TrialLog(store)
    with pytest.raises(KeyboardInterrupt):
        crashing.compact()
    assert content(reread(tmp_path)) == content(log)
    again = reread(tmp_path)
    again.compact()
    assert content(reread(tmp_path)) == content(log)
    assert len(trials_of(tmp_path)) == 3


@pytest.mark.usefixtures("compacts_at_once")
@pytest.mark.parametrize("name", [None, "compacted-999999-9999999999.json", "compacted-000000-0.json"])
def test_an_older_compacted_file_left_over_does_not_bring_old_ends_back(tmp_path: Path, name: str | None) -> None:
    log = filled(tmp_path, count=4, ended=3)
    log.finish(failed(2, time=200.0))
    log.compact()
    old = next(path for path in trials_of(tmp_path) if path.name.startswith("compacted"))
    left = old.read_bytes()
    log.finish(finished(2, time=300.0, accuracy=0.9))
    log.finish(finished(3, time=300.0))
    log.compact()
    (old if name is None else old.with_name(name)).write_bytes(left)
    assert content(reread(tmp_path)) == content(log)
    assert reread(tmp_path).finished[2].accuracy == 0.9


@pytest.mark.usefixtures("compacts_at_once")
@pytest.mark.parametrize("name", ["000000-finished-100.000000.json", "compacted-000300-1.json"])
def test_compaction_keeps_a_file_that_could_not_be_read(tmp_path: Path, name: str) -> None:
    filled(tmp_path)
    later = {"records": [{"of": "a later version"}]}
    (tmp_path / "trials" / name).write_text(json.dumps(later))
    before = reread(tmp_path)
    before.compact()
    after = reread(tmp_path)
    assert json.loads((tmp_path / "trials" / name).read_text()) == later
    assert after.broken == before.broken
    assert content(after) == content(before)


@pytest.mark.usefixtures("compacts_at_once")
def test_a_reader_that_meets_a_compaction_on_its_way_still_sees_every_trial(tmp_path: Path) -> None:
    log = filled(tmp_path)
    store = RunStore(str(tmp_path))
    read = store.read

    def read_while_the_driver_compacts(name: str) -> bytes:
        store.read = read  # type: ignore[method-assign]
        log.compact()
        return read(name)

    store.read = read_while_the_driver_compacts  # type: ignore[method-assign]
    reader = TrialLog(store)
    assert content(reader) == content(log)
    assert reader.broken == []
