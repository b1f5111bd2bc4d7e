"""A hub on loopback: the parts of the Hugging Face HTTP interface that fetching a model uses, over real sockets."""

import hashlib
import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

Files = Mapping[str, bytes]


@dataclass
class HubModel:
    """`commits`: files by commit hash; `refs`: commit by branch or tag."""

    commits: dict[str, Files]
    refs: dict[str, str]
    is_gated: bool = False

    @classmethod
    def of(cls, *versions: Files) -> "HubModel":
        """One commit each, oldest first; `main` is the last."""
        hashes = [hashlib.sha1(str(number).encode()).hexdigest() for number in range(len(versions))]
        return cls(dict(zip(hashes, versions, strict=True)), {"main": hashes[-1]})

    def commit(self, revision: str) -> str | None:
        found = self.refs.get(revision, revision)
        return found if found in self.commits else None


@dataclass
class Hub:
    models: dict[str, HubModel]
    url: str = ""
    requests: list[str] = field(default_factory=list)  # "GET /org/name/resolve/main/config.json"
    num_bytes_sent: int = 0
    failing: int | None = None  # answer every request with this status


@contextmanager
def serving(models: dict[str, HubModel]) -> Generator[Hub]:
    hub = Hub(models)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.failing is not None:
            return self._send(self.hub.failing, b"out of order")
        words = path.strip("/").split("/")
        if words[:2] == ["api", "models"]:
            return self._model(words[2:])
        return self._file(words)

    def _model(self, words: list[str]) -> None:
        """/api/models/ORG/NAME[/revision/REVISION | /tree/REVISION]"""
        name, rest = "/".join(words[:2]), words[2:] or ["revision", "main"]
        model = self.hub.models.get(name)
        if model is None:
            return self._send(401, b"", {"X-Error-Code": "RepoNotFound"})  # as the hub answers who is not signed in
        commit = model.commit("/".join(rest[1:]))
        if commit is None:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if rest[0] == "tree":
            files = model.commits[commit].items()
            tree = [{"type": "file", "path": path, "size": len(data), "oid": _etag(data)} for path, data in files]
            return self._send(200, json.dumps(tree).encode())
        return self._send(200, json.dumps({"id": name, "modelId": name, "sha": commit, "siblings": []}).encode())

    def _file(self, words: list[str]) -> None:
        """/ORG/NAME/resolve/REVISION/FILE"""
        model = self.hub.models.get("/".join(words[:2]))
        if model is None:
            return self._send(404, b"")
        if model.is_gated:
            return self._send(403, b"", {"X-Error-Code": "GatedRepo"})
        commit = model.commit(words[3])
        assert commit is not None
        data = model.commits[commit].get("/".join(words[4:]))
        if data is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        headers = {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range")
        if wanted is None:
            return self._send(200, data, headers)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        part = data[int(first) : int(last) + 1 if last else None]
        end = int(first) + len(part) - 1
        return self._send(206, part, {**headers, "Content-Range": f"bytes {first}-{end}/{len(data)}"})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] = {}) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
            self.hub.num_bytes_sent += len(body)


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
