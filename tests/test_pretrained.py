"""Releases by name: folders, a hub cache as huggingface_hub leaves it, a hub that refuses, SAELens's list."""

import os
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from scale_sae.errors import UserError
from scale_sae.saes.inference import SAE
from scale_sae.saes.pretrained import load_pretrained, resolve

sae_lens = pytest.importorskip("sae_lens")
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory  # noqa: E402
from sae_lens.registry import get_sae_class  # noqa: E402

D_IN, D_SAE = 8, 24
FIRST, SECOND = "1" * 40, "2" * 40  # commits
RESID, MLP, HOOK_Z = "gpt2-small-res-jb", "gpt2-small-mlp-tm", "gpt2-small-hook-z-kk"  # of SAELens's list


def theirs(architecture: str = "standard", seed: int = 0, d_sae: int = D_SAE, **options: Any) -> Any:
    made, config_class = get_sae_class(architecture)
    sae = made(config_class(d_in=D_IN, d_sae=d_sae, **options))
    generator = torch.Generator().manual_seed(seed)
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return sae


def same(ours: SAE, sae: Any) -> bool:
    state = sae.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())


def inputs() -> torch.Tensor:
    return torch.randn(5, D_IN, generator=torch.Generator().manual_seed(9))


def put(hub: Path, repo: str, name: str, commit: str = FIRST) -> Path:
    """The folder of a name inside a repository, in a hub cache whose main branch is at this commit."""
    folder = hub / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    path = folder / "snapshots" / commit / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


# ---- folders --------------------------------------------------------------------------------------------------------


def test_a_folder_of_saes_and_one_sae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = theirs(seed=1), theirs(seed=2)
    first.save_model(tmp_path / "user" / "release" / "layer_0" / "a")
    second.save_model(tmp_path / "user" / "release" / "layer_1")
    release = str(tmp_path / "user" / "release")
    assert same(SAE.from_pretrained(release, "layer_0/a"), first)
    assert same(SAE.from_pretrained(f"{release}/layer_1"), second)
    assert resolve(release, "layer_1/", None) == Path(release, "layer_1")
    monkeypatch.chdir(tmp_path / "user")
    assert same(SAE.from_pretrained("release", "layer_1"), second)
    monkeypatch.chdir(tmp_path)
    ours = SAE.from_pretrained("user/release", "layer_1", dtype=torch.float64)  # a folder before a repository
    assert ours.dtype == torch.float64 and torch.equal(ours.W_dec.float(), second.W_dec)


@pytest.mark.parametrize(
    ("sae_id", "message"),
    [
        ("../other", r"sae_id: '\.\./other' must be a folder inside the release"),
        ("layer_0/../../other", "must be a folder inside the release"),
        ("/etc", "must be a folder inside the release"),
        ("layer_O", r"holds no cfg\.json \(did you mean layer_., .*\?\); there are layer_0, layer_1, .* and 2 more"),
        (None, r"holds no cfg\.json; there are layer_0"),
        ("empty", r"holds no cfg\.json"),
    ],
)
def test_what_is_not_in_the_folder(tmp_path: Path, sae_id: str | None, message: str) -> None:
    theirs().save_model(tmp_path / "other")
    for layer in range(7):
        theirs().save_model(tmp_path / "release" / f"layer_{layer}")
    (tmp_path / "release" / "empty").mkdir()
    with pytest.raises(UserError, match=message) as caught:
        load_pretrained(str(tmp_path / "release"), sae_id)
    assert "\n" not in str(caught.value)


# ---- the hub --------------------------------------------------------------------------------------------------------


def test_a_repository(hub: Path) -> None:
    old, new, root = theirs(seed=1), theirs("topk", seed=2, k=3), theirs(seed=3)
    old.save_model(put(hub, "user/saes", "deep/layer_0", FIRST))
    new.save_model(put(hub, "user/saes", "deep/layer_0", SECOND))
    root.save_model(put(hub, "user/one", "."))
    assert same(SAE.from_pretrained("user/saes", "deep/layer_0"), new)
    assert same(SAE.from_pretrained("user/saes", "deep/layer_0", revision=FIRST), old)
    assert same(SAE.from_pretrained("user/one"), root)
    folder = resolve("user/saes", "deep/layer_0", None)
    assert folder == hub / "models--user--saes" / "snapshots" / SECOND / "deep" / "layer_0"


