"""A small Hub on this machine that speaks the upload protocol: repositories, branches, LFS objects, commits."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Hub:
    """What arrived.

    Attributes:
        url: its address.
        requests: "METHOD path", in order.
        tokens: Authorization headers of the POSTs.
        created: bodies of repository creations. A repository called refuse-403 is answered with that status.
        objects: sha256 -> bytes of LFS uploads.
        files: "repo@branch" -> name -> bytes, as committed.
        summaries: commit messages.
    """

    url: str = ""
    requests: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    created: list[dict] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    summaries: list[str] = field(default_factory=list)

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict]:
        parts = path.strip("/").split("/")
        if method == "PUT" and parts[0] == "objects":
            self.objects[parts[1]] = body
            return 200, {}
        if path == "/api/repos/create":
            new = json.loads(body)
            self.created.append(new)
            if status := re.fullmatch(r"refuse-(\d+)", new["name"]):
                return int(status[1]), {"error": "Refused\nfor a reason."}
            return 200, {"url": f"{self.url}/{new.get('organization') or 'me'}/{new['name']}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if parts[-1] == "verify":
            return 200, {}
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, {"objects": [self.instructions(one) for one in json.loads(body)["objects"]]}
        if method != "POST" or len(parts) < 6:
            return 404, {"error": "not found"}
        repo, action = "/".join(parts[2:4]), parts[4]
        if action == "branch":
            return 200, {}
        if action == "preupload":
            modes = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(body)["files"]
            ]
            return 200, {"files": modes}
        if action == "commit":
            self.commit(f"{repo}@{parts[5]}", [json.loads(line) for line in body.splitlines()])
            return 200, {"success": True, "commitOid": "c0ffee", "commitUrl": f"{self.url}/{repo}/commit/c0ffee"}
        return 404, {"error": "not found"}

    def instructions(self, one: dict) -> dict:
        actions = {"upload": {"href": f"{self.url}/objects/{one['oid']}"}, "verify": {"href": f"{self.url}/verify"}}
        return {"oid": one["oid"], "size": one["size"], "actions": actions}

    def commit(self, place: str, operations: list[dict]) -> None:
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "header":
                self.summaries.append(value["summary"])
            elif operation["key"] == "file":
                self.files.setdefault(place, {})[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                content = self.objects[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                self.files.setdefault(place, {})[value["path"]] = content
            else:
                raise AssertionError(operation)


@contextmanager
def running() -> Iterator[Hub]:
    """Run a hub until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = self.path.partition("?")[0]
            hub.requests.append(f"{self.command} {path}")
            if self.command == "POST":
                hub.tokens.add(self.headers.get("Authorization"))
            status, answer = hub.answer(self.command, path, body)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = answer

        def log_message(self, *_arguments) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
