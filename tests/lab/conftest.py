"""The emulated Arm device for the tests of this folder; skipped with the reason where it cannot be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import lab_build as build
import lab_machine as machine
import pytest

from edgecomp.devices.ssh import SshDevice
from edgecomp.devices.ssh_connect import Login

NOT_HERE = build.why_not()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if NOT_HERE and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=NOT_HERE))


@pytest.fixture(scope="session")
def lab() -> None:
    build.ensure()


@pytest.fixture(scope="session")
def board(lab: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[machine.Board]:
    running = machine.Board(tmp_path_factory.mktemp("board"))
    running.start()
    yield running
    running.stop()


@pytest.fixture
def link(board: machine.Board) -> Iterator[machine.Link]:
    relay = machine.Link(board.port)
    board.trust(relay.port)
    yield relay
    relay.close()


Make = Callable[..., SshDevice]


@pytest.fixture
def ssh(board: machine.Board, tmp_path: Path) -> Iterator[Make]:
    """Makes SSH devices on the board; `port` may be that of a link."""
    made: list[SshDevice] = []

    def make(port: int | None = None, **changes: str) -> SshDevice:
        facts = {
            "host": "127.0.0.1",
            "user": "root",
            "key": str(board.key),
            "config": str(tmp_path / "no_config"),
            "known_hosts": str(board.known_hosts),
        }
        settings = {k: changes.pop(k) for k in ("workdir", "interpreter", "name") if k in changes}
        login = Login(port=port or board.port, **(facts | changes))
        device = SshDevice(settings.pop("name", "lab"), login, **settings)
        made.append(device)
        return device

    yield make
    for device in made:
        device.close()
