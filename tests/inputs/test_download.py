"""download.py: what pip is configured with, finding, checking, unpacking; hostile and broken archives."""

from __future__ import annotations

import errno
import hashlib
import http.server
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from asi_lens.base.errors import FetchError
from asi_lens.inputs import download as dl


def make_index(root: Path, dist: str, filename: str, data: bytes) -> dl.PackageFile:
    """A simple index on disk with one file; returns the pinned file."""
    folder = root / dist
    folder.mkdir(parents=True, exist_ok=True)
    (folder / filename).write_bytes(data)
    (folder / "index.html").write_text(f'<a href="{filename}">{filename}</a>')
    return dl.PackageFile(dist, "1.0", filename, hashlib.sha256(data).hexdigest(), len(data))


@pytest.fixture
def pip_env(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets pip's configuration to exactly what is given."""
    for key in list(os.environ):
        if key.startswith("PIP_"):
            monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)  # pip's word for: no configuration files at all

    def configure(**values: str) -> None:
        for key, value in values.items():
            monkeypatch.setenv(f"PIP_{key.upper()}", value)

    return configure


def test_settings_come_from_pips_files_and_variables(tmp_path: Path, pip_env: Callable[..., None]) -> None:
    config = tmp_path / "pip.conf"
    config.write_text(
        "[global]\nindex-url = https://a.example/simple\nextra-index-url = https://b.example/simple\n"
        "    https://c.example/simple\ncert = /etc/cert.pem\ntimeout = 7\n"
        "[download]\ncert = /etc/other.pem\n[install]\nindex-url = https://wrong.example\n"
    )
    pip_env(find_links="/one /two", config_file=str(config), trusted_host="b.example")
    settings = dl.pip_settings()
    assert settings.index_urls[:1] == ("https://a.example/simple",)
    assert settings.index_urls[-2:] == ("https://b.example/simple", "https://c.example/simple")
    assert settings.find_links == ("/one", "/two")
    assert settings.cert == "/etc/other.pem"
    assert settings.trusted_hosts == ("b.example",)
    assert settings.timeout == 7
    assert [kind for kind, _ in settings.locations][:3] == ["find_links", "find_links", "index"]

    pip_env(index_url="https://d.example/simple", default_timeout="9")
    assert dl.pip_settings().index_urls[0] == "https://d.example/simple"
    pip_env(no_index="1")
    assert dl.pip_settings().index_urls == ()


def test_settings_without_configuration_are_pypi(pip_env: Callable[..., None]) -> None:
    assert dl.pip_settings() == dl.PipSettings(("https://pypi.org/simple",), ())


