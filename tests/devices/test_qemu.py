"""What the counting plugin prints."""

import pytest

from edgecomp.devices import qemu
from edgecomp.devices.faults import OutputFormError


def test_the_cost_of_marking_is_taken_off_the_median() -> None:
    counts = (100, 110, 200, 1210, 2000, 3030, 4000, 5020)
    text = "".join(f"mark {tag} {count}\n" for tag, count in enumerate(counts, 1))
    # runs of 1010, 1030 and 1020; 10 for marking
    assert qemu.counted(text + "total 9999\n") == 1010


@pytest.mark.parametrize("text", ["", "total 5\n", "mark 1 5\nmark 2 6\n", "mark x\n"])
def test_nothing_counted_is_an_error_that_keeps_the_text(text: str) -> None:
    with pytest.raises(OutputFormError) as caught:
        qemu.counted(text)
    assert caught.value.text == text
