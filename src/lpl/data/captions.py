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

    - Dropout: draw n has no caption if (seed, "dropout", id, n) says so; it gets no prefix either.
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
        settings: all that variants depends on except the sample: hashable, of strings, numbers, booleans and None.
            Options without effect are not in it, nor is the seed without shuffling.
    """

    def __init__(self, config: DataConfig, seed: int) -> None:
        self._config, self._seed = config, seed
        self._first, self._shuffle = config.caption_choice == "first", config.shuffle_caption
        self._prefix = (config.caption_prefix or "").strip()
        order = (seed, config.keep_tokens, config.caption_separator, config.caption_variants)
        self.settings: tuple[str | int | bool | None, ...] = (
            self._first,
            self._prefix,
            config.proportion_empty_prompts >= 1,
            config.shuffle_caption,
            *(order if config.shuffle_caption else ()),
        )

    def variants(self, sample: str, captions: Sequence[str]) -> list[str]:
        """Every text that a draw of a sample (id, at least one caption) may take, each once, in the same order.

        The empty text of a dropped caption is not among them; that of a caption which is empty itself is.
        """
        if self._config.proportion_empty_prompts >= 1:
            return []
        chosen = captions[:1] if self._first else captions
        texts = dict.fromkeys(
            text
            for number, caption in enumerate(chosen)
            for text in (self._shuffled(sample, number, caption) if self._shuffle else [self._prefixed(caption)])
        )
        return list(texts)

    def draw(self, sample: str, captions: Sequence[str], count: int) -> str:
        """The text of draw number `count` of a sample (id, at least one caption); "" if its caption is dropped."""
        dropout = self._config.proportion_empty_prompts
        if dropout > 0 and keyed_uniform(self._seed, "dropout", sample, count) < dropout:
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
        return [tag for part in caption.split(self._config.caption_separator) if (tag := part.strip())]

    def _number_of_orders(self, tags: Sequence[str]) -> int:
        movable = tags[self._config.keep_tokens :]
        possible = factorial(len(movable))
        for times in Counter(movable).values():
            possible //= factorial(times)
        return min(self._config.caption_variants, possible)

    def _orders_of(self, sample: str, number: int, tags: Sequence[str]) -> Iterator[str]:
        """The caption in order 0, 1, 2 ...; must not be asked for more orders than there are different ones."""
        joint = f"{self._config.caption_separator.strip()} "
        kept, movable = tags[: self._config.keep_tokens], tags[self._config.keep_tokens :]
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
