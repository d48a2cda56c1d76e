from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import bridges.atomic
from bridges.atomic import atomic_directory

WEIGHTS = "model*"


def save(target: Path | str, **files: str) -> None:
    with atomic_directory(target, replaces=WEIGHTS) as folder:
        for name, text in files.items():
            (folder / name).write_text(text)


def fail_halfway(target: Path, error: BaseException) -> None:
    with atomic_directory(target, replaces=WEIGHTS) as folder:
        (folder / "model").write_text("half")
        raise error


def contents(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): f.read_text() for f in folder.rglob("*") if f.is_file()}


def test_a_new_directory_and_its_parents(tmp_path: Path) -> None:
    save(tmp_path / "a" / "b", model="1")
    assert contents(tmp_path) == {"a/b/model": "1"}


def test_it_replaces_its_own_names_and_keeps_the_others(tmp_path: Path) -> None:
    target = tmp_path / "m"
    save(target, model_1="old", model_2="old", config="old", tokenizer="kept")
    (target / "runs").mkdir()
    (target / "runs" / "log").write_text("kept")
    (target / "link").symlink_to("tokenizer")
    save(target, model_1="new", config="new")
    assert contents(target) == {
        "model_1": "new",
        "config": "new",
        "tokenizer": "kept",
        "link": "kept",
        "runs/log": "kept",
    }
    assert (target / "link").is_symlink()
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError("x")],
    ids=repr,
)
@pytest.mark.parametrize("existing", [False, True])
def test_an_error_leaves_what_was_there(tmp_path: Path, error: BaseException, existing: bool) -> None:
    target = tmp_path / "m"
    if existing:
        save(target, model="old")
    with pytest.raises(type(error)):
        fail_halfway(target, error)
    assert contents(tmp_path) == ({"m/model": "old"} if existing else {})


def test_an_error_in_the_swap_puts_the_older_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "m"
    save(target, model="old", tokenizer="kept")
    rename = Path.rename

    def failing(self: Path, to: Path) -> Path:
        if self.suffix == ".saving":
            raise OSError(errno.EIO, "the disk is gone")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="gone"):
        save(target, model="new")
    assert contents(tmp_path) == {"m/model": "old", "m/tokenizer": "kept"}


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    save(tmp_path / "m", model="old", tokenizer="kept")
    monkeypatch.setattr(os, "link", refuse)
    save(tmp_path / "m", model="new")
    assert contents(tmp_path) == {"m/model": "new", "m/tokenizer": "kept"}


KILLED = """
import importlib.util, os, pathlib, signal, sys
spec = importlib.util.spec_from_file_location("atomic", sys.argv[1])
atomic = importlib.util.module_from_spec(spec)
spec.loader.exec_module(atomic)
when, target = sys.argv[2], pathlib.Path(sys.argv[3])
rename = pathlib.Path.rename

def killing(self, to):
    if when == "between" and self.suffix == ".saving":
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, to)

pathlib.Path.rename = killing
with atomic.atomic_directory(target, replaces="model*") as folder:
    (folder / "model").write_text("new")
    if when == "writing":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def kill(when: str, target: Path) -> None:
    command = [sys.executable, "-c", KILLED, bridges.atomic.__file__, when, str(target)]
    assert subprocess.run(command, timeout=60).returncode == -signal.SIGKILL


def test_a_kill_while_writing_leaves_the_older_one(tmp_path: Path) -> None:
    target = tmp_path / "m"
    save(target, model="old", tokenizer="kept")
    kill("writing", target)
    assert contents(target) == {"model": "old", "tokenizer": "kept"}
    save(target, model="newer")
    assert contents(target) == {"model": "newer", "tokenizer": "kept"}


def test_after_a_kill_between_the_renames_nothing_is_lost(tmp_path: Path) -> None:
    target = tmp_path / "m"
    save(target, model="old", tokenizer="kept")
    kill("between", target)
    assert not target.exists()
    assert contents(bridges.atomic.older(target)) == {"model": "old", "tokenizer": "kept"}
    with pytest.raises(ValueError, match="x"):
        fail_halfway(target, ValueError("x"))
    assert contents(target) == {"model": "old", "tokenizer": "kept"}
    kill("between", target)
    save(target, model="newer")
    assert contents(target) == {"model": "newer", "tokenizer": "kept"}


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    save(tmp_path / "m", model="old")
    (tmp_path / "latest").symlink_to("m")
    save(tmp_path / "latest", model="new")
    assert (tmp_path / "latest").is_symlink()
    assert contents(tmp_path / "m") == {"model": "new"}


def test_a_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("mine")
    with pytest.raises(NotADirectoryError, match="is a file"):
        save(tmp_path / "m", model="new")
    assert contents(tmp_path) == {"m": "mine"}


def test_the_working_directory_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="inside it"):
        save(".", model="new")
    save("m", model="new")
    assert contents(tmp_path) == {"m/model": "new"}


def test_permissions_are_those_of_a_new_directory(tmp_path: Path) -> None:
    save(tmp_path / "m", model="1")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "m").stat().st_mode == (tmp_path / "plain").stat().st_mode
