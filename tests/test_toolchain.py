"""Finding and installing llama.cpp, and what doctor says of it."""

import json
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner

from reapc import toolchain
from reapc.cli.doctor import command
from reapc.errors import ReapcError


def fake_tool(folder: Path, name: str, version: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\necho 'version: {version}'\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.delenv("REAPC_LLAMA_CPP", raising=False)
    return toolchain.cache_folder()


def test_named_folder_wins_and_each_tool_falls_back(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = fake_tool(tmp_path / "mine" / "build" / "bin", "llama-server", "7 (abc)")
    fake_tool(empty_cache / "bin", "llama-server", "1 (cache)")
    quantize = fake_tool(empty_cache / "bin", "llama-quantize", "1 (cache)")
    monkeypatch.setenv("REAPC_LLAMA_CPP", str(tmp_path / "mine"))
    tools = toolchain.find_llamacpp()
    assert (tools.server, tools.quantize) == (named, quantize)
    assert (tools.sources["server"], tools.source) == ("REAPC_LLAMA_CPP", "cache")
    assert toolchain.tool_version(named) == "7 (abc)"


def test_path_comes_before_the_cache(empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tool(empty_cache / "bin", "llama-server", "1")
    on_path = fake_tool(tmp_path / "somewhere", "llama-server", "2")
    monkeypatch.setenv("PATH", str(on_path.parent))
    assert toolchain.require("server") == on_path


def test_missing_tool_names_the_command_that_installs_it(empty_cache: Path) -> None:
    with pytest.raises(ReapcError, match=r"llama-quantize.*(\n.*)*reapc doctor --install") as caught:
        toolchain.require("quantize")
    assert caught.value.exit_code == 1


def install_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fail: BaseException) -> None:
    """Runs an install whose download is a folder and whose build fails."""
    tool = fake_tool(tmp_path / "tools", "tool", "1")
    monkeypatch.setattr(toolchain, "find_cxx_compiler", lambda: tool)
    monkeypatch.setattr(toolchain, "find_build_tool", lambda name: tool)
    monkeypatch.setattr(toolchain, "_download", lambda partial, log: partial)

    def failing(*arguments: object, **options: object) -> str:
        raise fail

    monkeypatch.setattr(toolchain, "run_logged", failing)
    toolchain.install_llamacpp(lambda line: None)


@pytest.mark.parametrize("fail", [ReapcError("the build failed", exit_code=1), KeyboardInterrupt()])
def test_interrupted_install_leaves_nothing(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: BaseException
) -> None:
    with pytest.raises(type(fail)):
        install_with(monkeypatch, tmp_path, fail)
    assert [path.name for path in empty_cache.parent.iterdir()] == [".lock"]


def test_missing_compiler_says_what_to_install(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "find_cxx_compiler", lambda: None)
    with pytest.raises(ReapcError, match=r"apt-get install g\+\+"):
        toolchain.install_llamacpp(lambda line: None)


def test_unwritable_cache_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ReapcError, match="XDG_CACHE_HOME"):
        toolchain.install_llamacpp(lambda line: None)


def test_failing_command_carries_its_last_lines() -> None:
    with pytest.raises(ReapcError, match=r"exit 3.*\n.*the reason"):
        toolchain.run_logged(["sh", "-c", "echo the reason; exit 3"], "it", lambda line: None)


def test_doctor_json() -> None:
    result = CliRunner().invoke(command, ["--json"])
    report = json.loads(result.output)
    assert result.exit_code == (0 if report["gguf_road"] else 1)
    assert report["cache"]["free_bytes"] > 0
    names = {row["name"]: row for row in report["findings"]}
    assert names["numpy"]["present"]
    assert names["numpy"]["version"]
    assert {"llama-quantize", "llama-server", "convert_hf_to_gguf.py", "vllm", "cmake"} <= set(names)
    assert all(row["present"] == (row["cost"] == "") for row in report["findings"])


def test_doctor_without_tools_says_what_they_cost(empty_cache: Path) -> None:
    result = CliRunner().invoke(command, [])
    assert result.exit_code == 1
    assert "no GGUF from a checkpoint" in result.output
    assert "reapc doctor --install" in result.output
