"""Data sets of the hub -> files: parquet, jsonl, json or csv, pinned to a commit; no script is ever run.

What the hub is asked by anyone here is asked within limits: `bound_session`.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from headstart.data.read import HUB_PREFIX, KINDS, TEXTS, SourceFile
from headstart.errors import DataError, Problem
from headstart.machine import offline

OTHER_SPLITS = re.compile(r"(?<![a-z0-9])(test|validation|valid|val|dev|eval)(?![a-z0-9])", re.IGNORECASE)
SILENT_S = 30.0  # for so long the hub may say nothing
WAIT_S = 60  # so long is waited before it is asked again, at most five times, whatever it asks for
NAME = re.compile(r"hub:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(#(?P<split>[\w.-]+))?$")


def fetch_dataset(name: str) -> list[SourceFile]:
    """Fetch `hub:owner/name[@revision][#split]` (split: train) into the hub's own cache.

    Files whose path holds the split's name are taken, parquet before others; where the repository has none, the
    parquet files that the hub itself made of it. Raises DataError.
    """
    from huggingface_hub import hf_hub_download

    bound_session()
    with _hub_errors(name):
        repo, revision, files = _find_split(name)
        return [
            SourceFile(
                Path(hf_hub_download(repo, file, repo_type="dataset", revision=revision)),
                f"{HUB_PREFIX}{repo}/{file}",
                revision,
            )
            for file in files
        ]


def pin_dataset(name: str, files: Sequence[SourceFile]) -> str:
    """Return the name of a data set with the commit that its `files` came from."""
    match = NAME.match(name)
    if not match:
        return name
    revision = next(file.revision for file in files if file.name.startswith(f"{HUB_PREFIX}{match['repo']}/"))
    return f"{HUB_PREFIX}{match['repo']}@{revision}#{match['split'] or 'train'}"


def _find_split(name: str) -> tuple[str, str, list[str]]:
    """Return repository, commit and files."""
    from huggingface_hub import HfApi

    match = NAME.match(name)
    if not match:
        cure = "write hub:owner/name, hub:owner/name@revision or hub:owner/name#split"
        raise DataError(Problem("data.hub", "can't be read", name, cure))
    if offline():
        cure = "unset it, or give local files"
        raise DataError(Problem("data.hub", "HEADSTART_OFFLINE=1 forbids the network", name, cure))
    repo, split = match["repo"], match["split"] or ""
    for revision in (match["revision"], "refs/convert/parquet"):
        info = HfApi().dataset_info(repo, revision=revision)
        chosen = choose_files([s.rfilename for s in info.siblings or ()], split or "train", asked=bool(split))
        groups = sorted({_group(file) for file in chosen})
        if len(groups) > 1:
            cure = f"name one of them: hub:{repo}#SPLIT, or give its files"
            raise DataError(Problem("data.hub", f"several sets hold the split: {', '.join(groups)}", name, cure))
        if chosen:
            return repo, info.sha or "", chosen
    cure = f"see the files at huggingface.co/datasets/{repo}; name a split with hub:{repo}#split"
    raise DataError(Problem("data.hub", f"no data file for the split {split or 'train'!r}", name, cure))


@functools.cache
def bound_session() -> None:
    """Let no question to the hub wait without end: its library sets some no limit, and waits as long as a server asks."""
    from huggingface_hub import get_session, set_client_factory

    made = get_session()
    client, hooks = type(made), made.event_hooks["request"]
    set_client_factory(
        lambda: client(
            event_hooks={"request": [*hooks, _limit], "response": [_shorten_wait]},
            follow_redirects=True,
            timeout=SILENT_S,
        )
    )


def _limit(request: Any) -> None:
    given = request.extensions.get("timeout", {})
    names = ("connect", "read", "write", "pool")
    request.extensions["timeout"] = {name: min(given.get(name) or SILENT_S, SILENT_S) for name in names}


def _shorten_wait(response: Any) -> None:
    response.headers.pop("ratelimit", None)
    asked = response.headers.get("retry-after", "")
    if asked.isdigit() and int(asked) > WAIT_S:
        response.headers["retry-after"] = str(WAIT_S)


@contextlib.contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError  # type: ignore[attr-defined]

    try:
        yield
    except (HTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        cure = "check the name and the network; for gated data run `hf auth login` first"
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(Problem("data.hub", said, name, cure)) from None


def choose_files(paths: list[str], split: str, *, asked: bool = True) -> list[str]:
    """Return the data files of a split: those of the first type that has any.

    A lone file is taken for the split where the user `asked` for none and its name holds no other split's.
    """
    word = re.compile(rf"(?<![a-z0-9]){re.escape(split)}(?![a-z0-9])", re.IGNORECASE)
    # A repository's texts describe it.
    for ending in (".parquet", *(e for e in KINDS if e != ".parquet" and e not in TEXTS)):
        files = sorted(p for p in paths if ending in PurePosixPath(p).suffixes)
        named = [p for p in files if word.search(p)]
        if named:
            return named
        if len(files) == 1 and not asked and not OTHER_SPLITS.search(files[0]):
            return files
    return []


def _group(file: str) -> str:
    """Return what the parts of one set have in common: the path without the number of the part."""
    return re.sub(r"[-_]?\d+(-of-\d+)?(?=\.)", "", file).partition(".")[0]
