"""A loopback stand-in for a W&B server, enough for the real client to start, log, resume, finish.

It answers the few GraphQL operations of a run's life, of an artifact's and of saved workspaces and
reports, and the stream of rows; an operation it does not know gets an empty answer. Files of a run
are taken and thrown away, those of an artifact kept.

    with WandbStandIn() as server:      # server.url for WANDB_BASE_URL
        ...
    server.runs["<run id>"]["history"]  # rows in order, as dicts
"""

import gzip
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

API_KEY = "local-" + "0" * 40
"""A key of the form the client accepts."""


class WandbStandIn:
    """The server, on a free port of 127.0.0.1.

    Args:
        reject_key: answer everything with 401, as the real server does to a wrong key.

    Attributes:
        runs: run id -> {"history": rows, "summary", "config", "groupName", "jobType", "tags",
            "displayName", "project", "entity", "sweep", "exit"}, as far as the client sent them.
        artifacts: name -> {"artifactTypeName", "metadata", "files": path -> bytes, "committed"}.
        views: workspaces and reports as they were saved: {"displayName", "spec", "type", ...}.
    """

    def __init__(self, reject_key: bool = False) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.artifacts: dict[str, dict[str, Any]] = {}
        self.views: list[dict[str, Any]] = []
        self.reject_key = reject_key
        self.lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.stand_in = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )

    def start(self) -> "WandbStandIn":
        self._thread.start()
        return self

    def stop(self) -> None:
        """Die as a killed process does: the port closes and so does every open connection."""
        self._server.shutdown()
        self._server.server_close()
        for connection in self._server.connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:  # closed by the client already
                pass

    def __enter__(self) -> "WandbStandIn":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a kept-alive connection would hold server_close() for ever
    stand_in: WandbStandIn

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.connections: list[socket.socket] = []

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address

    def handle_error(self, *_: object) -> None:
        """Say nothing: a connection that breaks is part of what the tests try."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._reply({})

    def do_PUT(self) -> None:
        body = self._body()
        if found := re.fullmatch(r"/artifact/([^/]+)/(.+)", self.path):
            self.server.stand_in.artifacts[found[1]]["files"][found[2]] = body
        self._reply({})

    def do_POST(self) -> None:
        body = self._body()
        stream = re.fullmatch(r"/files/(?:[^/]+/)?[^/]+/([^/]+)/file_stream", self.path)
        if self.server.stand_in.reject_key:
            self._reply({"errors": [{"message": "user is not logged in"}]}, code=401)
        elif self.path.startswith("/graphql"):
            self._reply({"data": self._graphql(json.loads(body))})
        elif stream:
            self._take_rows(stream[1], json.loads(body))
            self._reply({"exitcode": None, "limits": {}})
        else:
            self._reply({})

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        zipped = self.headers.get("content-encoding") == "gzip"
        return gzip.decompress(body) if zipped else body

    def _reply(self, answer: object, code: int = 200) -> None:
        body = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _take_rows(self, name: str, message: dict[str, Any]) -> None:
        with self.server.stand_in.lock:
            run = self.server.stand_in.runs.setdefault(name, {"history": []})
            for file, chunk in (message.get("files") or {}).items():
                lines = [json.loads(line) for line in chunk["content"]]
                if file == "wandb-history.jsonl":
                    # The client says at which row its chunk starts: a chunk sent twice is no row.
                    start = chunk["offset"]
                    run["history"][start : start + len(lines)] = lines
                elif file == "wandb-summary.json":
                    run["summary"] = lines[-1]
            if message.get("complete"):
                run["exit"] = message.get("exitcode")

    def _graphql(self, request: dict[str, Any]) -> dict[str, Any]:
        variables = request.get("variables") or {}
        operation = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
        runs = self.server.stand_in.runs
        name: str = variables.get("name") or ""
        match operation[1] if operation else "":
            case "Viewer":
                teams = {"edges": [{"node": {"name": "me"}}]}
                user = {"id": "u", "entity": "me", "username": "me", "email": "me@example.org"}
                return {"viewer": {**user, "flags": "{}", "teams": teams}}
            case "UpsertBucket":
                with self.server.stand_in.lock:
                    inserted = name not in runs
                    run = runs.setdefault(name, {"history": []})
                    keys = (
                        "project",
                        "entity",
                        "groupName",
                        "jobType",
                        "tags",
                        "displayName",
                        "sweep",
                    )
                    run |= {k: variables[k] for k in keys if variables.get(k) is not None}
                    if variables.get("config"):
                        run["config"] = json.loads(variables["config"])
                return {"upsertBucket": {"bucket": self._bucket(name), "inserted": inserted}}
            case "RunResumeStatus":
                bucket = self._bucket(name) if name in runs else None
                project = {"id": "p", "name": variables.get("project")}
                return {"model": {**project, "entity": {"id": "e", "name": "me"}, "bucket": bucket}}
            case "CreateRunFiles":
                files = [
                    {"name": file, "uploadUrl": f"{self.server.stand_in.url}/upload/{file}"}
                    for file in variables["files"]
                ]
                answer = {"runID": variables["run"], "uploadHeaders": [], "files": files}
                return {"createRunFiles": answer}
            case "UpsertView2" | "upsertView":
                self.server.stand_in.views.append(variables)
                project = {"name": variables["projectName"], "entityName": variables["entityName"]}
                view = {"id": "v", "name": variables["name"], "project": project}
                view |= {key: variables[key] for key in ("displayName", "description")}
                view |= {"spec": json.loads(variables["spec"]), "type": variables["type"]}
                return {"upsertView": {"view": view, "inserted": True}}
            case "ProjectInternalId":
                return {"project": {"id": "p", "internalId": "cDoxOjE="}}
            case "GetProjects":
                page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
                node = {"__typename": "Project", "id": "p", "name": "p", "entityName": "me"}
                node |= {"createdAt": "2026-01-01T00:00:00Z", "isBenchmark": False, "user": None}
                return {"models": {"pageInfo": page, "edges": [{"node": node}]}}
            case other:
                return self._artifact(other, variables)

    def _artifact(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Its operations; artifacts go by their name as their id."""
        artifacts, url = self.server.stand_in.artifacts, self.server.stand_in.url
        match operation:
            case "ArtifactType":
                return {"project": {"artifact": None}}
            case "CreateArtifact":
                name = variables["input"]["artifactCollectionName"]
                artifacts[name] = {**variables["input"], "files": {}, "committed": False}
                made = {
                    "id": name,
                    "state": "PENDING",
                    "artifactSequence": {"latestArtifact": None},
                }
                return {"createArtifact": {"artifact": made}}
            case "CreateArtifactManifest":
                upload = f"{url}/upload/{variables['name']}"
                file = {"id": "f", "uploadUrl": upload, "uploadHeaders": []}
                return {"createArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}
            case "CreateArtifactFiles":
                edges = [
                    {
                        "node": {
                            "storagePath": file["name"],
                            "uploadUrl": f"{url}/artifact/{file['artifactID']}/{file['name']}",
                            "uploadHeaders": [],
                            "uploadMultipartUrls": None,
                            "artifact": {"id": file["artifactID"]},
                        }
                    }
                    for file in variables["input"]["artifactFiles"]
                ]
                return {"createArtifactFiles": {"files": {"edges": edges}}}
            case "CommitArtifact":
                name = variables["artifactID"]
                artifacts[name]["committed"] = True
                return {"commitArtifact": {"artifact": {"id": name, "digest": "d"}}}
            case "ArtifactByID":
                name = variables["id"]
                project = {"id": "p", "internalId": "p", "name": "p", "entity": {"name": "me"}}
                sequence = {"__typename": "ArtifactSequence", "name": name, "project": project}
                facts = {"__typename": "Artifact", "id": name, "state": "COMMITTED", "size": 1}
                facts |= {"artifactSequence": sequence, "versionIndex": 0, "digest": "d"}
                facts |= {"artifactType": {"name": artifacts[name]["artifactTypeName"]}}
                facts |= {"description": None, "metadata": artifacts[name]["metadata"], "tags": []}
                facts |= {"ttlDurationSeconds": -1, "ttlIsInherited": True, "historyStep": 0}
                facts |= {"commitHash": "c", "fileCount": 1, "aliases": [], "updatedAt": None}
                return {"artifact": facts | {"createdAt": "2026-01-01T00:00:00Z"}}
            case _:
                return {}

    def _bucket(self, name: str) -> dict[str, Any]:
        """The run as the client reads it when it starts or resumes it."""
        run = self.server.stand_in.runs[name]
        history = run["history"]
        tail = [json.dumps(history[-1])] if history else []
        return {
            "id": f"id-{name}",
            "name": name,
            "displayName": run.get("displayName") or name,
            "description": "",
            "config": json.dumps(run.get("config") or {}),
            "sweepName": None,
            "tags": run.get("tags") or [],
            "historyLineCount": len(history),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps(tail),
            "eventsTail": "[]",
            "summaryMetrics": json.dumps(run.get("summary") or {}),
            "wandbConfig": '{"t": 1}',
            "project": {
                "id": "p",
                "name": run.get("project", "p"),
                "entity": {"id": "e", "name": "me"},
            },
        }
