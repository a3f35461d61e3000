"""Releases by name: a folder of this disk, a repository of the Hugging Face hub, or an entry of SAELens's list."""

import contextlib
import os
import pickle
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch

from scale_sae.errors import UserError, nearest
from scale_sae.saes.inference import CFG_FILE, SAE, WEIGHTS_FILE, as_dtype, build, cast

_NAMED = 5  # names that a message lists at most


def load_pretrained(
    release: str,
    sae_id: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    force_download: bool = False,
) -> SAE:
    """The SAE ``sae_id`` of a release.

    Args:
        release: an existing folder; else ``user/repo`` on the hub; else a name of SAELens's list, whose loaders then
            read it (they know formats other than SAELens's own), where sae_lens is installed.
        sae_id: the SAE's folder in the release, or its id in SAELens's list; None: the release is one SAE itself.
        device: where the SAE goes.
        dtype: what its tensors are cast to, thresholds to at least float32. None: the dtype of its cfg.json; for a name
            of SAELens's list float32, as there.
        revision: branch, tag or commit of a repository; None: its main branch.
        force_download: download even what is in the cache.

    Raises:
        UserError: there is no such release or SAE, it cannot be had, or what it holds cannot be used.
    """
    if Path(release).is_dir() or "/" in release:
        return SAE.load_from_disk(resolve(release, sae_id, revision, force_download), device, dtype)
    if revision is not None:
        raise UserError(f"revision: {revision!r} needs a Hugging Face repository as the release, not {release!r}")
    return _from_saelens_list(release, sae_id, device, dtype, force_download)


def resolve(release: str, sae_id: str | None, revision: str | None, force_download: bool = False) -> Path:
    """The folder on this disk with cfg.json and sae_weights.safetensors of an SAE in a folder or on the hub.

    From the hub these two files are downloaded, of one commit, and no others. Arguments and errors are those of
    ``load_pretrained``.
    """
    parts = PurePosixPath(sae_id or "").parts
    if ".." in parts or "/" in parts:
        raise UserError(f"sae_id: {sae_id!r} must be a folder inside the release")
    if not Path(release).is_dir():
        return _download(release, parts, revision, force_download)
    if revision is not None:
        raise UserError(f"revision: {revision!r} needs a Hugging Face repository as the release; {release} is a folder")
    folder = Path(release).joinpath(*parts)
    if not (folder / CFG_FILE).is_file():
        found = sorted(str(path.parent.relative_to(release)) for path in Path(release).rglob(CFG_FILE))
        raise UserError(f"sae_id: {folder} holds no {CFG_FILE}{nearest(sae_id or '', found)}; {_listed(found)}")
    return folder


def _download(release: str, parts: tuple[str, ...], revision: str | None, force_download: bool) -> Path:
    from huggingface_hub import hf_hub_download

    def fetch(name: str, revision: str | None) -> Path:
        filename = "/".join((*parts, name))
        with _hub_errors(release, filename, revision):
            return Path(hf_hub_download(release, filename, revision=revision, force_download=force_download))

    cfg = fetch(CFG_FILE, revision)
    # The cache is snapshots/COMMIT/FILENAME. A branch may move between two downloads; a commit does not.
    commit = cfg.parents[len(parts)].name
    return fetch(WEIGHTS_FILE, commit).parent


@contextlib.contextmanager
def _hub_errors(release: str, what: str, revision: str | None) -> Iterator[None]:
    """One line for whatever the hub's client raises. Its own words are left out: they may quote request headers."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError:
        raise UserError(f"release: {release!r} is neither a folder here nor user/repo on the hub") from None
    except errors.GatedRepoError:
        raise UserError(
            f"{release}: is gated; accept its terms on huggingface.co and log in with `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{release}: is not on the Hugging Face hub, or private; check its name or log in with `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"revision: {release} has no {revision!r}; give one of its branches, tags or commits") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise UserError(
            f"{release}: {what} is not in the cache and the hub is out of reach; check the connection, HF_HUB_OFFLINE "
            "and the name, or give a folder"
        ) from None
    except errors.EntryNotFoundError:
        raise UserError(f"{release}: holds no {what}; check sae_id and revision") from None
    except ValueError as error:
        if error.__cause__ is None:  # the client's has one: why the hub could not be asked
            raise
        raise UserError(f"force_download: {what} of {release} cannot be downloaded now; check the connection") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        raise UserError(f"{release}: the hub answered {status} for {what}; log in, or try again later") from None


def _from_saelens_list(
    release: str, sae_id: str | None, device: torch.device | str, dtype: torch.dtype | str | None, force_download: bool
) -> SAE:
    try:
        from sae_lens import SAE as SAELensSAE
        from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
    except ImportError:
        raise UserError(
            f"release: {release!r} is neither a folder here nor user/repo on the hub; for names of SAELens's list "
            "install scale_sae[sae-lens]"
        ) from None
    releases = get_pretrained_saes_directory()
    if release not in releases:
        raise UserError(
            f"release: {release!r} is neither a folder here, nor user/repo on the hub, nor in SAELens's list"
            f"{nearest(release, releases)}"
        )
    sae_ids = list(releases[release].saes_map)
    if sae_id not in sae_ids:
        raise UserError(f"sae_id: {release} has no {sae_id!r}{nearest(sae_id or '', sae_ids)}; {_listed(sae_ids)}")

    wanted = as_dtype("float32" if dtype is None else dtype)
    read_as = str(torch.promote_types(wanted, torch.float32)).removeprefix("torch.")  # thresholds stay this wide
    what = f"{release}, {sae_id}"
    with _hub_errors(releases[release].repo_id, f"a file of {what}", None), _tensors_only(what):
        theirs = SAELensSAE.from_pretrained(
            release, sae_id, device=str(device), dtype=read_as, force_download=force_download
        )
    tensors = {name: cast(name, tensor, wanted) for name, tensor in theirs.state_dict().items()}
    return build(theirs.cfg.to_dict(), tensors, what)


@contextlib.contextmanager
def _tensors_only(what: str) -> Iterator[None]:
    """Whatever a loader asks for, torch.load makes tensors and plain containers only, and runs no code of the file.

    Some of SAELens's loaders read ``.pt`` files. They leave this to torch's default, which the environment can change.
    """
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    try:
        yield
    except pickle.UnpicklingError:
        raise UserError(f"{what}: its file holds more than tensors; it is not read, since it could run code") from None
    finally:
        del os.environ[names[0]]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _listed(names: list[str]) -> str:
    if not names:
        return "there are none"
    return f"there are {', '.join(names[:_NAMED])}" + (f" and {len(names) - _NAMED} more" if names[_NAMED:] else "")
