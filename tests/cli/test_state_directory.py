"""What stacks leave for others to find, and who tidies up after a killed one."""

import json
from pathlib import Path

import pytest

from isthmus.cli.state_directory import StateDir, newest_stack, noted, open_state_dir, start_ticks
from isthmus.errors import CannotStart


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_stack_is_found_while_its_supervisor_lives():
    with open_state_dir(None) as state, noted(state):
        state.write({"supervisor": 1})
        assert newest_stack() == {"supervisor": 1}
    assert newest_stack() is None


def test_note_of_a_reused_pid_is_not_believed(directory: Path):
    with open_state_dir(None) as state, noted(state):
        state.write({"supervisor": 1})
        (note,) = (directory / "isthmus").glob("*.json")
        note.write_text(json.dumps({"start": (start_ticks() or 0) - 1, "dir": str(state.path)}))
        assert newest_stack() is None


def test_next_stack_removes_the_temporary_state_of_a_killed_one(directory: Path):
    killed = directory / "isthmus-stack-old"
    kept = directory / "mine"
    (directory / "isthmus").mkdir()
    for number, path, temporary in ((4194305, killed, True), (4194306, kept, False)):
        path.mkdir()
        note = {"start": 1, "dir": str(path), "temporary": temporary}
        (directory / "isthmus" / f"{number}.json").write_text(json.dumps(note))
    (directory / "isthmus" / "garbage.json").write_text("[")
    with open_state_dir(None) as state, noted(state):
        pass
    assert list(directory.iterdir()) == [kept]


def test_failed_stack_keeps_its_logs():
    with open_state_dir(None) as state:
        state.keep = True
    assert state.logs.is_dir()


def test_directory_that_cannot_be_made_is_refused(directory: Path):
    (directory / "file").write_text("")
    with pytest.raises(CannotStart, match=r"state_dir.*--state-dir"), open_state_dir(directory / "file"):
        pass


def test_stack_file_is_replaced_whole(directory: Path):
    state = StateDir(directory, temporary=False)
    state.write({"a": 1})
    state.write({"a": 2})
    assert json.loads(state.stack_file.read_text()) == {"a": 2}
    assert [path.name for path in directory.iterdir()] == ["stack.json"]
