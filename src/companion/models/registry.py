"""Published files by name: where they are, how they arrive whole, and the promise that they stay the same.

    entry = find("aid/fastmri-320-cplx")
    files = fetch(entry)                # from the cache if it is there, else from the Hugging Face Hub; checked
    files.path, files.sha256, files.revision

`registry.yaml` beside this module lists what is known. The transfer is huggingface_hub's: its cache, tokens,
offline mode (HF_HUB_OFFLINE) and HF_ENDPOINT for mirrors. It does not look at what arrives, so every file is
hashed here, after each download and before each conversion, and compared with three things: the hash under which
the hub lists it, the one in the registry, and the one that the first download recorded in `lock.json`.

Nothing here opens a file's content or needs torch; the hub's client, slow to import, is imported where it is used.
"""

from __future__ import annotations

import errno
import fnmatch
import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from companion.files import atomic_write, sha256

ROUNDING = 0.02  # relative; how far a size shown by the hub ("557 MB") may be from the true one
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Entry:
    """A published model or data set. Without `repo` it is a slot for weights that nobody has published."""

    name: str
    title: str = ""
    repo: str | None = None
    file: str = ""  # in the repository; with a * all files of that pattern
    revision: str | None = None  # a commit pins it; None or a branch is recorded at the first download
    bytes: int | None = None
    about: int | None = None  # as `bytes`, rounded
    sha256: str | None = None
    kind: str = "data"  # how companion.models.kinds reads it
    config: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""  # where a file without `repo` is to be had by hand
    licence: str = "not stated"
    citation: str = ""
    training: str = "not stated"
    metrics: str = "none"
    use: str = "research; not for clinical use"

    @property
    def key(self) -> str:
        """Under which lock.json keeps it."""
        return f"{self.repo}@{self.revision or 'main'}:{self.file}"

    @property
    def size(self) -> int | None:
        """Bytes, perhaps rounded."""
        return self.bytes or self.about


@dataclass(frozen=True)
class File:
    """A file in the cache of the hub client, checked."""

    path: Path
    revision: str
    sha256: str
    bytes: int
    etag: str | None  # the hub's own hash: a SHA-256 for large files, a git hash for small ones


@dataclass(frozen=True)
class Files:
    """What an entry consists of, by name in its repository."""

    files: dict[str, File]

    @property
    def path(self) -> Path:
        return next(iter(self.files.values())).path

    @property
    def revision(self) -> str:
        return next(iter(self.files.values())).revision

    @property
    def sha256(self) -> str:
        return next(iter(self.files.values())).sha256


# ----------------------------------------------------------------------------------------------------
# Names


def home() -> Path:
    """The user's folder for converted weights, lock.json and registry.yaml: COMPANION_HOME or ~/.cache/companion."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("COMPANION_HOME") or Path(cache) / "companion")


def entries() -> dict[str, Entry]:
    """All entries by name: the package's, then those of a registry.yaml in `home()`, which win."""
    own = home() / "registry.yaml"
    return _read(Path(__file__).with_name("registry.yaml")) | (_read(own) if own.exists() else {})


