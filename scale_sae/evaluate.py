"""Evaluates a release on held-out text: ``[accelerate launch …] -m scale_sae.evaluate DIR [--sae_id …] [--tokens N]``.

For each SAE: how well it reconstructs, how sparse it is, and what the language model loses when the reconstruction
takes the place of the activations. Writes ``eval.json`` beside the weights (SAELens's names) and prints a table; and
``DIR/eval.json``, what the model loses with all of them in place at once, where no two of them are at one place.

Of several ranks each ``topology.lm.tp`` share a copy of the model, and the copies share the text. The figures are those
of one process.
"""

import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import fire
import torch
import torch.distributed as dist
from torch import Tensor

from scale_sae import topology
from scale_sae.activations.source import inspect_model
from scale_sae.collectives import NonFiniteError, Ranks
from scale_sae.config import RunConfig, from_dict
from scale_sae.config_parsing import set_dotted
from scale_sae.errors import UserError, nearest
from scale_sae.held_out import Batch, HeldOutModel, Losses, Substitute, batches, instead, loss_figures, loss_sums, total
from scale_sae.progress import progress_bar
from scale_sae.reconstruction import Figures, Reconstruction
from scale_sae.saes.inference import SAE, read_cfg
from scale_sae.session import Session, agree, run_command
from scale_sae.topology import LMRanks
from scale_sae.train import open_model, set_tf32

EVAL = "eval.json"
T = TypeVar("T")


