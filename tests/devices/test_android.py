"""Android's own reports, in the forms that dumpsys prints."""

from __future__ import annotations

from edgecomp.devices import android, health

THERMAL = """IsStatusOverride: false
ThermalEventListeners:
Thermal Status: 2
Cached temperatures:
	Temperature{mValue=99.0, mType=0, mName=CPU0, mStatus=3}
HAL Ready: true
HAL connection:
	ThermalHAL 2.0 connected: yes
Current temperatures from HAL:
	Temperature{mValue=41.2, mType=0, mName=CPU0, mStatus=0}
	Temperature{mValue=-1.5, mType=3, mName=skin therm, mStatus=0}
Current cooling devices from HAL:
	CoolingDevice{mValue=0, mType=2, mName=cpufreq-cpu0}
Temperature static thresholds from HAL:
	TemperatureThreshold{mType=0, mName=CPU0}
"""
BATTERY = """Current Battery Service state:
  AC powered: false
  level: 87
  temperature: 305
  technology: Li-ion
"""


def test_only_the_block_that_was_read_now_counts() -> None:
    assert android.current_temperatures(THERMAL) == [("cpu CPU0", 41.2), ("skin skin therm", -1.5)]
    assert (
        android.current_temperatures("Cached temperatures:\n Temperature{mValue=9, mType=0, mName=x,") == []
    )


def test_status_battery_and_memory() -> None:
    assert android.thermal_status(THERMAL) == 2 and android.thermal_status("") is None
    assert android.battery_celsius(BATTERY) == 30.5
    assert android.total_pss_bytes("           TOTAL PSS:    12345            TOTAL RSS:  2") == 12345 * 1024
    assert android.total_pss_bytes("          TOTAL     2048     100") == 2048 * 1024
    status = "Name:\tx\nVmHWM:\t    5000 kB\nVmSwap:\t       0 kB\n"
    assert android.peak_rss_bytes(status) == 5000 * 1024 and android.peak_rss_bytes("") is None
    assert android.swapped_bytes(status) == 0 and android.swapped_bytes("") is None


def test_the_state_has_the_agent_s_keys_and_health_reads_it() -> None:
    text = (
        f"== thermalservice\n{THERMAL}== battery\n{BATTERY}== load\n1.5 1.2 0.9 2/400 99\n"
        "== scaling_governor\ncpu0 schedutil\ncpu7 performance\n== scaling_cur_freq\ncpu0 1800000\n"
        "== scaling_max_freq\ncpu0 1500000\n== cpuinfo_max_freq\ncpu0 1800000\n"
    )
    found = android.state(text)
    assert found["load"] == [1.5, 1.2, 0.9] and found["cap_khz"] == {"cpu0": 1500000}
    assert health.governor(found) == "performance+schedutil"
    assert health.temperature(found) == 41.2
    assert health.throttling(found, found) == ["Android's thermal status is 2"]
    kinds = [w.split(":")[0] for w in health.warnings(found, found, other_cores=None, swapped=None)]
    assert kinds == ["throttled", "governor", "capped"]


def test_a_phone_that_tells_nothing() -> None:
    found = android.state("")
    assert found["thermal_status"] is None and found["temperatures"] == [] and found["governors"] == {}
