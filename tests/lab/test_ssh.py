"""SSH to a real OpenSSH server in front of an arm64 machine: what works, and every fault by its name."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import lab_machine as machine
import paramiko
import pytest

from edgecomp.devices import faults, ssh_connect
from edgecomp.devices.ssh import SshDevice
from edgecomp.devices.ssh_connect import Login
from edgecomp.errors import DeviceError, InputError

Make = Callable[..., SshDevice]


def quiet(board: machine.Board, seconds: float = 60) -> bool:
    """True when nothing of ours is left on the device."""
    end = time.monotonic() + seconds
    while board.processes() and time.monotonic() < end:
        time.sleep(0.2)
    return board.processes() == []


def random_file(path: Path, size: int) -> Path:
    path.write_bytes(hashlib.shake_128(path.name.encode()).digest(size))
    return path


def test_a_command_gives_code_streams_and_lines(ssh: Make) -> None:
    lines: list[str] = []
    result = ssh().run(["sh", "-c", "uname -m; echo 'a b'; echo c >&2; exit 7"], 20, lines.append)
    assert (result.exit_code, result.stdout, result.stderr) == (7, "aarch64\na b\n", "c\n")
    assert lines == ["aarch64", "a b"]


def test_a_signal_is_a_negative_code(ssh: Make) -> None:
    assert ssh().run(["sh", "-c", "kill -SEGV $$"], 20).exit_code == -11


def test_the_machine_is_known_as_emulated_arm(ssh: Make) -> None:
    found = ssh().probe()
    assert (found["isa"], found["soc"], found["emulated"]) == ("aarch64", "Cortex-A72", True)
    assert found["runtimes"].keys() >= {"numpy", "onnxruntime", "ai-edge-litert"}


# -- who we talk to


def test_an_unknown_host_key_is_refused_with_the_command_that_accepts_it(
    ssh: Make, board: machine.Board, tmp_path: Path
) -> None:
    with pytest.raises(faults.HostKeyError, match="--accept-host-key SHA256:") as caught:
        ssh(known_hosts=str(tmp_path / "none")).run(["true"], 10)
    shown = paramiko.Ed25519Key.from_private_key_file(str(board.folder / "host_key"))
    assert ssh_connect.fingerprint(shown) in str(caught.value)


def test_the_named_fingerprint_is_accepted_and_remembered(
    ssh: Make, board: machine.Board, tmp_path: Path
) -> None:
    key = paramiko.Ed25519Key.from_private_key_file(str(board.folder / "host_key"))
    known = str(tmp_path / "known")
    assert ssh(known_hosts=known, accept=ssh_connect.fingerprint(key)).run(["true"], 20).exit_code == 0
    assert ssh(known_hosts=known).run(["true"], 20).exit_code == 0


def test_another_fingerprint_than_the_named_one_is_refused(ssh: Make, tmp_path: Path) -> None:
    with pytest.raises(faults.HostKeyError, match="you asked for SHA256:other"):
        ssh(known_hosts=str(tmp_path / "none"), accept="SHA256:other").run(["true"], 10)
    assert not (tmp_path / "none").exists()


def test_a_changed_host_key_is_always_refused(ssh: Make, board: machine.Board, tmp_path: Path) -> None:
    machine.make_key(tmp_path / "other")
    words = (tmp_path / "other.pub").read_text().split()
    (tmp_path / "known").write_text(f"[127.0.0.1]:{board.port} {words[0]} {words[1]}\n")
    key = paramiko.Ed25519Key.from_private_key_file(str(board.folder / "host_key"))
    device = ssh(known_hosts=str(tmp_path / "known"), accept=ssh_connect.fingerprint(key))
    with pytest.raises(faults.HostKeyError, match="was changed"):
        device.run(["true"], 10)


# -- who we are


def test_a_wrong_key_is_refused(ssh: Make, tmp_path: Path) -> None:
    machine.make_key(tmp_path / "wrong")
    with pytest.raises(faults.AuthenticationError, match="refused the login as 'root'"):
        ssh(key=str(tmp_path / "wrong")).run(["true"], 10)


def test_a_key_file_that_is_not_there(ssh: Make, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no SSH key at"):
        ssh(key=str(tmp_path / "none")).run(["true"], 10)


def test_an_encrypted_key_needs_its_passphrase(
    ssh: Make, board: machine.Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.make_key(tmp_path / "locked", passphrase="open sesame")
    with (board.folder / "authorized_keys").open("a") as keys:
        keys.write((tmp_path / "locked.pub").read_text())
    with pytest.raises(faults.AuthenticationError, match=ssh_connect.PASSPHRASE):
        ssh(key=str(tmp_path / "locked")).run(["true"], 10)
    monkeypatch.setenv(ssh_connect.PASSPHRASE, "open sesame")
    assert ssh(key=str(tmp_path / "locked")).run(["true"], 20).exit_code == 0


def test_the_user_s_ssh_config_is_read(ssh: Make, board: machine.Board, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(
        f"Host pi\n  HostName 127.0.0.1\n  Port {board.port}\n  User root\n  IdentityFile {board.key}\n"
    )
    login = Login("pi", config=str(config), known_hosts=str(board.known_hosts))
    device = SshDevice("pi", login)
    assert device.run(["uname", "-m"], 20).stdout == "aarch64\n"
    device.close()


def test_a_jump_host_is_gone_through(ssh: Make, board: machine.Board, link: machine.Link) -> None:
    before = link.carried
    device = ssh(jump=f"root@127.0.0.1:{link.port}")
    assert device.run(["true"], 20).exit_code == 0
    assert link.carried > before


# -- files


def test_a_file_arrives_whole_and_only_once(ssh: Make, tmp_path: Path, link: machine.Link) -> None:
    source = random_file(tmp_path / "model.bin", 1 << 20)
    device = ssh(link.port)
    device.push(source, "w/model.bin")
    carried = link.carried
    device.push(source, "w/model.bin")
    assert link.carried - carried < 1 << 19
    device.pull("w/model.bin", tmp_path / "back.bin")
    assert (tmp_path / "back.bin").read_bytes() == source.read_bytes()
    assert device.run(["ls", "w"], 20).stdout == "model.bin\n"


def test_a_folder_arrives_with_its_structure(ssh: Make, tmp_path: Path) -> None:
    (tmp_path / "p.mlpackage" / "Data").mkdir(parents=True)
    random_file(tmp_path / "p.mlpackage" / "Data" / "w.bin", 5000)
    path = ssh().stage(tmp_path / "p.mlpackage")
    assert ssh().run(["wc", "-c", f"{path}/Data/w.bin"], 20).stdout.startswith("5000")


def test_an_upload_goes_on_where_it_was_cut(ssh: Make, tmp_path: Path, link: machine.Link) -> None:
    size = 6 << 20
    source = random_file(tmp_path / "big.bin", size)
    device = ssh(link.port)
    device.run(["true"], 20)
    link.carried, link.cut_after = 0, size // 2
    device.push(source, "resumed/big.bin")
    assert link.cuts == 1
    assert link.carried < size * 1.5, "the first half was not sent again"
    device.pull("resumed/big.bin", tmp_path / "back.bin")
    assert (tmp_path / "back.bin").read_bytes() == source.read_bytes()


def test_a_partial_file_of_another_content_is_not_continued(ssh: Make, tmp_path: Path) -> None:
    device = ssh()
    first, second = random_file(tmp_path / "a", 4000), random_file(tmp_path / "b", 4000)
    device.push(first, "same/name")
    device.push(second, "same/name")
    device.pull("same/name", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == second.read_bytes()


def test_a_full_device_is_named_before_anything_is_sent(ssh: Make, tmp_path: Path) -> None:
    source = random_file(tmp_path / "big.bin", 6 << 20)
    with pytest.raises(faults.NoSpaceError, match=r"free in /full.*needs 6291456"):
        ssh(workdir="/full").push(source, "/full/big.bin")
    assert ssh().run(["ls", "/full"], 20).stdout == ""


def test_a_device_that_fills_up_during_the_upload(
    ssh: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = random_file(tmp_path / "big.bin", 6 << 20)
    device = ssh()
    monkeypatch.setattr(device, "_make_room", lambda folder, size: None)
    with pytest.raises(faults.NoSpaceError, match="needs 6291456"):
        device.push(source, "/full/big.bin")
    device.run(["sh", "-c", "rm -f /full/*"], 20)


def test_a_folder_that_cannot_be_made(ssh: Make, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="cannot make folder /proc/no"):
        ssh().push(random_file(tmp_path / "f", 10), "/proc/no/f")


def test_a_file_that_is_not_on_the_device(ssh: Make, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="no file nothing"):
        ssh().pull("nothing", tmp_path / "f")
    assert not (tmp_path / "f").exists()


# -- links and machines that fail


def test_a_closed_port_is_unreachable(ssh: Make) -> None:
    with pytest.raises(faults.UnreachableError, match="no SSH connection"):
        ssh(machine.free_port()).run(["true"], 10)


def test_a_port_that_is_not_ssh_is_unreachable(ssh: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh_connect, "CONNECT_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(faults.UnreachableError):
        ssh(silent.getsockname()[1]).run(["true"], 10)


def test_a_hung_command_is_killed_with_its_children(ssh: Make, board: machine.Board) -> None:
    assert quiet(board)
    with pytest.raises(faults.TookTooLongError, match="longer than 1 s"):
        ssh().run(["sh", "-c", "sleep 300 & sleep 301; wait"], 1)
    assert quiet(board)


def test_a_command_that_ignores_its_end_is_killed(ssh: Make, board: machine.Board) -> None:
    with pytest.raises(faults.TookTooLongError):
        ssh().run(["sh", "-c", "trap '' TERM; sleep 300; sleep 300"], 1)
    assert quiet(board)


def test_a_link_cut_in_a_run_is_told_and_leaves_no_orphan(
    ssh: Make, board: machine.Board, link: machine.Link
) -> None:
    device = ssh(link.port)
    device.run(["true"], 20)
    seen: list[str] = []

    def look_and_cut() -> None:
        seen.extend(board.processes())
        link.cut()

    threading.Timer(1.5, look_and_cut).start()
    with pytest.raises(faults.DroppedError, match="lost while it ran sh"):
        device.run(["sh", "-c", "echo started; sleep 200"], 60)
    assert any("sleep 200" in line for line in seen)
    assert quiet(board), "a second connection killed it"


def test_a_frozen_peer_is_noticed(
    ssh: Make, board: machine.Board, link: machine.Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh_connect, "BEAT_S", 0.3)
    monkeypatch.setattr(ssh_connect, "FROZEN_S", 2.0)
    monkeypatch.setattr(ssh_connect, "CONNECT_S", 2.0)
    device = ssh(link.port)
    device.run(["true"], 20)
    start = time.monotonic()

    def freeze() -> None:
        link.frozen = True

    threading.Timer(1.0, freeze).start()
    with pytest.raises(faults.DroppedError):
        device.run(["sleep", "12"], 60)
    assert time.monotonic() - start < 11
    link.frozen = False
    assert quiet(board), "timeout on the device ends what nobody can reach"


def test_silence_of_a_working_command_is_not_a_frozen_peer(
    ssh: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh_connect, "BEAT_S", 0.2)
    monkeypatch.setattr(ssh_connect, "FROZEN_S", 1.0)
    assert ssh().run(["sleep", "3"], 20).exit_code == 0


def test_closing_the_device_ends_a_run_in_another_thread(ssh: Make, board: machine.Board) -> None:
    device = ssh()
    threading.Timer(1.5, device.close).start()
    with pytest.raises(faults.DroppedError):
        device.run(["sh", "-c", "sleep 200 & sleep 201; wait"], 60)
    assert quiet(board)


def test_an_interrupted_host_leaves_nothing_running(
    ssh: Make, board: machine.Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ssh().run(["sh", "-c", "echo ready; sleep 200"], 60, interrupt)
    assert quiet(board)
