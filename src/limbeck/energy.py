"""Watt-hours of each stage, and what kind of number that is.

codecarbon's offline tracker reads the CPU's own counters where it can (measured) and otherwise
models power from load (an estimate, and called so). Without codecarbon nothing is claimed.
"""

from __future__ import annotations

import logging
from typing import Any

from limbeck.run import Energy

# codecarbon's modes for a CPU: the first reads counters, the others model power from load or TDP
_MEASURED = {"intel_rapl", "intel_power_gadget", "apple_powermetrics"}


class CodecarbonMeter:
    """Starts codecarbon with the first stage that really runs: an unchanged run pays nothing."""

    def __init__(self) -> None:
        self._tracker: Any = None
        self._source = "not metered: codecarbon is not installed (pip install 'limbeck[meter]')"
        self._absent = False

    def begin(self, name: str) -> None:
        if self._tracker is None and not self._absent:
            self._start()
        if self._tracker is not None:
            self._tracker.start_task(name)

    def end(self, name: str) -> Energy:
        if self._tracker is None:
            return Energy(None, self._source)
        data = self._tracker.stop_task(name)
        return Energy(data.energy_consumed * 1000, self._source)  # kWh -> Wh

    def _start(self) -> None:
        try:
            from codecarbon import OfflineEmissionsTracker
        except ImportError:
            self._absent = True
            return
        try:
            self._track(OfflineEmissionsTracker)
        except Exception as error:  # of whatever reads this machine's sensors: no run ends by it
            self._tracker, self._absent = None, True
            self._source = f"not metered: codecarbon does not work here ({error!r})"

    def _track(self, tracker: Any) -> None:
        logging.getLogger("codecarbon").setLevel(logging.ERROR)
        # The country sets the carbon intensity only, which is not used: energy is what we report.
        self._tracker = tracker(
            country_iso_code="USA", save_to_file=False, log_level="error", allow_multiple_runs=True
        )
        self._tracker.start_task("warm-up")
        self._tracker.stop_task("warm-up")
        modes = [getattr(part, "_mode", None) for part in self._tracker._hardware]
        measured = any(mode in _MEASURED for mode in modes)
        how = "measured" if measured else "estimated"
        means = ", ".join(sorted(str(mode) for mode in modes if mode)) or "constant power"
        self._source = f"{how}: codecarbon ({means})"


class NoMeter:
    """Claims nothing."""

    def begin(self, name: str) -> None:
        pass

    def end(self, name: str) -> Energy:  # noqa: ARG002 the meter's interface
        return Energy(None, "not metered")
