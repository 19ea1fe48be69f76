"""Publishing on the Hub: a finished run, a long-tailed split or the metric, each by an allow-list, in one commit.

This uses `create_commit`. With hf_xet installed, `upload_folder` splits a large folder into several commits, and it
repeats a commit whose response was lost. `create_commit` skips files that already exist, so repeating a push makes no
new commit. It retries only uploads, so `_with_hub` retries the rest.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import getpass
import json
import os
import re
import shlex
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_session, get_token
from huggingface_hub.errors import HTTPError

from .card import build, choices_of_card, kept_edits
from .errors import InputError, PublishError, first_line
from .files import try_json, why_broken, write_text
from .plots import figure_names, save_plots
from .program import program
from .reading import read_text
from .results import ONNX_FILES, RESULTS_NAME, load_results
from .schema import check_repo_id
from .splits import PLACEHOLDER, SPLIT_NAME

_T = TypeVar("_T")

CARD_NAME = "README.md"
#: File in the app of a run (see `bkd_hf.spaces`) with its facts about each class.
FACTS_NAME = "classes.json"
TEACHER_FOLDER = "teacher"
#: What is pushed, by repository type; for a run also figures, export, and the code of a custom model.
_ALLOWED = {
    "model": (
        "config.json", "preprocessor_config.json", "model.safetensors", "model-*-of-*.safetensors",
        "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "*.model", RESULTS_NAME,
    ),
    "dataset": (CARD_NAME, "class_counts.png", SPLIT_NAME, "data/*.parquet"),
    "space": (
        CARD_NAME, "long_tail.py", "metrics.py", "app.py", "requirements.txt", FACTS_NAME, "examples/*.png",
        *(f"model/*{suffix}" for suffix in (".json", ".txt", ".safetensors", ".onnx", ".py")),
    ),
}  # fmt: skip
#: Files of which every publication has one.
_RECORDS = {"model": {RESULTS_NAME}, "dataset": {SPLIT_NAME}, "space": {FACTS_NAME, "long_tail.py"}}
_TEXT_FILES = {".json", ".md", ".py", ".txt"}
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")
_ABSOLUTE_PATH = re.compile(r"(?<![\w.:/~-])/[\w.+@-]+/[\w.+@-]+")
_OF_EVERY_MACHINE = ("/bin", "/dev", "/etc", "/lib", "/proc", "/sys", "/usr")
#: Seconds for which transient failures are retried.
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
    """The published part of a folder.

    Attributes:
        repo_type: `"model"`, `"dataset"` or `"space"`.
        files: Local path of each file except the card, by its path in the repository.
        card: Content of `README.md`, which names the repository.
    """

    repo_type: str
    files: dict[str, Path]
    card: str

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of everything that is pushed, by path in the repository."""
        sizes = {name: path.stat().st_size for name, path in self.files.items()}
        return dict(sorted({**sizes, CARD_NAME: len(self.card.encode())}.items()))

    def outdated(self, there: Iterable[str]) -> list[str]:
        """Return the files, among those in the repository, of an earlier publication that are no longer part of it."""
        there, patterns = [*there], _ALLOWED[self.repo_type]
        if _RECORDS[self.repo_type].isdisjoint(there):
            return []  # somebody else's files
        if self.repo_type == "model":
            patterns += ("figures/*.png", *ONNX_FILES.values())
        return [
            name
            for name in there
            if name not in self.files
            and name != CARD_NAME
            and any(name.count("/") == each.count("/") and fnmatch.fnmatch(name, each) for each in patterns)
        ]


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
    """Push the publishable part of a folder in one commit, completely or not at all.

    Repeating a push changes nothing. Files of an earlier publication that are no longer part of it are deleted.
    Transient failures (no connection, 429, 5xx, …) are retried for about 20 seconds.

    Args:
        folder: Output folder of a finished run, a split, or the folder of the metric.
        repo_id: `USER/NAME`, or `NAME` for the token's own user. Created if it does not exist.
        private: Whether a new repository is private.
        token: With write access; the stored one if not given.
        license: For the card; if not given, taken from the card in the folder.
        dataset_id: Id on the Hub of training data that was read from a folder; if not given, as for `license`.
        revision: Branch.
        commit_message: Title of the commit.
        retry_options: Further options of the command that an error names.
        card_options: Further arguments of [`bkd_hf.card.build`].

    Returns:
        The URL of the repository.

    Raises:
        InputError: If the folder holds nothing finished, the id is malformed, there is no token, or a file holds
            something that should not leave this machine.
        PublishError: If the Hub rejects it.
    """
    card_options |= {"license": license, "dataset_id": dataset_id}
    publication = prepare(folder, repo_id, token, **card_options)
    _check_token(token)
    retry = shlex.join([*program("publish"), str(folder), "--repo_id", repo_id])
    retry += " --private" if private else ""
    retry += " --token …" if token and token != get_token() else ""
    retry += retry_options
    for name, value in {"license": license, "dataset_id": dataset_id, "revision": revision}.items():
        retry += f" --{name} {shlex.quote(value)}" if value else ""
    with_hub = functools.partial(_with_hub, repo_id=repo_id, way_out=f"Nothing is lost: `{retry}` tries again.")
    url = with_hub(lambda: _open_repository(repo_id, publication.repo_type, private, token))
    if url.repo_id != repo_id:  # was only NAME; the card needs USER/NAME
        publication = prepare(folder, url.repo_id, token, **card_options)

    def commit() -> None:
        # New operations for each attempt, as they remember that they were started.
        operations: list[Any] = [CommitOperationAdd(name, str(path)) for name, path in publication.files.items()]
        operations.append(CommitOperationAdd(CARD_NAME, publication.card.encode()))
        there = _files_there(url.repo_id, publication.repo_type, revision, token)
        operations += [CommitOperationDelete(name) for name in publication.outdated(there)]
        HfApi(token=token).create_commit(
            url.repo_id,
            operations,
            commit_message=commit_message or "Publish with bkd_hf",
            repo_type=publication.repo_type,
            revision=revision,
        )

    with_hub(commit)
    write_card(publication, folder)
    return str(url)


