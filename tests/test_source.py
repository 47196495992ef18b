"""Hub downloads against a stand-in hub on this machine: what is asked for, and what happens when it breaks."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import make_model
from hub_server import HubHandler, HubServer, run_with_hub, serving

NAME = "some-org/tiny-moe"
MAIN, TAGGED = "a" * 40, "b" * 40
NEEDED = {"config.json", "tokenizer.json", "generation_config.json", "README.md"}
NOT_NEEDED = {
    "pytorch_model.bin": b"pickle", "plot.png": b"png", "model.gguf": b"GGUF", "original/extra.safetensors": b"x",
    "consolidated.safetensors": b"x", "consolidated.00.pth": b"pickle", "run.py": b"import os",
}  # fmt: skip


class Hub(HubServer):
    """``commits`` maps a sha to files; ``cut`` names a file whose first ``cuts`` answers break off in the middle."""

    def __init__(self, commits: dict[str, dict[str, bytes]]) -> None:
        super().__init__(Handler)
        self.commits = commits
        self.revisions = {"main": MAIN, "v1.0": TAGGED, MAIN: MAIN, TAGGED: TAGGED}
        self.asked: list[tuple[str, str, str]] = []
        self.cut, self.cuts = "", 0
        self.status_of: dict[str, int] = {}

    def got(self) -> list[str]:
        """Files whose content was asked for, in order."""
        return [p.split("/resolve/")[1].split("/", 1)[1] for m, p, _ in self.asked if m == "GET" and "/resolve/" in p]

    def shas(self) -> set[str]:
        return {p.split("/resolve/")[1].split("/")[0] for _, p, _ in self.asked if "/resolve/" in p}


class Handler(HubHandler):
    server: Hub

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        self.server.asked.append((self.command, path, self.headers.get("Range") or ""))
        api = re.fullmatch(rf"/api/models/{NAME}/(revision|tree)/([^/]+)", path)
        file = re.fullmatch(rf"/{NAME}/resolve/([^/]+)/(.+)", path)
        if not api and not file:
            return self.refuse(404, "RepoNotFound", body)
        sha = self.server.revisions.get(api[2] if api else file[1])
        if sha is None:
            return self.refuse(404, "RevisionNotFound", body)
        files = self.server.commits[sha]
        if api:
            return self.send(200, self._listing(api[1], sha, files), {"Content-Type": "application/json"}, body)
        if file[2] not in files:
            return self.refuse(404, "EntryNotFound", body)
        self._file(file[2], sha, files[file[2]], body)

    def _listing(self, kind: str, sha: str, files: dict[str, bytes]) -> bytes:
        if kind == "revision":
            siblings = [{"rfilename": name} for name in files]
            return json.dumps(
                {"id": NAME, "modelId": NAME, "sha": sha, "private": False, "tags": [], "siblings": siblings}
            ).encode()
        rows = [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in files.items()
        ]
        return json.dumps(rows).encode()

    def _file(self, name: str, sha: str, data: bytes, body: bool) -> None:
        if body and name in self.server.status_of:
            return self.send(self.server.status_of[name], b"", {})
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        headers = {"ETag": etag, "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(asked[1]) if asked else 0
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        part = data[start:]
        if body and name == self.server.cut and self.server.cuts:
            self.server.cuts -= 1
            self.send(206 if asked else 200, part, headers, body=False)
            if not asked:
                self.wfile.write(part[: len(part) // 2])
            self.wfile.flush()
            self.close_connection = True
            return
        self.send(206 if asked else 200, part, headers, body)


@pytest.fixture(scope="module")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = make_model(tmp_path_factory.mktemp("hub") / "m", shards="100KB", mlp_only_layers=[])
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "notes.txt"}
    assert sum(name.endswith(".safetensors") for name in files) > 2
    return {**files, "README.md": b"# tiny", "tokenizer.json": b"{}"}


@pytest.fixture
def hub(model_files: dict[str, bytes]) -> Iterator[Hub]:
    tagged = {**model_files, "README.md": b"# tagged"}
    with serving(Hub({MAIN: {**model_files, **NOT_NEEDED}, TAGGED: tagged})) as server:
        yield server


def run(hub: Hub, home: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return run_with_hub(hub.url, home, *command, timeout=120)


FETCH = """
import sys
from pathlib import Path
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 4096  # 10 MB: smaller files would not resume in the middle
from reapc.checkpoint.source import fetch
from reapc.errors import ReapcError
try:
    print(fetch(sys.argv[1], sys.argv[2] or None, Path(".")))