class Evaluator:
    """A language model and the held-out text of one run's config, to evaluate SAEs at any of ``hookpoints``."""

    def __init__(
        self,
        config: RunConfig,
        hookpoints: Sequence[str],
        tokens: int,
        devices: tuple[torch.device, ...],
        ranks: LMRanks | None = None,
    ):
        """
        Args:
            config: of the run; its ``topology.lm`` says how ``ranks`` share the model.
            hookpoints: inputs and targets of all SAEs.
            tokens: held-out tokens, at most.
            devices: this rank's.
            ranks: the ranks that evaluate together, all of which make the same calls; None: this process alone.
        """
        self.device = devices[0]
        self.ranks = ranks
        lm = config.topology.lm
        widths = self.agreed(lambda: inspect_model(config.model, hookpoints, lm.tp, lm.parallel))
        reads = ranks is None or ranks.rank == 0
        read = [self.agreed(lambda: batches(config, tokens) if reads else None)]
        if ranks is not None:
            dist.broadcast_object_list(read, 0, group=ranks.control)
        assert read[0] is not None
        self.data: list[Batch] = read[0]
        mesh = None if ranks is None else ranks.lm_mesh
        self.model = HeldOutModel(self.agreed(lambda: open_model(config, widths, devices, mesh, reads)))
        replica, replicas = (0, 1) if ranks is None else (ranks.replica, ranks.replicas)
        self.own = dict(list(enumerate(self.data))[replica::replicas])
        # Of the model as it is, and with zeros at some hookpoints, by batch; found once.
        self.clean: dict[int, float] = {}
        self.ablated: dict[tuple[tuple[str, ...], int], Losses] = {}

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for its copy of the model."""
        return self.ranks is None or self.ranks.leads

    def evaluate(self, sae: SAE, hookpoint: str, target: str, done: Callable[[], object] = lambda: None) -> Figures:
        """All figures of one SAE, on all ranks.

        The ablation sets the kept positions to zero; excluded positions (special tokens) stay as they are throughout.

        Args:
            sae: what to evaluate.
            hookpoint: where its input is.
            target: where what it reconstructs is: ``hookpoint`` itself, but for transcoders.
            done: called after each batch.

        Raises:
            NonFiniteError: the SAE gave NaN or infinite values.
            UserError: a forward comes to the target before the input, or no activation there is finite.
        """
        reconstruction = Reconstruction(sae)

        def losses(number: int, batch: Batch) -> Losses | None:
            clean = self.model.clean(batch, list(dict.fromkeys((hookpoint, target))))
            self._without_sae(number, batch, clean.logits, (target,))
            if not clean.reaches(hookpoint, before=target):
                raise UserError(
                    f"reads {hookpoint}, which a forward reaches after {target}, where its output would go; it cannot "
                    "be evaluated"
                )
            x = clean.rows[hookpoint]
            y_hat = reconstruction.add(x, x if hookpoint == target else clean.rows[target], counts=self.leads)
            done()
            return None if clean.logits is None else self.model.losses(batch, clean.logits, {target: instead(y_hat)})

        lost = self._of_all(losses)
        if self.ranks is not None:
            everyone = Ranks(self.ranks.rank, dist.get_world_size(), self.ranks.control)
            reconstruction.sums.over(everyone, torch.device("cpu"))
        if not reconstruction.sums.rows:
            places = " or ".join(dict.fromkeys((hookpoint, target)))
            raise UserError(f"all activations at {places} are NaN or infinite; try model.dtype: float32")
        return reconstruction.sums.figures() | self._figures(lost, (target,))

    def evaluate_together(self, load: Mapping[tuple[str, str], Callable[[], SAE]]) -> Figures | None:
        """What the model loses with several SAEs in place at once; None where that cannot be.

        Args:
            load: (hookpoint, target) → what gives the SAE there. It is called in every forward, so that only one of
                them need be in memory.

        Raises:
            NonFiniteError: an SAE gave NaN or infinite values.
        """
        targets = tuple(target for _, target in load)
        if len(set(targets)) < len(targets) or not self.model.predicts:
            return None
        hookpoints = list(dict.fromkeys(name for place in load for name in place))

        def losses(number: int, batch: Batch) -> Losses | None:
            clean = self.model.clean(batch, hookpoints)
            if not all(clean.reaches(source, before=target) for source, target in load):
                return None
            assert clean.logits is not None
            self._without_sae(number, batch, clean.logits, targets)
            seen: dict[str, Tensor] = {}

            def change(source: str, target: str, y: Tensor) -> Tensor:
                return Reconstruction(load[source, target]()).add(y if source == target else seen[source], y, False)

            changes: dict[str, Substitute] = {place[1]: partial(change, *place) for place in load}
            return self.model.losses(batch, clean.logits, changes, seen.__setitem__, [s for s, t in load if s != t])

        lost = self._of_all(losses)
        return self._figures(lost, targets) if lost else None

    def _without_sae(self, number: int, batch: Batch, logits: Tensor | None, targets: tuple[str, ...]) -> None:
        """Finds, once, the losses of the model as it is and with zeros at ``targets``."""
        if logits is None or (targets, number) in self.ablated:
            return
        self.clean[number] = loss_sums(logits, batch.tokens, logits).ce
        self.ablated[targets, number] = self.model.losses(batch, logits, dict.fromkeys(targets, torch.zeros_like))

    def _of_all(self, losses: Callable[[int, Batch], Losses | None]) -> dict[int, Losses]:
        """``losses`` of every batch, by its number, each found by one copy of the model. What one raises, all raise."""
        problem: NonFiniteError | UserError | None = None
        found = {}
        try:
            with torch.no_grad():
                found = {number: losses(number, batch) for number, batch in self.own.items()}
        except (NonFiniteError, UserError) as error:
            problem = error.with_traceback(None)
        parts = [(problem, found, self.clean, self.ablated)]
        if self.ranks is not None:
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, parts[0], group=self.ranks.control)
            parts = gathered
        for failed, _, clean, ablated in parts:
            if failed is not None:
                raise failed
            self.clean |= clean
            self.ablated |= ablated
        return {number: lost for _, part, *_ in parts for number, lost in part.items() if lost is not None}

    def _figures(self, lost: Mapping[int, Losses], targets: tuple[str, ...]) -> Figures:
        if not lost:  # a model that predicts no tokens
            return {}
        numbers = range(len(self.data))
        zeroed = total([self.ablated[targets, number] for number in numbers])
        clean = sum(self.clean[number] for number in numbers)
        return loss_figures(self.data, clean, total([lost[number] for number in numbers]), zeroed)

    def agreed(self, attempt: Callable[[], T]) -> T:
        """What ``attempt`` gives; a UserError of one rank is one of all."""
        return attempt() if self.ranks is None else agree(attempt)


def release_folders(root: Path, sae_id: str | None) -> list[Path]:
    """The folders of the release's SAEs, or of the one asked for."""
    folders = sorted(path.parent for path in root.rglob("cfg.json"))
    if not folders:
        raise UserError(
            f"{root}: holds no released SAE; make one with python -m scale_sae.consolidate RUN_DIR --out {root}"
        )
    if sae_id is None:
        return folders
    names = {folder.relative_to(root).as_posix(): folder for folder in folders}
    if sae_id not in names:
        raise UserError(f"--sae_id: {root} has no {sae_id!r}{nearest(sae_id, names)}; it has {', '.join(names)}")
    return [names[sae_id]]


