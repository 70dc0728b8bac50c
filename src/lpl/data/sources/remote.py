"""Fetches files (http and https by urllib, all else by fsspec) and tells whether they have changed."""

from __future__ import annotations

import http.client
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from email.message import Message
from hashlib import blake2b
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from lpl.base.errors import UserError
from lpl.base.files import stamp_of, status_of

ATTEMPTS = 3
PAUSE = 1.0
"""Seconds before the second attempt; each further pause is twice as long."""
_TIMEOUT = 60.0
_CHUNK = 1 << 20
_BUSY = (408, 425, 429)


def download(url: str, file: BinaryIO, shard: str) -> str:
    """Writes what is at a URL (of urllib or fsspec) to an empty file; its length must be what the server says.

    Returns:
        The version of what was written, see Versions; the file is at its start.

    Raises:
        UserError: it cannot be fetched, in several attempts where trying again may help, or there is no room for it.
    """
    reason = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE * 2 ** (attempt - 1))
        file.seek(0)
        file.truncate()
        try:
            version = _fetch(url, file, shard)
        except urllib.error.HTTPError as error:
            error.close()
            reason = f"HTTP {error.code} {error.reason}"
            if error.code < 500 and error.code not in _BUSY:
                break
        except urllib.error.URLError as error:
            reason = str(error.reason)
        except (OSError, http.client.HTTPException) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
        else:
            file.seek(0)
            return version
    raise UserError(f"{shard}: cannot be fetched ({reason}): check the URL and the network, then run again")


def _fetch(url: str, file: BinaryIO, shard: str) -> str:
    with _opened(url, shard) as (stream, length, version):
        done = 0
        while chunk := stream.read(_CHUNK):
            done += len(chunk)
            try:
                file.write(chunk)
                file.flush()
            except OSError as error:
                raise UserError(
                    f"{shard}: no room for it in the folder for temporary files ({error.strerror}): name another one "
                    "with the environment variable TMPDIR"
                ) from None
    if length is not None and done != length:
        raise OSError(f"the connection ended after {done} of {length} bytes")
    return version


@contextmanager
def _opened(url: str, shard: str) -> Iterator[tuple[Any, int | None, str]]:
    """A stream to read from, its length if that is known, and its version."""
    if _is_http(url):
        with _ask(url, _TIMEOUT) as response:
            yield response, response.length, _version_in(response.headers)
        return
    try:
        filesystem, path = _filesystem(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{shard}: cannot be opened ({error}): install what it needs, or correct the URL") from None
    version = _version_of(filesystem, path)
    with filesystem.open(path, "rb") as stream:
        yield stream, filesystem.size(path), version


def _version_of(filesystem: Any, path: str) -> str:
    return _short(str(filesystem.ukey(path)))


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    return fsspec.core.url_to_fs(url)


THREADS = 16
TIMEOUT = 20.0
SILENT = ""
"""The version of a URL whose server says nothing that changes with the file."""

logger = logging.getLogger("lpl")


class Versions:
    """Versions of files and URLs, each looked up once in a run, before it is read or with it.

    So what is noted is never newer than what was read, and a file that is replaced in between is read again by the next
    run. `addresses` says what to open for some of the names; the others are paths and URLs themselves.
    """

    def __init__(self, addresses: Mapping[str, str] | None = None) -> None:
        self._addresses = addresses or {}
        self._known: dict[str, str | None] = {}
        self._down: set[str] = set()
        self._unanswered: dict[str, str] = {}

    def __call__(self, name: str) -> str | None:
        """The version of a file (see stamp_of) or URL; SILENT, or None where its server does not answer."""
        if name not in self._known:
            self._known[name] = self._look_up(name)
        return self._known[name]

    def note(self, name: str, version: str) -> None:
        """Records the version that a server sent with the content itself."""
        self._known[name] = version

    def differ(self, names: Iterable[str], noted: Iterable[str | None]) -> bool:
        """Whether any file has another version than was noted; what does not answer is taken to have the same."""
        pairs = list(zip(names, noted, strict=True))
        if not pairs:
            return False
        urls = [name for name in dict.fromkeys(name for name, _ in pairs) if "://" in name and name not in self._known]
        with ThreadPoolExecutor(THREADS, thread_name_prefix="lpl-version") as pool:
            list(pool.map(self, urls))
        return any(self(name) not in (None, version) for name, version in pairs)

    def tell(self, source: str) -> None:
        """Logs which files could not be asked for, or say nothing."""
        if self._unanswered:
            first, reason = next(iter(self._unanswered.items()))
            logger.warning(
                "%s: %d of its files do not say whether they have changed, first %s (%s): what is cached is used",
                *(source, len(self._unanswered), first, reason),
            )
        silent = [name for name, version in self._known.items() if version == SILENT]
        if silent:
            logger.warning(
                "%s: the servers of %d of its files send no length, ETag or date, first %s: changes go unnoticed, "
                "unless --rehash reads everything again",
                *(source, len(silent), silent[0]),
            )

    def _look_up(self, name: str) -> str | None:
        address = self._addresses.get(name, name)
        if "://" not in address:
            return stamp_of(status_of(address), address)
        host = urlsplit(address).netloc
        if host in self._down:  # a machine without network must not wait for each file
            self._unanswered[name] = "nor did others there"
            return None
        try:
            if not _is_http(address):
                return _version_of(*_filesystem(address))
            # Asks for one byte, since a URL that is signed for reading answers no other request.
            with _ask(address, TIMEOUT, Range="bytes=0-0") as response:
                return _version_in(response.headers)
        except urllib.error.HTTPError as error:
            error.close()
            self._unanswered[name] = f"HTTP {error.code} {error.reason}"
            return None
        except (OSError, http.client.HTTPException, ImportError, ValueError) as error:
            self._unanswered[name] = (str(error) or type(error).__name__).splitlines()[0]
            if _is_http(address):
                self._down.add(host)
            return None


def _is_http(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def _ask(url: str, timeout: float, **headers: str) -> Any:
    """A server's answer to a request for a file as it is stored."""
    headers = {"User-Agent": "lpl", "Accept-Encoding": "identity"} | headers
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)


def _version_in(headers: Message) -> str:
    """The version that a server's answer tells: length, and ETag or else date; SILENT if it tells none."""
    length = (headers.get("Content-Range") or "").rpartition("/")[2] or headers.get("Content-Length")
    parts = length, headers.get("ETag") or headers.get("Last-Modified")
    return _short(" ".join(part for part in parts if part not in (None, "*")))


def _short(text: str) -> str:
    return blake2b(text.encode(), digest_size=8).hexdigest() if text else SILENT
