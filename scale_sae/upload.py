"""Sends a release to the Hugging Face hub: ``python -m scale_sae.upload RELEASE_DIR --repo user/name``.

Every file is checked before any is sent, a commit carries whole SAEs, and files that the repository has already are not
sent again: an upload that was cut short goes on with the same command. The layout is SAELens's, so that
``SAE.from_pretrained("user/name", sae_id)`` of either library loads what is there.
"""

import contextlib
import hashlib
import inspect
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import fire
import torch
from huggingface_hub import CommitOperationAdd, HfApi, errors, get_token, utils
from huggingface_hub.hf_api import RepoFile

from scale_sae import card
from scale_sae.card import CARD, EVAL, PLOT
from scale_sae.errors import UserError, nearest
from scale_sae.export import RUNNER_CFG, SPARSITY
from scale_sae.formats import LAYOUTS
from scale_sae.progress import progress_bar
from scale_sae.saes.base import TrainingSAE
from scale_sae.saes.inference import CFG_FILE, SAE, WEIGHTS_FILE, build, read_cfg
from scale_sae.tensorfile import Reader, blocks

SAE_FILES = (CFG_FILE, WEIGHTS_FILE, SPARSITY, RUNNER_CFG, EVAL, PLOT)  # of which the first two must be there
# of the HTTP library that the client's version uses
TRANSPORT_ERRORS: tuple[Any, ...] = errors.HfHubHTTPError.__bases__
OPTIONS = ("repo", "private", "revision", "dry_run")
COMMITS = 32  # of SAEs at most in an upload: the hub takes only so many an hour
ACCOUNT = ("wandb_project", "wandb_entity", "run_name")  # keys of the config's logging


def main(
    release: Any = None,
    *extra: Any,
    repo: Any = None,
    private: Any = False,
    revision: Any = "main",
    dry_run: Any = False,
    **unknown: Any,
) -> None:
    """python -m scale_sae.upload RELEASE_DIR --repo user/name [--private] [--revision R] [--dry_run]

    Sends a release to the Hugging Face hub. Log in with `hf auth login`, or set HF_TOKEN.

    Args:
        release: the folder that scale_sae.consolidate wrote.
        repo: the repository, user/name; made if it is not there.
        private: the repository is to be private.
        revision: the branch that is written to; made from main if it is not there.
        dry_run: list what would be sent, and send nothing.
    """
    if unknown.keys() & {"help", "h"}:  # Fire hands them over, as it does every flag that is not declared
        print(inspect.getdoc(main))
        return
    try:
        for name, value in unknown.items():
            raise UserError(f"--{name} {value}: no such option{nearest(name, OPTIONS)}")
        if extra or release is None:
            raise UserError("RELEASE_DIR: give one folder that scale_sae.consolidate wrote")
        for name, flag in (("private", private), ("dry_run", dry_run)):
            if not isinstance(flag, bool):
                raise UserError(f"--{name} {flag}: takes no value")
        if isinstance(revision, bool):
            raise UserError(f"--revision {revision}: must be the name of a branch")
        upload(Path(str(release)), repo, private, str(revision), dry_run)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


def upload(root: Path, repo: Any, private: bool = False, revision: str = "main", dry_run: bool = False) -> None:
    """Sends the release in ``root`` and its model card; arguments as for `main`.

    Raises:
        UserError: the folder holds anything but a release; a file of it is damaged; the hub refuses or is out of reach.
    """
    _check_repo(repo)
    if not root.is_dir():
        raise UserError(f"{root}: is no folder; give one that scale_sae.consolidate wrote")
    folders = {path.parent.relative_to(root).as_posix(): path.parent for path in sorted(root.rglob(CFG_FILE))}
    _refuse_strangers(root, folders)
    together = None if "." in folders else root / EVAL  # where the release is one SAE, the figures are its own
    _transfer(folders, repo, private, revision, dry_run=dry_run, replace_card=True, together=together)


