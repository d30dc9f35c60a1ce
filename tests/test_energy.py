"""Energy is claimed where it was metered, and a meter that fails ends no run."""

import pytest

from limbeck.energy import CodecarbonMeter


def test_a_meter_that_does_not_work_says_so_and_claims_nothing(monkeypatch):
    codecarbon = pytest.importorskip("codecarbon")

    def broken(**settings):
        raise OSError("no sensors")

    monkeypatch.setattr(codecarbon, "OfflineEmissionsTracker", broken)
    meter = CodecarbonMeter()
    for _ in range(2):
        meter.begin("stage")
        energy = meter.end("stage")
        assert energy.watt_hours is None
        assert "not metered" in energy.source and "no sensors" in energy.source
