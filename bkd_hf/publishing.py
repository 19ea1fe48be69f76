"""What goes to the Hub: a finished run, a long-tailed split, or the metric, each by an allow-list in one commit."""

from __future__ import annotations

import functools
import getpass
import json
import os
import re
import shlex
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from .errors import InputError, PublishError, first_line
from .model_card import build, of_teacher
from .plots import save_plots
from .results import RESULTS_NAME, load_results, save_json
from .run_folder import read_json
from .splits import SPLIT_NAME, split_files

_T = TypeVar("_T")

CARD_NAME = "README.md"
TEACHER_FOLDER = "teacher"
#: What is pushed of a run, beside the code of a model that is not part of transformers.
MODEL_FILES = (
    CARD_NAME, "config.json", "preprocessor_config.json", "model*.safetensors", "model.safetensors.index.json",
    "tokenizer*.json", "special_tokens_map.json", "vocab.*", "merges.txt", RESULTS_NAME, "figures/*.png",
)  # fmt: skip
_METRIC_FILES = (CARD_NAME, "long_tail.py", "metrics.py", "app.py", "requirements.txt")
_TEXT_FILES = {".json", ".md", ".py", ".txt"}
_TOKEN = re.compile(rb"hf_[A-Za-z0-9]{20,}")
#: Seconds for which a request that failed for a passing reason is tried again.
PATIENCE = 20.0
_TRANSIENT_STATUSES = {408, 409, 429, 500, 502, 503, 504}
_REASONS = {
    400: "the Hub refuses it as invalid",
    401: "the Hub does not accept the token: log in anew by `hf auth login`, or give a token with write access",
    402: "the Hub asks for payment",
    403: "the token has no write access there: give another token, or a repository of your own",
    404: "there is no such repository or branch, or the token may not see it",
    409: "somebody else is committing to the repository",
    413: "the Hub finds it too large",
    429: "the Hub has had too many requests from you: wait some minutes",
}