def publish_run(
    folder: str | os.PathLike[str], repo_id: str, with_teacher: bool = False, **options: Any
) -> Iterator[str]:
    """Publish a run, optionally with its teacher: arguments and errors of [`folders_of_run`] and [`publish_folder`].

    Yields:
        The URL of each repository.
    """
    for name, part in folders_of_run(folder, repo_id, with_teacher).items():
        rest = " --push_teacher" if with_teacher and name == repo_id else ""
        yield publish_folder(part, name, retry_options=rest, **options)


def folders_of_run(folder: str | os.PathLike[str], repo_id: str, with_teacher: bool = False) -> dict[str, Path]:
    """Return what a run publishes: folders for [`publish_folder`], by repository.

    Args:
        folder: Output folder of the finished run.
        repo_id: The student's repository.
        with_teacher: Whether the teacher trained in the run is published too, as `REPO_ID-teacher`.

    Raises:
        InputError: If no teacher was trained in that run.
    """
    folders = {repo_id: Path(folder)}
    if with_teacher:
        results, teacher = load_results(folder), Path(folder, TEACHER_FOLDER)
        if not (results["teacher"] or {}).get("training") or not teacher.is_dir():
            raise InputError(
                f"--push_teacher: no teacher was trained in {folder}; one that was given is where it comes from."
            )
        folders[f"{repo_id}-teacher"] = teacher
    return folders


def prepare(
    folder: str | os.PathLike[str], repo_id: str, token: str | None = None, **card_options: Any
) -> Publication:
    """Determine what would be published of a folder; nothing is sent.

    Args:
        folder: As for [`publish_folder`].
        repo_id: As for [`publish_folder`].
        token: Must not occur in any file, like the stored token.
        card_options: `license`, `dataset_id`, … of [`bkd_hf.card.build`]; `None` values are taken from the folder.

    Raises:
        InputError: If the folder holds nothing finished, the id is malformed, or a file holds something that should
            not leave this machine.
    """
    check_repo_id(repo_id)
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}.")
    marks = {"long_tail.py": "space", FACTS_NAME: "space", SPLIT_NAME: "dataset"}
    repo_type = next((kind for name, kind in marks.items() if (folder / name).exists()), "model")
    files = _existing(folder, _ALLOWED[repo_type])
    if repo_type == "model":
        results, figures = _finished_run(folder, files)
        exported = ONNX_FILES.values() if "export" in results else ()  # otherwise from an earlier student
        files |= _existing(folder, [*_own_code(folder), *figures, *exported])
        told = {name: value for name, value in card_options.items() if value not in (None, [], ())}
        card = card_of(folder, results, repo_id, told)
    elif any(card_options.values()):
        raise InputError(f"{folder} has a card of its own: --license and --dataset_id are for the card of a student.")
    else:
        card = read_text(files.pop(CARD_NAME)).replace(PLACEHOLDER, repo_id)
    publication = Publication(repo_type, files, card)
    _check_contents(publication, folder, token)
    return publication