except ReapcError as error:
    sys.exit(f"ReapcError {error.exit_code}: {error}")
"""


def fetched(hub: Hub, home: Path, revision: str = "") -> Path:
    done = run(hub, home, "-c", FETCH, NAME, revision)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def same(folder: Path, files: dict[str, bytes]) -> bool:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == files


def shard_of(files: dict[str, bytes]) -> str:
    return max((name for name in files if name.endswith(".safetensors")), key=lambda name: len(files[name]))


def test_only_what_is_needed_is_asked_for(hub: Hub, tmp_path: Path, model_files: dict[str, bytes]) -> None:
    folder = fetched(hub, tmp_path)
    assert set(model_files) > NEEDED
    assert same(folder, model_files)
    assert sorted(hub.got()) == sorted(model_files)
    assert not [path for _, path, _ in hub.asked if any(path.endswith(f"/{name}") for name in NOT_NEEDED)]
    assert hub.shas() == {MAIN}


def test_a_second_fetch_loads_no_file_again(hub: Hub, tmp_path: Path) -> None:
    first = fetched(hub, tmp_path)
    hub.asked.clear()
    assert fetched(hub, tmp_path) == first
    assert hub.got() == []


@pytest.mark.parametrize("revision", ["v1.0", TAGGED])
def test_a_pinned_revision_is_what_is_loaded(hub: Hub, tmp_path: Path, revision: str) -> None:
    folder = fetched(hub, tmp_path, revision)
    assert (folder / "README.md").read_bytes() == b"# tagged"
    assert hub.shas() == {TAGGED}
    assert not [path for _, path, _ in hub.asked if path.endswith("/revision/main")]


def test_a_connection_cut_in_a_shard_resumes_there(hub: Hub, tmp_path: Path, model_files: dict[str, bytes]) -> None:
    hub.cut, hub.cuts = shard_of(model_files), 1
    assert same(fetched(hub, tmp_path), model_files)
    ranges = [r for method, path, r in hub.asked if method == "GET" and path.endswith(hub.cut)]
    assert ranges[0] == ""
    half = len(model_files[hub.cut]) // 2
    assert len(ranges) == 2
    assert ranges[1].startswith("bytes=")
    assert half - 4096 < int(ranges[1].removeprefix("bytes=").removesuffix("-")) <= half


def test_an_interrupted_download_ends_whole_when_run_again(
    hub: Hub, tmp_path: Path, model_files: dict[str, bytes]
) -> None:
    hub.cut, hub.cuts = shard_of(model_files), 1000
    done = run(hub, tmp_path, "-m", "reapc", "observe", NAME, "--out", str(tmp_path / "s.safetensors"))
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert f"error: model.source = '{NAME}' (revision main)" in done.stderr
    complete = set(hub.got()) - {hub.cut}
    assert len(complete) > 3
    hub.cuts = 0
    hub.asked.clear()
    assert same(fetched(hub, tmp_path), model_files)
    assert hub.cut in hub.got()
    assert not complete & set(hub.got())


def test_a_broken_hub_is_named(hub: Hub, tmp_path: Path, model_files: dict[str, bytes]) -> None:
    hub.status_of[shard_of(model_files)] = 403
    done = run(hub, tmp_path, "-c", FETCH, NAME, "")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-2].startswith(f"ReapcError 2: model.source = '{NAME}'")
    assert "403" in done.stderr
    assert "Traceback" not in done.stderr


PLAN = f'[model]\nsource = "{NAME}"\n[serve]\ncontext = 256\n[target]\nram = "4GB"\n'


def test_plan_asks_for_the_config_alone(hub: Hub, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(PLAN)
    done = run(hub, tmp_path / "home", "-m", "reapc", "plan", str(recipe), "--json", "--set", "model.revision=v1.0")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["plan"]["model"] == NAME
    assert set(hub.got()) == {"config.json"}
    assert {path for _, path, _ in hub.asked if "/resolve/" in path} == {f"/{NAME}/resolve/v1.0/config.json"}


@pytest.mark.parametrize("command", ["plan", "observe"])
@pytest.mark.parametrize(("name", "revision"), [("some-org/nosuch", "main"), (NAME, "v9")])
def test_missing_repo_and_revision(hub: Hub, tmp_path: Path, command: str, name: str, revision: str) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(PLAN.replace(NAME, name).replace("[serve]", f'revision = "{revision}"\n[serve]'))
    arguments = {"plan": [str(recipe)], "observe": [name, "--revision", revision, "--out", str(tmp_path / "s")]}[
        command
    ]
    done = run(hub, tmp_path / "home", "-m", "reapc", command, *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[0].startswith(f"error: model.source = '{name}' (revision {revision})")
    assert "NotFound" in done.stderr


def test_no_hub_at_all(hub: Hub, tmp_path: Path) -> None:
    hub.shutdown()
    hub.server_close()
    done = run(hub, tmp_path, "-c", FETCH, NAME, "")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-2].startswith(f"ReapcError 2: model.source = '{NAME}'")
    assert "Traceback" not in done.stderr


def test_inspect_asks_for_the_config_alone(hub: Hub, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "-m", "reapc", "inspect", NAME, "--revision", "v1.0", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["model"], found["experts"]["count"]) == (NAME, 12)
    assert {path for _, path, _ in hub.asked} == {f"/{NAME}/resolve/v1.0/config.json"}
    assert hub.got() == ["config.json"]
    hub.shutdown()
    hub.server_close()
    again = run(hub, tmp_path, "-m", "reapc", "inspect", NAME, "--revision", "v1.0", "--json")
    assert (again.returncode, again.stdout) == (0, done.stdout)  # from the cache


@pytest.mark.parametrize("source", ["zai-org/GLM-5", "glm-5", "ZAI-ORG/glm-5"])
def test_names_of_the_catalogue_need_no_hub(hub: Hub, tmp_path: Path, source: str) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(PLAN.replace("4GB", "2000GB"))
    for command in (["plan", str(recipe), "--set", f"model.source={source}"], ["inspect", source]):
        done = run(hub, tmp_path / "home", "-m", "reapc", *command, "--json")
        assert done.returncode == 0, done.stderr
        assert "753864139008" in done.stdout or command[0] == "plan"
    assert hub.asked == []


def test_a_revision_is_always_the_hubs(hub: Hub, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "-m", "reapc", "inspect", "glm-5", "--revision", "v1")
    assert done.returncode == 2
    assert {path for _, path, _ in hub.asked} == {"/zai-org/GLM-5/resolve/v1/config.json"}


def test_fetch_takes_the_full_name_of_a_part(hub: Hub, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "-c", FETCH, "kimi-linear", "")
    assert "ReapcError 2: model.source = 'moonshotai/Kimi-Linear-48B-A3B-Instruct'" in done.stderr
    assert {path for _, path, _ in hub.asked} == {"/api/models/moonshotai/Kimi-Linear-48B-A3B-Instruct/revision/main"}


def test_a_hub_id_is_no_part_of_another(hub: Hub, tmp_path: Path) -> None:
    """The catalogue has deepseek-ai/DeepSeek-V2-Lite-Chat, which DeepSeek-V2 is not."""
    done = run(hub, tmp_path, "-m", "reapc", "inspect", "deepseek-ai/DeepSeek-V2")
    assert done.returncode == 2
    assert "/deepseek-ai/DeepSeek-V2/resolve/main/config.json" in {path for _, path, _ in hub.asked}
    assert "did you mean" in done.stderr


def test_a_hub_that_is_away_is_said_at_once(hub: Hub, tmp_path: Path) -> None:
    hub.shutdown()
    hub.server_close()
    start = time.monotonic()
    done = run(hub, tmp_path, "-m", "reapc", "inspect", "zai-org/GLM-5x")
    assert time.monotonic() - start < 10
    assert (done.returncode, "Retrying" in done.stderr) == (2, False)
    assert done.stderr.startswith("error: model = 'zai-org/GLM-5x' (revision main)")
    assert "did you mean zai-org/GLM-5" in done.stderr
