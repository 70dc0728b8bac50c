"""What tells the versions of files and URLs apart that a source names, but whose content it does not hold."""

from __future__ import annotations

import http.client
import logging
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from hashlib import blake2b
from typing import Any
from urllib.parse import urlsplit

from lpl.data.files import stamp_of, status_of

THREADS = 16
TIMEOUT = 20.0
SILENT = ""
"""Of a URL whose server says nothing that changes with the file."""

logger = logging.getLogger("lpl")


class Versions:
    """Versions of files and URLs, each looked up once in a run, before it is read or with it.

    So what is noted is never newer than what was read, and a file that is replaced in between is read again by the next
    run.

    Args:
        addresses: what to open for some of the names; the others are paths and URLs themselves.
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
        """Takes the version that a server told with the content itself."""
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
                "%s: of %d of its files no length, ETag or date is told, first %s: if they change it goes unnoticed, "
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
            return _of_http(address) if is_http(address) else _of_other(address)
        except urllib.error.HTTPError as error:
            error.close()
            self._unanswered[name] = f"HTTP {error.code} {error.reason}"
            return None
        except (OSError, http.client.HTTPException, ImportError, ValueError) as error:
            self._unanswered[name] = (str(error) or type(error).__name__).splitlines()[0]
            if is_http(address):
                self._down.add(host)
            return None


def is_http(url: str) -> bool:
    """Whether urllib opens it."""
    return url.lower().startswith(("http://", "https://"))


def request_of(url: str, **headers: str) -> urllib.request.Request:
    """A request for a file as it is stored."""
    return urllib.request.Request(url, headers={"User-Agent": "lpl", "Accept-Encoding": "identity"} | headers)


def version_in(headers: Message) -> str:
    """The version that a server's answer tells: length, and ETag or else date; SILENT if it tells none."""
    length = (headers.get("Content-Range") or "").rpartition("/")[2] or headers.get("Content-Length")
    parts = length, headers.get("ETag") or headers.get("Last-Modified")
    return _short(" ".join(part for part in parts if part not in (None, "*")))


def version_of(filesystem: Any, path: str) -> str:
    """The version of a file of fsspec's."""
    return _short(str(filesystem.ukey(path)))


def _of_http(url: str) -> str:
    # Of one byte, since a URL that is signed for reading answers to nothing else.
    with urllib.request.urlopen(request_of(url, Range="bytes=0-0"), timeout=TIMEOUT) as response:
        return version_in(response.headers)


def _of_other(url: str) -> str:
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(url)
    return version_of(filesystem, path)


def _short(text: str) -> str:
    return blake2b(text.encode(), digest_size=8).hexdigest() if text else SILENT
