"""What a source holds and a run does not use, in one line: nothing is left out without a word."""

from __future__ import annotations

import os
from collections.abc import Sequence

from lpl.data.sources.listing import Listing


def tell_left_out(listing: Listing, shadowed: Sequence[str] = ()) -> str:
    """What of a folder is left out; "" if nothing is.

    Args:
        listing: the folder; what metadata names is among its images.
        shadowed: images with a caption in metadata.jsonl and a caption file beside.
    """
    unread = sorted(name for name in listing.unread if name not in listing.images)
    endings = ", ".join(sorted({os.path.splitext(name)[1].lower() or "none" for name in unread})[:5])
    groups = (
        (
            unread,
            ("file is", "files are"),
            f"left out, as {endings} is not read: convert pictures to PNG or JPEG",
        ),
        (
            listing.orphans,
            ("caption file is", "caption files are"),
            "not read, as no image beside has that name",
        ),
        (
            [*listing.doubled, *shadowed],
            ("caption file is", "caption files are"),
            "not read, as the image has another caption",
        ),
        (listing.tables, ("table is", "tables are"), "not read: write it as metadata.jsonl"),
    )
    return "; ".join(_counted(names, nouns, why) for names, nouns, why in groups if names)


def _counted(names: Sequence[str], nouns: tuple[str, str], why: str) -> str:
    return f"{len(names):,} {nouns[len(names) > 1]} {why} ({'first ' if len(names) > 1 else ''}{names[0]})"
