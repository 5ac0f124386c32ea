"""Files written whole or not at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import snapshot

from pyfmha.aot.staging import staging
from pyfmha.errors import OutputError


def test_published_files_appear_and_nothing_else(tmp_path: Path) -> None:
    with staging(tmp_path / "out") as stage:
        stage.write("a.txt", "A")
        stage.write("deep/b.bin", b"\0B")
        stage.write("scratch.txt", "not published")
        assert not (tmp_path / "out" / "a.txt").exists()
        stage.publish("a.txt", "deep/b.bin")

    assert snapshot(tmp_path / "out") == {"a.txt": b"A", "deep/b.bin": b"\0B"}
    assert os.listdir(tmp_path / "out") in (["a.txt", "deep"], ["deep", "a.txt"])


def test_a_published_file_replaces_the_earlier_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("earlier")

    with (tmp_path / "a.txt").open() as reader, staging(tmp_path) as stage:
        stage.write("a.txt", "later")
        assert (tmp_path / "a.txt").read_text() == "earlier"
        stage.publish("a.txt")
        assert reader.read() == "earlier"  # whoever has it open, or runs its code, keeps what they have

    assert (tmp_path / "a.txt").read_text() == "later"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failure_before_publishing_leaves_everything_as_it_was(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "a.txt").write_text("earlier")

    def fail() -> None:
        with staging(tmp_path) as stage:
            stage.write("a.txt", "later")
            raise error

    with pytest.raises(error):
        fail()

    assert snapshot(tmp_path) == {"a.txt": b"earlier"}
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("folder", ["/proc/pyfmha", "{file}", "{file}/below"])
def test_a_folder_that_cannot_be_made_is_an_error_that_names_it(tmp_path: Path, folder: str) -> None:
    file = tmp_path / "file"
    file.write_text("here already")
    target = folder.format(file=file)

    def prepare() -> None:
        with staging(Path(target)):
            pytest.fail("the folder cannot be used")

    with pytest.raises(OutputError, match=r"cannot write to .*disk full or read-only") as caught:
        prepare()

    assert target in str(caught.value)
    assert file.read_text() == "here already"


def test_the_prepared_files_of_a_killed_process_are_swept_up(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = tmp_path / f".pyfmha-staging-{dead.pid}-abc"
    left.mkdir()
    (left / "half").write_text("half")
    ours = tmp_path / f".pyfmha-staging-{os.getpid()}-other"  # a build of another thread
    ours.mkdir()

    with staging(tmp_path):
        assert not left.exists()
        assert ours.exists()


def test_two_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    with staging(tmp_path) as one, staging(tmp_path) as two:
        one.write("a.txt", "one")
        two.write("a.txt", "two")
        two.publish("a.txt")
        one.publish("a.txt")

    assert snapshot(tmp_path) == {"a.txt": b"one"}
