"""Kill runs at random moments, again and again, until they are done: `python -m tests.soak [RUNS] [SEED]`.

Each run is carried on in processes of its own that are killed (SIGKILL) after a random time, up to `KILLS` times; then it is
compared with one that was never touched, bit for bit. What the test suite does at named places, this does anywhere.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path

from headstart.files import TEMPORARY_PREFIX
from headstart.verify import differences
from tests.e2e.test_survival import SESSIONS, WAYS, Trial, build_trial, session

KILLS = 4


def main(runs: int, seed: int) -> int:
    """Kill and compare; return how many runs differ."""
    draw, kills, bad = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory() as name:
        trials = [_trial(Path(name), way) for way in WAYS]
        lasts = [_seconds(trial) for trial in trials]
        for number in range(runs):
            trial, last = trials[number % len(trials)], lasts[number % len(trials)]
            run = trial.folder / f"soak-{number}"
            killed = sum(_kill(trial, run, draw.uniform(0.2, last)) for _ in range(KILLS))
            assert trial.session("", run) == 0
            found = differences(trial.whole, run) + [str(path) for path in run.glob(f"{TEMPORARY_PREFIX}*")]
            kills, bad = kills + killed, bad + bool(found)
            print(f"{number + 1:>4} killed {killed} times: {'; '.join(found) or 'the same'}", flush=True)
    print(f"{runs} runs, {kills} kills, {bad} runs that differ")
    return bad


def _trial(folder: Path, way: str) -> Trial:
    place = folder / f"{len(list(folder.iterdir()))}"
    place.mkdir()
    return build_trial(place, way)


def _seconds(trial: Trial) -> float:
    """Return how long a run lasts here."""
    begun = time.perf_counter()
    assert trial.session("", trial.folder / "timed") == 0
    return time.perf_counter() - begun


def _kill(trial: Trial, run: Path, after_s: float) -> bool:
    """Carry a run on for some seconds; tell whether it was killed, and not done before."""
    process = SESSIONS.Process(target=session, args=(trial.data, trial.model, run, trial.settings, ""))
    process.start()
    process.join(after_s)
    process.kill()
    process.join()
    return process.exitcode != 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if sys.argv[1:] else 25, int(sys.argv[2]) if sys.argv[2:] else 0) > 0)
