"""Data sets of the hub -> files: parquet, jsonl, json or csv, pinned to a commit; no script is ever run."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from headstart.data.read import HUB_PREFIX, KINDS, SourceFile
from headstart.errors import DataError, Problem
from headstart.machine import offline

NAME = re.compile(r"hub:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(#(?P<split>[\w.-]+))?$")


def fetch_dataset(name: str) -> list[SourceFile]:
    """Fetch `hub:owner/name[@revision][#split]` (split: train) into the hub's own cache.

    Files whose path holds the split's name are taken, parquet before others; where the repository has none, the
    parquet files that the hub itself made of it. Raises DataError.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    match = NAME.match(name)
    if not match:
        raise DataError(
            Problem(
                "data.hub",
                "can't be read",
                name,
                "write hub:owner/name, hub:owner/name@revision or hub:owner/name#split",
            )
        )
    if offline():
        raise DataError(
            Problem("data.hub", "HEADSTART_OFFLINE=1 forbids the network", name, "unset it, or give local files")
        )
    repo, split = match["repo"], match["split"] or "train"
    try:
        api = HfApi()
        for revision in (match["revision"], "refs/convert/parquet"):
            info = api.dataset_info(repo, revision=revision)
            chosen = choose_files([s.rfilename for s in info.siblings or ()], split)
            if chosen:
                break
        else:
            cure = f"see the files at huggingface.co/datasets/{repo}; name a split with hub:{repo}#split"
            raise DataError(Problem("data.hub", f"no data file for the split {split!r}", name, cure))
        return [
            SourceFile(
                Path(hf_hub_download(repo, file, repo_type="dataset", revision=info.sha)),
                f"{HUB_PREFIX}{repo}/{file}",
                info.sha or "",
            )
            for file in chosen
        ]
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        cure = "check the name and the network; for gated data run `hf auth login` first"
        raise DataError(Problem("data.hub", str(error).splitlines()[0], name, cure)) from None


def choose_files(paths: list[str], split: str) -> list[str]:
    """Return the data files of a split: those of the first type that has any."""
    word = re.compile(rf"(?<![a-z0-9]){re.escape(split)}(?![a-z0-9])", re.IGNORECASE)
    for ending in (".parquet", *(e for e in KINDS if e != ".parquet")):
        files = sorted(p for p in paths if ending in PurePosixPath(p).suffixes)
        named = [p for p in files if word.search(p)]
        if named or len(files) == 1:
            return named or files
    return []
