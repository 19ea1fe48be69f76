"""The real client, in real processes, against the Hub of `hub_server`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.hub_server import WRITE_TOKEN, Hub, read_card

pytest_plugins = ["tests.hub_server"]

PRELUDE = """
import json, os, time, warnings
import httpx2
from huggingface_hub import *
from huggingface_hub.errors import *
from huggingface_hub.utils import disable_progress_bars, logging
from tests.hub_server import READ_TOKEN, Hub

disable_progress_bars()
logging.set_verbosity(60)
warnings.simplefilter("ignore")
hub, api = Hub(os.environ["HF_ENDPOINT"]), HfApi()
CARD = "---\\nlicense: mit\\n---\\n# A card\\n"

def add(**files):
    return [CommitOperationAdd(name.replace("__", "."), content) for name, content in files.items()]

def commit(operations, title="Title", repo_id="user/model", api=api, **kwargs):
    return api.create_commit(repo_id, operations, commit_message=title, **kwargs)

def refused(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        return error
    raise AssertionError("not refused")

def status(call, *args, **kwargs):
    error = refused(call, *args, **kwargs)
    return type(error).__name__, getattr(error, "response", None) and error.response.status_code
"""


def client(hub: Hub, code: str, token: str | None = WRITE_TOKEN) -> str:
    """The output of a process that runs `code` after `PRELUDE`."""
    process = subprocess.run(
        [sys.executable, "-c", PRELUDE + code], capture_output=True, text=True, env=hub.environment(token), timeout=120
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


# ---- Round trips


def test_push_and_download(hub, tmp_path):
    large = tmp_path / "large.bin"
    large.write_bytes(bytes(1_500_000))
    code = f"""
assert api.whoami()["name"] == "user"
url = api.create_repo("model")
assert (url.repo_id, url.repo_type) == ("user/model", "model")
assert api.create_repo("user/model", exist_ok=True) == url
assert status(api.create_repo, "user/model") == ("HfHubHTTPError", 409)

def push(title):
    large = CommitOperationAdd("folder/large.bin", {str(large)!r})
    return commit([large, *add(README__md=CARD.encode(), model__safetensors=b"weights", empty__txt=b"")], title)

first = push("One")
sent = len(hub.requests())
assert push("Two").oid == first.oid == api.repo_info("user/model").sha
assert not any("/commit/" in request or "PUT" in request for request in hub.requests()[sent:])

path = hf_hub_download("user/model", "model.safetensors")
assert open(path, "rb").read() == b"weights" and first.oid in path
folder = snapshot_download("user/model")
assert sorted(os.listdir(folder)) == [".gitattributes", "README.md", "empty.txt", "folder", "model.safetensors"]
with HfFileSystem().open("user/model/folder/large.bin", block_size=1000) as file:
    assert file.seek(1_499_990) and file.read() == bytes(10)
assert ModelCard.load("user/model").data.license == "mit"
assert api.repo_info("user/model").card_data.license == "mit"
assert status(hf_hub_download, "user/model", "missing") == ("RemoteEntryNotFoundError", 404)
assert status(hf_hub_download, "user/model", "README.md", revision="v1") == ("RevisionNotFoundError", 404)
assert status(api.list_repo_files, "user/missing") == ("RepositoryNotFoundError", 404)

assert [file.path for file in api.list_repo_tree("user/model", "folder")] == ["folder/large.bin"]
infos = {{info.path: info for info in api.get_paths_info("user/model", ["folder/large.bin", "README.md"])}}
assert infos["folder/large.bin"].lfs.size == 1_500_000 and infos["README.md"].lfs is None
siblings = {{sibling.rfilename: sibling for sibling in api.repo_info("user/model", files_metadata=True).siblings}}
assert siblings["folder/large.bin"].lfs.sha256 == infos["folder/large.bin"].lfs.sha256
"""
    client(hub, code)
    assert hub.commits("user/model") == ["One"]
    assert hub.files("user/model")["model.safetensors"] == b"weights"
    assert not hub.is_private("user/model")
    hub.reset()
    assert hub.requests() == []
    with pytest.raises(KeyError):
        hub.files("user/model")


def test_commits(hub):
    code = """
api.create_repo("model")
first = commit(add(a=b"1", model__safetensors=b"1"), "One")
commit([CommitOperationDelete("a"), *add(b=b"2")], "Two", parent_commit=first.oid)
assert status(commit, add(c=b"3"), parent_commit=first.oid) == ("HfHubHTTPError", 412)
assert status(commit, [CommitOperationDelete("a")]) == ("RemoteEntryNotFoundError", 404)
assert status(commit, add(c=b"3"), revision="draft") == ("RevisionNotFoundError", 404)
api.create_branch("user/model", branch="draft", revision=first.oid)
commit(add(c=b"3"), revision="draft")
assert api.list_repo_files("user/model", revision="draft") == [".gitattributes", "a", "c", "model.safetensors"]
assert "b" not in os.listdir(snapshot_download("user/model", revision=first.oid))

assert status(commit, add(d=b"4"), create_pr=True) == ("BadRequestError", 400)

url = api.create_repo("demo", repo_type="space", space_sdk="static")
assert commit(add(a=b"1"), repo_id="user/demo", repo_type="space").oid == api.space_info(url.repo_id).sha

late = add(model__safetensors=b"2")
late[0]._upload_mode, late[0]._is_uploaded = "lfs", True  # as one says who has not uploaded it
error = refused(commit, late)
assert isinstance(error, BadRequestError) and "LFS pointer" in str(error)
"""
    client(hub, code)
    assert hub.commits("user/model") == ["One", "Two"]
    assert set(hub.files("user/model")) == {".gitattributes", "b", "model.safetensors"}


def test_tokens(hub):
    hub.add("user/secret", {"model.safetensors": b"weights"}, private=True)
    hub.add("other/model", {"model.safetensors": b"weights"})
    hub.add("other/secret", {}, private=True)
    code = """
assert api.hf_hub_download("other/model", "model.safetensors")
for repo_id in ("user/secret", "user/missing"):
    assert status(api.repo_info, repo_id) == ("RepositoryNotFoundError", 401)
    assert status(hf_hub_download, repo_id, "model.safetensors") == ("RepositoryNotFoundError", 401)
    assert status(commit, add(a=b"1"), repo_id=repo_id) == ("RepositoryNotFoundError", 401)
assert status(api.create_repo, "new") == ("HfHubHTTPError", 401)
assert refused(api.create_repo, "new").response.json() == {"error": "Invalid username or password."}
"""
    client(hub, code, token=None)

    code = """
reader, stranger = HfApi(token=READ_TOKEN), HfApi(token="hf_" + "x" * 34)
files = add(a=b"1")

assert api.hf_hub_download("user/secret", "model.safetensors")
api.auth_check("user/secret", write=True)
assert status(api.repo_info, "other/secret") == ("RepositoryNotFoundError", 404)
assert status(api.create_repo, "other/new") == ("HfHubHTTPError", 403)
assert "create_pr" in str(refused(commit, files, repo_id="other/model"))
assert status(commit, files, repo_id="user/missing") == ("RepositoryNotFoundError", 404)

assert reader.repo_info("user/secret").private
assert status(reader.create_repo, "new", exist_ok=True) == ("HfHubHTTPError", 403)
assert reader.create_repo("user/secret", exist_ok=True)  # the client takes what exists for what may be written
assert status(reader.auth_check, "user/secret", write=True) == ("HfHubHTTPError", 403)
assert "write token" in str(refused(commit, files, repo_id="user/secret", api=reader))

assert status(stranger.repo_info, "other/model") == ("HfHubHTTPError", 401)
assert status(stranger.create_repo, "new") == ("HfHubHTTPError", 401)
assert status(stranger.whoami) == ("HfHubHTTPError", 401)
assert status(commit, files, repo_id="user/secret", api=stranger) == ("HfHubHTTPError", 401)
"""
    client(hub, code)
    assert hub.is_private("user/secret")


def test_load_dataset(hub):
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: only\n    path: data/train-*\n---\n"
    code = f"""
import io
import datasets

features = datasets.Features(label=datasets.ClassLabel(names=["cat", "dog"]))
data, parquet = datasets.Dataset.from_dict({{"label": [0, 1, 1]}}, features), io.BytesIO()
data.to_parquet(parquet)
api.create_repo("user/data", repo_type="dataset", private=True)
files = {{"data/train-00000-of-00001.parquet": parquet.getvalue(), "README.md": {card.encode()!r}}}
commit([CommitOperationAdd(*file) for file in files.items()], repo_id="user/data", repo_type="dataset")
loaded = datasets.load_dataset("user/data")
assert list(loaded) == ["only"]  # which the README alone says
assert loaded["only"]["label"][:] == [0, 1, 1] and loaded["only"].features == features

datasets.DatasetDict(validation=data).push_to_hub("user/pushed")
assert datasets.load_dataset("user/pushed", split="validation")["label"][:] == [0, 1, 1]
"""
    client(hub, code)
    assert hub.is_private("user/data", "dataset")
    assert "data/validation-00000-of-00001.parquet" in hub.files("user/pushed", "dataset")


def test_from_pretrained(hub):
    code = """
import torch
from transformers import AutoModelForImageClassification
from tests.tiny_models import tiny_vit

model = tiny_vit(0, num_labels=3)
model.push_to_hub("user/vit")
loaded = AutoModelForImageClassification.from_pretrained("user/vit").state_dict()
assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
"""
    client(hub, code)
    assert {"README.md", "config.json", "model.safetensors"} <= set(hub.files("user/vit"))


# ---- What it refuses


METRIC = "model-index:\n- name: m\n  results:\n  - task: {type: t}\n    dataset: {type: d, name: D}\n    metrics: [%s]"


@pytest.mark.parametrize(
    ("metadata", "error"),
    [
        ("license: mit\nunknown: 1\ntags: [a, b]\nbase_model: [a/b, c]\npipeline_tag: image-classification", None),
        (METRIC % "{type: accuracy, value: 0.5}", None),
        ("- license", '"value" must be of type object'),
        ("license: [", "Invalid YAML in README.md: "),
        ("license: Apache", '"license" must be one of [apache-2.0, mit, '),
        ("license: 1", '"license" must be one of ['),
        ("pipeline_tag: classification", '"pipeline_tag" must be one of [text-classification, '),
        ("tags: a", '"tags" must be an array'),
        ("tags: [1]", '"tags[0]" must be a string'),
        ("base_model: ../runs/teacher", '"base_model" with value "../runs/teacher" is not valid.'),
        ("datasets: [null]", '"datasets" with value "None" is not valid.'),
        ("model-index: {}", '"model-index" must be an array'),
        ("model-index: [{name: m}]", '"model-index[0].results" is required'),
        (METRIC % "{value: 1}", '"model-index[0].results[0].metrics[0].type" is required'),
        (METRIC % "{type: a, value: x}", '"model-index[0].results[0].metrics[0].value" must be a number'),
        (METRIC % "{type: a, value: .nan}", '"model-index[0].results[0].metrics[0].value" must be a number'),
    ],
)
def test_card(metadata, error):
    _, errors, warnings = read_card(f"---\n{metadata}\n---\n# Title\n")
    assert not warnings
    assert [message[: len(error)] for message in errors] == [error] if error else errors == []


def test_card_is_validated(hub):
    code = """
api.create_repo("model")
BAD = CARD.replace("mit", "MIT")
error = refused(ModelCard(BAD).validate)
assert type(error) is ValueError and "must be one of [apache-2.0, " in str(error)
ModelCard(CARD).validate()
ModelCard("no metadata").validate()
error = refused(commit, add(README__md=BAD.encode(), model__safetensors=b"1"))
assert type(error) is ValueError and "Invalid metadata in README.md" in str(error)
api._validate_yaml = lambda *args, **kwargs: None
assert status(commit, add(README__md=BAD.encode())) == ("BadRequestError", 400)  # the Hub looks at it itself
"""
    client(hub, code)
    assert not any("/preupload/" in request for request in hub.requests()[:-2])
    assert hub.commits("user/model") == []


# ---- Faults

BACKOFF, LIMITED = [1, 2, 4, 8, 8], [2] * 5


def test_faults_for_ever(hub):
    """Which exception each becomes, and how long the client waits before."""
    code = """
waits = []
time.sleep = waits.append
push = lambda: commit(add(b=b"1", model__safetensors=b"1"))
calls = dict.fromkeys(("preupload", "lfs", "put", "commit"), push)
calls["create"] = lambda: api.create_repo("new", exist_ok=True)
calls["download"] = lambda: hf_hub_download("user/model", "a")
for route, call in calls.items():
    for fault in ("401", "403", "409", "429", "500", "503", "cut", "lost"):
        if fault == "409" and route != "commit":
            continue
        hub.reset()
        hub.add("user/model", {"a": b"1"})
        hub.fail(route, fault)
        waits.clear()
        error = refused(call)
        cause = error.__cause__ if isinstance(error, (RuntimeError, LocalEntryNotFoundError)) else error
        if fault in ("cut", "lost"):
            assert isinstance(cause, httpx2.NetworkError)  # of reading or of writing, as it happens
        else:
            assert cause.response.status_code == int(fault)
        print(json.dumps([route, fault, type(error).__name__, waits]))
"""
    outcomes = {}
    for line in client(hub, code).splitlines():
        route, fault, error, waits = json.loads(line)
        outcomes[route, fault] = waits
        if route == "put":
            assert error == "RuntimeError"
        elif route == "download" and fault in ("403", "429", "500", "503"):
            assert error == "LocalEntryNotFoundError"
        else:
            assert error in (("ReadError", "WriteError") if fault in ("cut", "lost") else ("HfHubHTTPError",))
    for route in ("create", "preupload", "lfs", "put", "commit", "download"):
        again = route in ("preupload", "lfs", "put", "download")
        assert outcomes[route, "401"] == outcomes[route, "403"] == []
        assert outcomes[route, "429"] == (LIMITED if again else [])
        assert outcomes[route, "500"] == outcomes[route, "503"] == (BACKOFF if again else [])
        assert outcomes[route, "cut"] == outcomes[route, "lost"] == (BACKOFF if again and route != "download" else [])
    assert outcomes["commit", "409"] == []


def test_faults_that_pass(hub, tmp_path):
    """The client gets over what it tries again, and a second attempt over the rest."""
    large = tmp_path / "large.bin"
    large.write_bytes(bytes(range(256)) * 10_000)
    code = f"""
time.sleep = lambda seconds: None
api.create_repo("model")
for fault in ("cut", "500", "429", "lost"):
    for route in ("preupload", "lfs", "put"):
        hub.fail(route, fault, times=1)
    large = open({str(large)!r}, "ab")
    large.write(fault.encode())
    large.close()
    commit([CommitOperationAdd("large.bin", {str(large)!r})], fault)

def sent():
    return sum("PUT" in request for request in hub.requests())

hub.fail("put", "403")
assert "a.png" in str(refused(commit, add(a__png=b"1")))
hub.fail("put", "403", times=0)
hub.fail("commit", "409", times=1)
assert status(commit, add(a__png=b"1")) == ("HfHubHTTPError", 409)
before = sent()
commit(add(a__png=b"1"), "After 409")
assert sent() == before  # it is there already

hub.fail("commit", "lost", times=1)
files = add(b=b"1")
assert isinstance(refused(commit, files, "Arrived"), httpx2.NetworkError)
assert commit(add(b=b"1"), "Again").oid == api.repo_info("user/model").sha  # there is nothing to commit
commit(files, "Twice")  # which the used objects do not know

hub.fail("validate", "503", times=1)
assert isinstance(refused(commit, add(README__md=CARD.encode())), json.JSONDecodeError)
hub.fail("any", "500", times=1)
assert status(api.whoami) == ("HfHubHTTPError", 500)
assert api.whoami()
"""
    client(hub, code)
    assert hub.commits("user/model") == ["cut", "500", "429", "lost", "After 409", "Arrived", "Twice"]
    assert hub.files("user/model")["large.bin"] == large.read_bytes()


@pytest.mark.parametrize(("route", "fault"), [("push", "500"), ("put", "418"), ("create", "409")])
def test_unknown_fault(hub, route, fault):
    with pytest.raises(ValueError, match=fault):
        hub.fail(route, fault)