@dataclass(frozen=True)
class Publication:
    """What is published of a folder.

    Attributes:
        repo_type: `"model"`, `"dataset"` or `"space"`.
        files: Local path of each file, by its path in the repository.
        cards: Content of files that are written for the occasion, by path in the repository.
    """

    repo_type: str
    files: dict[str, Path]
    cards: dict[str, str]

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of all that is pushed, by path in the repository."""
        sizes = {name: path.stat().st_size for name, path in self.files.items()}
        return dict(sorted({**sizes, **{name: len(text.encode()) for name, text in self.cards.items()}}.items()))


def publish_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    license: str | None = None,
    dataset_id: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    **card_options: Any,
) -> str:
    """Push what a folder holds for others, in one commit: all of it arrives, or nothing.

    A second push of the same changes nothing. Passing failures (no connection, 429, 5xx, …) are tried again for about
    20 seconds.

    Args:
        folder: Output folder of a finished run, of `make_long_tailed.py`, or the folder of the metric.
        repo_id: `USER/NAME`, or `NAME` for the token's own user. Made if it is not there.
        private: Whether a new repository is private.
        token: With write access; the stored one if not given.
        license: For the card.
        dataset_id: Id on the Hub of the training data, where it was read from a folder.
        revision: Branch.
        commit_message: Title of the commit.
        card_options: Further arguments of [`bkd_hf.model_card.build`].

    Returns:
        The URL of the repository.

    Raises:
        InputError: If there is nothing finished in the folder, the id is malformed, there is no token, or a file holds
            what should not leave this machine.
        PublishError: If the Hub does not take it.
    """
    publication = prepare(folder, repo_id, license=license, dataset_id=dataset_id, **card_options)
    check_publication(publication, token)
    retry = f"python scripts/publish.py {shlex.quote(str(folder))} --repo_id {shlex.quote(repo_id)}"
    given = {"license": license, "dataset_id": dataset_id, "revision": revision}
    retry += " --private" if private else ""
    retry += "".join(f" --{name} {shlex.quote(value)}" for name, value in given.items() if value)
    with_hub = functools.partial(_with_hub, repo_id=repo_id, way_out=f"Nothing is lost: `{retry}` tries again.")
    url = with_hub(lambda: _open_repository(repo_id, publication.repo_type, private, token))
    write_cards(publication, folder)
    with_hub(
        lambda: HfApi().create_commit(
            repo_id=url.repo_id,
            repo_type=publication.repo_type,
            # Made anew for each attempt: an operation remembers that it was begun.
            operations=[
                CommitOperationAdd(name, text.encode()) for name, text in publication.cards.items()
            ] + [CommitOperationAdd(name, str(path)) for name, path in publication.files.items()],
            commit_message=commit_message or "Publish with bkd_hf",
            revision=revision,
            token=token,
        )
    )  # fmt: skip
    return str(url)


def prepare(
    folder: str | os.PathLike[str],
    repo_id: str,
    license: str | None = None,
    dataset_id: str | None = None,
    **card_options: Any,
) -> Publication:
    """Find out what would be published of a folder (arguments as [`publish_folder`]); nothing is sent.

    Raises:
        InputError: If there is nothing finished in the folder, or the id is malformed.
    """
    check_repo_id(repo_id)
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}.")
    is_metric, is_split = (folder / "long_tail.py").exists(), (folder / SPLIT_NAME).exists()
    if (is_metric or is_split) and (license or dataset_id):
        raise InputError(f"{folder} has a card of its own: --license and --dataset_id are for the card of a student.")
    if is_metric:
        return Publication("space", _existing(folder, _METRIC_FILES), {})
    if is_split:
        return Publication("dataset", split_files(folder), {})
    if not (folder / RESULTS_NAME).exists():
        raise InputError(
            f"{folder} is no finished run: it has no {RESULTS_NAME}. An interrupted run is continued by the command "
            "that began it."
        )
    results = load_results(folder)
    files = _existing(folder, [*MODEL_FILES, *_own_code(folder)])
    if "config.json" not in files or not any(name.endswith(".safetensors") for name in files):
        raise InputError(f"{folder} has {RESULTS_NAME}, but no model (config.json and model.safetensors).")
    files.pop(CARD_NAME, None)
    card = build(results, repo_id, license, dataset_id, **card_options)
    return Publication("model", files, {CARD_NAME: str(card)})


def write_cards(publication: Publication, folder: str | os.PathLike[str]) -> list[Path]:
    """Write the cards into the folder too, so that it holds what a reader sees on the Hub; return their paths."""
    paths = [Path(folder) / name for name in publication.cards]
    for path, text in zip(paths, publication.cards.values(), strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


def folders_of_run(folder: str | os.PathLike[str], repo_id: str, with_teacher: bool = False) -> dict[str, Path]:
    """Return what a run publishes: folders for [`publish_folder`], by repository; a teacher's is `REPO_ID-teacher`.

    Raises:
        InputError: If no teacher was trained in that run.
    """
    folders = {repo_id: Path(folder)}
    if with_teacher:
        folders[f"{repo_id}-teacher"] = prepare_teacher(folder)
    return folders


def prepare_teacher(folder: str | os.PathLike[str]) -> Path:
    """Make the teacher that was trained in a run publishable on its own: with results and figures.

    Args:
        folder: Output folder of the finished run.

    Returns:
        The teacher's folder, for [`publish_folder`].

    Raises:
        InputError: If no teacher was trained in that run.
    """
    results, teacher = load_results(folder), Path(folder) / TEACHER_FOLDER
    if not (results["teacher"] or {}).get("training") or not teacher.is_dir():
        raise InputError(
            f"--push_teacher: no teacher was trained in {folder}; one that was given is where it comes from."
        )
    save_json(of_teacher(results), teacher / RESULTS_NAME)
    save_plots(of_teacher(results), teacher / "figures")
    return teacher


def check_repo_id(repo_id: str) -> None:
    """Raise an `InputError` unless this can be the id of a repository."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(
            f"{repo_id!r} cannot be the id of a repository: expected USER/NAME, of letters, digits, '-', '_' and '.'."
        ) from error


def check_repo_access(
    repo_id: str, token: str | None = None, repo_type: str = "model", private: bool | None = None
) -> None:
    """Find or make the repository, so that a wrong name or token is noticed before long work.

    Where the Hub cannot be reached, or has a fault, nothing is known yet, which is said by a warning.

    Args:
        repo_id: As for [`publish_folder`].
        token: As for [`publish_folder`].
        repo_type: `"model"`, `"dataset"` or `"space"`.
        private: Whether a new repository is private.

    Raises:
        InputError: If the id is malformed, or there is no token.
        PublishError: If the Hub refuses.
    """
    check_repo_id(repo_id)
    _check_token(token)
    way_out = "It was tried before any work began. Leave --push_to_hub out to go on without."
    try:
        _with_hub(
            lambda: _open_repository(repo_id, repo_type, private, token), repo_id=repo_id, way_out=way_out, patience=2
        )
    except PublishError as error:
        if not error.is_temporary:
            raise
        reason = str(error).removesuffix(f" {way_out}")
        warnings.warn(f"{reason} It is tried again when there is something to publish.", stacklevel=2)


# ---- What is pushed ------------------------------------------------------------------------------------------------


