"""The benchmark over a limited link, without its minutes of sampling."""

import shutil
import subprocess

import asyncdiff_link as link
import asyncdiff_speed as speed
import pytest

from diffusers_ext.asyncdiff import AsyncDiffConfig


def test_the_ways_differ_in_what_is_sent_and_when_only_where_their_names_say_so():
    ways = link.ways()
    needed, blocking, released = (ways[name].config for name in (speed.AUTHORS, link.NEEDED_BLOCKING, speed.RELEASED))
    assert needed.stages == blocking.stages == released.stages
    assert (needed.transport, needed.overlap) == (AsyncDiffConfig().transport, True)
    assert (blocking.transport, blocking.overlap) == (needed.transport, False)
    assert (released.transport, released.overlap) == ("all", False)


@pytest.mark.parametrize("missing", ["unshare", "ip", "tc"])
def test_missing_tools_are_named_before_any_work(missing, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == missing else f"/usr/bin/{tool}")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("something was run"))
    with pytest.raises(SystemExit, match=f"Needs {missing} "):
        link.enter_namespace(link.RATE, ["--short"])


def test_the_script_runs_again_within_the_limited_link_and_ends_as_that_does(monkeypatch):
    calls = []

    def run(command, env):
        calls.append((command, env))
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(shutil, "which", lambda tool: tool)
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SystemExit) as caught:
        link.main(["--short", "--rate", "10mbit"])
    assert caught.value.code == 3
    ((command, env),) = calls
    assert command[:3] == ["unshare", "--map-root-user", "--net"]
    assert "tbf rate 10mbit" in command[5]
    assert command[-4:] == [link.__file__, "--short", "--rate", "10mbit"]
    assert env[link.INSIDE] == "10mbit"
