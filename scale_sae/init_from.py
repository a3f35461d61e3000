"""Starts training from a released SAE: each rank reads its own rows of the file, and no more."""

from pathlib import Path
from typing import Any

import torch

from scale_sae.config import InitFrom
from scale_sae.errors import UserError
from scale_sae.saes.base import TrainingSAE
from scale_sae.saes.inference import CFG_FILE, WEIGHTS_FILE, read_cfg
from scale_sae.saes.pretrained import resolve
from scale_sae.tensorfile import Reader, blocks

# Fields that must be the same, or the weights would mean something else; each where both sides have it.
SAME = ("d_in", "d_sae", "d_out", "apply_b_dec_to_input", "rescale_acts_by_decoder_norm", "normalize_activations")


@torch.no_grad()
def load_release(sae: TrainingSAE, wanted: InitFrom, sae_id: str, key: str) -> None:
    """Copies this shard's rows of a released SAE into ``sae``.

    Args:
        sae: of any dtype; what its release would not hold (BatchTopK's running mean) is left as it is.
        wanted: where the release is.
        sae_id: the folder in it where ``wanted`` names none and the release is not itself the folder of an SAE.
        key: where the wish stands in the config file, such as ``saes.0.init_from``.

    Raises:
        UserError: there is no such release; it is of another architecture or shape; a file is damaged.
    """
    is_sae = (Path(wanted.release) / CFG_FILE).is_file()
    try:
        folder = resolve(wanted.release, wanted.sae_id or (None if is_sae else sae_id), wanted.revision)
        _check(sae, read_cfg(folder))
        with Reader(folder / WEIGHTS_FILE) as file:
            for name, parameter in sae.named_parameters():
                _fill(parameter, sae, name, file)
    except (UserError, OSError) as error:
        raise UserError(f"{key}: {wanted.release}: {error}") from None


def _check(sae: TrainingSAE, cfg: dict[str, Any]) -> None:
    architecture = sae.cfg.get_inference_config_class().architecture()
    if cfg.get("architecture") != architecture:
        raise UserError(
            f"holds a {cfg.get('architecture')} SAE; {sae.cfg.architecture()} starts from a {architecture} release"
        )
    # What a cfg.json leaves out has the released class's default, which may be another than that of training.
    theirs = sae.cfg.get_inference_config_class().from_dict(cfg)
    ours = sae.cfg.get_inference_sae_cfg_dict()
    for name in SAME:
        if name in ours and ours[name] != getattr(theirs, name):
            raise UserError(f"has {name}: {getattr(theirs, name)}, this SAE {ours[name]}; set the same")


def _fill(parameter: torch.nn.Parameter, sae: TrainingSAE, name: str, file: Reader) -> None:
    """Copies the released counterpart of one parameter, in blocks."""
    released = "W_enc" if name == "W_enc_rows" else name
    if released not in file.entries:
        raise UserError(f"has no tensor {released}; it holds {', '.join(sorted(file.entries))}")
    shape = list(parameter.shape) if name in sae.replicated else [sae.cfg.d_sae, *parameter.shape[1:]]
    if list(file.entries[released].shape) != (shape[::-1] if name == "W_enc_rows" else shape):
        raise UserError(f"tensor {released} has shape {list(file.entries[released].shape)}, which its cfg.json denies")
    if name in sae.replicated:
        parameter.copy_(file.tensor(released))
        return
    for start, stop in blocks(sae.rows.start, sae.rows.stop, parameter[0].nbytes):
        read = file.columns(released, start, stop).T if name == "W_enc_rows" else file.rows(released, start, stop)
        parameter[start - sae.rows.start : stop - sae.rows.start] = read
