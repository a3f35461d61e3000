"""Uploads against a stand-in of the hub that speaks its HTTP API: what arrives, what is said, what never leaves."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import fire
import huggingface_hub
import pytest
import sae_lens
import torch
import yaml
from huggingface_hub import constants

from fake_hub import READER, TOKEN, Hub
from made_up_run import D_IN, save_run
from scale_sae import card, upload
from scale_sae.collectives import Shard
from scale_sae.config import from_dict
from scale_sae.consolidate import consolidate
from scale_sae.errors import UserError
from scale_sae.saes import SAE, registry

SAES: list[dict[str, Any]] = [
    {"name": "small", "architecture": "topk", "d_sae": 96, "k": 8},
    {"name": "wide", "architecture": "batchtopk", "d_sae": 128, "k": 8},
]
SMALL, WIDE = "model.layers.1/small", "model.layers.1/wide"
BARE = ("cfg.json", "runner_cfg.json", "sae_weights.safetensors")
SENT = ("cfg.json", "density.png", "runner_cfg.json", "sae_weights.safetensors", "sparsity.safetensors")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()
    yield server
    huggingface_hub.close_session()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release of two SAEs, which no test changes."""
    folder = tmp_path_factory.mktemp("made")
    save_run(folder / "run", saes=SAES)
    consolidate(folder / "run", folder / "release")
    return folder / "release"


@pytest.fixture
def release(made: Path, tmp_path: Path) -> Path:
    """A copy of it to be changed."""
    return Path(shutil.copytree(made, tmp_path / "release"))


