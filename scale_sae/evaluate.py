"""Evaluates a release on held-out text: ``[accelerate launch …] -m scale_sae.evaluate DIR [--sae_id …] [--tokens N]``.

For each SAE: how well it reconstructs, how sparse it is, and what the language model loses when the reconstruction
takes the place of the activations. Writes ``eval.json`` beside the weights (SAELens's names) and prints a table; then
``DIR/eval.json``, what the model loses with all of them in place at once, where no two of them are at one place.

Of several ranks each ``topology.lm.tp`` share a copy of the model, and the copies share the text. The figures are those
of one process.
"""

import gc
import inspect
import json
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
from scale_sae.card import EVAL, FIGURES, json_object
from scale_sae.collectives import NonFiniteError, Ranks
from scale_sae.config import RunConfig, from_saved
from scale_sae.config_parsing import set_dotted
from scale_sae.errors import UserError, nearest
from scale_sae.export import RUNNER_CFG
from scale_sae.held_out import Batch, HeldOutModel, Losses, Substitute, WithoutSAE, batches, instead
from scale_sae.hook_names import names_of
from scale_sae.progress import progress_bar
from scale_sae.reconstruction import Figures, Reconstruction, reconstructed
from scale_sae.saes.inference import CFG_FILE, SAE, read_cfg
from scale_sae.session import Session, agree, end_process, run_command
from scale_sae.topology import LMRanks
from scale_sae.train import open_model, set_tf32

# SAEs of as many bytes stay in memory while several are in place at once; the others are read for each batch.
SAE_BYTES = 2**32
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
        self.without_sae = WithoutSAE(self.data)

    @property
    def is_main(self) -> bool:
        return self.ranks is None or self.ranks.rank == 0

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for its copy of the model."""
        return self.ranks is None or self.ranks.leads

    def evaluate(self, sae: SAE, hookpoint: str, target: str, done: Callable[[], object] = lambda: None) -> Figures:
        """All figures of one SAE, on all ranks; those of principal components on the main one.

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
            if not clean.reaches(hookpoint, before=target):
                raise UserError(
                    f"reads {hookpoint}, which a forward reaches after {target}, where its output would go; it cannot "
                    "be evaluated"
                )
            x = clean.rows[hookpoint]
            y_hat = reconstruction.add(x, x if hookpoint == target else clean.rows[target], counts=self.leads)
            done()
            if clean.logits is None:
                return None
            self.without_sae.find(self.model, number, clean.logits, (target,))
            return self.model.losses(batch, clean.logits, {target: instead(y_hat)})

        lost = self._of_all(losses)
        if self.ranks is not None:
            everyone = Ranks(self.ranks.rank, dist.get_world_size(), self.ranks.control)
            reconstruction.sums.over(everyone, torch.device("cpu"))
        if not reconstruction.sums.rows:
            places = " or ".join(dict.fromkeys((hookpoint, target)))
            raise UserError(f"all activations at {places} are NaN or infinite; try model.dtype: float32")
        return reconstruction.sums.figures(pca=self.is_main) | self.without_sae.figures((target,), lost)

    def evaluate_together(
        self, load: Mapping[tuple[str, str], Callable[[], SAE]], done: Callable[[], object] = lambda: None
    ) -> Figures | None:
        """What the model loses with several SAEs in place at once, on all ranks; None where that cannot be.

        Args:
            load: (hookpoint, target) → what gives the SAE there. It is called once, or in every forward where the SAEs
                before have `SAE_BYTES` already: one of them then need be in memory.
            done: called after each batch.

        Raises:
            NonFiniteError: an SAE gave NaN or infinite values.
        """
        targets = tuple(target for _, target in load)
        if len(set(targets)) < len(targets) or not self.model.predicts:
            return None
        hookpoints = list(dict.fromkeys(name for place in load for name in place))
        first = Batch(self.data[0].tokens[:1], self.data[0].keep[:1])
        clean = self.model.clean(first, hookpoints)
        if not all(clean.reaches(source, before=target) for source, target in load):
            return None
        sae_at = keeping(load)

        def losses(number: int, batch: Batch) -> Losses:
            logits = self.model.clean(batch, []).logits
            assert logits is not None
            self.without_sae.find(self.model, number, logits, targets)
            seen: dict[str, Tensor] = {}

            def change(source: str, target: str, y: Tensor) -> Tensor:
                return reconstructed(sae_at((source, target)), y if source == target else seen[source], y)

            changes: dict[str, Substitute] = {place[1]: partial(change, *place) for place in load}
            lost = self.model.losses(batch, logits, changes, seen.__setitem__, [s for s, t in load if s != t])
            done()
            return lost

        return self.without_sae.figures(targets, self._of_all(losses))

    def _of_all(self, losses: Callable[[int, Batch], Losses | None]) -> dict[int, Losses]:
        """``losses`` of every batch, by its number, each found by one copy of the model. What one raises, all raise."""
        problem: NonFiniteError | UserError | None = None
        found = {}
        try:
            with torch.no_grad():
                found = {number: losses(number, batch) for number, batch in self.own.items()}
        except (NonFiniteError, UserError) as error:
            problem = error.with_traceback(None)
        parts = [(problem, found, self.without_sae.losses)]
        if self.ranks is not None:
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, parts[0], group=self.ranks.control)
            parts = gathered
        for failed, _, without_sae in parts:
            if failed is not None:
                raise failed
            self.without_sae.losses |= without_sae
        return {number: lost for _, part, _ in parts for number, lost in part.items() if lost is not None}

    def agreed(self, attempt: Callable[[], T]) -> T:
        """What ``attempt`` gives; a UserError of one rank is one of all."""
        return attempt() if self.ranks is None else agree(attempt)