def upload_saes_to_huggingface(
    saes_dict: Mapping[str, SAE | TrainingSAE | Path | str],
    hf_repo_id: str,
    hf_revision: str = "main",
    show_progress: bool = True,
    add_default_readme: bool = True,
    private: bool = False,
) -> None:
    """SAELens's function of this name: sends SAEs, each into the folder of the repository that is its key.

    Args:
        saes_dict: sae_id → an SAE, or the folder of one. Of a folder's files only those of a release are sent.
        hf_repo_id: ``user/name``; made if it is not there.
        hf_revision: the branch that is written to; made from main if it is not there.
        show_progress: show bars.
        add_default_readme: send a model card too, where the repository has no README.md.
        private: the repository is to be private.

    Raises:
        UserError: an SAE or a file of it is not whole; the hub refuses or is out of reach.
    """
    _check_repo(hf_repo_id)
    if not saes_dict:
        raise UserError("saes_dict: is empty; give at least one SAE")
    with tempfile.TemporaryDirectory() as made, _client_bars(show_progress):
        folders = {}
        for index, (sae_id, sae) in enumerate(saes_dict.items()):
            if sae_id != PurePosixPath(sae_id).as_posix() or ".." in sae_id.split("/") or sae_id.startswith("/"):
                raise UserError(f"saes_dict: {sae_id!r} must be a folder's path in the repository")
            folders[sae_id] = Path(sae) if isinstance(sae, str | Path) else Path(made, str(index))
            if isinstance(sae, TrainingSAE) and sae.shard.size > 1:
                raise UserError(f"saes_dict: {sae_id} is a shard; save_inference_model on all ranks, give its folder")
            if not isinstance(sae, str | Path):
                # One in training, of SAELens too, may also have a format of its own to save.
                save = "save_inference_model" if hasattr(sae, "save_inference_model") else "save_model"
                getattr(sae, save)(folders[sae_id])
        _transfer(folders, hf_repo_id, private, hf_revision, with_card=add_default_readme, show_progress=show_progress)


