"""What the processor uses of energy, where the system tells it (RAPL, through Linux's powercap)."""

from __future__ import annotations

from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Counts joules of all processor packages, and so of all that runs on them; tells None where the system doesn't."""

    def __init__(self, root: Path = POWERCAP) -> None:
        # Zones with two colons are parts of a package, and others than packages count what these count already.
        zones = [zone for zone in root.glob("intel-rapl:*") if zone.name.count(":") == 1]
        self._zones = [zone for zone in zones if (_read(zone / "name") or "").startswith("package")]
        self._last = [_number(zone / "energy_uj") for zone in self._zones]

    def take(self) -> float | None:
        """Return the joules since the last call, or since it was made; counters that began anew are followed."""
        now = [_number(zone / "energy_uj") for zone in self._zones]
        used = 0
        for zone, before, after in zip(self._zones, self._last, now, strict=True):
            if before is None or after is None:
                return None
            used += after - before + (_number(zone / "max_energy_range_uj") or 0) * (after < before)
        self._last = now
        return used / 1e6 if now else None


def _read(file: Path) -> str | None:
    try:
        return file.read_text().strip()
    except OSError:  # there are none, or only root may read them
        return None


def _number(file: Path) -> int | None:
    text = _read(file) or ""
    return int(text) if text.isdigit() else None