def test_settings_without_pip_use_the_variables(
    pip_env: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pip_env(index_url="https://a.example/simple", find_links="/one")
    monkeypatch.setattr(dl.sys, "executable", "false")  # a Python without pip exits with an error
    settings = dl.pip_settings()
    assert settings.index_urls == ("https://a.example/simple",)
    assert settings.find_links == ("/one",)


def test_download_from_an_index_and_from_a_folder(tmp_path: Path, pip_env: Callable[..., None]) -> None:
    file = make_index(tmp_path / "simple", "thing", "thing-1.0-py3-none-any.whl", b"x" * 1000)
    pip_env(index_url=(tmp_path / "simple").as_uri())
    path = dl.download(file, tmp_path / "one")
    assert path.read_bytes() == b"x" * 1000
    assert [p.name for p in path.parent.iterdir()] == [path.name]

    pip_env(index_url=(tmp_path / "nothing").as_uri(), find_links=str(tmp_path / "simple" / "thing"))
    assert dl.download(file, tmp_path / "two").read_bytes() == b"x" * 1000


def test_a_whole_copy_is_used_and_a_damaged_one_fetched_again(
    tmp_path: Path, pip_env: Callable[..., None]
) -> None:
    file = make_index(tmp_path / "simple", "thing", "thing-1.0.tar.gz", b"x" * 1000)
    pip_env(index_url=(tmp_path / "simple").as_uri())
    path = dl.download(file, tmp_path / "got")
    path.write_bytes(b"y" * 1000)
    assert dl.download(file, tmp_path / "got").read_bytes() == b"x" * 1000
    pip_env(index_url="http://127.0.0.1:9/simple")
    assert dl.download(file, tmp_path / "got") == path


def test_no_network_says_what_where_and_what_to_do(tmp_path: Path, pip_env: Callable[..., None]) -> None:
    pip_env(index_url="http://user:secret@127.0.0.1:9/simple")
    file = dl.PackageFile("thing", "1.0", "thing-1.0-py3-none-any.whl", "0" * 64, 1)
    with pytest.raises(FetchError) as caught:
        dl.download(file, tmp_path)
    told = str(caught.value)
    assert "thing==1.0" in told
    assert "127.0.0.1:9/simple" in told
    assert "ASI_LENS_CACHE" in told
    assert "PIP_INDEX_URL" in told
    assert "secret" not in told
    assert list(tmp_path.iterdir()) == []


def test_a_version_that_the_index_does_not_have(tmp_path: Path, pip_env: Callable[..., None]) -> None:
    make_index(tmp_path / "simple", "thing", "thing-2.0-py3-none-any.whl", b"x")
    pip_env(index_url=(tmp_path / "simple").as_uri())
    with pytest.raises(FetchError, match="1 other files of thing"):
        dl.download(
            dl.PackageFile("thing", "1.0", "thing-1.0-py3-none-any.whl", "0" * 64, 1), tmp_path / "got"
        )


def test_wrong_hash_shows_both(tmp_path: Path, pip_env: Callable[..., None]) -> None:
    file = make_index(tmp_path / "simple", "thing", "thing-1.0-py3-none-any.whl", b"x" * 1000)
    (tmp_path / "simple" / "thing" / file.filename).write_bytes(b"y" * 1000)
    pip_env(index_url=(tmp_path / "simple").as_uri())
    with pytest.raises(FetchError) as caught:
        dl.download(file, tmp_path / "got")
    assert file.sha256 in str(caught.value)
    assert hashlib.sha256(b"y" * 1000).hexdigest() in str(caught.value)
    assert list((tmp_path / "got").iterdir()) == []


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """An index over HTTP whose file answers can be broken through the dictionary."""
    behavior: dict[str, object] = {"length": None, "send": b"", "status": 200, "asked": 0}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/moved"):
                self.send_response(301)
                self.send_header("Location", self.path.replace("/moved", "/simple"))
                self.end_headers()
            elif self.path.endswith("/"):
                body = b'<a href="thing-1.0.tar.gz">thing-1.0.tar.gz</a>'
                self._answer(200, "text/html", len(body), body)
            else:
                behavior["asked"] = int(str(behavior["asked"])) + 1
                data = behavior["send"]
                assert isinstance(data, bytes)
                self._answer(int(str(behavior["status"])), "application/gzip", behavior["length"], data)

        def _answer(self, status: int, kind: str, length: object, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            if kind == "application/gzip":
                self.send_header("Content-Encoding", "gzip")  # what some servers say of a .tar.gz
            if length is not None:
                self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}", behavior
        httpd.shutdown()
        thread.join()


@pytest.mark.parametrize("announced", [True, False])
def test_cut_off_download_keeps_nothing(
    tmp_path: Path,
    pip_env: Callable[..., None],
    server: tuple[str, dict[str, object]],
    monkeypatch: pytest.MonkeyPatch,
    announced: bool,
) -> None:
    url, behavior = server
    monkeypatch.setattr(dl.time, "sleep", lambda seconds: None)
    data = os.urandom(5000)
    file = dl.PackageFile("thing", "1.0", "thing-1.0.tar.gz", hashlib.sha256(data).hexdigest(), 5000)
    behavior.update(send=data[:2000], length=5000 if announced else None)
    pip_env(index_url=f"{url}/simple")
    with pytest.raises(FetchError, match=r"(cut off|broke off).*2,000 of 5,000 bytes") as caught:
        dl.download(file, tmp_path / "got")
    assert file.filename in str(caught.value)
    assert list((tmp_path / "got").iterdir()) == []


def test_bytes_arrive_as_they_are_through_a_redirect(
    tmp_path: Path, pip_env: Callable[..., None], server: tuple[str, dict[str, object]]
) -> None:
    url, behavior = server
    data = os.urandom(5000)
    file = dl.PackageFile("thing", "1.0", "thing-1.0.tar.gz", hashlib.sha256(data).hexdigest(), 5000)
    behavior.update(send=data, length=5000)
    pip_env(index_url=f"{url}/moved")
    assert dl.download(file, tmp_path / "got").read_bytes() == data


def test_refusal_is_not_retried(
    tmp_path: Path, pip_env: Callable[..., None], server: tuple[str, dict[str, object]]
) -> None:
    url, behavior = server
    behavior.update(status=403, length=0)
    pip_env(index_url=f"{url}/simple")
    with pytest.raises(FetchError, match="403"):
        dl.download(dl.PackageFile("thing", "1.0", "thing-1.0.tar.gz", "0" * 64, 5000), tmp_path / "got")
    assert behavior["asked"] == 1


def test_full_disk_names_the_file(
    tmp_path: Path, pip_env: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make_index(tmp_path / "simple", "thing", "thing-1.0-py3-none-any.whl", b"x" * 1000)
    pip_env(index_url=(tmp_path / "simple").as_uri())

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*thing-1\.0-py3-none-any\.whl: No space left"):
        dl.download(file, tmp_path / "got")
    assert list((tmp_path / "got").iterdir()) == []


def test_unreadable_certificate_is_named(tmp_path: Path, pip_env: Callable[..., None]) -> None:
    pip_env(cert=str(tmp_path / "missing.pem"))
    with pytest.raises(FetchError, match=r"missing\.pem"):
        dl.download(dl.PackageFile("thing", "1.0", "thing-1.0.tar.gz", "0" * 64, 1), tmp_path / "got")
