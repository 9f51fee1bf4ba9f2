"""A small Hugging Face Hub on loopback, for the real client: repositories with commits, large files behind a redirect
to another host, uploads, and faults on demand.

    with Hub() as hub:
        commit = hub.commit("me/weights", {"model.pt": data})
        hub.faults["model.pt"] = flip                   # what is sent is flip(data)
"""

import base64
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

LARGE = 1000  # bytes from which a file is "large": sent by another host, known by its SHA-256


class Hub:
    def __init__(self):
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}  # repository -> commit -> file -> content
        self.heads: dict[str, str] = {}
        self.gated: set[str] = set()
        self.faults = {}  # file -> function of its bytes: what is sent instead
        self.cuts: dict[str, int] = {}  # file -> how many more times its connection breaks in the middle
        self.slow: dict[str, float] = {}  # file -> seconds to wait in the middle of it
        self.requests: list[tuple[str, str]] = []
        handler = type("Bound", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        """The new commit on main, which holds `files` besides the former ones."""
        commits = self.repos.setdefault(repo, {})
        files = commits.get(self.heads.get(repo), {}) | files
        name = hashlib.sha1(f"{repo}{len(commits)}{sorted(files)}".encode()).hexdigest()
        commits[name], self.heads[repo] = files, name
        return name

    def count(self, method: str, part: str = "") -> int:
        """How many requests there were so far."""
        return sum(m == method and part in path for m, path in self.requests)


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def reply(self, content, status=200):
        self.answer(status, json.dumps(content).encode(), Content_Type="application/json")

    def fail(self, status, code):
        self.answer(status, X_Error_Code=code, X_Error_Message=code)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(self.path.partition("?")[0])
        self.hub.requests.append((self.command, path))
        if found := re.fullmatch(r"/lfs/(\w+)/(.*)", path):
            return self.send_file(found[2], self.large(found[1]))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/(.+))?", path):
            commit = self.find(found[1], found[2] or "main")
            if commit:
                files = [{"rfilename": name} for name in self.hub.repos[found[1]][commit]]
                self.reply({"id": found[1], "sha": commit, "siblings": files, "private": False, "tags": []})
            return
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(\w+)", path):
            commit = self.find(found[1], found[2])
            if commit:
                files = self.hub.repos[found[1]][commit]
                self.reply([{"type": "file", "path": n, "size": len(b), "oid": git_hash(b)} for n, b in files.items()])
            return
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(*found.groups())
        self.fail(404, "EntryNotFound")

    def find(self, repo, revision) -> str | None:
        if repo not in self.hub.repos:
            return self.fail(401, "RepoNotFound")
        if repo in self.hub.gated and not self.headers.get("Authorization"):
            return self.fail(403, "GatedRepo")
        commit = self.hub.heads[repo] if revision == "main" else revision
        return commit if commit in self.hub.repos[repo] else self.fail(404, "RevisionNotFound")

    def resolve(self, repo, revision, file):
        commit = self.find(repo, revision)
        if commit is None:
            return
        content = self.hub.repos[repo][commit].get(file)
        if content is None:
            return self.fail(404, "EntryNotFound")
        if len(content) < LARGE:
            return self.send_file(file, content, ETag=f'"{git_hash(content)}"', X_Repo_Commit=commit)
        digest = hashlib.sha256(content).hexdigest()
        away = f"http://localhost:{self.hub.port}/lfs/{digest}/{file}"  # another host than 127.0.0.1
        self.answer(302, Location=away, X_Linked_Etag=f'"{digest}"', X_Linked_Size=str(len(content)),
                    X_Repo_Commit=commit)  # fmt: skip

    def large(self, digest):
        everything = (c for commits in self.hub.repos.values() for files in commits.values() for c in files.values())
        return next(c for c in everything if hashlib.sha256(c).hexdigest() == digest)

    def send_file(self, file, content, **headers):
        content = self.hub.faults.get(file, bytes)(content)
        whole, start = len(content), 0
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start = int(found[1])
            headers["Content_Range"] = f"bytes {start}-{whole - 1}/{whole}"
        self.send_response(206 if start else 200)
        for name, value in ({"Content-Length": str(whole - start)} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "HEAD":
            return
        middle = (start + whole) // 2
        self.wfile.write(content[start:middle])
        self.wfile.flush()
        if self.hub.cuts.get(file, 0):
            self.hub.cuts[file] -= 1
            self.close_connection = True
            return self.connection.shutdown(2)
        time.sleep(self.hub.slow.get(file, 0))
        self.wfile.write(content[middle:])

    # --- uploads

    def do_POST(self):
        self.hub.requests.append(("POST", self.path))
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self.chunks()
        if not self.headers.get("Authorization"):
            return self.fail(401, "RepoNotFound")
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if repo not in self.hub.repos:
                self.hub.commit(repo, {".gitattributes": b""})
            return self.reply({"url": f"{self.hub.url}/{repo}"})
        if self.path == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            # "regular": inside the commit. The true hub takes large files through its Xet service.
            paths = [f["path"] for f in json.loads(body)["files"]]
            return self.reply({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})
        if found := re.fullmatch(r"/api/models/(.+?)/commit/main.*", self.path):
            added = [line["value"] for line in map(json.loads, body.splitlines()) if line["key"] == "file"]
            commit = self.hub.commit(found[1], {f["path"]: base64.b64decode(f["content"]) for f in added})
            url = f"{self.hub.url}/{found[1]}/commit/{commit}"
            return self.reply({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})
        self.fail(404, "EntryNotFound")

    def chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline() or b"0", 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        return body


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
