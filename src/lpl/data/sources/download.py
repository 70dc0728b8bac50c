"""Fetches a file: http and https by urllib, all else by fsspec."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from lpl.data.sources.versions import is_http, request_of, version_in, version_of
from lpl.errors import UserError

ATTEMPTS = 3
PAUSE = 1.0
"""Seconds before the second attempt; each further pause is twice as long."""
_TIMEOUT = 60.0
_CHUNK = 1 << 20
_BUSY = (408, 425, 429)


def download(url: str, file: BinaryIO, shard: str) -> str:
    """Writes what is at a URL to a file, and checks its length against what the server said.

    Args:
        url: any URL that urllib or fsspec opens.
        file: an empty file, opened for reading and writing; at its start afterwards.
        shard: what to call the URL in a message.

    Returns:
        The version of what was written, see Versions.

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
    if is_http(url):
        with urllib.request.urlopen(request_of(url), timeout=_TIMEOUT) as response:
            yield response, response.length, version_in(response.headers)
        return
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{shard}: cannot be opened ({error}): install what it needs, or correct the URL") from None
    version = version_of(filesystem, path)
    with filesystem.open(path, "rb") as stream:
        yield stream, filesystem.size(path), version
