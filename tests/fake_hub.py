"""A stand-in of the hub that speaks its HTTP API, with repositories in memory."""

import base64
import hashlib
import json
import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN, READER = "hf_writesecret", "hf_readsecret"


class Hub(ThreadingHTTPServer):
    """Repositories in memory. Their commits are numbered; the large files of all lie in one store, as on the hub."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, dict[str, str]] = {}  # repository -> branch -> commit
        self.private: dict[str, bool] = {}
        self.stored: dict[str, bytes] = {}  # large files by sha256
        self.messages: list[str] = []
        self.puts: list[int] = []  # sizes of the large files that were received
        self.puts_until_cut = 10**9
        self.commits_until_busy = 10**9
        self.loses = ""  # a path that commits leave out

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[repo].get(revision, revision)]

    def commit(self, repo: str, branch: str, files: dict[str, bytes], message: str = "made") -> str:
        name = f"{len(self.commits) + 1:040x}"
        self.commits[name] = files
        self.branches.setdefault(repo, {})[branch] = name
        self.messages.append(message)
        return name


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".png"))


class Requests(BaseHTTPRequestHandler):
    """The parts of the hub's API that its client needs for an upload and a download."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def answer(self, status: int, value: Any = None, error: str = "", **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value or {}).encode()
        self.send_response(status)
        for name, text in {**headers, "X-Error-Code": error, "Content-Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def refused(self, writes: bool) -> bool:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in ("", TOKEN, READER):
            self.answer(401, error="RepoNotFound", X_Error_Message="Invalid credentials in Authorization header")
        elif writes and token != TOKEN:
            self.answer(403)
        else:
            return False
        return True

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if self.refused(writes=False):
            return
        hub, repo = self.server, "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if repo not in hub.branches:
            return self.answer(404, error="RepoNotFound")
        if parts[0] == "api" and len(parts) == 4:
            return self.answer(200, {"id": repo, "private": hub.private.get(repo, False), "sha": "0" * 40})
        revision = parts[5] if parts[0] == "api" else parts[3]
        commit = hub.branches[repo].get(revision, revision)
        if commit not in hub.commits:
            return self.answer(404, error="RevisionNotFound")
        if parts[0] == "api":
            return self.answer(200, [described(path, data) for path, data in hub.commits[commit].items()])
        path = "/".join(parts[4:])
        if path not in hub.commits[commit]:
            return self.answer(404, error="EntryNotFound", X_Repo_Commit=commit)
        data = hub.commits[commit][path]
        return self.answer(200, data, X_Repo_Commit=commit, ETag=f'"{hashlib.sha256(data).hexdigest()}"')

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        data = self.body()
        if len(self.server.puts) >= self.server.puts_until_cut:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.server.puts.append(len(data))
        self.server.stored[hashlib.sha256(data).hexdigest()] = data
        self.answer(200)

    def do_POST(self) -> None:
        body, hub = self.body(), self.server
        parts = [unquote(part) for part in self.path.split("?")[0].strip("/").split("/")]
        if parts[-1] == "validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.refused(writes=True):
            return
        if parts[:3] == ["api", "repos", "create"]:
            asked = json.loads(body)
            if asked["organization"] != "user":
                return self.answer(403)
            repo = f"{asked['organization']}/{asked['name']}"
            hub.private[repo] = asked.get("visibility") == "private"
            hub.commit(repo, "main", {".gitattributes": b""})
            return self.answer(200, {"url": f"{hub.url}/{repo}"})
        if parts[-1] == "batch":
            return self.answer(
                200, {"transfer": "basic", "objects": [self.place(o) for o in json.loads(body)["objects"]]}
            )
        repo, branches = "/".join(parts[2:4]), hub.branches["/".join(parts[2:4])]
        if parts[4] == "branch":
            branches[parts[5]] = branches["main"]
            return self.answer(200, {})
        if parts[4] == "preupload":
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_large(file["path"]) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        return self.receive_commit(repo, parts[5], [json.loads(line) for line in body.splitlines()])

    def place(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Where a large file goes, unless it is stored already."""
        if wanted["oid"] in self.server.stored:
            return wanted
        return {**wanted, "actions": {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"}}}

    def receive_commit(self, repo: str, branch: str, lines: list[dict[str, Any]]) -> None:
        hub = self.server
        if len(hub.commits) >= hub.commits_until_busy:
            return self.answer(429)
        files = dict(hub.files(repo, branch))
        for line in lines[1:]:
            value = line["value"]
            large = line["key"] == "lfsFile"
            if value["path"] != hub.loses:
                files[value["path"]] = hub.stored[value["oid"]] if large else base64.b64decode(value["content"])
        name = hub.commit(repo, branch, files, lines[0]["value"]["summary"])
        self.answer(200, {"commitUrl": f"{hub.url}/{repo}/commit/{name}", "commitOid": name})

    def log_message(self, *args: Any) -> None:
        """Not a word."""


def described(path: str, data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "file", "path": path, "size": len(data)}
    found["oid"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    if is_large(path):
        found["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return found
