"""What goes to the Hub: a finished run, a long-tailed split, or the metric, each by an allow-list in one commit."""

from __future__ import annotations

import contextlib
import functools
import getpass
import json
import os
import re
import shlex
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_session, get_token
from huggingface_hub.errors import HTTPError

from .errors import InputError, PublishError, first_line
from .model_card import build, check_repo_id, choices_of_card
from .plots import figure_names, save_plots
from .results import RESULTS_NAME, load_results
from .run_folder import read_json
from .splits import PLACEHOLDER, SPLIT_NAME, split_files

_T = TypeVar("_T")

CARD_NAME = "README.md"
TEACHER_FOLDER = "teacher"
#: What is pushed of a run, beside the code of a model that is not part of transformers.
MODEL_FILES = (
    "config.json", "preprocessor_config.json", "model.safetensors", "model-*-of-*.safetensors",
    "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
    "vocab.txt", "merges.txt", RESULTS_NAME,
)  # fmt: skip
_METRIC_FILES = (CARD_NAME, "long_tail.py", "metrics.py", "app.py", "requirements.txt")
_TEXT_FILES = {".json", ".md", ".py", ".txt"}
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")
_ABSOLUTE_PATH = re.compile(r"(?<![\w.:/~-])/[\w.+@-]+/[\w.+@-]+")
_OF_EVERY_MACHINE = ("/bin", "/dev", "/etc", "/lib", "/proc", "/sys", "/usr")
#: Seconds for which a request that failed for a passing reason is tried again.
PATIENCE = 20.0
#: Seconds without a byte after which a connection counts as broken.
SILENCE = 120.0
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
    retry_options: str = "",
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
        license: For the card; what the card in the folder says if not given.
        dataset_id: Id on the Hub of the training data, where it was read from a folder; else as `license`.
        revision: Branch.
        commit_message: Title of the commit.
        retry_options: Further options of the command that an error names.
        card_options: Further arguments of [`bkd_hf.model_card.build`].

    Returns:
        The URL of the repository.

    Raises:
        InputError: If there is nothing finished in the folder, the id is malformed, there is no token, or a file holds
            what should not leave this machine.
        PublishError: If the Hub does not take it.
    """
    _check_token(token)
    about = {"license": license, "dataset_id": dataset_id, **card_options}
    publication = prepare(folder, repo_id, token=token, **about)
    retry = f"python scripts/publish.py {shlex.quote(str(folder))} --repo_id {shlex.quote(repo_id)}"
    given = {"license": license, "dataset_id": dataset_id, "revision": revision}
    retry += " --private" if private else ""
    retry += " --token …" if token and token != get_token() else ""
    retry += retry_options
    retry += "".join(f" --{name} {shlex.quote(value)}" for name, value in given.items() if value)
    with_hub = functools.partial(_with_hub, repo_id=repo_id, way_out=f"Nothing is lost: `{retry}` tries again.")
    url = with_hub(lambda: _open_repository(repo_id, publication.repo_type, private, token))
    if url.repo_id != repo_id:  # NAME alone; the card needs USER/NAME
        publication = prepare(folder, url.repo_id, token=token, **about)
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
    write_cards(publication, folder)
    return str(url)


def prepare(
    folder: str | os.PathLike[str],
    repo_id: str,
    license: str | None = None,
    dataset_id: str | None = None,
    token: str | None = None,
    **card_options: Any,
) -> Publication:
    """Find out what would be published of a folder (arguments as [`publish_folder`]); nothing is sent.

    Raises:
        InputError: If there is nothing finished in the folder, the id is malformed, or a file holds what should not
            leave this machine.
    """
    publication = _collect(folder, repo_id, license, dataset_id, **card_options)
    _check_contents(publication, Path(folder), token)
    return publication


def _collect(
    folder: str | os.PathLike[str], repo_id: str, license: str | None, dataset_id: str | None, **card_options: Any
) -> Publication:
    check_repo_id(repo_id)
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}.")
    is_metric, is_split = (folder / "long_tail.py").exists(), (folder / SPLIT_NAME).exists()
    if (is_metric or is_split) and (license or dataset_id):
        raise InputError(f"{folder} has a card of its own: --license and --dataset_id are for the card of a student.")
    if is_metric or is_split:
        files = _existing(folder, _METRIC_FILES) if is_metric else split_files(folder)
        text = files.pop(CARD_NAME).read_text(encoding="utf-8").replace(PLACEHOLDER, repo_id)
        return Publication("space" if is_metric else "dataset", files, {CARD_NAME: text})
    if not (folder / RESULTS_NAME).exists():
        raise InputError(
            f"{folder} is no finished run: it has no {RESULTS_NAME}. An interrupted run is continued by the command "
            "that began it."
        )
    results = load_results(folder)
    figures = [f"figures/{name}" for name in figure_names(results)]
    if not all((folder / name).exists() for name in figures):
        save_plots(results, folder / "figures")
    files = _existing(folder, [*MODEL_FILES, *_own_code(folder), *figures])
    if "config.json" not in files or not any(name.endswith(".safetensors") for name in files):
        raise InputError(f"{folder} has {RESULTS_NAME}, but no model (config.json and model.safetensors).")
    if not any(name.startswith(("preprocessor", "tokenizer")) for name in files):
        warnings.warn(
            f"{folder} has no preprocessor_config.json: the published model cannot be used by a pipeline. Save its "
            "image processor there (from Python: give it to the trainer as processing_class).",
            stacklevel=4,
        )
    given = {"license": license, "dataset_id": dataset_id, **card_options}
    told = {name: value for name, value in given.items() if value not in (None, [], ())}
    card = build(results, repo_id, **{**choices_of_card(folder / CARD_NAME), **told})
    return Publication("model", files, {CARD_NAME: str(card)})


def write_cards(publication: Publication, folder: str | os.PathLike[str]) -> list[Path]:
    """Write the card of a run into its folder too, so that it holds what a reader sees on the Hub; return its path.

    The cards of splits and of the metric stay as they are: they can be published under several names.
    """
    paths = [Path(folder) / name for name in publication.cards if publication.repo_type == "model"]
    for path in paths:
        path.write_text(publication.cards[path.name], encoding="utf-8")
    return paths


def publish_run(
    folder: str | os.PathLike[str], repo_id: str, with_teacher: bool = False, **options: Any
) -> Iterator[str]:
    """Publish a run, and its teacher if wanted.

    Args:
        folder: Output folder of the finished run.
        repo_id: Of the student.
        with_teacher: Whether the teacher that was trained in the run is published too, as `REPO_ID-teacher`.
        options: For [`publish_folder`].

    Yields:
        The URL of each repository.

    Raises:
        InputError: As `publish_folder`, or if no teacher was trained in that run.
        PublishError: If the Hub does not take it.
    """
    for name, part in folders_of_run(folder, repo_id, with_teacher).items():
        rest = " --push_teacher" if with_teacher and part == Path(folder) else ""
        yield publish_folder(part, name, retry_options=rest, **options)


def folders_of_run(folder: str | os.PathLike[str], repo_id: str, with_teacher: bool = False) -> dict[str, Path]:
    """Return what a run publishes: folders for [`publish_folder`], by repository; a teacher's is `REPO_ID-teacher`.

    Raises:
        InputError: If no teacher was trained in that run.
    """
    folders = {repo_id: Path(folder)}
    if with_teacher:
        folders[f"{repo_id}-teacher"] = folder_of_teacher(folder)
    return folders


def folder_of_teacher(folder: str | os.PathLike[str]) -> Path:
    """Find the teacher that was trained in a run.

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
    return teacher


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


