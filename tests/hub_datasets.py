"""A stand-in for the hub's data sets on this machine: what `datasets` asks over HTTP when it streams."""

from __future__ import annotations

import hashlib
import json
import re
from urllib.parse import unquote

from hub_server import HubHandler, HubServer

COMMIT = "c" * 40  # what "main" is


class DataHub(HubServer):
    """``repos`` maps a data set's id to its files; ``gated`` names those that ask for a login."""

    def __init__(self, repos: dict[str, dict[str, bytes]], gated: tuple[str, ...] = ()) -> None:
        super().__init__(_Handler)
        self.repos, self.gated = repos, gated
        self.revisions: set[str] = set()  # of the files that were asked for


class _Handler(HubHandler):
    server: DataHub

    def _json(self, value: object, body: bool) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"}, body)

    def answer(self, body: bool) -> None:
        asked = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(self.path.split("?")[0])
        found = re.fullmatch(r"(/api)?/datasets/([\w.-]+/[\w.-]+)(?:/([a-z-]+)/([^/]+)(?:/(.*))?)?", path)
        if not found or found[2] not in self.server.repos:
            return self.refuse(404, "RepoNotFound", body)
        api, name, verb, revision, rest = found.groups()
        if name in self.server.gated and not api:  # anybody may ask about it
            return self.refuse(403, "GatedRepo", body)
        if revision not in (None, "main") and not re.fullmatch(r"[0-9a-f]{40}", revision):
            return self.refuse(404, "RevisionNotFound", body)
        files = self.server.repos[name]
        commit = revision if revision and revision != "main" else COMMIT
        if not api:
            self.server.revisions.add(revision)
            return self._file(files, rest, commit, body)
        if verb == "tree":
            return self._tree(files, rest, body)
        if verb == "paths-info":
            rows = [self._row(path, files[path]) for path in json.loads(asked)["paths"] if path in files]
            return self._json(rows, body)
        siblings = [{"rfilename": path} for path in files]
        self._json({"id": name, "sha": commit, "private": False, "tags": [], "siblings": siblings}, body)

    @staticmethod
    def _row(path: str, data: bytes) -> dict[str, object]:
        return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def _tree(self, files: dict[str, bytes], folder: str | None, body: bool) -> None:
        prefix = f"{folder}/" if folder else ""
        inside = {path.removeprefix(prefix): data for path, data in files.items() if path.startswith(prefix)}
        if not inside:
            return self.refuse(404, "EntryNotFound", body)
        rows = [self._row(prefix + path, data) for path, data in inside.items() if "/" not in path]
        folders = sorted({path.split("/")[0] for path in inside if "/" in path})
        self._json([*rows, *({"type": "directory", "path": prefix + f, "oid": "d" * 40} for f in folders)], body)

    def _file(self, files: dict[str, bytes], path: str, commit: str, body: bool) -> None:
        if path not in files:
            return self.refuse(404, "EntryNotFound", body)
        data = files[path]
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not asked:
            return self.send(200, data, headers, body)
        start, end = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
        self.send(206, data[start : end + 1], headers, body)