def _existing(folder: Path, patterns: Iterable[str]) -> dict[str, Path]:
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {path.relative_to(folder).as_posix(): path for path in sorted(found)}


def _own_code(folder: Path) -> list[str]:
    """Files with the code of a model that is not part of transformers, as its configuration names them."""
    config = read_json(folder / "config.json") or {}
    classes = [
        name
        for names in config.get("auto_map", {}).values()
        for name in ([names] if isinstance(names, str) else names)
    ]
    # "repository--module.Class" is code that stays where it is.
    return sorted({f"{name.split('.')[0]}.py" for name in classes if name and "--" not in name})


def check_publication(publication: Publication, token: str | None = None) -> None:
    """Refuse what should not leave this machine: tokens, and the folders of its user.

    Raises:
        InputError: Naming the file.
    """
    _check_token(token)
    home = str(Path.home())
    secrets = {
        "a token": [secret.encode() for secret in (token, get_token()) if secret],
        "the path of your home folder": [home.encode() + b"/"] if len(home) > 1 else [],
        "a path with your user name": [f"/{part}/{getpass.getuser()}/".encode() for part in ("home", "Users")],
    }
    texts = {name: path.read_bytes() for name, path in publication.files.items() if path.suffix in _TEXT_FILES}
    for name, content in {**texts, **{name: text.encode() for name, text in publication.cards.items()}}.items():
        found = [what for what, values in secrets.items() if any(value in content for value in values)]
        if _TOKEN.search(content):
            found.append("a token")
        if found:
            raise InputError(f"{name} holds {found[0]}, which is not for others: nothing was pushed. Remove it there.")


# ---- The Hub -------------------------------------------------------------------------------------------------------


def _check_token(token: str | None) -> None:
    if constants.HF_HUB_OFFLINE:
        raise InputError("HF_HUB_OFFLINE is set, so nothing can be pushed: unset it, or leave --push_to_hub out.")
    if token is None and get_token() is None:
        raise InputError(
            "There is no token for the Hub: log in by `hf auth login`, set HF_TOKEN, or give one with write access."
        )


def _open_repository(repo_id: str, repo_type: str, private: bool | None, token: str | None) -> Any:
    api = HfApi(token=token)
    sdk = "gradio" if repo_type == "space" else None
    url = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True, space_sdk=sdk)
    # create_repo is content with a repository that can be read.
    api.auth_check(url.repo_id, repo_type=repo_type, write=True)
    if private and not api.repo_info(url.repo_id, repo_type=repo_type).private:
        raise InputError(
            f"{url.repo_id} is there already, and public: make it private on the Hub first, or choose another name."
        )
    return url


def _with_hub(request: Callable[[], _T], repo_id: str, way_out: str, patience: float | None = None) -> _T:
    """Make a request, again while it fails for a passing reason; what is left ends in one message."""
    end, wait = time.monotonic() + (PATIENCE if patience is None else patience), 1.0
    while True:
        try:
            return request()
        except (HTTPError, OSError, RuntimeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            if str(error).startswith("Invalid metadata in README.md"):
                said = " ".join(str(error).split())
                raise PublishError(
                    f"{repo_id} could not be published: the Hub refuses its card. {said}", False
                ) from error
            cause = _http_error(error)
            if cause is None:
                raise
            status = _status(cause)
            is_temporary = status is None or status in _TRANSIENT_STATUSES
            wait = max(wait, _retry_after(cause))
            if is_temporary and time.monotonic() + wait <= end:
                time.sleep(wait)
                wait *= 2
                continue
            raise PublishError(
                f"{repo_id} could not be published: {_reason(cause, status)}. {way_out}", is_temporary
            ) from error


def _http_error(error: BaseException | None) -> BaseException | None:
    """The failed request behind an error: an upload in threads hides it in a RuntimeError.

    An answer that is no JSON, such as the error page of a proxy, comes out as a JSONDecodeError.
    """
    while error is not None and not isinstance(
        error, (HTTPError, ConnectionError, TimeoutError, json.JSONDecodeError)
    ):
        error = error.__cause__ or error.__context__
    return error


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _retry_after(error: BaseException) -> float:
    value = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
    return float(value) if value.isdigit() else 0.0


def _reason(error: BaseException, status: int | None) -> str:
    if status is None:
        return f"the Hub cannot be reached ({type(error).__name__}: {first_line(error)})"
    reason = _REASONS.get(status, "the Hub has a fault: try again later" if status >= 500 else first_line(error))
    said = getattr(error, "server_message", None)
    return f"{reason} ({status}{': ' + said if said and status in (400, 403, 409) else ''})"