def keeping(load: Mapping[tuple[str, str], Callable[[], SAE]]) -> Callable[[tuple[str, str]], SAE]:
    """What gives the SAE at a place, which it loads but for those that it holds: the first ones, of `SAE_BYTES`."""
    kept: dict[tuple[str, str], SAE] = {}
    free = SAE_BYTES

    def sae_at(place: tuple[str, str]) -> SAE:
        nonlocal free
        if place in kept:
            return kept[place]
        sae = load[place]()
        size = sum(tensor.nbytes for tensor in (*sae.parameters(), *sae.buffers()))
        if size <= free:
            kept[place] = sae
            free -= size
        return sae

    return sae_at


def release_folders(root: Path, sae_id: str | None) -> list[Path]:
    """The folders of the release's SAEs, or of the one asked for."""
    folders = sorted(path.parent for path in root.rglob(CFG_FILE))
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
    sources, targets = names_of(metadata)
    if not sources:
        name = metadata.get("hook_name")
        raise UserError(f"{folder / CFG_FILE}: metadata.hook_name: {name!r} names no place in the model")
    return sources[0], (targets or sources)[0]


def run_config(folder: Path) -> dict[str, Any]:
    """The config of the run that a released SAE is from, without its topology."""
    path = folder / RUNNER_CFG
    if not path.is_file():
        raise UserError(
            f"{folder}: has no {path.name}; evaluate needs the config of the SAE's run, for its model and its held-out "
            "text, which releases of scale_sae have"
        )
    config = json_object(path)
    return {name: value for name, value in config.items() if name != "topology"}


