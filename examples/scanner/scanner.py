"""Finds words that look like secrets, with a model that is learned before the first call and never again."""

import math
import re
import sysconfig
from collections import Counter
from pathlib import Path

from substrate_guest import App, Request

FILES_MAX, LETTERS_MIN, SURPRISE_MIN = 25, 16, 6.3
"""How much is learned from; how long a word is that may be a secret; how many bits a letter of one is worth."""
WORD = re.compile(rf"[A-Za-z0-9+/_-]{{{LETTERS_MIN},}}")

pairs: Counter[str] = Counter()
triples: Counter[str] = Counter()


def learn() -> None:
    """Count which letters follow which in the sources of the standard library."""
    for source in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:FILES_MAX]:
        text = source.read_text("utf-8", "replace")
        pairs.update(text[i : i + 2] for i in range(len(text) - 1))
        triples.update(text[i : i + 3] for i in range(len(text) - 2))


def surprise(word: str) -> float:
    """How unlikely a word is in a program, in bits a letter."""
    bits = [math.log2((pairs[word[i : i + 2]] + 96) / (triples[word[i : i + 3]] + 1)) for i in range(len(word) - 2)]
    return sum(bits) / len(bits)


def scan(request: Request) -> dict[str, list[dict[str, object]]]:
    """Every word of the body that looks like a secret, with its line."""
    lines = enumerate(request.body.decode("utf-8", "replace").splitlines(), 1)
    words = [(number, word) for number, line in lines for word in WORD.findall(line)]
    found = [(number, word, surprise(word)) for number, word in words]
    return {
        "found": [
            {"line": number, "begins": word[:4], "bits": round(bits, 1)}
            for number, word, bits in found
            if bits >= SURPRISE_MIN
        ]
    }


app = App(scan, prime=learn)