def card_of(
    folder: str | os.PathLike[str], results: dict[str, Any], repo_id: str, told: Mapping[str, Any] | None = None
) -> str:
    """Return the card of a run: the one in its folder if it was edited by hand, else a new one.

    Args:
        folder: Folder of the run.
        results: The content of its `results.json`.
        repo_id: As for [`publish_folder`].
        told: Arguments of [`bkd_hf.card.build`]; others are taken from the card in the folder.
    """
    path = Path(folder, CARD_NAME)
    told = told or {}
    if (edited := kept_edits(path, repo_id)) is None:
        return str(build(results, repo_id, **{**choices_of_card(path), **told}))
    unused = f", without {', '.join(told)}" if told else ""
    warnings.warn(f"{path} was edited, so it stays as it is{unused}. Delete it to have it written anew.", stacklevel=3)
    return edited


def write_card(publication: Publication, folder: str | os.PathLike[str]) -> Path | None:
    """Write the card of a run into its folder too, as it appears on the Hub; return its path.

    The cards of splits and of the metric are not changed, as they can be published under several names.
    """
    if publication.repo_type != "model":
        return None
    path = Path(folder, CARD_NAME)
    write_text(path, publication.card)
    return path


def check_repo_access(
    repo_id: str, token: str | None = None, repo_type: str = "model", private: bool | None = None
) -> None:
    """Find or create the repository, so that a wrong name or token is noticed before long work.

    If the Hub cannot be reached or fails, there is only a warning.

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
        _with_hub(lambda: _open_repository(repo_id, repo_type, private, token), repo_id, way_out, patience=2)
    except PublishError as error:
        if not error.is_temporary:
            raise
        reason = str(error).removesuffix(f" {way_out}")
        warnings.warn(f"{reason} It is tried again when there is something to publish.", stacklevel=2)


# ---- What is pushed ------------------------------------------------------------------------------------------------


def _existing(folder: Path, patterns: Iterable[str]) -> dict[str, Path]:
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {path.relative_to(folder).as_posix(): path for path in sorted(found)}


def _finished_run(folder: Path, files: dict[str, Path]) -> tuple[dict[str, Any], list[str]]:
    """Results and figures of a publishable run; missing figures are drawn."""
    if RESULTS_NAME not in files:
        raise InputError(
            f"{folder} is no finished run: it has no {RESULTS_NAME}. An interrupted run is continued by the command "
            "that began it."
        )
    if "config.json" not in files or not any(name.endswith(".safetensors") for name in files):
        raise InputError(f"{folder} has {RESULTS_NAME}, but no model (config.json and model.safetensors).")
    if "model_type" not in (try_json(folder / "config.json") or {}):
        raise InputError(f"{folder}: config.json does not load: nothing was pushed. Have it made again.")
    if not any(name.startswith(("preprocessor", "tokenizer")) for name in files):
        warnings.warn(
            f"{folder} has neither an image processor nor a tokenizer: the published model cannot be used by a "
            "pipeline. Save it there (from Python: give it to the trainer as processing_class).",
            stacklevel=4,
        )
    results = load_results(folder)
    if "export" in results and (missing := [name for name in ONNX_FILES.values() if not (folder / name).is_file()]):
        raise InputError(
            f"{folder} has no {missing[0]}, which its results tell of: have it made again (--export onnx)."
        )
    figures = [f"figures/{name}" for name in figure_names(results)]
    save_plots(results, folder / "figures", only_missing=True)
    return results, figures


def _own_code(folder: Path) -> list[str]:
    """Code files of a model that is not part of transformers, as named by its configuration."""
    named = (try_json(folder / "config.json") or {}).get("auto_map")
    found = named.values() if isinstance(named, dict) else ()
    classes = [name for names in found for name in (names if isinstance(names, list) else [names])]
    # "repository--module.Class" is code in another repository.
    modules = {name.split(".")[0] for name in classes if isinstance(name, str)}
    return sorted(f"{module}.py" for module in modules if module.isidentifier())


def _check_contents(publication: Publication, folder: Path, token: str | None) -> None:
    """Reject files that do not load or should not leave this machine; the error names the file."""
    for name, path in publication.files.items():
        if not path.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{name} is a link out of {folder}: nothing was pushed. Put the file itself there.")
        if why := why_broken(path):
            raise InputError(f"{folder}: {name} does not load ({why}): nothing was pushed. Have it made again.")
    texts = {
        name: path.read_text(encoding="utf-8", errors="replace")
        for name, path in publication.files.items()
        if path.suffix in _TEXT_FILES
    }
    own_folders = _own_folders(folder)
    for name, content in {**texts, CARD_NAME: publication.card}.items():
        paths = [path for path in own_folders if f"{path}/" in content]
        paths += [
            path
            for path in dict.fromkeys(_ABSOLUTE_PATH.findall(content))
            if not path.startswith(_OF_EVERY_MACHINE) and os.path.exists(path)
        ]
        found = [f"a path of your machine ({path})" for path in paths]
        if _TOKEN.search(content) or any(secret in content for secret in (token, get_token()) if secret):
            found.append("a token")
        if found:
            raise InputError(f"{name} holds {found[0]}, which is not for others: nothing was pushed. Remove it there.")


def _own_folders(folder: Path) -> list[str]:
    """Folders whose paths reveal the user or the machine."""
    home = Path(os.path.expanduser("~"))  # "~" for a user without an entry in the system's list of users
    places = [folder.resolve().parent, Path.cwd(), home, home.resolve()]
    with contextlib.suppress(OSError, KeyError):
        places += [Path("/home", getpass.getuser()), Path("/Users", getpass.getuser())]
    return [str(place) for place in dict.fromkeys(places) if len(place.parts) > 2 or place == Path("/root")]


# ---- The Hub -------------------------------------------------------------------------------------------------------


def _check_token(token: str | None) -> None:
    if constants.HF_HUB_OFFLINE:
        raise InputError("HF_HUB_OFFLINE is set, so nothing can be pushed: unset it, or do not push.")
    if token is None and get_token() is None:
        raise InputError(
            "There is no token for the Hub: log in by `hf auth login`, set HF_TOKEN, or give one with write access."
        )


def _files_there(repo_id: str, repo_type: str, revision: str | None, token: str | None) -> list[str]:
    """List the files in a repository; none where the Hub, or its mirror, cannot list them."""
    try:
        return HfApi(token=token).list_repo_files(repo_id, repo_type=repo_type, revision=revision)
    except HTTPError as error:
        if getattr(getattr(error, "response", None), "status_code", None) == 404:
            return []
        raise


def _open_repository(repo_id: str, repo_type: str, private: bool | None, token: str | None) -> Any:
    api = HfApi(token=token)
    sdk = "gradio" if repo_type == "space" else None
    url = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True, space_sdk=sdk)
    try:  # create_repo accepts a repository with read access only
        api.auth_check(url.repo_id, repo_type=repo_type, write=True)
    except HTTPError as error:
        response = getattr(error, "response", None)  # other statuses say nothing: not every Hub supports this request
        if response is not None and response.status_code in (401, 403):
            raise
    if private and api.repo_info(url.repo_id, repo_type=repo_type).private is False:
        raise InputError(
            f"{url.repo_id} is there already, and public: make it private on the Hub first, or choose another name."
        )
    return url


def _with_hub(request: Callable[[], _T], repo_id: str, way_out: str, patience: float = PATIENCE) -> _T:
    """Make a request, and retry transient failures; other failures end in one message."""
    end, wait = time.monotonic() + patience, 1.0
    while True:
        get_session().timeout = SILENCE  # huggingface_hub would wait indefinitely
        try:
            return request()
        except (HTTPError, OSError, RuntimeError, ValueError) as error:
            cause = _failed_request(error)
            if cause is None:
                raise
            response = getattr(cause, "response", None)
            status = None if response is None else response.status_code
            is_temporary = status is None or status in _TRANSIENT_STATUSES
            asked = "" if response is None else response.headers.get("Retry-After", "")
            wait = max(wait, float(asked) if asked.isdigit() else 0.0)
            if not is_temporary or time.monotonic() + wait > end:
                reason = f"{_reason(error, cause, status)}. {way_out}"
                raise PublishError(f"{repo_id} could not be published: {reason}", is_temporary) from error
            time.sleep(wait)
            wait *= 2


def _failed_request(error: BaseException | None) -> BaseException | None:
    """The failed request behind an error; uploads in threads wrap it in a RuntimeError.

    A response that is not JSON, such as a proxy's error page, raises a JSONDecodeError.
    """
    requests = (HTTPError, ConnectionError, TimeoutError, json.JSONDecodeError)
    while error is not None and not isinstance(error, requests):
        error = error.__cause__ or error.__context__
    return error


def _reason(error: BaseException, cause: BaseException, status: int | None) -> str:
    if status is None:
        return f"the Hub cannot be reached ({type(cause).__name__}: {first_line(cause)})"
    if str(error).startswith("Invalid metadata in README.md"):
        return f"the Hub refuses its card. {' '.join(str(error).split()).rstrip('.')}"
    reason = _REASONS.get(status, "the Hub has a fault: try again later" if status >= 500 else first_line(cause))
    said = getattr(cause, "server_message", None)
    return f"{reason} ({status}{': ' + said if said and status in (400, 403, 409) else ''})"