def table(results: Mapping[str, Figures]) -> str:
    """The results as text columns; FVU stands beside that of PCA with k components, which a good SAE halves."""
    rows = [["SAE", "FVU", *FIGURES]]
    for sae_id, figures in results.items():
        row = [sae_id, f"{1 - figures['reconstruction_quality']['explained_variance']:.4f}"]
        for section, name, form in FIGURES.values():
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
    if session is not None:
        session.stop.release()  # there is nothing to save before it ends
    is_main = session is None or session.is_main
    root = Path(str(release))

    def read() -> dict[str, tuple[RunConfig, dict[Path, tuple[str, str]]]]:
        check_arguments(extra, tokens, options)
        return runs_of(release_folders(root, sae_id), options, trust_remote_code)

    runs = together(read)
    results: dict[str, Figures] = {}
    problems: list[str] = []
    for number, (config, places) in enumerate(runs.values(), 1):
        evaluator = open_evaluator(config, places.values(), int(str(tokens)), session)
        found, failed = evaluate_all(evaluator, root, places)
        results |= found
        problems += failed
        if number < len(runs):
            del evaluator
            gc.collect()  # before the next model is there; hooks of accelerate make a model refer to itself
    if results and is_main:
        print(table(results), flush=True)
    if sae_id is None and not any(root in places for _, places in runs.values()):
        joint, failed = None, []
        if len(runs) == 1 and not problems and len(places) > 1:
            joint, failed = evaluate_joint(evaluator, root, places)
        problems += failed
        if is_main:
            write_figures(root, joint)
        if is_main and joint is not None:
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
    """Configs, and for each the places, by folder, of the SAEs that share its model and text, of one run or several."""
    runs: dict[str, tuple[RunConfig, dict[Path, tuple[str, str]]]] = {}
    for folder in folders:
        tree = run_config(folder)
        train = tree.get("train")
        tf32 = train.get("allow_tf32") if isinstance(train, dict) else None
        text = json.dumps([tree.get("model"), tree.get("data"), tf32], sort_keys=True)
        if text not in runs:
            tree["topology"] = {"lm": {}}
            for name, value in options.items():
                set_dotted(tree, name, value)
            try:
                config = from_saved(tree)
            except UserError as error:
                where = "" if str(error).startswith("topology") else f"{folder / RUNNER_CFG}: "
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
    done, close = progress(evaluator, len(places), "evaluating")
    for folder, place in places.items():
        name = folder.relative_to(root).as_posix()
        figures = None
        try:
            sae = evaluator.agreed(partial(SAE.load_from_disk, folder, evaluator.device))
            figures = results[name] = evaluator.evaluate(sae, *place, done=done)
        except NonFiniteError:
            problems.append(f"{name}: some activations are NaN or infinite, so there are no figures")
        except UserError as error:
            problems.append(f"{name}: {error}")
        if evaluator.is_main:
            write_figures(folder, figures)
    close()
    return results, problems


def evaluate_joint(
    evaluator: Evaluator, root: Path, places: Mapping[Path, tuple[str, str]]
) -> tuple[Figures | None, list[str]]:
    """What the model loses with all SAEs of a release in place at once, or None; and what went wrong."""
    load = {place: partial(SAE.load_from_disk, folder, evaluator.device) for folder, place in places.items()}
    if len(load) < len(places):
        return None, []
    done, close = progress(evaluator, 1, "all at once")
    try:
        return evaluator.evaluate_together(load, done), []
    except NonFiniteError:
        return None, ["all SAEs at once: some activations are NaN or infinite, so there are no figures"]
    except UserError as error:
        return None, [f"all SAEs at once: {error}"]
    finally:
        close()


def progress(evaluator: Evaluator, times: int, what: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """What the main process calls after each batch, all of which it forwards several ``times``; and at the end."""
    if not evaluator.is_main:
        return lambda: None, lambda: None
    bar = progress_bar(times * len(evaluator.own), what, "batch", unit_scale=False)
    return bar.update, bar.close


def write_figures(folder: Path, figures: Figures | None) -> None:
    """Writes ``eval.json``, or removes that of before. UserError where it cannot be written."""
    try:
        if figures is None:
            (folder / EVAL).unlink(missing_ok=True)
        else:
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
    end_process(run_command(lambda session: arguments(session)))


if __name__ == "__main__":
    fire.Fire(main)
