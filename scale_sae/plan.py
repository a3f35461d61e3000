"""What a run takes, before it starts: ``python -m scale_sae.plan --config C.yaml [--gpus N] [--device h100] …``.

One process, no GPU, no weights: memory of every kind of rank, time and traffic of a step, hours and dollars of the run.
``--search`` tries the topologies of the GPUs that there are, ``--dry_run`` runs a step of every kind of rank of the
whole world on tensors without values, ``--calibrate`` measures the machine that it runs on.
"""

import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fire
import torch

from scale_sae.config import RunConfig, TopologyConfig
from scale_sae.errors import UserError
from scale_sae.planning import calibrate as calibration
from scale_sae.planning.dry_run import dry_run as run_dry
from scale_sae.planning.estimate import DEAD_SHARE, USABLE, Estimate, gigabytes
from scale_sae.planning.hardware import DEVICES, Hardware, changed, find, this_gpu, to_json
from scale_sae.planning.language_model import bytes_while_loading, profile
from scale_sae.planning.search import search as find_topologies
from scale_sae.planning.storage import checkpoint_bytes, copies_on_a_node, release_bytes
from scale_sae.planning.traffic import flows
from scale_sae.planning.workload import Workload
from scale_sae.session import Session, agree, end_process, run_command
from scale_sae.train import read_config

if TYPE_CHECKING:
    from scale_sae.planning.language_model import LMProfile

BEST = 5  # topologies that a search shows
HARDWARE = "hardware."  # begins the options that are of the machine, not of the run


def profile_of(w: Workload, config: RunConfig, hardware: Hardware) -> "LMProfile | None":
    """The language model's part on the topology of ``config``; None where activations come from a cache."""
    return None if config.topology.lm.cache is not None else profile(config, w.widths, hardware.kind)


# ---- what it prints --------------------------------------------------------------------------------------------------


