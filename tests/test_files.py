"""Files are replaced whole, under a name of each writer's own."""

import os
import threading

import pytest

from ran_ext._files import require_regular, write_atomically, write_json


def test_many_writers_of_one_file_leave_one_of_their_contents(tmp_path):
    path, faults = tmp_path / "file", []
    contents = [bytes([number]) * 300_000 for number in range(4)]

    def work(content):
        try:
            for _ in range(20):
                write_atomically(path, content)
                if path.read_bytes() not in contents:
                    faults.append("mixed")
        except OSError as error:
            faults.append(str(error))

    writers = [threading.Thread(target=work, args=(content,)) for content in contents]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert faults == []
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_mode_is_that_of_any_new_file(tmp_path):
    write_atomically(tmp_path / "file", b"")
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("kind", ["device", "folder", "pipe"])
def test_what_is_no_file_is_not_replaced(tmp_path, kind):
    path = tmp_path / "path"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/null")
    before = os.lstat(path)
    with pytest.raises(OSError, match="there is a folder or a device of that name"):
        write_atomically(path, b"data")
    assert os.lstat(path).st_ino == before.st_ino
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(OSError, match="not a file"):
        require_regular(path)


def test_a_write_that_fails_leaves_what_was_there(tmp_path, full_disk):
    write_json(tmp_path / "file", {"a": 1})
    full_disk(True)
    for size in (10, 10_000_000):
        with pytest.raises(OSError, match="No space left"):
            write_atomically(tmp_path / "file", bytes(size))
    assert (tmp_path / "file").read_text() == '{"a": 1}\n'
    assert len(list(tmp_path.iterdir())) == 1