def place_of(folder: Path) -> tuple[str, str]:
    """(hookpoint of a released SAE's input, hookpoint of what it reconstructs), as names of the transformers model."""
    metadata = read_cfg(folder).get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    source = metadata.get("hf_hook_name") or metadata.get("hook_name")
    target = metadata.get("hf_hook_name_out") or metadata.get("hook_name_out") or source
    if not isinstance(source, str) or not isinstance(target, str):
        raise UserError(f"{folder / 'cfg.json'}: metadata.hook_name: {source!r} names no place in the model")
    return source, target


def run_config(folder: Path) -> dict[str, Any]:
    """The config of the run that a released SAE is from, without its topology."""
    path = folder / "runner_cfg.json"
    if not path.is_file():
        raise UserError(
            f"{folder}: has no {path.name}; evaluate needs the config of the SAE's run, for its model and its held-out "
            "text, which releases of scale_sae have"
        )
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error}); get the file again") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: must hold an object with the run's config, not {type(config).__name__}")
    return {name: value for name, value in config.items() if name != "topology"}


TABLE = {
    "explained variance": ("reconstruction_quality", "explained_variance", "{:.4f}"),
    "PCA-k FVU": ("reconstruction_quality", "pca_fvu", "{:.4f}"),
    "L0": ("sparsity", "l0", "{:.2f}"),
    "L0 max": ("sparsity", "l0_max", "{:.0f}"),
    "dead": ("sparsity", "dead_fraction", "{:.1%}"),
    "CE": ("model_performance_preservation", "ce_loss_without_sae", "{:.4f}"),
    "CE with SAE": ("model_performance_preservation", "ce_loss_with_sae", "{:.4f}"),
    "CE zeroed": ("model_performance_preservation", "ce_loss_with_ablation", "{:.4f}"),
    "CE score": ("model_performance_preservation", "ce_loss_score", "{:.4f}"),
    "KL with SAE": ("model_behavior_preservation", "kl_div_with_sae", "{:.4f}"),
    "KL score": ("model_behavior_preservation", "kl_div_score", "{:.4f}"),
}


