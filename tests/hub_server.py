"""A Hugging Face Hub on the loopback for the real, unpatched `huggingface_hub`, with the routes that the tests need.

`Hub` starts it as a separate process and controls it. Statuses, headers and messages follow huggingface.co, as far as
known from the client's source and public reports. One header is ours: the client treats a 401 as a missing repository
only at https addresses, so here such a 401 has the same `X-Error-Code` as a 404.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.request
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results

USER = "user"
WRITE_TOKEN = "hf_" + "w" * 34
READ_TOKEN = "hf_" + "r" * 34
LFS_SUFFIXES = (".safetensors", ".parquet", ".png")
LFS_SIZE = 10**6
CONTROL = "/__control__/"

# ---- What the Hub knows of a README

LICENSES = "mit apache-2.0 afl-3.0 bsd-3-clause unknown other"  # of some eighty
REPOSITORY_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def read_card(content: str) -> tuple[dict[str, Any], list[str]]:
    """The metadata of a README, and what the Hub finds wrong with it."""
    block = re.match(r"\s*---[\r\n]+([\S\s]*?)[\r\n]+---(\r\n|\n|$)", content)
    if block is None:
        return {}, []
    data = yaml.safe_load(block[1])
    errors = []
    if data.get("license", "mit") not in LICENSES.split():
        errors.append(f'"license" must be one of [{", ".join(LICENSES.split())}]')
    if data.get("pipeline_tag", "other") not in ("image-classification", "other"):
        errors.append('"pipeline_tag" must be one of [image-classification, …]')
    errors += [f'"tags" must be strings, got {tag!r}' for tag in data.get("tags", []) if not isinstance(tag, str)]
    for name in ("base_model", "datasets"):
        ids = data.get(name, [])
        for item in ids if isinstance(ids, list) else [ids]:
            if not (isinstance(item, str) and REPOSITORY_ID.fullmatch(item)):
                errors.append(f'"{name}" with value "{item}" is not valid. Use an id from https://hf.co.')
    if "model-index" in data:
        for result in model_index_to_eval_results(data["model-index"])[1]:
            if not (isinstance(result.metric_value, int | float) and math.isfinite(result.metric_value)):
                errors.append(f'"model-index" {result.metric_type}: "value" must be a number')
    return data, errors


# ---- Repositories


class Answer(Exception):
    """What the server sends; raised where it refuses."""

    def __init__(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        self.status, self.body, self.headers = status, body, headers or {}


def refusal(status: int, message: str, code: str = "", **headers: str) -> Answer:
    headers = {name.replace("_", "-"): value for name, value in headers.items()} | {"X-Error-Message": message}
    if code:
        headers["X-Error-Code"] = code
    if status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="Authentication required", charset="UTF-8"'
    return Answer(status, {"error": message}, headers)


@dataclass(frozen=True)
class File:
    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        """All that git holds of a large file."""
        rest = f"oid sha256:{self.sha256}\nsize {len(self.content)}\n"
        return b"version https://git-lfs.github.com/spec/v1\n" + rest.encode()

    @property
    def blob_id(self) -> str:
        content = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def oid(self) -> str:
        return self.sha256 if self.lfs else self.blob_id

    def entry(self, path: str) -> dict[str, Any]:
        """Of a listing of a folder."""
        entry = {"type": "file", "path": path, "oid": self.blob_id, "size": len(self.content)}
        lfs = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}
        return entry | ({"lfs": lfs} if self.lfs else {})


@dataclass
class Commit:
    oid: str
    title: str
    files: dict[str, File]
    date: str


@dataclass
class Repository:
    kind: str
    id: str
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=lambda: {"main": []})
    stored: dict[str, bytes] = field(default_factory=dict)  # large files, also those not committed yet

    def __post_init__(self) -> None:
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        self.commit("main", "initial commit", {".gitattributes": File(attributes.encode(), lfs=False)})

    @property
    def path(self) -> str:
        return self.id if self.kind == "model" else f"{self.kind}s/{self.id}"

    def commit(self, branch: str, title: str, files: dict[str, File]) -> Commit:
        history = self.branches[branch]
        content = history[-1].oid if history else self.path, title, sorted((p, f.oid) for p, f in files.items())
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        history.append(Commit(hashlib.sha1(repr(content).encode()).hexdigest(), title, files, date))
        return history[-1]

    def at(self, revision: str) -> Commit:
        by_oid = {commit.oid: commit for history in self.branches.values() for commit in history}
        by_name = {name: history[-1] for name, history in self.branches.items()}
        if commit := (by_oid | by_name).get(revision):
            return commit
        raise refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")


# ---- The server

REPOSITORIES: dict[tuple[str, str], Repository] = {}
REQUESTS: list[str] = []
FAILING: dict[str, tuple[str, float]] = {}  # route → fault, times
LOCK = threading.Lock()
SILENCE = 10.0  # seconds

API = r"/api/(?P<kind>model|dataset|space)s/(?P<id>[^/]+/[^/]+)"
WEB = r"/(?:(?P<kind>dataset|space)s/)?(?P<id>[^/]+/[^/]+)"
REVISION = r"/(?P<revision>[^/]+)"
#: Each is answered by the method of the same name.
ROUTES = {
    "create": "POST /api/repos/create",
    "validate": "POST /api/validate-yaml",
    "preupload": f"POST {API}/preupload{REVISION}",
    "lfs": rf"POST {WEB}\.git/info/lfs/objects/batch",
    "put": rf"PUT /__storage__{WEB}/(?P<oid>[0-9a-f]{{64}})",
    "commit": f"POST {API}/commit{REVISION}",
    "info": f"GET {API}(/revision{REVISION})?",
    "tree": f"GET {API}/tree{REVISION}(/(?P<path>.+))?",
    "auth": f"GET {API}/auth-check(?P<write>/write)?",
    "download": f"(GET|HEAD) {WEB}/resolve{REVISION}/(?P<path>.+)",
}
BAD_TOKEN = (401, "Invalid credentials in Authorization header")
READ_ONLY = (403, "Forbidden: you must use a write token to upload to a repository.")
#: What a fault answers. 503 comes from the proxy before the Hub, which knows no JSON.
FAULTS = {
    "401": refusal(*BAD_TOKEN),
    "403": refusal(*READ_ONLY),
    "404": refusal(404, "Sorry, we can't find the page you are looking for."),  # a Hub without this route
    "409": refusal(409, "Another commit operation is in progress for this repository. Please try again later."),
    "429": refusal(429, "We had to rate limit you, you hit the quota of 1000 api requests.", Retry_After="1"),
    "500": refusal(500, "Internal Error - We're working hard to fix this as soon as possible!"),
    "503": Answer(503, b"<html><h1>503 Service Unavailable ERROR</h1></html>", {"Content-Type": "text/html"}),
    "cut": None,  # the connection breaks within the request
    "silent": None,  # the request is taken, and nothing follows
    "lost": None,  # the request is served, and the connection breaks before the answer
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # header and body are two writes

    def log_message(self, *_: Any) -> None:
        pass

    def serve(self) -> None:
        path, _, query = self.path.partition("?")
        if path.startswith(CONTROL):
            with LOCK:
                return self.send(control(path.removeprefix(CONTROL), json.loads(self.read_body())))
        call = f"{self.command} {path}"
        route, match = next(((n, m) for n, r in ROUTES.items() if (m := re.fullmatch(r, call))), ("", None))
        with LOCK:
            REQUESTS.append(unquote(call))
            failing = route if route in FAILING else "any"
            fault, times = FAILING.pop(failing, (None, 0))
            if times > 1:
                FAILING[failing] = fault, times - 1
        if fault == "cut":
            # At least one byte of a body: one that the client has not begun to send would fail in another way.
            self.rfile.read((int(self.headers.get("Content-Length", 0)) + 1) // 2)
            return self.cut()
        self.body, self.query = self.read_body(), parse_qs(query)
        if fault == "silent":
            time.sleep(SILENCE)
            return self.cut()
        self.groups = {name: unquote(value or "") for name, value in match.groupdict().items()} if match else {}
        try:
            with LOCK:
                answer = FAULTS.get(fault) or getattr(self, route or "unknown")()
        except Answer as refused:
            answer = refused
        except Exception as error:  # a request that is malformed for us; a 500 would only be tried again
            traceback.print_exc()
            answer = refusal(400, f"hub_server.py: {error!r}")
        return self.cut() if fault == "lost" else self.send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def send(self, answer: Answer) -> None:
        json_body = not isinstance(answer.body, bytes)
        body = json.dumps(answer.body, default=str).encode() if json_body else answer.body
        headers = {"Content-Type": "application/json" if json_body else "application/octet-stream"}
        self.send_response(answer.status)
        for name, value in (headers | answer.headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def cut(self) -> None:
        """Reset the connection, as a failing network does; what is not read yet is lost."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def role(self) -> str:
        """Of the token, without which nothing is said of what exists."""
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        if not token:
            asked_repository = "id" in self.groups and ".git/" not in self.path
            raise refusal(401, "Invalid username or password.", "RepoNotFound" if asked_repository else "")
        if token not in (WRITE_TOKEN, READ_TOKEN):
            raise refusal(*BAD_TOKEN)
        return "write" if token == WRITE_TOKEN else "read"

    def repository(self, write: bool = False) -> Repository:
        repository = REPOSITORIES.get((self.groups["kind"] or "model", self.groups["id"]))
        if write or repository is None or repository.private or self.headers["Authorization"]:
            role, owned = self.role(), self.groups["id"].startswith(f"{USER}/")
            if repository is None or (repository.private and not owned):
                raise refusal(404, "Repository not found", "RepoNotFound")
            if write and role == "read":
                raise refusal(*READ_ONLY)
            if write and not owned:
                raise refusal(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repository

    def at(self) -> Commit:
        return self.repository().at(self.groups["revision"] or "main")

    def unknown(self) -> Answer:
        return refusal(404, "Sorry, we can't find the page you are looking for.")

    # ---- Writing

    def create(self) -> Answer:
        role, wanted = self.role(), json.loads(self.body)
        kind, owner = wanted.get("type") or "model", wanted.get("organization") or USER
        if kind not in ("model", "dataset", "space") or (kind == "space" and not wanted.get("sdk")):
            raise refusal(400, '"sdk" is required' if kind == "space" else f"Invalid repo type: {kind}")
        if role == "read" or owner != USER:
            raise refusal(403, f'You don\'t have the rights to create a {kind} under the namespace "{owner}"')
        key = kind, f"{owner}/{wanted['name']}"
        exists = key in REPOSITORIES
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        repository = REPOSITORIES.setdefault(key, Repository(*key, private))
        body = {"url": f"{self.server.endpoint}/{repository.path}", "name": repository.id, "id": repository.path}
        error = {"error": f"You already created this {kind} repo"}
        return Answer(409, error | body) if exists else Answer(200, body)

    def validate(self) -> Answer:
        errors = read_card(json.loads(self.body)["content"])[1]
        body = {"errors": [{"message": message} for message in errors], "warnings": []}
        return Answer(400 if errors else 200, body)

    def preupload(self) -> Answer:
        self.repository(write=True)
        present, answers = self.at().files, []
        for file in json.loads(self.body)["files"]:
            large = file["path"].endswith(LFS_SUFFIXES) or file["size"] > LFS_SIZE
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            answers.append(answer | ({"oid": present[file["path"]].oid} if file["path"] in present else {}))
        return Answer(200, {"files": answers})

    def lfs(self) -> Answer:
        """Where to upload what is not there yet. The storage takes no token; its addresses are signed instead."""
        repository, answers = self.repository(write=True), []
        for wanted in json.loads(self.body)["objects"]:
            href = f"{self.server.endpoint}/__storage__/{repository.path}/{wanted['oid']}?signature=valid"
            upload = {"actions": {"upload": {"href": href}}} if wanted["oid"] not in repository.stored else {}
            answers.append({"oid": wanted["oid"], "size": wanted["size"], **upload})
        return Answer(200, {"transfer": "basic", "objects": answers})

    def put(self) -> Answer:
        repository = REPOSITORIES.get((self.groups["kind"] or "model", self.groups["id"]))
        if repository is None or self.query.get("signature") != ["valid"]:
            raise refusal(403, "SignatureDoesNotMatch")
        if hashlib.sha256(self.body).hexdigest() != self.groups["oid"]:
            raise refusal(400, "BadDigest")
        repository.stored[self.groups["oid"]] = self.body
        return Answer(200, b"")

    def commit(self) -> Answer:
        repository, revision = self.repository(write=True), self.groups["revision"]
        if revision not in repository.branches:
            raise refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        head = repository.at(revision)
        files, header = dict(head.files), {}
        for line in map(json.loads, self.body.splitlines()):
            key, value = line["key"], line["value"]
            path = value.get("path", "")
            if key == "header":
                header = value
            elif key == "file":
                files[path] = File(base64.b64decode(value["content"]), lfs=False)
            elif key == "deletedFile":
                files.pop(path)
            else:  # lfsFile
                if value["oid"] not in repository.stored:
                    reason = "an LFS pointer pointed to a file that does not exist"
                    raise refusal(400, f"Your push was rejected because {reason}. Offending file: - {path}")
                files[path] = File(repository.stored[value["oid"]], lfs=True)
        readme = files.get("README.md")
        if readme and readme != head.files.get("README.md") and (errors := read_card(readme.content.decode())[1]):
            raise refusal(400, "; ".join(errors))
        oid = repository.commit(revision, header["summary"], files).oid
        address = f"{self.server.endpoint}/{repository.path}/commit/{oid}"
        return Answer(200, {"success": True, "commitOid": oid, "commitUrl": address, "hookOutput": ""})

    # ---- Reading

    def auth(self) -> Answer:
        self.repository(write=bool(self.groups["write"]))
        return Answer(200, {})

    def info(self) -> Answer:
        repository, at = self.repository(), self.at()
        card = read_card(at.files["README.md"].content.decode())[0] if "README.md" in at.files else {}
        entries = [at.files[path].entry(path) for path in sorted(at.files)]
        siblings = [{"rfilename": e["path"], "size": e["size"], "blobId": e["oid"]} for e in entries]
        for sibling, entry in zip(siblings, entries, strict=True):
            if "lfs" in entry:
                sibling["lfs"] = entry["lfs"] | {"sha256": entry["lfs"]["oid"]}
        times = {"lastModified": at.date, "createdAt": repository.branches["main"][0].date}
        named = {key: card[key] for key in ("pipeline_tag", "library_name") if key in card}
        body = {"id": repository.id, "author": repository.id.split("/")[0], "sha": at.oid, "gated": False}
        body |= {"private": repository.private, "tags": card.get("tags", []), "cardData": card, "siblings": siblings}
        return Answer(200, body | times | named)

    def tree(self) -> Answer:
        files, recursive = self.at().files, self.query.get("recursive", [""])[0].lower() == "true"
        start = f"{self.groups['path']}/" if self.groups["path"] else ""
        entries: dict[str, dict[str, Any]] = {}
        for path in sorted(path for path in files if path.startswith(start)):
            folders = path[len(start) :].split("/")[:-1]
            for depth in range(1, 1 + (len(folders) if recursive else min(len(folders), 1))):
                folder = start + "/".join(folders[:depth])
                oid = hashlib.sha1(folder.encode()).hexdigest()
                entries[folder] = {"type": "directory", "path": folder, "oid": oid, "size": 0}
            if recursive or not folders:
                entries[path] = files[path].entry(path)
        if start and not entries:
            raise refusal(404, f"{self.groups['path']} does not exist", "EntryNotFound")
        return Answer(200, list(entries.values()))

    def download(self) -> Answer:
        at, path = self.at(), self.groups["path"]
        if path not in at.files:
            raise refusal(404, "Entry not found", "EntryNotFound", X_Repo_Commit=at.oid)
        file, size = at.files[path], len(at.files[path].content)
        headers = {"X-Repo-Commit": at.oid, "ETag": f'"{file.oid}"'}
        if file.lfs:
            headers |= {"X-Linked-Size": str(size), "X-Linked-Etag": f'"{file.oid}"'}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or ""):  # as streams read
            first, last = int(part[1]), min(int(part[2] or size), size - 1)
            headers |= {"Content-Range": f"bytes {first}-{last}/{size}"}
            return Answer(206, file.content[first : last + 1], headers)
        return Answer(200, file.content, headers)


