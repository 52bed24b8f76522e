"""A Hugging Face Hub on this machine, as small as the client lets it be: repositories are folders."""

import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

COMMIT = "c0ffee" + "0" * 34


class HubServer:
    """Serves `folders` (OWNER/NAME -> folder) for models and datasets alike; `asked` lists what came."""

    def __init__(self) -> None:
        self.folders: dict[str, Path] = {}
        self.refusals: dict[str, tuple[int, str]] = {}
        """Paths -> (status, what the Hub calls the error), for what is to fail."""
        self.asked: list[str] = []

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        if path in self.refusals:
            status, code = self.refusals[path]
            return status, {"X-Error-Code": code}, b"{}"
        named = path.removeprefix("/api").removeprefix("/models").removeprefix("/datasets")
        repository = "/".join(named.split("/")[1:3])
        if repository not in self.folders:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        folder = self.folders[repository]
        files = {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
        if path.startswith("/api/") and "/tree/" in path:
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            return 200, {}, json.dumps(tree).encode()
        if path.startswith("/api/"):
            siblings = [{"rfilename": name, "size": len(data), "blobId": "0"} for name, data in files.items()]
            return 200, {}, json.dumps({"_id": "0", "id": repository, "sha": COMMIT, "siblings": siblings}).encode()
        data = files[path.partition("/resolve/")[2].partition("/")[2]]
        return 200, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}, data


@contextlib.contextmanager
def serving(hub: HubServer) -> Iterator[str]:
    """The address at which it answers while the block runs."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(self.path.partition("?")[0])
            hub.asked.append(path)
            try:
                status, headers, body = hub.answer(path)
            except KeyError:
                status, headers, body = 404, {"X-Error-Code": "EntryNotFound"}, b"{}"
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def connect(patch: pytest.MonkeyPatch, address: str, cache: Path) -> None:
    """Let this process's Hub be the one at the address, and its cache that folder."""
    from huggingface_hub import constants

    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "ENDPOINT", address)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr("recipe.hub._found", {})
    patch.setattr("recipe.hub._said", set())
