"""Downloads from a server of our own: resumed, broken off, altered, refused."""

from __future__ import annotations

import hashlib
import http.server
import threading

import numpy as np
import pytest

from ran_ext.data import download as downloads
from ran_ext.data.download import Archive, DownloadError, download


class Server(http.server.ThreadingHTTPServer):
    """Serves ``content``; can ignore Range, send only ``limit`` bytes an answer, or answer with a status."""

    content, ranges, limit, status = b"", True, 1 << 30, 200

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = []  # the Range header of each request


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        if self.server.status != 200:
            self.send_error(self.server.status)
            return
        content, start = self.server.content, 0
        if asked and self.server.ranges:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : start + self.server.limit])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(downloads.time, "sleep", lambda seconds: None)
    with Server() as running:
        running.content = np.random.default_rng(0).bytes(300_000)
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def archive(server):
    url = f"http://127.0.0.1:{server.server_port}/cifar-10-binary.tar.gz"
    return Archive(url, len(server.content), hashlib.sha256(server.content).hexdigest())


def test_whole(tmp_path, server, archive):
    assert download(archive, tmp_path).read_bytes() == server.content
    assert server.asked == [None]
    assert [path.name for path in tmp_path.iterdir()] == [archive.name]


def test_interrupted_download_resumes(tmp_path, server, archive):
    (tmp_path / f"{archive.name}.part").write_bytes(server.content[:1000])
    assert download(archive, tmp_path).read_bytes() == server.content
    assert server.asked == ["bytes=1000-"]
    assert download(archive, tmp_path).read_bytes() == server.content
    assert len(server.asked) == 1, "a whole file is not fetched again"


def test_server_that_cannot_resume_starts_anew(tmp_path, server, archive):
    (tmp_path / f"{archive.name}.part").write_bytes(b"x" * 1000)
    server.ranges = False
    assert download(archive, tmp_path).read_bytes() == server.content


def test_connections_that_break_are_taken_up_again(tmp_path, server, archive):
    server.limit = archive.size // 3 + 1
    assert download(archive, tmp_path).read_bytes() == server.content
    assert server.asked == [None, f"bytes={server.limit}-", f"bytes={2 * server.limit}-"]


def test_server_that_stops_sending_is_given_up_and_the_part_kept(tmp_path, server, archive):
    part = tmp_path / f"{archive.name}.part"
    part.write_bytes(server.content[:500])
    server.limit = 0
    with pytest.raises(DownloadError, match=rf"500 of {archive.size} bytes are here\); run the same command again"):
        download(archive, tmp_path)
    server.limit = 1 << 30
    assert download(archive, tmp_path).read_bytes() == server.content


def test_server_that_neither_resumes_nor_finishes_is_given_up(tmp_path, server, archive):
    server.ranges, server.limit = False, archive.size // 2
    with pytest.raises(DownloadError, match=rf"{archive.size // 2} of {archive.size} bytes are here"):
        download(archive, tmp_path)
    assert len(server.asked) == 1 + downloads.ATTEMPTS


@pytest.mark.parametrize("old", [0, 1000], ids=["fresh", "resumed"])
def test_wrong_checksum_is_deleted_and_the_next_run_is_clean(tmp_path, server, archive, old):
    part = tmp_path / f"{archive.name}.part"
    part.write_bytes(b"x" * old)
    whole = server.content
    if not old:
        server.content = b"x" + whole[1:]
    with pytest.raises(DownloadError, match=rf"must be {archive.sha256}; it was deleted: run the same command again"):
        download(archive, tmp_path)
    assert not part.exists()
    server.content = whole
    assert download(archive, tmp_path).read_bytes() == whole


def test_part_longer_than_the_archive_is_dropped(tmp_path, server, archive):
    (tmp_path / f"{archive.name}.part").write_bytes(b"x" * (archive.size + 1))
    assert download(archive, tmp_path).read_bytes() == server.content


def test_another_file_or_a_login_page_is_told_by_its_size(tmp_path, server, archive):
    server.content = b"<html>please log in</html>"
    with pytest.raises(DownloadError, match=rf"offers 26 bytes, must be {archive.size}.*--source npm or --source PATH"):
        download(archive, tmp_path)


@pytest.mark.parametrize(("status", "kept"), [(404, True), (503, True), (416, False)])
def test_refusals(tmp_path, server, archive, status, kept):
    part = tmp_path / f"{archive.name}.part"
    part.write_bytes(server.content[:10])
    server.status = status
    with pytest.raises(DownloadError, match=f"HTTP {status} .*--source npm"):
        download(archive, tmp_path)
    assert part.exists() == kept
    assert len(server.asked) == 1