def control(name: str, wanted: dict[str, Any]) -> Answer:
    """What `Hub` asks for, beside the protocol."""
    if name == "fail":
        FAILING[wanted["route"]] = wanted["fault"], math.inf if wanted["times"] is None else wanted["times"]
        if wanted["times"] == 0:
            del FAILING[wanted["route"]]
    elif name == "add":
        REPOSITORIES["model", wanted["id"]] = Repository("model", wanted["id"], private=False)
    elif name == "repository":
        if (repository := REPOSITORIES.get((wanted["kind"], wanted["id"]))) is None:
            return Answer(200, None)
        files = {path: file.content.decode("latin-1") for path, file in repository.at("main").files.items()}
        titles = [commit.title for commit in repository.branches["main"]]
        return Answer(200, {"private": repository.private, "files": files, "commits": titles})
    return Answer(200, REQUESTS)


class Server(ThreadingHTTPServer):
    request_queue_size = 64

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


def main() -> None:
    with Server(("127.0.0.1", 0), Handler) as server:
        if "--attached" in sys.argv:  # ends with the process that started it, however that ends
            threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
        print(server.server_port, flush=True)
        server.serve_forever()


# ---- The other side


class Hub:
    """Starts the server and steers it; given an `endpoint`, steers one that another process started."""

    def __init__(self, endpoint: str = "") -> None:
        self.endpoint = endpoint

    def __enter__(self) -> Hub:
        self._folder = tempfile.TemporaryDirectory(prefix="hub-", ignore_cleanup_errors=True)
        command = [sys.executable, __file__, "--attached"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.endpoint = f"http://127.0.0.1:{int(self._process.stdout.readline())}"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()

    def _control(self, name: str, **wanted: Any) -> Any:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(self.endpoint + CONTROL + name, json.dumps(wanted).encode(), timeout=60) as answer:
            return json.load(answer)

    def environment(self, token: str | None = WRITE_TOKEN, **more: str) -> dict[str, str]:
        """For a process that talks to this Hub and to no other."""
        foreign = ("HF_", "HUGGING", "TRANSFORMERS_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        environment = {name: value for name, value in os.environ.items() if not name.upper().startswith(foreign)}
        environment |= {"HF_ENDPOINT": self.endpoint, "HF_HOME": self._folder.name}
        environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        environment |= {"PYTHONPATH": str(Path(__file__).parent.parent)} | ({"HF_TOKEN": token} if token else {})
        return environment | more

    def add(self, repo_id: str) -> None:
        """An empty public model, whoever owns it."""
        self._control("add", id=repo_id)

    def _repository(self, repo_id: str, repo_type: str) -> dict[str, Any]:
        if (repository := self._control("repository", kind=repo_type, id=repo_id)) is None:
            raise KeyError(f"No {repo_type} {repo_id} here")
        return repository

    def files(self, repo_id: str, repo_type: str = "model") -> dict[str, bytes]:
        """What main holds, with the `.gitattributes` that every repository is created with."""
        files = self._repository(repo_id, repo_type)["files"]
        return {path: content.encode("latin-1") for path, content in files.items()}

    def commits(self, repo_id: str, repo_type: str = "model") -> list[str]:
        """The titles, oldest first, without the "initial commit" of the creation."""
        return self._repository(repo_id, repo_type)["commits"][1:]

    def is_private(self, repo_id: str, repo_type: str = "model") -> bool:
        return self._repository(repo_id, repo_type)["private"]

    def fail(self, route: str, fault: str, times: int | None = None) -> None:
        """Let the next requests of a route (of `ROUTES`, which goes before "any") fail as `FAULTS` says.

        None is for ever, 0 ends it.
        """
        if route not in {*ROUTES, "any"} or fault not in FAULTS or (fault == "409" and route != "commit"):
            raise ValueError(f"The Hub knows no fault {fault} of {route}")
        self._control("fail", route=route, fault=fault, times=times)

    def requests(self) -> list[str]:
        """Every request as "METHOD path", in order."""
        return self._control("requests")


if __name__ == "__main__":
    main()