def table(results: Mapping[str, Figures]) -> str:
    """The results as text columns; FVU stands beside that of PCA with k components, which a good SAE halves."""
    rows = [["SAE", "FVU", *TABLE]]
    for sae_id, figures in results.items():
        row = [sae_id, f"{1 - figures['reconstruction_quality']['explained_variance']:.4f}"]
        for section, name, form in TABLE.values():
            value = figures.get(section, {}).get(name)
            row.append("-" if value is None else form.format(value))
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def run(
    release: object,
    extra: tuple[object, ...],
    sae_id: str | None,
    tokens: object,
    options: Mapping[str, Any],
    trust_remote_code: bool = False,
    session: Session | None = None,
) -> None:
    """Evaluates on the ranks of ``session``, or without one in this process. UserError for what cannot be evaluated."""
    together: Callable[[Callable[[], T]], T] = (lambda attempt: attempt()) if session is None else agree
    root = Path(str(release))

    def read() -> dict[str, tuple[RunConfig, dict[Path, tuple[str, str]]]]:
        check_arguments(extra, tokens, options)
        return runs_of(release_folders(root, sae_id), options, trust_remote_code)

    runs = together(read)
    results: dict[str, Figures] = {}
    problems: list[str] = []
    joint = None
    for config, places in runs.values():
        evaluator = open_evaluator(config, places.values(), int(str(tokens)), session)
        found, failed = evaluate_all(evaluator, root, places)
        results |= found
        problems += failed
        if sae_id is None and len(runs) == 1 and not failed and len(places) > 1:
            joint = evaluate_joint(evaluator, root, places)
    if results and (session is None or session.is_main):
        print(table(results))
        if joint is not None:
            ce = joint["model_performance_preservation"]
            print(f"all at once: CE with SAEs {ce['ce_loss_with_sae']:.4f}, CE score {ce['ce_loss_score']:.4f}")
    if problems:
        raise UserError("; ".join(problems))


def check_arguments(extra: tuple[object, ...], tokens: object, options: Mapping[str, Any]) -> None:
    """UserError for arguments that evaluate does not have."""
    unknown = [*(str(word) for word in extra), *(f"--{name}" for name in options if not name.startswith("topology.lm"))]
    if unknown:
        raise UserError(
            f"{unknown[0]}: no argument of evaluate; it takes DIR, --sae_id, --tokens, --trust_remote_code and, of "
            "several ranks, --topology.lm.tp, --topology.lm.dp, --topology.lm.parallel"
        )
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise UserError(f"--tokens: {tokens!r} must be a positive integer")


def runs_of(
    folders: Sequence[Path], options: Mapping[str, Any], trust_remote_code: bool
) -> dict[str, tuple[RunConfig, dict[Path, tuple[str, str]]]]:
    """The runs that SAEs are from: config, and the places of the run's SAEs by folder. They share model and text."""
    runs: dict[str, tuple[RunConfig, dict[Path, tuple[str, str]]]] = {}
    for folder in folders:
        tree = run_config(folder)
        text = json.dumps(tree, sort_keys=True)
        if text not in runs:
            tree["topology"] = {"lm": {}}
            for name, value in options.items():
                set_dotted(tree, name, value)
            try:
                config = from_dict(tree)
            except UserError as error:
                where = "" if str(error).startswith("topology") else f"{folder / 'runner_cfg.json'}: "
                raise UserError(f"{where}{error}") from None
            if config.model.trust_remote_code and not trust_remote_code:
                # A release may be anybody's: what its config says is no consent.
                raise UserError(
                    f"--trust_remote_code: the release asks to run code that comes with the model {config.model.name}; "
                    "pass this flag if you trust it"
                )
            runs[text] = config, {}
        runs[text][1][folder] = place_of(folder)
    return runs