def table(heads: list[str], rows: list[list[str]], numbers: set[int]) -> Iterator[str]:
    """A Markdown table, its columns as wide as they need to be but for the last; ``numbers`` are those to the right."""
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads) - 1)]

    def line(row: list[str]) -> str:
        cells = [
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        return f"| {' | '.join([*cells, row[-1]])} |"

    yield line(heads)
    rules = ["-" * (width + 1) + (":" if i in numbers else "-") for i, width in enumerate(widths)]
    yield f"|{'|'.join(rules)}|---|"
    yield from map(line, rows)


def duration(seconds: float) -> str:
    """Seconds for people."""
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s"


def described(laid_out: TopologyConfig) -> str:
    """A topology in a few words."""
    lm, sae = laid_out.lm, laid_out.sae
    if lm.cache is not None:
        model = "activations from a cache"
    elif lm.colocated:
        model = "language model on the SAE ranks"
    else:
        how = "device_map" if lm.parallel == "device_map" else f"tp {lm.tp}"
        model = f"LM {how} x dp {lm.dp}"
    return f"{model}; SAE groups {sae.groups} x dp {sae.dp} x tp {sae.tp}, engine {laid_out.engine}"


def as_options(laid_out: TopologyConfig) -> str:
    """A topology as overrides on a command line."""
    sae = laid_out.sae
    lm = "colocated" if laid_out.lm.colocated else f"'{{tp: {laid_out.lm.tp}, dp: {laid_out.lm.dp}}}'"
    if laid_out.lm.parallel == "device_map":
        keys = ("parallel", "dp", "devices_per_rank", "max_memory_gib")
        given = {key: value for key in keys if (value := getattr(laid_out.lm, key)) is not None}
        lm = "'{" + ", ".join(f"{key}: {value}" for key, value in given.items()) + "}'"
    lm_option = "" if laid_out.lm.cache is not None else f"--topology.lm={lm} "
    return (
        f"{lm_option}--topology.sae='{{groups: {sae.groups}, dp: {sae.dp}, tp: {sae.tp}}}' "
        f"--topology.engine={laid_out.engine}"
    )


def memory_lines(found: Estimate) -> Iterator[str]:
    """What each kind of rank holds."""
    for role, held in found.memory.items():
        total = found.held(role)
        own = found.of_process(role)
        rows = [["the process itself", gigabytes(own), "without a tensor"]] if own else []
        rows += [[item.what, gigabytes(item.bytes), item.formula] for item in held]
        yield f"\n{role}: {gigabytes(total)} each"
        yield from table(["memory", "", "formula"], rows, {1})


def time_lines(found: Estimate) -> Iterator[str]:
    """What a step is made of, and which side waits."""
    for name, parts in found.prediction.parts.items():
        rows = [
            [
                part.what,
                f"{part.seconds * 1e3:.2f}",
                f"{part.flops / 1e12:.3f}" if part.flops else "",
                gigabytes(part.memory_bytes) if part.memory_bytes else "",
                gigabytes(part.link_bytes) if part.link_bytes else "",
                part.formula,
            ]
            for part in parts
        ]
        yield f"\n{name}: time of a step of {found.workload.batch} rows"
        yield from table(["", "ms", "TFLOP", "memory traffic", "link", "formula"], rows, {1, 2, 3, 4})


def link_lines(found: Estimate, lm: "LMProfile | None") -> Iterator[str]:
    """What each kind of rank moves per step."""
    for role in found.memory:
        moved = flows(found.workload, role, lm if role.runs_lm else None)
        rows = [
            [
                flow.link,
                flow.what,
                flow.op,
                gigabytes(flow.bytes),
                f"{float(flow.count):.4g}",
                str(flow.ranks),
                flow.formula,
            ]
            for flow in moved
        ]
        if rows:
            yield f"\n{role}: calls per step"
            yield from table(["link", "what", "call", "bytes", "calls", "ranks", "formula"], rows, {3, 4, 5})


def summary(found: Estimate, gpus: int, price: float | None) -> Iterator[str]:
    """Whether it fits, how fast it is, what the whole run costs."""
    p, w, hardware = found.prediction, found.workload, found.hardware
    role, fullest = found.fullest
    whose, what = ("a GPU", "GPU") if hardware.kind == "cuda" else ("a node", "process")
    verdict = "It fits" if found.fits else f"DOES NOT FIT: {found.remedy}"
    dead, share = found.dead(DEAD_SHARE), f"{DEAD_SHARE:.0%} of the latents are dead"
    more = sum(item.bytes for item in found.memory_with(found.dead(1.0))[role]) - sum(
        i.bytes for i in found.memory[role]
    )
    yield (
        f"memory: {gigabytes(fullest)} of {whose}'s {gigabytes(hardware.memory)}, of which a plan may fill "
        f"{USABLE:.0%}; the fullest are {role}. {verdict}"
        + (f" (while {share}" + (f"; {gigabytes(more)} more if all were)" if more > 0 else ")") if dead else "")
    )
    sides = ", ".join(f"{side} side {seconds * 1e3:.1f} ms" for side, seconds in p.sides.items())
    yield f"step: {p.step_seconds * 1e3:.1f} ms ({sides}). {p.waits[:1].upper()}{p.waits[1:]}"
    if dead and (slower := found.prediction_with(dead).step_seconds) > p.step_seconds:
        yield f"AuxK: {slower * 1e3:.1f} ms a step while {share}"
    hours = gpus * p.total_seconds / 3600
    line = (
        f"run: {p.tokens_per_second:,.0f} tokens/s; {w.schedule.steps:,} steps of {w.batch:,} tokens in "
        f"{duration(p.total_seconds)} ({duration(p.startup_seconds)} to fill the buffer), {hours:,.1f} {what}-hours"
    )
    yield line if price is None else f"{line}, {hours * price:,.0f} dollars at {price:g} for each"
    saved = w.config.checkpoint
    kept = saved.keep + 1 + (w.schedule.steps // saved.keep_every if saved.keep_every else 0)
    size, release = gigabytes(checkpoint_bytes(w)), gigabytes(release_bytes(w))
    yield f"disk: {size} for each of {kept} checkpoints, {release} for the release"
    if hardware.kind == "cuda":
        yield f"RAM of a node: {gigabytes(copies_on_a_node(w, found.per_node))} to write a checkpoint"
    if found.profile is not None:
        loading = bytes_while_loading(w.config, found.profile)
        yield f"loading the model takes {gigabytes(loading)} of RAM for each rank that runs it, beside its files"
    if w.config.evaluation.every_steps is not None:
        yield "not in the memory: evaluations, in which ranks that run the model hold the logits of some contexts twice"
    yield "not in the time: loading the model, tokenising, checkpoints, evaluations, AuxK while latents are dead"


def search_lines(found: list[Estimate], ranks: int) -> Iterator[str]:
    """The best topologies and why each is where it is."""
    yield f"\nthe best of {len(found)} topologies of up to {ranks} ranks that fit"
    rows = []
    for one in found[:BEST]:
        p = one.prediction
        rows.append(
            [
                described(one.workload.config.topology),
                str(one.workload.plan.world_size),
                f"{p.step_seconds * 1e3:.1f}",
                f"{p.tokens_per_second:,.0f}",
                duration(p.total_seconds),
                gigabytes(one.fullest[1]),
                p.waits,
            ]
        )
    yield from table(["topology", "ranks", "ms/step", "tokens/s", "run", "memory", "why"], rows, {1, 2, 3, 4, 5})
    yield f"\nthe first: {as_options(found[0].workload.config.topology)}"


# ---- the command -----------------------------------------------------------------------------------------------------


def _hardware(device: object, overrides: Mapping[str, object]) -> Hardware:
    """The machine that is meant: named, or this one's GPU."""
    if device is None and torch.cuda.is_available():
        here = this_gpu(torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory)
        return changed(here, overrides)
    if not isinstance(device, str):
        names = ", ".join(DEVICES)
        raise UserError(f"--device: name what the ranks run on, of {names}, or the file that --calibrate has written")
    return find(device, overrides)


def _gpus(w: Workload, per_node: int) -> int:
    """The GPUs that the ranks of ``w`` use, all nodes together."""
    lm, sae_ranks, copies = w.config.topology.lm, len(w.plan.sae_ranks), len(w.plan.lm)
    if lm.parallel != "device_map":
        return w.plan.world_size
    return sae_ranks + copies * (lm.devices_per_rank or max(1, (per_node - sae_ranks) // copies))


def _check_options(options: Mapping[str, Any]) -> None:
    for name in ("gpus", "gpus_per_node"):
        value = options[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"--{name}: {value!r} is no whole number from 1")
    price = options["price"]
    if price is not None and (not isinstance(price, int | float) or isinstance(price, bool) or price < 0):
        raise UserError(f"--price: {price!r} is no number of dollars per GPU and hour")


def _show_figures(w: Workload, options: Mapping[str, Any], hardware_options: Mapping[str, object]) -> bool:
    """Prints memory, time, links and cost, and what a search finds; returns whether there is a topology that fits."""
    hardware = _hardware(options["device"], hardware_options)
    per_node, world = options["gpus_per_node"], w.plan.world_size
    lm = profile_of(w, w.config, hardware)
    found = Estimate(w, hardware, per_node, lm)
    print(f"on {hardware.name}, {per_node} ranks per node")
    for lines in (memory_lines(found), time_lines(found), link_lines(found, lm)):
        print("\n".join(lines))
    print("\n".join(["", *summary(found, _gpus(w, per_node), options["price"])]))
    if not options["search"]:
        if options["gpus"] != world:
            print(f"\nnote: the topology has {world} ranks, --gpus says {options['gpus']}; --search finds one for them")
        return found.fits
    best = find_topologies(w, hardware, options["gpus"], per_node, lambda one: profile_of(w, one, hardware))
    if not best:
        raise UserError(
            f"--gpus: {options['gpus']}, but no topology of so many ranks fits; give more, or lower "
            "train.train_batch_size_tokens, saes.0.d_sae or data.chunk_contexts"
        )
    print("\n".join(search_lines(best, options["gpus"])))
    return True


def _show_dry_run(w: Workload, per_node: int) -> bool:
    """Prints a dry run; returns whether all went well."""
    print(f"\ndry run: one step of every kind of rank among {w.plan.world_size}")
    found = run_dry(w, lambda line: print(line, flush=True), per_node)
    for problem in found.problems:
        print(f"problem: {problem}")
    print(
        "dry run: every rank got through its step" if not found.problems else f"dry run: {len(found.problems)} problems"
    )
    return not found.problems


def plan(config: RunConfig, options: Mapping[str, Any], hardware_options: Mapping[str, object]) -> int:
    """Prints the plan; returns the exit code: 0 if it fits and every rank of a dry run got through its step."""
    w = Workload.of(config)
    options = {**options, "gpus": w.plan.world_size if options["gpus"] is None else options["gpus"]}
    _check_options(options)
    hookpoints = len({spec.hookpoint for spec in w.specs})
    print(
        f"{len(w.specs)} SAEs at {hookpoints} hookpoints of {config.model.name}; {described(config.topology)}: "
        f"{w.plan.world_size} ranks"
    )
    good = True
    if options["device"] is not None or options["search"] or not options["dry_run"]:
        good = _show_figures(w, options, hardware_options)
    if options["dry_run"]:
        good = _show_dry_run(w, options["gpus_per_node"]) and good
    return int(not good)


def measure(path: object) -> int:
    """Measures the machine on every rank, and writes what it found to the file ``path``; returns the exit code."""

    def work(session: Session) -> None:
        agree(lambda: _check_file(path))
        found = calibration.measure(session)
        if session.is_main:
            assert found is not None
            Path(str(path)).write_text(json.dumps(to_json(found), indent=1) + "\n")
            print(f"written to {path}: --device={path} plans for this machine")

    return run_command(work)


def _check_file(path: object) -> None:
    if not isinstance(path, str) or not Path(path).absolute().parent.is_dir():
        raise UserError(f"--calibrate: {path!r} is no file in a folder that exists; name the file to write")


def main(
    config: str | None = None,
    *extra: object,
    gpus: Any = None,
    gpus_per_node: Any = 8,
    device: Any = None,
    price: Any = None,
    search: bool = False,
    dry_run: bool = False,
    calibrate: Any = None,
    **overrides: Any,
) -> None:
    """python -m scale_sae.plan --config C.yaml [--device h100] [--gpus N] [--search] [--dry_run] [--dotted.key=value]

    Says before a run starts whether it fits, how long it takes, and how to split it. Loads no weights, needs no GPU.
    Exits with 1 if it does not fit; with --search, if nothing does.

    Args:
        config: the YAML file of the run.
        gpus: how many there are; by default as many as the config's topology needs.
        gpus_per_node: of them, those of one machine.
        device: what they are (h100, a100, ...), or the file that --calibrate has written; by default this machine's.
        price: dollars for a GPU and an hour.
        search: try the topologies of up to so many GPUs, and print the best five.
        dry_run: run one step of every kind of rank of the whole world, in this process, on tensors without values.
        calibrate: a file. Measures this machine, on the ranks that accelerate launch started, and writes it there:
            accelerate launch --multi_gpu --num_processes 8 -m scale_sae.plan --calibrate=machine.json
        overrides: any key of the config, dotted: --topology.sae.tp=4; or of the machine: --hardware.memory_gib=96
    """
    if overrides.keys() & {"help", "h"}:  # Fire hands them over, as it does every flag that is not declared
        print(inspect.getdoc(main))
        return
    if calibrate is not None:
        end_process(measure(calibrate))
    machine = {name.removeprefix(HARDWARE): value for name, value in overrides.items() if name.startswith(HARDWARE)}
    of_run = {name: value for name, value in overrides.items() if not name.startswith(HARDWARE)}
    options = {
        "gpus": gpus,
        "gpus_per_node": gpus_per_node,
        "device": device,
        "price": price,
        "search": search,
        "dry_run": dry_run,
    }
    try:
        code = plan(read_config(config, extra, of_run), options, machine)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    fire.Fire(main)