def _check_contents(publication: Publication, folder: Path, token: str | None) -> None:
    """Refuse what should not leave this machine: tokens, and folders of this machine.

    Raises:
        InputError: Naming the file.
    """
    texts = {
        name: path.read_text(encoding="utf-8", errors="replace")
        for name, path in publication.files.items()
        if path.suffix in _TEXT_FILES
    }
    own_folders = _own_folders(folder)
    for name, content in {**texts, **publication.cards}.items():
        found = [f"a path of your machine ({path})" for path in own_folders if f"{path}/" in content]
        found += [f"a path of your machine ({path})" for path in _existing_paths(content)]
        if _TOKEN.search(content) or any(secret in content for secret in (token, get_token()) if secret):
            found.append("a token")
        if found:
            raise InputError(f"{name} holds {found[0]}, which is not for others: nothing was pushed. Remove it there.")


def _own_folders(folder: Path) -> list[str]:
    """Folders whose paths tell who and where one is."""
    places = [folder.resolve().parent, Path.cwd()]
    with contextlib.suppress(RuntimeError):  # a user without an entry in the system's list of users
        places += [Path.home(), Path.home().resolve()]
    with contextlib.suppress(OSError, KeyError):
        places += [Path("/home", getpass.getuser()), Path("/Users", getpass.getuser())]
    return [str(place) for place in dict.fromkeys(places) if len(place.parts) > 2 or place == Path("/root")]


def _existing_paths(content: str) -> list[str]:
    """Beginnings of absolute paths in a text, where these folders are on this machine."""
    starts = dict.fromkeys(_ABSOLUTE_PATH.findall(content))
    return [start for start in starts if not start.startswith(_OF_EVERY_MACHINE) and os.path.exists(start)]


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
    try:  # create_repo is content with a repository that can be read
        api.auth_check(url.repo_id, repo_type=repo_type, write=True)
    except HTTPError as error:
        if _status(error) in (401, 403):  # else nothing is known yet: not every Hub answers this
            raise
    if private and api.repo_info(url.repo_id, repo_type=repo_type).private is False:
        raise InputError(
            f"{url.repo_id} is there already, and public: make it private on the Hub first, or choose another name."
        )
    return url


def _with_hub(request: Callable[[], _T], repo_id: str, way_out: str, patience: float | None = None) -> _T:
    """Make a request, again while it fails for a passing reason; what is left ends in one message."""
    end, wait = time.monotonic() + (PATIENCE if patience is None else patience), 1.0
    while True:
        try:
            with _limited_silence():
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


@contextlib.contextmanager
def _limited_silence() -> Iterator[None]:
    """Have requests fail that get no byte for long; huggingface_hub would wait for ever."""
    client = get_session()
    before = client.timeout
    client.timeout = SILENCE
    try:
        yield
    finally:
        client.timeout = before


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
