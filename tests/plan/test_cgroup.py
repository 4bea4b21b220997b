"""Limits of control groups, from made-up trees of both versions."""

import pytest

from manyhands.plan import host
from manyhands.plan.cgroup import Limit, memory_limits


def group(directory, version, limit, used, cache):
    directory.mkdir(parents=True, exist_ok=True)
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}[version]
    fields = ("total_inactive_file", "total_active_file") if version == 1 else ("inactive_file", "active_file")
    (directory / names[0]).write_text(f"{limit}\n")
    (directory / names[1]).write_text(f"{used}\n")
    (directory / "memory.stat").write_text("".join(f"{name} {cache}\n" for name in fields) + "rss 5\n")


def limits(tmp_path, line):
    (tmp_path / "own").write_text(line + "\n")
    return memory_limits(tmp_path / "sys", tmp_path / "own")


def test_version_2_own_group_and_those_around_it(tmp_path):
    root = tmp_path / "sys"
    group(root / "a.slice" / "b.service", 2, "max", 900, 10)
    group(root / "a.slice", 2, 5000, 1000, 100)
    (root / "cgroup.controllers").touch()
    assert limits(tmp_path, "0::/a.slice/b.service") == [Limit(5000.0, 800.0)], "cache of files is not used up"


def test_version_2_in_a_container(tmp_path):
    root = tmp_path / "sys"
    group(root, 2, 4096, 96, 0)
    (root / "cgroup.controllers").touch()
    assert limits(tmp_path, "0::/") == [Limit(4096.0, 96.0)]
    assert limits(tmp_path, "0::/docker/0123") == [Limit(4096.0, 96.0)], "the path is the host's"
    assert limits(tmp_path, "0::/../../x") == [Limit(4096.0, 96.0)]


def test_version_1(tmp_path):
    group(tmp_path / "sys" / "memory" / "box", 1, 3000, 50, 100)
    group(tmp_path / "sys" / "memory", 1, 9223372036854771712, 60, 0)
    found = limits(tmp_path, "11:blkio:/box\n4:memory:/box\n0::/")
    assert found == [Limit(3000.0, 0.0), Limit(9223372036854771712.0, 60.0)]


def test_no_control_groups(tmp_path):
    assert memory_limits(tmp_path / "sys", tmp_path / "own") == []


@pytest.mark.skipif(host.free_memory() is None, reason="this system does not say what is free")
def test_the_container_bounds_the_machine(monkeypatch):
    monkeypatch.setattr(host, "memory_limits", lambda: [Limit(1000.0, 400.0), Limit(2.0**80, 0.0)])
    assert host.usable_memory() == 1000
    assert host.free_memory() == 600
    monkeypatch.setattr(host, "memory_limits", list)
    assert host.usable_memory() > host.free_memory() > 1000
