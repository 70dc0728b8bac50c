"""Which text a draw of a sample sees: choice among captions, order of tags, trigger words, dropout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from math import factorial
from random import Random

from lpl.config import DataConfig
from lpl.diffusion.draws import keyed_seed, keyed_uniform


class CaptionRules:
    """Makes a sample's captions into the texts of its draws; each is a function of (seed, sample id, draw number).

    - Dropout: draw n has no caption if (seed, "dropout", id, n) says so; nothing is put before it.
    - Choice: of several captions draw n takes the one that (seed, "caption", id, n) says, or always the first.
    - Shuffling: a caption is split at the separator, tags are stripped and empty ones left out. The first keep_tokens
      stay, the others are put into order n modulo the number of orders. Orders are drawn for (seed, "tags", id,
      caption number, order number) and all differ: there are caption_variants of them, or as many as the tags allow.
      So each epoch sees another order until all have been seen. Tags are joined by the separator and a space.
    - Prefix: put before the caption with a space. With shuffling it is a tag (or several) of its own, always first and
      not among those that keep_tokens counts. A blank caption becomes the prefix alone.

    Without shuffling and prefix a caption is taken as it is, spaces included.

    Args:
        config: the options named above.
        seed: seed of the run.

    Attributes:
        settings: all that variants depends on but the sample: hashable, of strings, numbers, booleans and None. Options
            that do not act do not enter, nor does the seed without shuffling.
    """

    def __init__(self, config: DataConfig, seed: int) -> None:
        self._seed = seed
        self._dropout = config.proportion_empty_prompts
        self._first = config.caption_choice == "first"
        self._shuffle = config.shuffle_caption
        self._keep = config.keep_tokens
        self._separator = config.caption_separator
        self._orders = config.caption_variants
        self._prefix = (config.caption_prefix or "").strip()
        shuffling = (seed, self._keep, self._separator, self._orders) if self._shuffle else ()
        self.settings: tuple[str | int | bool | None, ...] = (
            self._first,
            self._prefix,
            self._dropout >= 1,
            self._shuffle,
            *shuffling,
        )

    def variants(self, sample: str, captions: Sequence[str]) -> list[str]:
        """Every text that a draw of a sample may take, each once, always in the same order.

        The empty text of a dropped caption is not among them; that of a caption which is empty itself is.

        Args:
            sample: id of the sample.
            captions: its captions, at least one.
        """
        if self._dropout >= 1:
            return []
        chosen = captions[:1] if self._first else captions
        texts = dict.fromkeys(
            text
            for number, caption in enumerate(chosen)
            for text in (self._shuffled(sample, number, caption) if self._shuffle else [self._prefixed(caption)])
        )
        return list(texts)

    def draw(self, sample: str, captions: Sequence[str], count: int) -> str:
        """The text of a draw; "" if its caption is dropped.

        Args:
            sample: id of the sample.
            captions: its captions, at least one.
            count: how often the sample has been drawn before.
        """
        if self._dropout > 0 and keyed_uniform(self._seed, "dropout", sample, count) < self._dropout:
            return ""
        number = 0
        if len(captions) > 1 and not self._first:
            number = int(keyed_uniform(self._seed, "caption", sample, count) * len(captions))
        if not self._shuffle:
            return self._prefixed(captions[number])
        tags = self._tags(captions[number])
        order = count % self._number_of_orders(tags)
        return next(islice(self._orders_of(sample, number, tags), order, None))

    def _prefixed(self, caption: str) -> str:
        if not self._prefix:
            return caption
        return f"{self._prefix} {caption}" if caption.strip() else self._prefix

    def _shuffled(self, sample: str, number: int, caption: str) -> Iterator[str]:
        tags = self._tags(caption)
        return islice(self._orders_of(sample, number, tags), self._number_of_orders(tags))

    def _tags(self, caption: str) -> list[str]:
        return [tag for part in caption.split(self._separator) if (tag := part.strip())]

    def _number_of_orders(self, tags: Sequence[str]) -> int:
        movable = tags[self._keep :]
        possible = factorial(len(movable))
        for times in Counter(movable).values():
            possible //= factorial(times)
        return min(self._orders, possible)

    def _orders_of(self, sample: str, number: int, tags: Sequence[str]) -> Iterator[str]:
        """The caption in order 0, 1, 2 ...: as many as differ, after which it must not be asked for more."""
        joint = f"{self._separator.strip()} "
        kept, movable = tags[: self._keep], tags[self._keep :]
        if self._prefix:
            kept = [self._prefix, *kept]
        seen: set[tuple[str, ...]] = set()
        while True:
            key: tuple[int | str, ...] = (self._seed, "tags", sample, number, len(seen))
            while (order := _permuted(movable, *key)) in seen:
                key = (*key, "again")
            seen.add(order)
            yield joint.join([*kept, *order])


def _permuted(tags: Sequence[str], *key: int | str) -> tuple[str, ...]:
    """Tags in an order drawn for a key."""
    random = Random(keyed_seed(*key)).random  # its sequence is the same in every version of Python, shuffle's is not
    return tuple(tag for _, tag in sorted(zip([random() for _ in tags], tags, strict=True)))
