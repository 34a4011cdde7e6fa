"""The texts: drawn from common words by a seed, or read from a file. The same seed gives the same texts."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmark import BenchError

MIXED_MEDIAN, MIXED_SIGMA = 22, 1.0  # words; the sigma puts one text in ten above 80
COMMON = """
the of and to in a is that for it was on are as with his they at be this from have or by one had not but what all were
when we there can an your which their said if do will each about how up out them then she many some so these would other
into has more her two like him see time could no make than first been its who now people my made over did down only way
find use may water long little very after words called just where most know get through back much before go good new
write our used me man too any day same right look think also around another came come work three word must because does
part even place well such here take why things help put years different away again off went old number great tell men
say small every found still between name should home big give air line set own under read last never us left end along
while might next sound below saw something thought both few those always looked show large often together asked house
world going want school important until form food keep children feet land side without boy once animals life enough took
four head above kind began almost live page got earth need far hand high year mother light parts country father let
night following picture being study second eyes soon times story boys since white days ever paper hard near sentence
better best across during today others however sure means knew try told young miles sun ways thing whole hear example
heard several change answer room sea against top turned learn point city play toward five using himself usually money
seen car morning given order reason response system service account customer payment invoice delivery warranty shipping
machine network database language protein climate engine contract medicine insurance temperature configuration
electricity government university agriculture photograph translation performance approximately infrastructure
"""
WORDS = COMMON.split()


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    name: str
    texts: Iterator[str]  # without end

    def take(self, count: int) -> list[str]:
        return list(itertools.islice(self.texts, count))


def short_queries(seed: int) -> Workload:
    return _generated("short", seed, lambda rng: rng.randint(5, 15))


def passages(seed: int) -> Workload:
    return _generated("passages", seed, lambda rng: rng.randint(100, 150))


def mixed(seed: int) -> Workload:
    """Most texts short, a few very long: what makes padding expensive."""

    def words(rng: random.Random) -> int:
        return min(200, max(3, round(rng.lognormvariate(math.log(MIXED_MEDIAN), MIXED_SIGMA))))

    return _generated("mixed", seed, words)


def from_file(path: Path) -> Workload:
    """One JSON string per line, over and over."""
    try:
        texts = [json.loads(line) for line in path.read_bytes().splitlines()]
    except (OSError, ValueError) as error:
        raise BenchError(f"{path}: {error}") from error
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise BenchError(f"{path} must hold one JSON string per line, none of them empty")
    return Workload(name=path.stem, texts=itertools.cycle(texts))


def _generated(name: str, seed: int, words: Callable[[random.Random], int]) -> Workload:
    rng = random.Random(f"{name} {seed}")

    def texts() -> Iterator[str]:
        while True:
            yield _text(rng, words(rng))

    return Workload(name=name, texts=texts())


def _text(rng: random.Random, count: int) -> str:
    """Words with the punctuation of prose, so that tokens per word are about right."""
    words = rng.choices(WORDS, k=count)
    for index in range(0, count, 12):
        words[index] = words[index].capitalize()
        last = min(index + 11, count - 1)
        words[last] += "." if count > 15 else "?"
        if last - index > 6:
            words[index + 5] += ","
    return " ".join(words)
