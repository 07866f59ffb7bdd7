"""`edgecomp doctor`: what is here, what is missing, what the CPU lacks."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from edgecomp.cli import doctor, main, needs

_X86 = "processor\t: 0\nmodel name\t: A CPU\nflags\t\t: fpu avx2 {}\n"


def test_a_complete_machine_exits_with_zero() -> None:
    result = CliRunner().invoke(main, ["doctor", "--json", "-"])
    assert result.exit_code == 0
    groups = {row["group"] for row in json.loads(result.stdout)}
    assert {"python", "extras", "tools", "cpu", "room"} <= groups


def test_a_missing_extra_is_named_and_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = needs.version_of
    monkeypatch.setattr(needs, "version_of", lambda n: None if n == "paramiko" else installed(n))
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 0
    assert "pip install 'edgecomp[ssh]'" in result.stdout


def test_a_missing_torch_exits_with_three(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = needs.version_of
    monkeypatch.setattr(needs, "version_of", lambda n: None if n == "torch" else installed(n))
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 3
    assert "pip install torch" in result.stdout


@pytest.mark.parametrize("word", ["avx512_vnni", "avx_vnni"])
def test_vnni_is_found(word: str) -> None:
    assert doctor.integer_kernels("x86_64", doctor.cpu_flags(_X86.format(word))).ok is True


def test_x86_without_vnni_is_warned_of_saturation() -> None:
    check = doctor.integer_kernels("x86_64", doctor.cpu_flags(_X86.format("sse4_2")))
    assert check.ok is False
    assert "saturate" in check.note


def test_arm_dotprod_is_read_from_features() -> None:
    flags = doctor.cpu_flags("processor : 0\nFeatures\t: fp asimd asimddp\n")
    assert doctor.integer_kernels("aarch64", flags).value == "asimddp"
    assert doctor.integer_kernels("aarch64", {"fp", "asimd"}).ok is False


def test_memory_is_positive_and_available_is_no_more_than_all() -> None:
    total, available = doctor.memory()
    assert total and available and 0 < available <= total
