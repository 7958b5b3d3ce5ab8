"""Uploads a saved adapter to the Hub: what of a folder goes up, and one commit that holds it.

`Adapter.push_to_hub` and `lora-adapters push` both use this. Planning an upload contacts nobody and imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .adapter_config import CONFIG_NAME, DIFFUSERS_NAME, WEIGHTS_NAME
from .adapter_file import AdapterFile, inspect_adapter, read_adapter
from .errors import CheckpointError, HubError, RequestError
from .staging import interrupted_config
from .tensor_file import Header, read_header, read_tensors

CARD = "README.md"
#: What an adapter's repository holds. Everything else in a folder stays at home: pickles, optimizer states, logs, data.
_ALLOWED = frozenset(
    {
        *(CONFIG_NAME, WEIGHTS_NAME, DIFFUSERS_NAME, CARD, "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
        *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
        *("source.spm", "target.spm", "chat_template.jinja", "chat_template.json"),
        *("preprocessor_config.json", "processor_config.json", "generation_config.json"),
    }
)
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")


@dataclass(frozen=True)
class UploadPlan:
    """What would go up. Names come from the folder.

    Attributes:
        adapter: the checked adapter, or the header of a file in diffusers' format.
        folder: where it lies.
        files: (name, bytes), what is uploaded.
        left_out: (name, why not).
        warnings: what keeps others from using it.
    """

    adapter: AdapterFile | Header
    folder: Path
    files: tuple[tuple[str, int], ...]
    left_out: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]


def plan_upload(path: str | Path) -> UploadPlan:
    """Check an adapter's config and header, and say which files would go up. Contacts nobody.

    Args:
        path: the adapter's folder, or the folder of a run that holds it as adapter/.

    Raises:
        CheckpointError: there is no adapter, it is damaged, or the last save to it was interrupted.
    """
    folder = Path(path)
    names = (WEIGHTS_NAME, DIFFUSERS_NAME)
    here, inside = ([(place / name).exists() for name in names] for place in (folder, folder / "adapter"))
    if not any(here) and any(inside):
        folder = folder / "adapter"
    image = (folder / DIFFUSERS_NAME).exists()
    adapter = read_header(folder / DIFFUSERS_NAME) if image else inspect_adapter(folder)
    if interrupted_config(folder):
        raise CheckpointError(f"The last save to {folder} was interrupted: restore it and save it again, then push.")
    files, left_out = [], []
    for entry in sorted(folder.iterdir()):
        reason = _why_not(entry)
        if reason:
            left_out.append((entry.name, reason))
        else:
            files.append((entry.name, entry.stat().st_size))
    return UploadPlan(adapter, folder, tuple(files), tuple(left_out), tuple(_warnings(adapter, folder)))


def upload(
    plan: UploadPlan, repo_id: str, *, private: bool | None = None, token: str | None = None, **options: Any
) -> str:
    """Upload an adapter as one commit, after reading all of its values once more.

    Args:
        plan: what `plan_upload` returned.
        repo_id: "name/repo"; created if missing.
        private: make a new repository private; None leaves that to the account. One that is there stays as it is.
        token: Hub token; None takes the one of the login.
        options: passed to `huggingface_hub.HfApi.upload_folder`; a branch named as `revision` is made if missing.

    Returns:
        The commit's address.

    Raises:
        CheckpointError: a value is not finite, or not the one that was saved. Nothing was sent.
        HubError: no token, no permission, or the Hub can't be reached. The repository holds all of the commit or nothing.
    """
    from huggingface_hub import HfApi

    check_repo_id(repo_id)
    if isinstance(plan.adapter, Header):
        read_tensors(plan.folder / DIFFUSERS_NAME, plan.adapter)
    else:
        read_adapter(plan.adapter)
    api = HfApi(token=token)
    with _one_line(repo_id):
        # The Hub's answer names the repository in full ("me/repo" for "repo").
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if (revision := options.get("revision")) is not None and not options.get("create_pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        names = [name for name, _ in plan.files]
        return str(api.upload_folder(repo_id=repo_id, folder_path=plan.folder, allow_patterns=names, **options))


def check_repo_id(repo_id: str) -> None:
    """Raise RequestError if the Hub can't have a repository of that name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise RequestError(f"{' '.join(str(error).split())} Give 'name/repo'.") from None


def _why_not(entry: Path) -> str:
    """Return why an entry of the folder stays at home, "" if it goes up."""
    if entry.is_symlink() and not entry.resolve().is_relative_to(entry.parent.resolve()):
        return "a link out of the folder"
    if entry.is_dir():
        return "a folder"
    if entry.name in _ALLOWED:
        return ""
    if entry.suffix in _PICKLES:
        return "may be a pickle, which can run code when read"
    return "no part of an adapter"


def _warnings(adapter: AdapterFile | Header, folder: Path) -> Iterator[str]:
    base = None if isinstance(adapter, Header) else adapter.config.get("base_model_name_or_path")
    if isinstance(adapter, Header):
        pass  # diffusers' file names no base: the card does
    elif not base:
        yield f"{CONFIG_NAME} names no base model, so others don't know what to load it on."
    elif _local(base):
        yield (
            f"{CONFIG_NAME} names the base model as a path of this machine ({_printable(base)}), which others can't load: "
            "set base_model_name_or_path to its name on the Hub."
        )
    if not (folder / CARD).is_file():
        yield f"there is no model card ({CARD}): others won't know what it is for."


def _local(base: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(base)
    except HFValidationError:
        return True
    return Path(base).exists()


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text[:200])


@contextmanager
def _one_line(repo_id: str) -> Iterator[None]:
    """Turn what the Hub and the network say into one line that tells what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        raise HubError(_refusal(status, repo_id, str(getattr(error, "server_message", None) or error))) from error
    except errors.OfflineModeIsEnabled:
        raise HubError("HF_HUB_OFFLINE is set, so the Hub is not contacted: unset it, then push again.") from None
    except (OSError, getattr(errors, "HTTPError", OSError)) as error:
        raise HubError(
            f"The Hub can't be reached ({_short(str(error))}): check the network, then push again."
        ) from error


def _refusal(status: int | None, repo_id: str, said: str) -> str:
    if status == 401:
        return (
            "The Hub does not accept the token, or there is none: run 'hf auth login', or set HF_TOKEN to one that can."
        )
    if status == 403:
        return f"The token may not write to {repo_id}: take one with write permission, or another repository."
    if status == 404:
        return (
            f"The Hub knows no {repo_id}, or the token may not see it ({_short(said)}): check the name and the token."
        )
    return f"The Hub refused the upload to {repo_id} (status {status}): {_short(said)}. Try again later."


def _short(text: str) -> str:
    return re.sub(r"\s+", " ", _printable(text)).strip().rstrip(".")