# ---- what is sent ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class File:
    """One file to be: its path in the repository, and its contents or where they are."""

    path: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    @cached_property
    def sha256(self) -> str:
        """As the hub names large files."""
        return self._hash(hashlib.sha256())

    @cached_property
    def git_sha1(self) -> str:
        """As git names a blob."""
        return self._hash(hashlib.sha1(b"blob %d\0" % self.size))

    def _hash(self, digest: Any) -> str:
        if isinstance(self.content, bytes):
            digest.update(self.content)
        else:
            with self.content.open("rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
        return str(digest.hexdigest())

    def is_in(self, remote: Mapping[str, RepoFile]) -> bool:
        """Whether the repository has this file with these contents."""
        there = remote.get(self.path)
        if there is None or there.size != self.size:
            return False
        return there.lfs.sha256 == self.sha256 if there.lfs else there.blob_id == self.git_sha1


def _check_repo(repo: Any) -> None:
    if not isinstance(repo, str) or repo.count("/") != 1:
        raise UserError(f"--repo {repo}: must be user/name, with the name of your account or organisation")
    try:
        utils.validate_repo_id(repo)
    except errors.HFValidationError:
        raise UserError(
            f"--repo {repo}: must be user/name, of letters, digits, '-', '_' and '.', and no more than 96 of them"
        ) from None


def _refuse_strangers(root: Path, folders: Mapping[str, Path]) -> None:
    """UserError where the folder holds what is no part of a release: it may be private."""
    if not folders:
        raise UserError(f"{root}: holds no {CFG_FILE}; give a release in SAELens's format (consolidate writes it)")
    known = {folder / name for folder in folders.values() for name in SAE_FILES} | {root / CARD, root / EVAL}
    strangers = [str(path.relative_to(root)) for path in sorted(root.rglob("*")) if not path.is_dir()]
    strangers = [name for name in strangers if root / name not in known]
    for name in strangers:
        if Path(name).name in [layout.weights for layout in LAYOUTS.values()]:
            raise UserError(f"{root}: {name} is of another library's format; send it with `hf upload`")
    if strangers:
        more = f" and {len(strangers) - 3} more" if strangers[3:] else ""
        raise UserError(
            f"{root}: {', '.join(strangers[:3])}{more}: no file of a release; move it elsewhere, then upload"
        )


def check_sae(folder: Path) -> dict[str, Any]:
    """The cfg.json of an SAE's folder, whose weights it fits. UserError where a file is damaged or a weight no number.

    The weights are read in blocks: an SAE may be larger than memory.
    """
    cfg = read_cfg(folder)
    if not (folder / WEIGHTS_FILE).is_file():
        raise UserError(f"{folder}: holds no {WEIGHTS_FILE}; give the folder of one SAE of a release")
    with Reader(folder / WEIGHTS_FILE) as file:
        shapes = {name: torch.empty(e.shape, dtype=e.dtype, device="meta") for name, e in file.entries.items()}
        build(cfg, shapes, str(folder))
        for name, entry in file.entries.items():
            rows = blocks(0, entry.shape[0], entry.row_bytes) if entry.shape else ()
            for part in (file.rows(name, *span) for span in rows):
                if not part.isfinite().all():
                    raise UserError(f"{folder / WEIGHTS_FILE}: {name} has NaN or infinite values; release another step")
    if (folder / SPARSITY).is_file():
        with Reader(folder / SPARSITY) as file:
            if "sparsity" not in file.entries or file.tensor("sparsity").shape != (cfg["d_sae"],):
                raise UserError(f"{folder / SPARSITY}: is not about {cfg['d_sae']} latents; get the file again")
    return cfg


def _files(sae_id: str, folder: Path, cut: set[str]) -> tuple[list[File], card.Entry]:
    """What is sent of an SAE's folder, and its line in the model card; ``cut`` gets the keys of shortened paths."""
    entry = card.entry(sae_id, check_sae(folder), card.figures(folder / EVAL))
    cut |= entry.local
    plot = card.plot_density(folder, sae_id)
    prefix = "" if sae_id == "." else f"{sae_id}/"
    found = []
    for name in SAE_FILES:
        path = folder / name
        content: Path | bytes = path
        if name == PLOT and plot is not None:
            content = plot
        elif not path.is_file():
            continue
        elif name in (CFG_FILE, RUNNER_CFG):
            tree = card.json_object(path)
            public = _public(name, tree, cut)
            content = path if public == tree else (json.dumps(public, indent=1) + "\n").encode()
        found.append(File(prefix + name, content))
    return found, replace(entry, has_plot=any(file.path == prefix + PLOT for file in found))


def _public(name: str, tree: dict[str, Any], cut: set[str]) -> dict[str, Any]:
    """A JSON file as it is sent: what tells of the machine, or of an account with Weights & Biases, stays here."""
    public: dict[str, Any] = card.without_local_paths(tree, cut)
    if name == RUNNER_CFG and isinstance(public.get("logging"), dict):
        public["logging"] = {key: value for key, value in public["logging"].items() if key not in ACCOUNT}
    return public


# ---- the hub ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Remote:
    """A repository as it is; ``files`` by path, of the branch or else of main."""

    exists: bool = False
    private: bool = False
    has_branch: bool = False
    files: Mapping[str, RepoFile] | None = None


def _transfer(
    folders: Mapping[str, Path],
    repo: str,
    private: bool,
    revision: str,
    *,
    dry_run: bool = False,
    with_card: bool = True,
    replace_card: bool = False,
    together: Path | None = None,
    show_progress: bool = True,
) -> None:
    """Checks everything, then sends what the repository lacks: whole SAEs in each commit, the model card last.

    ``together`` is where the figures of all SAEs at once are, if they are there.
    A README.md that is no model card of this package stays. One that is stays too, unless ``replace_card``.
    """
    api = HfApi()
    if not dry_run and get_token() is None:
        raise UserError(f"--repo {repo}: no token of the Hugging Face hub; log in with `hf auth login` or set HF_TOKEN")
    figures = {} if together is None else card.figures(together)
    cut: set[str] = set()
    plan: dict[str, list[File]] = {}
    lines: list[card.Entry] = []
    with _bar(show_progress, len(folders), "Checking", "SAE") as advance:
        for sae_id, folder in folders.items():
            plan[sae_id], entry = _files(sae_id, folder, cut)
            lines.append(entry)
            advance(1)
    if cut:
        print("local paths are sent as their last part, addresses without user and password: " + ", ".join(sorted(cut)))
    remote = Remote()
    try:
        with _hub_errors(repo):
            remote = _look(api, repo, revision)
            with_card = with_card and _may_write_card(api, repo, revision, remote, replace_card)
    except UserError as error:
        if not dry_run:
            raise
        print(f"{error}; so it is not known what is there", file=sys.stderr)
    last = [File(EVAL, together)] if together is not None and figures else []
    if with_card:
        last.append(File(CARD, card.text(lines, repo, together=figures).encode()))
    plan[""] = last
    if private and remote.exists and not remote.private:
        raise UserError(
            f"--private: {repo} is there and public; make it private in its settings, or choose another name"
        )
    if dry_run:
        _list(plan, repo, revision, remote)
    else:
        _send(api, plan, repo, private, revision, remote, show_progress)


def _look(api: HfApi, repo: str, revision: str) -> Remote:
    """The repository as it is now."""
    try:
        about = api.repo_info(repo)
    except errors.GatedRepoError:
        raise
    except errors.RepositoryNotFoundError:
        return Remote()
    has_branch = True
    try:
        tree = list(api.list_repo_tree(repo, recursive=True, revision=revision))
    except errors.RevisionNotFoundError:
        has_branch = False
        tree = list(api.list_repo_tree(repo, recursive=True))
    files = {item.path: item for item in tree if isinstance(item, RepoFile)}
    return Remote(True, bool(about.private), has_branch, files)


def _may_write_card(api: HfApi, repo: str, revision: str, remote: Remote, replace: bool) -> bool:
    """Whether the repository's README.md is none, or a card of this package that may be replaced."""
    if CARD not in (remote.files or {}):
        return True
    if not replace:
        return False
    path = api.hf_hub_download(repo, CARD, revision=revision if remote.has_branch else None)
    if card.is_ours(Path(path).read_text(errors="replace")):
        return True
    print(f"{CARD}: {repo} has one that is no model card of scale_sae; it stays as it is", file=sys.stderr)
    return False


def _list(plan: Mapping[str, Sequence[File]], repo: str, revision: str, remote: Remote) -> None:
    """Prints what an upload would do."""
    files = [file for part in plan.values() for file in part]
    there = remote.files or {}
    for file in files:
        state = "there" if file.is_in(there) else "changed" if file.path in there else "new"
        print(f"{state:8}{_amount(file.size):>10}  {file.path}")
    new = [file for file in files if not file.is_in(there)]
    print(
        f"{repo}, revision {revision}: {len(new)} of {len(files)} files would be sent, "
        f"{_amount(sum(file.size for file in new))}; nothing was"
    )


def _send(
    api: HfApi,
    plan: Mapping[str, Sequence[File]],
    repo: str,
    private: bool,
    revision: str,
    remote: Remote,
    show_progress: bool,
) -> None:
    """Sends what is not there, and looks whether it has arrived."""
    files = [file for part in plan.values() for file in part]
    with _hub_errors(repo):
        if not remote.exists:
            api.create_repo(repo, private=private, exist_ok=True)
        if not remote.has_branch and revision != "main":
            api.create_branch(repo, branch=revision, exist_ok=True)
        with _bar(show_progress, sum(file.size for file in files), "Uploading", "B") as advance:
            commits = _commits(plan, remote.files or {})
            new = [file for _, part in commits for file in part]
            advance(sum(file.size for file in files) - sum(file.size for file in new))
            for message, part in commits:
                _commit(api, repo, revision, message, part)
                advance(sum(file.size for file in part))
        there = _look(api, repo, revision).files or {}
    lost = [file.path for file in files if not file.is_in(there)]
    if lost:
        raise UserError(f"{repo}: {lost[0]} is not there as it is here; run the command again")
    print(f"{api.endpoint}/{repo}: {len(new)} files sent, {len(files) - len(new)} were there")


def _commits(plan: Mapping[str, Sequence[File]], there: Mapping[str, RepoFile]) -> list[tuple[str, list[File]]]:
    """Message and files of each commit: SAEs that are not there, several in one where they are many; then the card."""
    new = {name: found for name, part in plan.items() if (found := [file for file in part if not file.is_in(there)])}
    last = new.pop("", [])
    names = list(new)
    each = max(1, math.ceil(len(names) / COMMITS))
    commits = []
    for first in range(0, len(names), each):
        group = names[first : first + each]
        more = f" and {len(group) - 1} more" if group[1:] else ""
        commits.append((f"Upload {group[0]}{more}", [file for name in group for file in new[name]]))
    return commits + ([("Upload the model card", last)] if last else [])


def _commit(api: HfApi, repo: str, revision: str, message: str, files: Iterable[File]) -> None:
    additions = [
        CommitOperationAdd(file.path, file.content if isinstance(file.content, bytes) else str(file.content))
        for file in files
    ]
    api.create_commit(repo, operations=additions, commit_message=message, revision=revision)


@contextlib.contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """One line for whatever the hub's client raises. Its own words are left out: they may quote request headers."""
    try:
        yield
    except UserError:
        raise
    except (*TRANSPORT_ERRORS, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{repo}: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    """What went wrong, from the client's error or what caused it, and what to do."""
    again = "run the same command again: it goes on where it stopped"
    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    answered = next((cause for cause in causes if isinstance(cause, errors.HfHubHTTPError)), None)
    if isinstance(answered, errors.GatedRepoError):
        return "is gated; accept its terms on huggingface.co first"
    if answered is not None:
        status = answered.response.status_code
        if status == 401:
            return "the hub does not accept the token (401); log in again with `hf auth login` or set HF_TOKEN"
        if status in (403, 404):
            return f"the token may not write there ({status}); use one with write access to this repository"
        if status == 429:
            return f"the hub takes no more for now (429); wait an hour, then {again}"
        return f"the hub answered {status}; {again}"
    if any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in causes):
        return "the hub is out of reach: HF_HUB_OFFLINE is set; unset it"
    return f"the hub is out of reach ({type(causes[-1]).__name__}); check the connection, then {again}"


@contextlib.contextmanager
def _bar(shown: bool, total: int, description: str, unit: str) -> Iterator[Callable[[int], object]]:
    """What to call with the units that are done; a bar shows them, or nothing does."""
    if not shown:
        yield lambda done: None
        return
    with progress_bar(total, description, unit) as bar:
        yield bar.update


@contextlib.contextmanager
def _client_bars(shown: bool) -> Iterator[None]:
    """The hub's client shows no bars while open, unless they are to be shown."""
    if shown or utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


def _amount(size: int) -> str:
    """Bytes, written for people."""
    number = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


if __name__ == "__main__":
    fire.Fire(main)
