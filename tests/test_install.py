"""`make setup`: what it does to the machine."""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path

import pytest

from .conftest import ROOT


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "requirements")
    monkeypatch.setenv("PATH", "/nowhere")  # no systemctl


def test_what_the_tests_need_starts_no_services(tmp_path: Path) -> None:
    import preflight

    policy = tmp_path / "policy-rc.d"
    with pytest.raises(preflight.SetupError), preflight.without_services(["nginx"], policy):
        assert subprocess.call([policy, "nginx", "start"], env={"PATH": os.defpath}) == 101
        raise preflight.SetupError("apt-get failed")
    assert not policy.exists()
    with preflight.without_services([], policy):
        assert not policy.exists()
    policy.write_text("the machine's own")
    with preflight.without_services(["nginx"], policy):
        pass
    assert policy.read_text() == "the machine's own"


def test_one_setup_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import install

    monkeypatch.setattr(install, "ROOT", tmp_path)
    with install.exclusive() as lock:
        assert fcntl.fcntl(lock, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR, "NFS locks no other"
        with (tmp_path / ".venv.lock").open("r+") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
