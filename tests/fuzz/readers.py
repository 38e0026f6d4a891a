"""A fuzzer of the readers, guided by coverage where atheris is installed, and else by chance.

    python -m tests.fuzz.readers [SECONDS] [ENDING ...]

Files of every ending, or of those that are named, are changed and read. What makes a reader raise is written to `fuzz-findings/` with its traceback.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

try:
    import atheris
except ImportError:
    from tests.fuzz.seeds import seeds, try_to_read
else:
    with atheris.instrument_imports(include=["headstart", "tests.fuzz.seeds"]):
        from tests.fuzz.seeds import seeds, try_to_read

FINDINGS = Path("fuzz-findings")
TOKENS = [
    b"\0",
    b"\n",
    b"\r",
    b'"',
    b"\\u",
    b"{",
    b"[",
    b"]}",
    b",",
    b";",
    b"\t",
    b"\xff",
    b"\xef\xbb\xbf",
    b"NaN",
    b"1e999",
    b"-",
]


def change(content: bytes, chance: random.Random) -> bytes:
    """Return a file with some stretches cut, doubled, flipped or replaced."""
    changed = bytearray(content)
    for _ in range(chance.randint(1, 6)):
        place = chance.randrange(len(changed) + 1)
        size = chance.choice((0, 1, 2, 4, 8, 64))
        stretch = bytes(changed[place : place + size])
        new = (b"", stretch * 2, chance.choice(TOKENS), chance.randbytes(size), bytes(255 - b for b in stretch))
        changed[place : place + size] = chance.choice(new)
    return bytes(changed)


class Target:
    """What is tried, how often, and what was found."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.tried = 0
        self.found: dict[str, str] = {}
        self.slowest = (0.0, "")

    def run(self, ending: str, content: bytes) -> None:
        """Read one file."""
        path = self._folder / f"a{ending}"
        path.write_bytes(content)
        self.tried += 1
        begun = time.monotonic()
        try:
            try_to_read(path)
        except Exception:
            told = traceback.format_exc()
            name = hashlib.sha256(told.split("\n", 1)[1].encode()).hexdigest()[:12] + ending
            if name not in self.found:
                self.found[name] = told
                FINDINGS.mkdir(exist_ok=True)
                (FINDINGS / name).write_bytes(content)
                (FINDINGS / f"{name}.txt").write_text(told, encoding="utf-8", errors="backslashreplace")
        self.slowest = max(self.slowest, (time.monotonic() - begun, ending))


Files = Mapping[str, Sequence[bytes]]


def by_chance(target: Target, begin: Files, until: float) -> None:
    """Try changed files until time is up."""
    chance = random.Random(0)
    files = [(ending, content) for ending, contents in begin.items() for content in contents]
    while time.process_time() < until:
        ending, content = chance.choice(files)
        target.run(ending, change(content, chance))


def by_coverage(target: Target, begin: Files, until: float, out_of_time: Callable[[], None]) -> None:
    """Let atheris choose; the first byte of what it gives says which ending the rest is read under."""
    with tempfile.TemporaryDirectory() as corpus:
        endings = list(begin)
        for number, contents in enumerate(begin.values()):
            for content in contents:
                name = f"{zlib.crc32(content):08x}"
                (Path(corpus) / name).write_bytes(bytes([number]) + content)

        def one(data: bytes) -> None:
            if time.process_time() > until:
                out_of_time()
            if data:
                target.run(endings[data[0] % len(endings)], data[1:])

        atheris.Setup([sys.argv[0], corpus, "-max_len=6000", "-verbosity=0", "-timeout=20"], one)
        atheris.Fuzz()


def main() -> None:
    """Fuzz for some seconds of processor time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", nargs="?", type=float, default=60.0)
    parser.add_argument("endings", nargs="*", help="such as .jsonl; all where none is named")
    given = parser.parse_args()
    begin = {ending: contents for ending, contents in seeds().items() if ending in (given.endings or seeds())}
    until = time.process_time() + given.seconds
    with tempfile.TemporaryDirectory() as folder:
        target = Target(Path(folder))

        def tell() -> None:
            for name, told in target.found.items():
                sys.stdout.write(f"{FINDINGS / name}\n{told}\n")
            slow, ending = target.slowest
            sys.stdout.write(
                f"{target.tried:,} files, {len(target.found)} findings, the slowest {slow:.1f} s ({ending})\n"
            )
            sys.stdout.flush()

        def leave() -> None:
            tell()
            os._exit(bool(target.found))  # libFuzzer would go on behind any other end

        if "atheris" in sys.modules:
            by_coverage(target, begin, until, leave)
        by_chance(target, begin, until)
        leave()


if __name__ == "__main__":
    main()