def test_both_files_are_of_one_commit(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The main branch moves after the first file has come."""
    old, new = theirs(seed=1), theirs(seed=2, d_sae=2 * D_SAE)
    new.save_model(put(hub, "user/saes", "layer_0", SECOND))
    old.save_model(put(hub, "user/saes", "layer_0", FIRST))
    import huggingface_hub

    download = huggingface_hub.hf_hub_download

    def moved_after(*args: Any, **options: Any) -> str:
        path = download(*args, **options)
        put(hub, "user/saes", "layer_0", SECOND)
        return path

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", moved_after)
    assert same(load_pretrained("user/saes", "layer_0"), old)


@pytest.mark.parametrize(
    ("release", "options", "message"),
    [
        ("user/saes", {"sae_id": "layer_1"}, r"user/saes: layer_1/cfg\.json is not in the cache and the hub is out of"),
        ("user/saes", {"sae_id": "half"}, r"user/saes: half/sae_weights\.safetensors is not in the cache"),
        ("user/nothing", {"sae_id": "layer_0"}, r"user/nothing: layer_0/cfg\.json is not in the cache"),
        ("user/saes", {"sae_id": "layer_0", "revision": "v9"}, r"layer_0/cfg\.json is not in the cache"),
        ("user/saes", {"sae_id": "../x"}, "must be a folder inside the release"),
        ("/no/such/folder", {}, "release: '/no/such/folder' is neither a folder here nor user/repo on the hub"),
        ("user/saes", {"sae_id": "layer_0", "force_download": True}, "force_download: layer_0/cfg.json of user/saes"),
    ],
)
def test_what_is_not_in_the_cache(hub: Path, release: str, options: dict[str, Any], message: str) -> None:
    theirs().save_model(put(hub, "user/saes", "layer_0"))
    theirs().save_model(put(hub, "user/saes", "half"))
    put(hub, "user/saes", "half/sae_weights.safetensors").unlink()
    with pytest.raises(UserError, match=message) as caught:
        load_pretrained(release, **options)
    assert "\n" not in str(caught.value)


class Refusal(BaseHTTPRequestHandler):
    """Answers as the hub does where it has nothing to give; the repository's name says how."""

    answers = {  # noqa: RUF012
        "missing": (404, "RepoNotFound", ""),
        "gated": (403, "GatedRepo", ""),
        "private": (401, "RepoNotFound", ""),
        "branch": (404, "RevisionNotFound", ""),
        "file": (404, "EntryNotFound", ""),
        "forbidden": (403, "", ""),
        "token": (401, "", "Invalid credentials in Authorization header"),
    }

    def do_HEAD(self) -> None:
        status, code, words = self.answers[self.path.split("/")[2]]
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", words)
        self.send_header("X-Repo-Commit", FIRST)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        """Not a word."""


@pytest.fixture
def refusing_hub(hub: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = HTTPServer(("127.0.0.1", 0), Refusal)
    thread = Thread(target=server.serve_forever)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("repo", "message"),
    [
        ("user/missing", "user/missing: is not on the Hugging Face hub, or private; check its name or log in"),
        ("user/private", "user/private: is not on the Hugging Face hub, or private; check its name or log in"),
        ("user/gated", "user/gated: is gated; accept its terms"),
        ("user/branch", "revision: user/branch has no 'v1'; give one of its branches"),
        ("user/file", r"user/file: holds no layer_0/cfg\.json; check sae_id and revision"),
        ("user/token", r"user/token: the hub answered 401 for layer_0/cfg\.json; log in, or try again later"),
        ("user/forbidden", r"user/forbidden: layer_0/cfg\.json is not in the cache and the hub is out of reach"),
    ],
)
@pytest.mark.usefixtures("refusing_hub")
def test_what_the_hub_refuses(repo: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_pretrained(repo, "layer_0", revision="v1")
    assert "\n" not in str(caught.value)
    assert "hf_secret" not in str(caught.value) + "".join(capfd.readouterr())


# ---- SAELens's list -------------------------------------------------------------------------------------------------


def listed(release: str) -> tuple[str, str, str]:
    """A release's repository, its first SAE, and where that lies in the repository."""
    entry = get_pretrained_saes_directory()[release]
    sae_id, path = next(iter(entry.saes_map.items()))
    return entry.repo_id, sae_id, path


def test_a_release_of_saelens_s_list(hub: Path) -> None:
    repo, sae_id, path = listed(RESID)
    sae = theirs()
    sae.save_model(put(hub, repo, path))
    ours = SAE.from_pretrained(RESID, sae_id)
    assert same(ours, sae) and ours.dtype == torch.float32
    assert SAE.from_pretrained(RESID, sae_id, dtype="bfloat16").dtype == torch.bfloat16
    wide = SAE.from_pretrained(RESID, sae_id, dtype=torch.float64)
    assert wide.dtype == torch.float64 and torch.equal(wide.W_enc.float(), sae.W_enc)


def test_its_thresholds_stay_wide(hub: Path) -> None:
    repo, sae_id, path = listed(RESID)
    sae = theirs("jumprelu")
    sae.save_model(put(hub, repo, path))
    ours = SAE.from_pretrained(RESID, sae_id, dtype=torch.bfloat16).state_dict()
    assert torch.equal(ours["threshold"], sae.threshold) and ours["W_enc"].dtype == torch.bfloat16


def test_factors_that_only_the_list_knows_are_folded(hub: Path) -> None:
    repo, sae_id, path = listed(MLP)
    sae = theirs(normalize_activations="expected_average_only_in")
    sae.save_model(put(hub, repo, path))
    factor = get_pretrained_saes_directory()[MLP].norm_scaling_factor[sae_id]
    ours = SAE.from_pretrained(MLP, sae_id)
    # Two roundings of each weight to float32.
    torch.testing.assert_close(ours(inputs()), sae(inputs() * factor) / factor, rtol=1e-5, atol=1e-5)


def test_pt_files_of_the_list_hold_tensors_only(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The release is read where it holds tensors, and runs nothing where it holds more, whatever torch's default is."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    repo, sae_id, path = listed(HOOK_Z)
    file = put(hub, repo, path)
    sae = theirs()
    torch.save(sae.state_dict(), file)
    file.with_name(path.removesuffix(".pt") + "_cfg.json").write_text(
        f'{{"act_size": {D_IN}, "dict_size": {D_SAE}, "act_name": "blocks.0.attn.hook_z"}}'
    )
    ours = SAE.from_pretrained(HOOK_Z, sae_id)
    assert same(ours, sae) and ours(inputs().view(5, 2, 4)).shape == (5, 2, 4)

    mark = hub / "mark"
    torch.save({"W_enc": Trap(mark)}, file)
    with pytest.raises(UserError, match=f"{HOOK_Z}, {sae_id}: its file holds more than tensors"):
        SAE.from_pretrained(HOOK_Z, sae_id)
    assert not mark.exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    with pytest.warns(UserWarning, match="TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        torch.load(file)
    assert mark.exists()  # so the trap works


class Trap:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize(
    ("release", "options", "message"),
    [
        ("gpt2-small-res-jp", {"sae_id": "x"}, r"nor in SAELens's list \(did you mean .*gpt2-small-res-jb.*\?\)"),
        (
            RESID,
            {"sae_id": "blocks.0.hook_resid_pro"},
            f"sae_id: {RESID} has no 'blocks.0.hook_resid_pro' .did you mean blocks.0.hook_resid_pre.* and 8 more",
        ),
        (RESID, {}, f"sae_id: {RESID} has no None; there are blocks"),
        (RESID, {"sae_id": "blocks.0.hook_resid_pre", "revision": "v1"}, "revision: 'v1' needs a Hugging Face"),
        (RESID, {"sae_id": "blocks.0.hook_resid_pre"}, "is not in the cache and the hub is out of reach"),
        (RESID, {"sae_id": "blocks.0.hook_resid_pre", "dtype": "float33"}, "dtype: 'float33' must be float32"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_what_the_list_does_not_have(release: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_pretrained(release, **options)
    assert "\n" not in str(caught.value)


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    theirs().save_model(tmp_path)
    with pytest.raises(UserError, match=r"revision: 'v1' needs a Hugging Face repository as the release; .* a folder"):
        load_pretrained(str(tmp_path), revision="v1")


def test_without_saelens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(UserError, match=r"for names of SAELens's list install scale_sae\[sae-lens\]"):
        load_pretrained(RESID, "blocks.0.hook_resid_pre")
