"""Files and folders that are there whole or not at all, also where their writer is killed; and checksums."""

import hashlib
import multiprocessing
import os
import signal

import pytest

from rlhf_trainer.training import files
from rlhf_trainer.training.files import checksum, whole_folder, write_whole


def killed_in(write, owner, name):
    """Runs `write` in a child that kills itself where it calls owner.name."""

    def child():
        setattr(owner, name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        write()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("content", ["größer\n", b"\x00\xff"])
def test_a_file_is_replaced(content, tmp_path):
    path = tmp_path / "report.json"
    for _ in range(2):
        write_whole(path, content)
        assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_that_is_killed_leaves_the_old_file(tmp_path):
    path = tmp_path / "report.json"
    write_whole(path, "old")
    killed_in(lambda: write_whole(path, "new"), files.Path, "replace")
    assert path.read_text() == "old"
    write_whole(path, "new")
    assert path.read_text() == "new"


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    write_whole(path, "old")
    monkeypatch.setattr(files.Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("flush", [False, True])
def test_a_folder_appears_at_the_end_of_the_block(flush, tmp_path):
    folder = tmp_path / "deep" / "step-1"
    with whole_folder(folder, flush=flush) as new:
        (new / "model").write_text("weights")
        assert not folder.exists() and new.parent == folder.parent
    assert (folder / "model").read_text() == "weights"
    assert list(folder.parent.iterdir()) == [folder]


def test_a_folder_whose_block_fails_or_is_killed_does_not_appear(tmp_path):
    folder = tmp_path / "step-1"

    def fill(text):
        with whole_folder(folder) as new:
            (new / text).write_text(text)
            if text == "failed":
                raise ValueError(text)

    with pytest.raises(ValueError, match="failed"):
        fill("failed")
    assert not folder.exists()
    killed_in(lambda: fill("killed"), files.Path, "rename")
    assert not folder.exists()
    fill("whole")  # what the others left beside it does not get in
    assert [path.name for path in folder.iterdir()] == ["whole"]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_that_is_there_is_not_replaced(tmp_path):
    folder = tmp_path / "step-1"
    folder.mkdir()
    (folder / "model").write_text("old")
    with pytest.raises(OSError, match="not empty"), whole_folder(folder):
        pass
    assert (folder / "model").read_text() == "old"


def test_checksums_of_bytes_and_of_files(tmp_path):
    content = b"weights" * 100_000  # more than a file is read by at once
    (tmp_path / "model").write_bytes(content)
    expected = hashlib.blake2b(content, digest_size=16).hexdigest()
    assert checksum(content) == checksum(tmp_path / "model") == expected != checksum(content[1:])
