"""Throttling, temperatures, governor and load from what systems report."""

from edgecomp.devices import health


def test_bits_that_were_set_before_the_run_say_nothing_of_it() -> None:
    assert health.pi_flags("throttled=0x50000", "throttled=0x50000") == []


def test_a_sticky_bit_that_appears_counts() -> None:
    # bits 16 and 18: under-voltage and throttling have occurred
    assert health.pi_flags("throttled=0x0", "throttled=0x50000") == ["under-voltage", "throttled"]
    assert health.pi_flags("throttled=0x10000", "throttled=0x50000") == ["throttled"]


def test_a_bit_that_holds_now_counts_whatever_was_before() -> None:
    assert health.pi_flags("throttled=0x50005", "throttled=0x50005") == ["under-voltage", "throttled"]
    assert health.pi_flags("throttled=0x80008", "throttled=0x80000") == ["soft temperature limit"]


def test_a_machine_without_readings_is_unknown_not_well() -> None:
    assert health.throttling({}, {}) is None
    assert health.throttling({}, {"vcgencmd": None, "cooling": []}) is None


def test_throttling_is_told_by_any_of_four_sources() -> None:
    cool = {"throttle_counts": {"cpu0": 3}, "cap_khz": {"cpu0": 1800}, "cooling": [["cpufreq-cpu0", 0]]}
    assert health.throttling(cool, cool) == []
    assert health.throttling(cool, cool | {"throttle_counts": {"cpu0": 4}})
    assert health.throttling(cool, cool | {"cap_khz": {"cpu0": 1500}}) == ["cpu0 is capped"]
    assert health.throttling(cool, cool | {"cooling": [["cpufreq-cpu0", 2], ["fan", 3]]}) == [
        "cooling devices are active: cpufreq-cpu0 at 2"
    ]


def test_the_processor_s_zone_is_chosen() -> None:
    assert health.temperature({"temperatures": [["acpitz", 27.8], ["x86_pkg_temp", 55.0]]}) == 55.0
    assert health.temperature({"temperatures": [["wifi", 40.0], ["battery", 30.0]]}) == 40.0
    assert health.temperature({"temperatures": [["cpu-thermal", -256.0]]}) is None


def test_warnings_name_their_kind() -> None:
    after = {
        "governors": {"cpu0": "ondemand"},
        "cap_khz": {"cpu0": 600000},
        "max_khz": {"cpu0": 1800000},
        "swap_in": 12,
    }
    before = {"swap_in": 4, "cap_khz": {"cpu0": 600000}}
    kinds = [w.split(":")[0] for w in health.warnings(before, after, other_cores=0.5, swapped=0)]
    assert kinds == ["governor", "capped", "other load", "swap"]
    assert health.warnings({}, {"governors": {"cpu0": "performance"}}, other_cores=0.0, swapped=0) == []
