"""A loopback stand-in for the hub: what `datasets.load_dataset` asks of it, and what `HfApi` and
`snapshot_download` ask to upload a model and to fetch it, and no more.

Serves REPOS/<org>/<name>/<main or refs_convert_parquet>/… as repositories of data sets and models.
"""

import base64
import hashlib
import http.server
import json
import threading
import urllib.parse
from pathlib import Path
from types import TracebackType
from typing import Any

TOKEN = "hf_standin"
COMMITS = {"main": "a" * 40, "refs_convert_parquet": "b" * 40}


class HubStandIn:
    """Use as a context manager; `url` is what HF_ENDPOINT should be."""

    def __init__(self, repos: Path) -> None:
        handler = type("Handler", (_Handler,), {"repos": repos})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "HubStandIn":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repos: Path

    def log_message(self, *args: Any) -> None:
        pass

    def reply(self, body: Any, code: int = 200, headers: dict[str, str] | None = None) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def missing(self, code: str = "EntryNotFound") -> None:
        self.reply({"error": code}, 404, {"X-Error-Code": code, "X-Error-Message": code})

    def revision(self, repo: Path, name: str) -> Path:
        """The folder of a revision, named by branch or commit."""
        by_commit = {commit: folder for folder, commit in COMMITS.items()}
        return repo / by_commit.get(name, name.replace("/", "_"))

    def do_HEAD(self) -> None:
        self.do_GET()

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def do_PUT(self) -> None:
        """A large file, on its way into a commit that names it by its hash."""
        large, body = self.repos / ".large", self.body()
        large.mkdir(exist_ok=True)
        (large / hashlib.sha256(body).hexdigest()).write_bytes(body)
        self.reply({})

    def upload(self, parts: list[str], body: bytes) -> None:
        """What a client asks while it makes a repository and commits files to it."""
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            return self.reply({"error": "Invalid username or password."}, 401)
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            (self.repos / name / "main").mkdir(parents=True, exist_ok=True)
            return self.reply({"url": f"{self.host()}/{name}", "name": name})
        if parts[2:] == ["info", "lfs", "objects", "batch"]:
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.host()}/large/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self.reply({"transfer": "basic", "objects": objects})
        if parts == ["api", "validate-yaml"]:
            return self.reply({"errors": [], "warnings": []})
        root = self.repos / parts[2] / parts[3] / "main"
        if parts[4] == "preupload":
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self.reply({"files": files})
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] in ("file", "lfsFile"):
                path = root / value["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                if line["key"] == "file":
                    path.write_bytes(base64.b64decode(value["content"]))
                else:
                    path.write_bytes((self.repos / ".large" / value["oid"]).read_bytes())
        url = f"{self.host()}/{'/'.join(parts[2:4])}/commit/{COMMITS['main']}"
        self.reply({"success": True, "commitOid": COMMITS["main"], "commitUrl": url})

    def host(self) -> str:
        return f"http://{self.headers['host']}"

    def do_POST(self) -> None:
        body, parts = self.body(), self.parts()
        if "paths-info" not in parts:
            return self.upload(parts, body)
        root = self.revision(self.repos / parts[2] / parts[3], "/".join(parts[5:]))
        try:
            paths = json.loads(body)["paths"]
        except ValueError:
            paths = urllib.parse.parse_qs(body.decode()).get("paths", [])
        self.reply([entry(root, root / path) for path in paths if (root / path).exists()])

    def do_GET(self) -> None:
        parts = self.parts()
        if parts[:2] in (["api", "datasets"], ["api", "models"]):
            repo, rest = self.repos / parts[2] / parts[3], parts[4:]
            if not repo.is_dir():
                return self.missing("RepoNotFound")
            root = self.revision(repo, "/".join(rest[1:2]) or "main")
            if not rest or rest[0] == "revision":
                if not root.is_dir():
                    return self.missing("RevisionNotFound")
                names = [str(p.relative_to(root)) for p in sorted(root.rglob("*")) if p.is_file()]
                info = {"_id": "x", "id": "/".join(parts[2:4]), "sha": COMMITS[root.name]}
                flags = {"private": False, "gated": False, "disabled": False, "tags": []}
                return self.reply(info | flags | {"siblings": [{"rfilename": n} for n in names]})
            folder = root / "/".join(rest[2:])
            if rest[0] != "tree" or not folder.exists():
                return self.missing()
            deep = "recursive=1" in self.path or "recursive=true" in self.path.lower()
            paths = sorted(folder.rglob("*") if deep else folder.iterdir())
            return self.reply([entry(root, path) for path in paths])
        if parts[:1] == ["datasets"]:
            parts = parts[1:]
        if parts[2:3] == ["resolve"]:
            root = self.revision(self.repos / parts[0] / parts[1], parts[3])
            path = root / "/".join(parts[4:])
            if not path.is_file():
                return self.missing()
            raw = path.read_bytes()
            tag = f'"{hashlib.sha1(raw).hexdigest()}"'
            headers = {"ETag": tag, "X-Repo-Commit": COMMITS[root.name], "Accept-Ranges": "bytes"}
            asked = self.headers.get("Range", "")
            if asked.startswith("bytes="):
                first, _, last = asked[6:].partition("-")
                low, high = int(first), int(last or len(raw) - 1)
                headers["Content-Range"] = f"bytes {low}-{high}/{len(raw)}"
                return self.reply(raw[low : high + 1], 206, headers)
            return self.reply(raw, 200, headers)
        self.missing()

    def parts(self) -> list[str]:
        path = urllib.parse.urlsplit(self.path).path
        return [urllib.parse.unquote(part) for part in path.strip("/").split("/")]


def entry(root: Path, path: Path) -> dict[str, Any]:
    """A file or folder as the hub lists it."""
    oid = hashlib.sha1(str(path).encode()).hexdigest()
    if path.is_dir():
        return {"type": "directory", "path": str(path.relative_to(root)), "oid": oid, "size": 0}
    size = path.stat().st_size
    return {"type": "file", "path": str(path.relative_to(root)), "oid": oid, "size": size}