def open_evaluator(
    config: RunConfig, places: Iterable[tuple[str, str]], tokens: int, session: Session | None
) -> Evaluator:
    """The model and text of a run, on the ranks of ``session``. UserError where they do not suit its topology."""
    set_tf32(config.train.allow_tf32)
    hookpoints = list(dict.fromkeys(name for place in places for name in place))
    lm = config.topology.lm
    if lm.shares_ranks:
        raise UserError("topology.lm: ranks of evaluate run the model alone; give --topology.lm.tp or leave it out")
    rank, world_size, local_rank = topology.world_from_environment()
    world_size = 1 if session is None else world_size
    if lm.dp not in (1, world_size // lm.tp) or world_size % lm.tp:
        raise UserError(
            f"topology.lm: tp {lm.tp} times dp {lm.dp} are {lm.tp * lm.dp} ranks, but {world_size} were started; start "
            f"evaluate with accelerate launch --num_processes {lm.tp * lm.dp}, or leave topology.lm.dp out"
        )
    if session is None:
        return Evaluator(config, hookpoints, tokens, topology.pick_devices(config.topology, 0, 0, sae_ranks=0))
    devices = agree(lambda: topology.pick_devices(config.topology, rank, local_rank, sae_ranks=0))
    ranks = agree(lambda: topology.build_lm(rank, world_size, lm.tp, devices, session.backend))
    session.pulse.introduce(f"LM rank of replica {ranks.replica}, tp {rank % lm.tp}")
    return Evaluator(config, hookpoints, tokens, devices, ranks)


def evaluate_all(
    evaluator: Evaluator, root: Path, places: Mapping[Path, tuple[str, str]]
) -> tuple[dict[str, Figures], list[str]]:
    """Evaluates one SAE after the other and writes their figures: these by SAE, and what went wrong with the others."""
    results: dict[str, Figures] = {}
    problems: list[str] = []
    is_main = evaluator.ranks is None or evaluator.ranks.rank == 0
    bar = progress_bar(len(places) * len(evaluator.own), "evaluating", "batch", unit_scale=False) if is_main else None
    for folder, place in places.items():
        name = folder.relative_to(root).as_posix()
        try:
            sae = evaluator.agreed(partial(SAE.load_from_disk, folder, evaluator.device))
            figures = evaluator.evaluate(sae, *place, done=bar.update if bar else lambda: None)
        except NonFiniteError:
            problems.append(f"{name}: some activations are NaN or infinite, so there are no figures")
            continue
        except UserError as error:
            problems.append(f"{name}: {error}")
            continue
        results[name] = figures
        if is_main:
            write_figures(folder, figures)
    if bar is not None:
        bar.close()
    return results, problems


def evaluate_joint(evaluator: Evaluator, root: Path, places: Mapping[Path, tuple[str, str]]) -> Figures | None:
    """What the model loses with all SAEs of a release in place at once, which is written; None where it cannot be."""
    load = {place: partial(SAE.load_from_disk, folder, evaluator.device) for folder, place in places.items()}
    if len(load) < len(places) or root in places:
        return None
    figures = evaluator.evaluate_together(load)
    if figures is not None and (evaluator.ranks is None or evaluator.ranks.rank == 0):
        write_figures(root, figures)
    return figures


def write_figures(folder: Path, figures: Figures) -> None:
    """Writes ``eval.json``. UserError where it cannot be written."""
    try:
        (folder / EVAL).write_text(json.dumps(figures, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{folder / EVAL} cannot be written: {error.strerror}") from error


def main(
    release: Any = None,
    *extra: Any,
    sae_id: str | None = None,
    tokens: Any = 65536,
    trust_remote_code: bool = False,
    **options: Any,
) -> None:
    """[accelerate launch ...] -m scale_sae.evaluate DIR [--sae_id ID] [--tokens N] [--topology.lm.tp=N]

    Evaluates the SAEs of a release on text that was held out of their training.

    Args:
        release: the folder that scale_sae.consolidate wrote.
        sae_id: one SAE's folder in it; all of them if not given.
        tokens: held-out tokens to evaluate on, at most.
        trust_remote_code: run code that comes with the model, if the release asks for it.
        options: topology.lm.tp, topology.lm.parallel and others: how the ranks run the language model.
    """
    if options.keys() & {"help", "h"}:  # Fire hands them over, as it does every flag that is not declared
        print(inspect.getdoc(main))
        return
    arguments = partial(run, release, extra, sae_id, tokens, options, trust_remote_code)
    if topology.world_from_environment()[1] == 1:
        try:
            arguments()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        return
    code = run_command(lambda session: arguments(session))
    sys.stdout.flush()
    sys.stderr.flush()
    # At once: after a fault, other ranks' connections hang on this process, and its own threads wait for them.
    os._exit(code)


if __name__ == "__main__":
    fire.Fire(main)
