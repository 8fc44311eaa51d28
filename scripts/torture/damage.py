"""Every file of a run, damaged in every way: it is named, a way on is offered, and that way ends at the same bits."""

from __future__ import annotations

import random
import re
import shutil
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path

from retrain.training.folder import CONFIG, LOCK, METADATA
from scripts.torture.bench import Bench
from scripts.torture.command import Outcome, Wrong


def truncated(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(1, len(content))]


def emptied(content: bytes, chance: random.Random) -> bytes:
    return b""


def flipped(content: bytes, chance: random.Random) -> bytes:
    """One bit of it; not in the line that says where the run lies, which would make it a fork into that place."""
    place = content.find(b"\nlog_dir")
    line = range(place, content.find(b"\n", place + 1) + 1) if place >= 0 else range(0)
    bit = chance.choice([bit for bit in range(8 * len(content)) if bit // 8 not in line])
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def missing(content: bytes, chance: random.Random) -> None:
    return None


SAID = re.compile(r"damaged|missing|not as it was|altered|of another version|a good copy")
MANNERS: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "truncated": truncated,
    "zero length": emptied,
    "bit flipped": flipped,
    "missing": missing,
}


def files_of(run: Path) -> list[Path]:
    """Every file of a run, relative to it; the lock's content is nothing that a run relies on."""
    return sorted(path.relative_to(run) for path in run.rglob("*") if path.is_file() and path.name != LOCK)


def every_file(bench: Bench, cases: Iterable[tuple[Path, str]]) -> None:
    """cases: (file, manner) to damage in the finished run, which is then gone on with."""
    for name, manner in cases:
        with bench.trial(f"file {manner}", str(name), begun=True):
            path = bench.log_dir / name
            whole = path.read_bytes()
            content = MANNERS[manner](whole, bench.random)
            path.unlink() if content is None else path.write_bytes(content)
            if name == Path(CONFIG) and content is not None and _says_the_same(content, whole):
                continue
            _recover(bench, name)


def _recover(bench: Bench, name: Path) -> None:
    log_dir, again = bench.log_dir, bench.log_dir.with_name(bench.log_dir.name + "-again")
    shutil.rmtree(again, ignore_errors=True)
    # What only an older checkpoint holds is read when that one is asked for.
    where = log_dir / name.parent if name.parts[0] == "checkpoints" else log_dir
    words = (log_dir / CONFIG, "--resume", where)
    done = bench.run(*words)
    # An allowed key of the config may have been altered, which is what a user may do, and is said and recorded.
    altered = name == Path(CONFIG) and "changed: " in done.out
    if not altered and not any(name.name in line and SAID.search(line) for line in (done.out + done.err).splitlines()):
        raise Wrong(f"nothing is said of {name}:\n{done.out}\n{done.err}")
    if done.status == 2 and name == Path(METADATA):
        done = _move_away(bench, done.err, words)
    elif done.status == 2:
        done = bench.run(*done.advice)
    done.expect(0)
    (log_dir / f"{METADATA}.damaged").unlink(missing_ok=True)
    if not altered:
        # A damaged checkpoint that is not the newest stays as it is.
        but = [name.parent] if not again.exists() and name.parent in bench.older_checkpoints() else ()
        bench.same_as_whole(again if again.exists() else log_dir, but=but)


def _move_away(bench: Bench, said: str, words: tuple[object, ...]) -> Outcome:
    _, command, rest = said.rpartition(": mv ")
    if not command:
        raise Wrong(f"no remedy:\n{said}")
    source, target = rest.split()
    Path(source).rename(target)
    return bench.run(*words)


def _says_the_same(content: bytes, whole: bytes) -> bool:
    try:
        return tomllib.loads(content.decode()) == tomllib.loads(whole.decode())
    except ValueError:
        return False