@functools.lru_cache
def _read(path: Path) -> dict[str, Entry]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return {name: Entry(name, **facts) for name, facts in content.items() if not name.startswith("x-")}
    except (yaml.YAMLError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no registry: {error}") from error


def find(name: str) -> Entry | None:
    """The entry of a name, or of its last part if that is unique ("image_seq"); None if there is none."""
    known = entries()
    if name not in known:
        (name, *others) = [full for full in known if full.rpartition("/")[2] == name] or [name]
        if others:
            return None
    return known.get(name)


# ----------------------------------------------------------------------------------------------------
# The lock


def lock_file() -> Path:
    return home() / "lock.json"


def recorded(entry: Entry) -> dict | None:
    """What the first verified download of an entry recorded: commit, date, files with hash and size."""
    return _lock().get(entry.key)


def _lock() -> dict:
    try:
        return json.loads(lock_file().read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(
            f"{lock_file()} is not JSON ({error}). It says which downloads are trusted: restore it, or delete it "
            "to trust the next download of each file as the first"
        ) from error


def _record(entry: Entry, found: Files) -> None:
    files = {name: {"sha256": f.sha256, "bytes": f.bytes, "etag": f.etag} for name, f in found.files.items()}
    about = {"commit": found.revision, "date": f"{datetime.now(UTC):%Y-%m-%d}", "files": files}
    with one_at_a_time("lock.json"):
        content = _lock() | {entry.key: about}
        with atomic_write(lock_file()) as aside:
            aside.write_text(json.dumps(content, indent=2) + "\n")


@contextmanager
def one_at_a_time(what: str) -> Iterator[None]:
    """Makes other processes that want the same thing wait. The system frees it when a process is killed."""
    from huggingface_hub.utils import WeakFileLock

    path = home() / "locks" / f"{what.replace('/', '--')}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(path):
        yield


# ----------------------------------------------------------------------------------------------------
# Fetching


def fetch(entry: Entry, accept_change: bool = False) -> Files:
    """The entry's files, in the hub client's cache and checked; downloads what is missing.

    accept_change: take what the hub has now, whatever was recorded or listed, and record that.

    Raises ValueError for bytes other than the expected ones and for entries that nobody has published,
    FileNotFoundError for a repository, revision or file that does not exist or cannot be had offline,
    PermissionError for a gated one, OSError for a full disk or a broken connection.
    """
    if entry.repo is None:
        known = "these weights are on no hub" if entry.source else "nobody has published these weights"
        raise ValueError(f"{entry.name}: {known}. {how_to_make(entry)}")
    repo = entry.repo
    if accept_change:
        entry = replace(entry, bytes=None, about=None, sha256=None)
    with one_at_a_time(entry.key):
        known = None if accept_change else recorded(entry)
        revision = known["commit"] if known else entry.revision or "main"
        with explained(entry.name, repo, revision, known):
            names = list(known["files"]) if known else _names(entry, revision)
            found = Files({name: take(repo, name, revision, entry.name, _expected(entry, known, name))
                           for name in names})  # fmt: skip
        if len({file.revision for file in found.files.values()}) > 1:
            raise ValueError(f"{entry.name} changed while it was downloaded; try again")
        if known is None:
            _record(entry, found)
    return found


def cached(entry: Entry) -> Files | None:
    """The entry's files as they were recorded, if all are in the cache; not hashed, no network."""
    known = recorded(entry) if entry.repo else None
    if known is None or entry.repo is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    files = {}
    for name, about in known["files"].items():
        path = try_to_load_from_cache(entry.repo, name, revision=known["commit"])
        if not isinstance(path, str):
            return None
        files[name] = File(Path(path), known["commit"], **about)
    return Files(files)


def take(repo: str, file: str, revision: str, label: str, expected: Expected | None = None) -> File:
    """One file of a hub repository, from the cache or downloaded, and checked.

    A damaged file is downloaded once more, and removed if that does not help.
    """
    from huggingface_hub import HfApi, constants

    expected, api = expected or Expected(), HfApi()
    plan = api.hf_hub_download(repo, file, revision=revision, dry_run=True)
    if plan.will_download and plan.file_size is not None:
        expected.check_size(label, plan.file_size)
        check_space(Path(constants.HF_HUB_CACHE), plan.file_size, label)
    for force in (False, True):
        path = Path(api.hf_hub_download(repo, file, revision=revision, force_download=force))
        found = _inspect(path)
        wrong = expected.differs(found)
        if not wrong:
            return found
        if constants.is_offline_mode() or (found.etag and wrong != "damaged"):
            break
    if wrong == "damaged":
        blob = path.resolve()
        path.unlink(missing_ok=True)
        blob.unlink(missing_ok=True)
        raise ValueError(
            f"{label}: {file} is damaged: its SHA-256 is {found.sha256[:12]}..., not what the hub lists for it. The "
            "copy was removed; try again, or without a mirror or proxy"
        )
    raise ValueError(
        f"{label}: {repo} now holds another {file} ({found.bytes:,} bytes, SHA-256 {found.sha256[:12]}...) than the "
        f"one that {wrong} ({(expected.sha256 or '')[:12]}...). It is refused: results would not be comparable, and "
        f"someone may have tampered with it. If you know why it changed: companion weights pull {label} --accept-change"
    )


@dataclass(frozen=True)
class Expected:
    """What is known of a file before it is there, and who said so."""

    bytes: int | None = None
    about: int | None = None
    sha256: str | None = None
    source: str = ""

    def check_size(self, label: str, size: int) -> None:
        if self.bytes is not None and size != self.bytes:
            exact = f"{self.bytes:,}"
        elif self.bytes is None and self.about is not None and abs(size - self.about) > ROUNDING * self.about:
            exact = f"about {self.about:,}"
        else:
            return
        raise ValueError(
            f"{label}: the hub offers a file of {size:,} bytes where {exact} are expected, so it has changed. Nothing "
            f"was downloaded. If you know why: companion weights pull {label} --accept-change"
        )

    def differs(self, found: File) -> str | None:
        """None if the file is as expected, "damaged", or who expected another one."""
        if found.etag and found.etag not in (found.sha256, _git_hash(found)):
            return "damaged"
        return None if self.sha256 in (None, found.sha256) else self.source


def _expected(entry: Entry, known: dict | None, name: str) -> Expected:
    if known:
        about = known["files"][name]
        return Expected(about["bytes"], None, about["sha256"], f"was verified on {known['date']}")
    if "*" in entry.file:
        return Expected()
    return Expected(entry.bytes, entry.about, entry.sha256, "the registry lists")


def _names(entry: Entry, revision: str) -> list[str]:
    if "*" not in entry.file:
        return [entry.file]
    from huggingface_hub import HfApi

    assert entry.repo is not None  # `pull` has seen to it
    everything = HfApi().list_repo_files(entry.repo, revision=revision)
    names = sorted(fnmatch.filter(everything, entry.file))
    if not names:
        raise FileNotFoundError(f"{entry.name}: {entry.repo} holds no {entry.file} at {revision}")
    return names


def _inspect(path: Path) -> File:
    digest = sha256(path)
    # snapshots/<commit>/<file> is a link to blobs/<etag>, except where the system knows no links
    etag = Path(os.readlink(path)).name if path.is_symlink() else None
    commit = next((part for part in path.parts[::-1] if COMMIT.fullmatch(part)), "")
    return File(path, commit, digest, path.stat().st_size, etag)


def _git_hash(found: File) -> str | None:
    """The hash by which git, and so the hub, knows a small file."""
    if not COMMIT.fullmatch(found.etag or ""):
        return None
    digest = hashlib.sha1(b"blob %d\0" % found.bytes, usedforsecurity=False)
    digest.update(found.path.read_bytes())
    return digest.hexdigest()


def check_space(folder: Path, size: int, label: str) -> None:
    """Raises OSError unless the disk of `folder` has room for `size` bytes and a little more."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < size * 1.02 + 2**24:
        raise OSError(
            f"{label} needs {size / 1e6:,.0f} MB in {folder}, where {free / 1e6:,.0f} MB are free; make room (hf cache "
            "prune), or set HF_HOME and COMPANION_HOME to a larger disk"
        )


def moved(entry: Entry) -> str | None:
    """A sentence if the hub has other bytes by now than the recorded ones, which stay in use; else None.

    None too when the hub cannot be asked.
    """
    known = recorded(entry)
    if known is None or COMMIT.fullmatch(entry.revision or ""):
        return None
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    revision, api = entry.revision or "main", HfApi()
    assert entry.repo is not None  # what was recorded was published
    try:
        for name, about in known["files"].items():
            url = hf_hub_url(entry.repo, name, revision=revision, endpoint=api.endpoint)
            now = api.get_hf_file_metadata(url=url)
            if now.etag != about["etag"]:
                return (
                    f"{entry.name}: {entry.repo} has changed {name} since {known['date']} (now commit "
                    f"{(now.commit_hash or '?')[:12]}). The change is refused: the verified file of commit "
                    f"{known['commit'][:12]} stays in use. To take the new one: companion weights pull {entry.name} "
                    "--accept-change"
                )
    except (OSError, HTTPError):
        pass
    return None


def how_to_make(entry: Entry) -> str:
    """What to do about weights that are on no hub: get them by hand, or make them."""
    if entry.source:
        convert = f"companion weights convert FILE --kind {entry.name} --out FOLDER"
        return f"get {entry.file} from {entry.source}, then: {convert}"
    paper = entry.name.partition("/")[0]
    return (
        f"Train them (companion run notebooks/{paper}/2_train.ipynb), or convert a file of your own (companion weights "
        f"convert FILE --kind {entry.kind} --out FOLDER)"
    )


@contextmanager
def explained(label: str, repo: str, revision: str, known: dict | None = None) -> Iterator[None]:
    """Turns the hub client's errors into one sentence each: what happened, and what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at, place = constants.ENDPOINT, f"{repo} at {revision[:12]}"
    try:
        yield
    except GatedRepoError as error:
        raise PermissionError(
            f"{label}: {repo} is gated: accept its conditions at {at}/{repo}, then log in with `hf auth login` or set "
            "HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{label}: {at} has no repository {repo}, or it is private; if it is yours, log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        since = f"; it was verified on {known['date']} and is gone from the hub since" if known else ""
        raise FileNotFoundError(
            f"{label}: {repo} has no revision {revision}{since}. Another version is not taken silently: ask the "
            f"authors, or companion weights pull {label} --accept-change"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        if constants.is_offline_mode():
            reason = "is not in the cache and HF_HUB_OFFLINE is set: fetch it where there is a network, with"
        else:
            reason = f"is not in the cache and {at} cannot be reached: when it can, run"
        raise FileNotFoundError(f"{label} {reason} companion weights pull {label}") from error
    except EntryNotFoundError as error:
        named = re.search(r"/resolve/[^/]+/(\S+?)\.?\s", f"{error} ")
        raise FileNotFoundError(
            f"{label}: {place} does not hold {named[1] if named else 'the file'}; it may have been renamed: look at "
            f"{at}/{repo}"
        ) from error
    except HfHubHTTPError as error:
        if getattr(error.response, "status_code", None) == 401:
            raise PermissionError(
                f"{label}: {at} does not accept your token: it has expired or was revoked. Log in again with `hf auth "
                "login`, or log out (`hf auth logout`, unset HF_TOKEN): public repositories need no token"
            ) from error
        raise OSError(f"{label}: {at} answered {error}; try again later") from error
    except (HTTPError, ConnectionError) as error:
        raise OSError(
            f"{label}: the connection to {at} broke ({type(error).__name__}). Nothing incomplete is used; run the "
            "command again (what had arrived of the file is downloaded again)"
        ) from error
    except OSError as error:
        if str(error).startswith(label):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            reason = "the disk is full; free some space and try again"
        else:
            reason = f"{error}; try again"
        raise OSError(f"{label}: nothing incomplete is used: {reason}") from error