@pytest.fixture(scope="module")
def bare(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without sparsity, so that no plots are drawn; which no test changes either."""
    folder = tmp_path_factory.mktemp("bare") / "release"
    return Path(shutil.copytree(made, folder, ignore=shutil.ignore_patterns("sparsity.safetensors")))


def expected_paths(*sae_ids: str, names: tuple[str, ...] = SENT) -> set[str]:
    return {".gitattributes", "README.md"} | {f"{sae_id}/{name}" for sae_id in sae_ids for name in names}


def failed(*arguments: str) -> str:
    """The line with which the command ends, in this process."""
    with pytest.raises(SystemExit) as stopped:
        fire.Fire(upload.main, command=list(arguments))
    line = str(stopped.value)
    assert line.startswith("error: ") and "\n" not in line
    assert stopped.value.__cause__ is None
    return line.removeprefix("error: ")


# ---- what arrives ----------------------------------------------------------------------------------------------------


def test_both_libraries_load_what_was_sent(hub: Hub, release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"reconstruction_quality": {"explained_variance": 0.87654}, "sparsity": {"l0": 7.5}}
    (release / SMALL / "eval.json").write_text(json.dumps(figures))
    (release / "eval.json").write_text('{"model_performance_preservation": {"ce_loss_with_sae": 2.5}}')
    upload.upload(release, "user/saes")
    there = hub.files("user/saes")
    assert there.keys() == expected_paths(SMALL, WIDE) | {f"{SMALL}/eval.json", "eval.json"}
    assert hub.messages == ["made", f"Upload {SMALL}", f"Upload {WIDE}", "Upload the model card"]
    for sae_id in (SMALL, WIDE):
        for name in ("sae_weights.safetensors", "cfg.json", "sparsity.safetensors"):
            assert there[f"{sae_id}/{name}"] == (release / sae_id / name).read_bytes()
        ours, theirs = SAE.from_pretrained("user/saes", sae_id), sae_lens.SAE.from_pretrained("user/saes", sae_id)
        local = SAE.from_pretrained(str(release), sae_id)
        x = torch.randn(9, D_IN, generator=torch.Generator().manual_seed(1))
        assert torch.equal(ours(x), local(x))
        torch.testing.assert_close(theirs(x), local(x))  # float32, sums in another order
    card = there["README.md"].decode()
    assert card.startswith("---\nlibrary_name: saelens\n") and "| 0.8765 | 7.50 |" in card
    assert f'SAE.from_pretrained("user/saes", "{SMALL}")' in card
    assert "With all SAEs in place at once the model's loss is 2.5000 (without: -" in card
    assert "| lr | `0.0004` |" in card and "| context_size | `128` |" in card
    assert f"![{WIDE}]({WIDE}/density.png)" in card
    assert there[f"{SMALL}/density.png"].startswith(b"\x89PNG")
    assert not (release / SMALL / "density.png").exists()  # the release itself stays as it is
    captured = capsys.readouterr()
    assert captured.out.endswith(f"{hub.url}/user/saes: 13 files sent, 0 were there\n")
    assert TOKEN not in captured.out + captured.err


def test_a_second_upload_sends_what_has_changed(hub: Hub, release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    upload.upload(release, "user/saes")
    before, puts = len(hub.commits), len(hub.puts)
    upload.upload(release, "user/saes")
    assert (len(hub.commits), len(hub.puts)) == (before, puts)
    assert capsys.readouterr().out.endswith("0 files sent, 11 were there\n")
    (release / WIDE / "eval.json").write_text('{"sparsity": {"l0": 3.5}}')
    upload.upload(release, "user/saes")
    assert hub.messages[before:] == [f"Upload {WIDE}", "Upload the model card"]
    assert "| 3.50 |" in hub.files("user/saes")["README.md"].decode()


def test_an_upload_that_was_cut_short_goes_on(
    hub: Hub, made: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Large files that have arrived are not sent again, whether they are committed or not."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its attempts
    hub.puts_until_cut = 4  # all three of the first SAE, and one of the second
    line = failed(str(made), "--repo", "user/saes")
    assert line.startswith("user/saes: the hub is out of reach (") and "it goes on where it stopped" in line
    assert hub.messages == ["made", f"Upload {SMALL}"]
    hub.puts_until_cut = 10**9
    upload.upload(made, "user/saes")
    assert hub.files("user/saes").keys() == expected_paths(SMALL, WIDE)
    assert len(hub.puts) == len(set(hub.puts)) == 6
    assert TOKEN not in line + "".join(capfd.readouterr())


def test_many_saes_share_their_commits(hub: Hub, bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub takes so many in an hour, then answers 429; with the next hour the same command goes on."""
    monkeypatch.setattr(upload, "COMMITS", 1)
    hub.commits_until_busy = 2
    line = failed(str(bare), "--repo", "user/saes")
    assert line.startswith("user/saes: the hub takes no more for now (429); wait an hour, then run the same command")
    assert hub.messages == ["made", f"Upload {SMALL} and 1 more"]
    hub.commits_until_busy = 10**9
    upload.upload(bare, "user/saes")
    assert hub.messages[2:] == ["Upload the model card"]
    assert hub.files("user/saes").keys() == expected_paths(SMALL, WIDE, names=BARE)


@pytest.mark.parametrize(("saes", "expected"), [(1, 1), (32, 32), (33, 17), (200, 29)])
def test_how_many_commits(saes: int, expected: int) -> None:
    plan = {f"layer_{index}": [upload.File(f"layer_{index}/cfg.json", b"{}")] for index in range(saes)}
    commits = upload._commits(plan, {})
    assert len(commits) == expected
    assert [file for _, part in commits for file in part] == [file for part in plan.values() for file in part]


def test_a_revision_and_a_private_repository(hub: Hub, bare: Path) -> None:
    upload.upload(bare, "user/saes", private=True, revision="v2")
    assert hub.private["user/saes"] and hub.files("user/saes", "main").keys() == {".gitattributes"}
    assert hub.files("user/saes", "v2").keys() == expected_paths(SMALL, WIDE, names=BARE)
    assert SAE.from_pretrained("user/saes", SMALL, revision="v2").cfg.d_sae == 96


def test_a_card_that_somebody_wrote_stays(hub: Hub, bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.commit("user/saes", "main", {"README.md": b"# My own words\n- scale_sae\n"})
    upload.upload(bare, "user/saes")
    assert hub.files("user/saes")["README.md"] == b"# My own words\n- scale_sae\n"
    assert "README.md: user/saes has one that is no model card of scale_sae; it stays" in capsys.readouterr().err


def test_dry_run_sends_nothing(hub: Hub, release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fire.Fire(upload.main, command=[str(release), "--repo", "user/saes", "--dry_run"])
    lines = capsys.readouterr().out.splitlines()
    assert not hub.branches and all(line.startswith("new ") for line in lines[:-1])
    assert lines[-1].startswith("user/saes, revision main: 11 of 11 files would be sent, ")
    upload.upload(release, "user/saes")
    capsys.readouterr()
    (release / SMALL / "eval.json").write_text("{}")
    (release / WIDE / "sae_weights.safetensors").write_bytes((release / SMALL / "sae_weights.safetensors").read_bytes())
    (release / WIDE / "cfg.json").write_bytes((release / SMALL / "cfg.json").read_bytes())
    (release / WIDE / "sparsity.safetensors").unlink()
    commits = len(hub.commits)
    fire.Fire(upload.main, command=[str(release), "--repo", "user/saes", "--dry_run"])
    lines = capsys.readouterr().out.splitlines()
    states = {line.split()[-1]: line.split()[0] for line in lines[:-1]}
    assert len(hub.commits) == commits
    assert states[f"{SMALL}/eval.json"] == "new" and states[f"{SMALL}/sae_weights.safetensors"] == "there"
    assert states[f"{WIDE}/sae_weights.safetensors"] == "changed"


def test_dry_run_without_a_hub(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fire.Fire(upload.main, command=[str(bare), "--repo", "user/saes", "--dry_run"])  # HF_HUB_OFFLINE is set
    captured = capsys.readouterr()
    assert captured.out.count("\nnew ") == 6 and "7 of 7 files would be sent" in captured.out
    assert "the hub is out of reach: HF_HUB_OFFLINE is set; unset it; so it is not known what is there" in captured.err


# ---- what never leaves -----------------------------------------------------------------------------------------------


def test_absolute_paths_stay_here(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = {
        "output_dir": "/home/ann/secret/run",
        "model": {"name": "/scratch/ann/llama"},
        "data": {"dataset": "C:\\Users\\ann\\texts", "tokenizer": "~/tokenizer"},
        "logging": {"wandb_project": "ann's", "wandb_entity": "ann", "run_name": "ann", "log_every_steps": 7},
    }
    save_run(tmp_path / "run", keys=keys)
    consolidate(tmp_path / "run", tmp_path / "release")
    upload.upload(tmp_path / "release", "user/saes")
    sent = {path: data for path, data in hub.files("user/saes").items() if path.endswith((".json", ".md"))}
    assert not any(b"ann" in data or b"~" in data for data in sent.values())
    run = json.loads(sent["model.layers.1/runner_cfg.json"])
    assert (run["output_dir"], run["model"]["name"], run["data"]["dataset"]) == ("run", "llama", "texts")
    assert json.loads(sent["model.layers.1/cfg.json"])["metadata"]["model_name"] == "llama"
    assert run["logging"] == {"log_every_steps": 7, "log_to_wandb": False, "log_weights_to_wandb": False}
    assert from_dict(run).logging.log_every_steps == 7  # it trains again
    front = yaml.safe_load(sent["README.md"].decode().split("---")[1])
    assert front.keys() == {"library_name", "tags"}  # llama and texts are no names of the hub
    card = (tmp_path / "release/README.md").read_text()
    assert "ann" not in card and "base_model" not in card and "`llama`" in card
    said = capsys.readouterr().out
    assert "without user and password: data.dataset, data.tokenizer, metadata.dataset_path" in said
    assert b"ann" in (tmp_path / "release" / "model.layers.1" / "runner_cfg.json").read_bytes()


def test_what_of_a_path_or_an_address_is_sent() -> None:
    sent = {
        "../../secret/llama": "llama",
        "..\\texts": "texts",
        "file:///home/ann/texts": "texts",
        "https://ann:secret@host/a/../b": "https://host/a/../b",
        "s3://key:p@ss@bucket/texts": "s3://bucket/texts",
        "user/name": "user/name",
        "s3://bucket/a@b": "s3://bucket/a@b",
        "data/a..b": "data/a..b",
    }
    cut: set[str] = set()
    assert card.without_local_paths({"data": list(sent)}, cut) == {"data": list(sent.values())}
    assert cut == {f"data.{index}" for index in range(5)}


def test_names_are_only_text_in_the_card() -> None:
    about: dict[str, Any] = {
        "model_name": "a\n# b`<img src=x>",
        "hook_name": "x|y",
        "context_size": "<b>",
        "training_steps": "1\n```",
    }
    about |= {"training_library": "scale_sae", "training_options": {"lr|`": "`|<i>\n", "seed": 0}}
    cfg = {"architecture": "a|b", "d_in": 1, "d_sae": 2, "dtype": "`", "metadata": about}
    text = card.text([card.entry('a"`]|</b>\n(c', cfg, has_plot=True)], "user/saes")
    names = "a?# b??img src=x?"
    assert f"\n# Sparse autoencoders for {names}\n" in text and f" on `{names}` over `-`, in" in text
    assert '\n| `a"????/b??(c` | `x?y` | a?b | 1 | 2 | - | - |\n' in text
    assert '\n| lr?? | `"` |\n| seed | `0` |\n' in text
    assert r'SAE.from_pretrained("user/saes", "a\"`]|</b>\n(c")' in text
    assert '![a"????/b??(c](a%22%60%5D%7C%3C/b%3E%0A%28c/density.png)' in text
    assert text.count("```") == 6 and "--step 1???? --dtype ?" in text


# ---- objects ---------------------------------------------------------------------------------------------------------


def test_objects_and_folders(hub: Hub, release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = registry.training_config("topk", D_IN, {"d_sae": 64, "k": 4}, "sae")
    live = registry.create("topk", cfg, Shard())
    live.initialize(0, "here")
    loaded = SAE.load_from_disk(release / SMALL)
    (release / WIDE / "optimizer.pt").write_text("of no concern to anybody")
    upload.upload_saes_to_huggingface(
        {"live": live, "loaded": loaded, "layer_1/wide": release / WIDE}, "user/saes", show_progress=False
    )
    there = hub.files("user/saes")
    weights = ("cfg.json", "sae_weights.safetensors")
    assert there.keys() == {".gitattributes", "README.md"} | {
        *(f"{sae_id}/{name}" for sae_id in ("loaded", "live") for name in weights),
        *(f"layer_1/wide/{name}" for name in SENT),
    }
    x = torch.randn(9, D_IN, generator=torch.Generator().manual_seed(1))
    assert torch.equal(SAE.from_pretrained("user/saes", "loaded")(x), loaded(x))
    torch.testing.assert_close(sae_lens.SAE.from_pretrained("user/saes", "loaded")(x), loaded(x))
    with torch.no_grad():  # the release moves the decoder's norms into the encoder, a rounding of float32
        torch.testing.assert_close(SAE.from_pretrained("user/saes", "live")(x), live(x))
    assert capsys.readouterr().err == ""
    before = there["README.md"]
    upload.upload_saes_to_huggingface({"more": loaded}, "user/saes", show_progress=False)
    assert hub.files("user/saes")["README.md"] == before  # as SAELens: it does not know what else is there


@pytest.mark.parametrize(
    ("saes", "words"),
    [
        ({}, "saes_dict: is empty"),
        ({"../up": "x"}, "saes_dict: '../up' must be a folder's path"),
        ({"/etc": "x"}, "saes_dict: '/etc' must be a folder's path"),
        ({"a//b": "x"}, "saes_dict: 'a//b' must be a folder's path"),
        ({"a": "no/such/folder"}, r"no/such/folder: holds no cfg\.json"),
    ],
)
def test_wrong_objects(hub: Hub, saes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        upload.upload_saes_to_huggingface(saes, "user/saes")
    assert not hub.branches


# ---- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("repo", "token", "words"),
    [
        ("saes", TOKEN, "--repo saes: must be user/name"),
        ("user/sa es", TOKEN, "--repo user/sa es: must be user/name, of letters"),
        ("user/team/saes", TOKEN, "--repo user/team/saes: must be user/name"),
        ("user/saes", "", "--repo user/saes: no token of the Hugging Face hub; log in with `hf auth login`"),
        ("user/saes", "hf_forged", "user/saes: the hub does not accept the token (401); log in again"),
        ("user/saes", READER, "user/saes: the token may not write there (403)"),
        ("somebody/saes", TOKEN, "somebody/saes: the token may not write there (403)"),
        ("user/public", TOKEN, "--private: user/public is there and public"),
    ],
)
def test_what_the_hub_refuses(
    hub: Hub,
    bare: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    repo: str,
    token: str,
    words: str,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    hub.commit("user/public", "main", {})
    line = failed(str(bare), "--repo", repo, "--private")
    assert line.startswith(words)
    assert "hf_" not in (line + "".join(capfd.readouterr())).replace("hf auth", "")
    assert hub.branches.keys() == {"user/public"} and hub.files("user/public") == {}


def test_a_hub_that_is_gone(hub: Hub, bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    assert failed(str(bare), "--repo", "user/saes").startswith("user/saes: the hub is out of reach (Connect")


def test_a_file_that_the_hub_lost(hub: Hub, bare: Path) -> None:
    hub.loses = f"{WIDE}/cfg.json"
    line = failed(str(bare), "--repo", "user/saes")
    assert line == f"user/saes: {WIDE}/cfg.json is not there as it is here; run the command again"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def not_a_number(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4] + b"\x00\x00\xc0\x7f")  # the last of the float32 values


def write(text: str) -> Any:
    return lambda path: path.write_text(text)


DAMAGE: dict[str, tuple[str, Any, str]] = {
    "a stray file": ("notes.txt", write("mine"), "{root}: notes.txt: no file of a release; move it elsewhere"),
    "another format": (
        f"{SMALL}/sae.safetensors",
        write("?"),
        f"{SMALL}/sae.safetensors is of another library's format; send it with `hf upload`",
    ),
    "a hidden one": (f"{SMALL}/.env", write("KEY=1"), f"{{root}}: {SMALL}/.env: no file of a release"),
    "weights cut short": (f"{SMALL}/sae_weights.safetensors", truncate, "the file ends at byte"),
    "weights that are none": (f"{SMALL}/sae_weights.safetensors", write("?"), "is not a whole safetensors file"),
    "weights lost": (f"{SMALL}/sae_weights.safetensors", Path.unlink, "holds no sae_weights.safetensors"),
    "NaN": (f"{SMALL}/sae_weights.safetensors", not_a_number, "has NaN or infinite values; release another step"),
    "a cfg.json that is none": (f"{SMALL}/cfg.json", write("{"), "cfg.json: is not JSON"),
    "another width": (
        f"{SMALL}/cfg.json",
        write('{"architecture": "topk", "d_in": 32, "d_sae": 95, "k": 8, "metadata": {}}'),
        "has shape [32, 96], but by cfg.json [32, 95]",
    ),
    "a runner_cfg.json that is none": (f"{SMALL}/runner_cfg.json", write("[1]"), "runner_cfg.json: is no JSON object"),
    "figures that are none": (f"{SMALL}/eval.json", write("nan?"), "eval.json: is no JSON object"),
    "sparsity of another": (f"{SMALL}/sparsity.safetensors", write("?"), "is not a whole safetensors file"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_nothing_is_sent_of_a_damaged_release(hub: Hub, release: Path, case: str) -> None:
    name, damage, words = DAMAGE[case]
    damage(release / name)
    assert words.format(root=release) in failed(str(release), "--repo", "user/saes")
    assert not hub.branches and not hub.puts


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "RELEASE_DIR: give one folder"),
        (["{made}"], "--repo None: must be user/name"),
        (["{made}", "more", "--repo", "user/saes"], "RELEASE_DIR: give one folder"),
        (["{made}", "--repo", "user/saes", "--dryrun"], "--dryrun True: no such option (did you mean dry_run?)"),
        (["{made}", "--repo", "user/saes", "--private", "7"], "--private 7: takes no value"),
        (["{made}", "--repo", "user/saes", "--revision"], "--revision True: must be the name of a branch"),
        (["{made}/nothing", "--repo", "user/saes"], "nothing: is no folder"),
        (["{made}/model.layers.1/small/../../../run", "--repo", "user/saes"], "holds no cfg.json"),
    ],
)
def test_wrong_arguments(made: Path, arguments: list[str], words: str) -> None:
    assert words in failed(*(argument.format(made=made) for argument in arguments))


def test_the_command(hub: Hub, bare: Path, tmp_path: Path) -> None:
    """In a process of its own, with the settings that a user has."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    environment |= {"HF_HUB_OFFLINE": "0", "PYTHONPATH": str(Path(upload.__file__).parents[1])}
    command = [sys.executable, "-m", "scale_sae.upload", str(bare), "--repo", "user/saes"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{hub.url}/user/saes: 7 files sent, 0 were there\n"
    assert TOKEN not in done.stdout + done.stderr
    assert hub.files("user/saes").keys() == expected_paths(SMALL, WIDE, names=BARE)
